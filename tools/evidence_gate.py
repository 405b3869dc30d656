"""The gate on a good checkpoint and on spoiled copies of it: a table of exit codes and breaches.

    python tools/evidence_gate.py --model OUT --baseline MODEL --out TABLE.md [--gate FILE]

OUT is a converted folder, MODEL what it was made from. Without --gate the limits are LIMITS and a
band around what OUT's configuration keeps. Every copy passes its checksums, so that figures alone
tell. Exits 1 unless the good one passes and every spoiled one ends with code 3.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from sabotage import SABOTAGES, spoiled

from hireconvert.figures import figure
from hireconvert.inspection import check_checksums, inspect_checkpoint
from hireconvert.loading import REPORT, read_config

BREACHED = 3
BAND = 0.01  # around the share that is kept
# Wide enough for the shipped recipes at keep 0.5 and above, whatever the text.
LIMITS: dict[str, Any] = {
    "perplexity_increase": {"max": 0.05, "high": 0.08},
    "kl_mean": {"max": 0.06},
    "top1_agreement": {"min": 0.85},
    "recall_mean": {"min": 0.9},
}


@dataclass(frozen=True)
class Outcome:
    """One folder under the gate."""

    name: str
    code: int
    seconds: float
    checks: list[dict[str, Any]]


def gate_for(folder: Path) -> dict[str, Any]:
    """LIMITS and a band around the share of neurons that the folder kept when it was made."""
    rows = inspect_checkpoint(folder)["layers"]
    shares = [row["kept"] / row["neurons"] if row["neurons"] else 1.0 for row in rows]
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    measured = figure(report, "evaluation", "selection", "kept_overall")
    mean = sum(shares) / len(shares) if measured is None else measured
    return {**LIMITS, "kept": {"min": round(mean - BAND, 4), "max": round(mean + BAND, 4)}}


def judged(name: str, folder: Path, gate: Path, arguments: argparse.Namespace) -> Outcome:
    """What `hireconvert eval --gate` does with a folder whose checksums hold."""
    check_checksums(folder)
    command = [sys.executable, "-m", "hireconvert", "eval", str(folder), "--json"]
    command += ["--baseline", arguments.baseline, "--gate", str(gate)]
    command += ["--tokens", str(arguments.tokens)]
    for text in arguments.text or []:
        command += ["--text", str(text)]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    checks = json.loads(done.stdout)["gate"]["checks"] if done.stdout else []
    return Outcome(name, done.returncode, seconds, checks)


def figures(checks: list[dict[str, Any]], *, passed: bool) -> str:
    """Limits that passed or were breached, with what was measured."""
    shown = []
    for check in checks:
        if check["passed"] == passed:
            found = "not measured" if check["found"] is None else f"{check['found']:.4g}"
            shown.append(f"{check['limit']} {found}")
    return "; ".join(shown) or "none"


def table(outcomes: list[Outcome], gate: str, arguments: argparse.Namespace) -> str:
    """The page in Markdown."""
    texts = ", ".join(path.name for path in arguments.text or []) or "pydoc_data.topics"
    total = sum(each.seconds for each in outcomes)
    lines = [
        f"Gate on {arguments.tokens} tokens of {texts}; {total:.0f} seconds in all.",
        "",
        *(f"    {line}" for line in gate.strip().splitlines()),
        "",
        "| checkpoint | exit | seconds | breached | kept |",
        "|---|--:|--:|---|---|",
    ]
    for each in outcomes:
        cells = (figures(each.checks, passed=False), figures(each.checks, passed=True))
        lines.append(f"| {each.name} | {each.code} | {each.seconds:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Judge the good folder and each spoiled copy, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="converted folder")
    parser.add_argument("--baseline", required=True, help="the model it was converted from")
    parser.add_argument("--out", type=Path, required=True, help="the table, in Markdown")
    parser.add_argument("--gate", type=Path, help="limits; LIMITS of this file without")
    parser.add_argument("--text", type=Path, action="append", help="may be repeated")
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    if read_config(arguments.model)["hire"]["ffn"] is None:
        parser.error(f"{arguments.model} has a dense FFN: there is nothing to spoil")
    with tempfile.TemporaryDirectory() as work:
        gate = arguments.gate or Path(work) / "gate.yaml"
        if arguments.gate is None:
            gate.write_text(yaml.safe_dump(gate_for(arguments.model), sort_keys=False))
        outcomes = [judged("as converted", arguments.model, gate, arguments)]
        for number, name in enumerate(SABOTAGES):
            folder = spoiled(arguments.model, Path(work) / str(number), name)
            outcomes.append(judged(name, folder, gate, arguments))
            shutil.rmtree(folder)
            print(f"{name}: exit {outcomes[-1].code}", file=sys.stderr, flush=True)
        arguments.out.write_text(table(outcomes, gate.read_text(), arguments))
    print(arguments.out.read_text(), end="")
    wanted = [0] + [BREACHED] * len(SABOTAGES)
    sys.exit(0 if [each.code for each in outcomes] == wanted else 1)


if __name__ == "__main__":
    main()
