"""Regenerate the tables between marks in docs/log.md; finished steps are kept: it can be stopped.

python tools/evidence.py --data DIR --out evidence [--only STEP] [--list]

DIR holds calib.txt, heldout_wiki.txt, heldout_c4.txt and finetune/{code,technical}.jsonl.gz;
models/ holds the three GGUF files (`make evidence` fetches them). A step's table replaces what
stands between `<!-- begin NAME -->` and `<!-- end NAME -->` in docs/log.md. Hours on two cores.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MODELS = {"smollm2": "smollm2", "gemma3": "gemma3-270m", "qwen25": "qwen2.5-coder-0.5b"}
RESEARCH = Path("tools/research")
LOG = Path("docs/log.md")


@dataclass(frozen=True)
class Step:
    """Commands to run in order, and the file whose text becomes a table of the log."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    done: Path
    table: tuple[str, ...] | Path


def _python(script: Path | str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, str(script), *map(str, arguments))


def steps(data: Path, out: Path) -> list[Step]:
    """Every step, in an order in which each finds what it needs."""
    found = []
    for name, file in MODELS.items():
        dense, acts, bar = out / name, out / f"{name}.pt", out / f"bar_{name}.jsonl"
        run = ("--model", dense, "--acts", acts, "--data", data)
        convert = (
            *(sys.executable, "-m", "hireconvert", "convert", f"models/{file}.gguf", str(dense)),
            *("--recipe", "lossless", "--overwrite"),
        )
        capture = _python(RESEARCH / "capture.py", *run[:2], *run[4:], "--out", acts)
        found.append(Step(f"inputs-{name}", (convert, capture), acts, ()))
        settings = RESEARCH / "settings_bar.json"
        options = ("--out", bar, "--settings", settings, "--windows", 5, "--keep", 0.5, 0.35)
        measure = _python(RESEARCH / "perplexity.py", *run, *options)
        done = out / f"bar_{name}.done"
        found.append(Step(f"bar-{name}", (measure,), done, _tables(bar)))
    settings, table = out / "settings_smollm2.json", out / "table_smollm2.jsonl"
    write = _python(RESEARCH / "settings_smollm2.py", settings, "essential")
    run = ("--model", out / "smollm2", "--acts", out / "smollm2.pt", "--data", data)
    options = ("--out", table, "--settings", settings, "--windows", 3, "--keep", 0.5)
    options = (*options, "--fit-stride", 3)
    measure = _python(RESEARCH / "perplexity.py", *run, *options)
    done = out / "table_smollm2.done"
    found.append(Step("predictors-smollm2", (write, measure), done, _tables(table)))
    lossless = out / "lossless"
    script = _python("tools/evidence_lossless.py", "--models", "models", "--out", lossless)
    found.append(Step("lossless", (script,), out / "lossless.done", lossless / "lossless.md"))
    parity = out / "parity.md"
    script = _python("tools/evidence_parity.py", "--model", out / "smollm2", "--out", parity)
    found.append(Step("parity", (script,), parity, parity))
    return [*found, *_quality_steps(data, out)]


def _quality_steps(data: Path, out: Path) -> list[Step]:
    """Budgets per layer, and the gate on a converted model and on spoiled copies of it."""
    budget, gate = out / "budget.md", out / "gate.md"
    run = ("--model", out / "smollm2", "--data", data, "--out", budget, "--keep", 0.5, 0.4)
    search = _python("tools/evidence_budget.py", *run)
    source, hire = "models/smollm2.gguf", out / "hire_smollm2"
    convert = (
        *(sys.executable, "-m", "hireconvert", "convert", source, str(hire)),
        *("--recipe", "smollm2-135m", "--overwrite"),
    )
    run = ("--model", hire, "--baseline", source, "--out", gate)
    check = _python("tools/evidence_gate.py", *run)
    return [
        *(_estimated_step(name, data, out) for name in MODELS),
        Step("budget-smollm2", (search,), out / "budget.done", budget),
        Step("gate-smollm2", (convert, check), out / "gate.done", gate),
    ]


def _estimated_step(name: str, data: Path, out: Path) -> Step:
    """What each share of neurons costs when the rest counts by estimate, on the off-grid twin."""
    twin, hire, table = (out / f"{kind}_{name}" for kind in ("twin", "estimated", "quality"))
    table = table.with_suffix(".md")
    make = _python(RESEARCH / "twin.py", out / name, twin)
    convert = (
        *(sys.executable, "-m", "hireconvert", "convert", str(twin), str(hire), "--overwrite"),
        *("--recipe", "balanced", "--set", "head=null", "--set", f"data.source={data}/calib.txt"),
    )
    run = ("--model", twin, "--converted", hire, "--data", data, "--out", table)
    measure = _python("tools/evidence_quality.py", *run)
    return Step(f"quality-{name}", (make, convert, measure), out / f"quality_{name}.done", table)


def _tables(results: Path) -> tuple[str, ...]:
    return _python(RESEARCH / "tables.py", results)


def marks(name: str) -> tuple[str, str]:
    """What stands before and behind a table in the log."""
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def check_marks(steps: list[Step]) -> None:
    """Raise SystemExit, before hours are spent, where the log has no place for a table."""
    page = LOG.read_text(encoding="utf-8")
    for step in steps:
        if step.table and any(page.count(mark) != 1 for mark in marks(step.name)):
            raise SystemExit(f"{LOG} must hold the marks {' and '.join(marks(step.name))} once")


def write_table(name: str, text: str) -> None:
    """Put a table between its marks in the log."""
    page = LOG.read_text(encoding="utf-8")
    begin, end = marks(name)
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    page = pattern.sub(lambda _: f"{begin}\n{text.strip()}\n{end}", page)
    LOG.write_text(page, encoding="utf-8")


def run(step: Step) -> None:
    """Run a step unless its result exists, then write its table."""
    if step.done.exists():
        print(f"{step.name}: kept", file=sys.stderr)
    else:
        for command in step.commands:
            print(f"{step.name}: {' '.join(command[1:])}", file=sys.stderr)
            subprocess.run(command, check=True)
        if step.done.suffix == ".done":
            step.done.touch()
    if isinstance(step.table, Path):
        write_table(step.name, step.table.read_text(encoding="utf-8"))
    elif step.table:
        drawn = subprocess.run(step.table, check=True, capture_output=True, text=True)
        write_table(step.name, drawn.stdout)


def main() -> None:
    """Run the steps asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", help="a step's name; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    args = parser.parse_args()
    wanted = steps(args.data, args.out)
    if args.list:
        print("\n".join(step.name for step in wanted))
        return
    chosen = [step for step in wanted if not args.only or step.name in args.only]
    check_marks(chosen)
    args.out.mkdir(parents=True, exist_ok=True)
    for step in chosen:
        run(step)


if __name__ == "__main__":
    main()
