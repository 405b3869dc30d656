"""Quality against speed and bytes: our settings and llama.cpp's formats of one model, in one run.

    python benchmarks/fetch_llama.py
    python benchmarks/make_rivals.py MODEL --out RIVALS
    python benchmarks/frontier.py NAME --model MODEL --converted OUT [OUT] --rivals RIVALS \\
        --text TEXT --out RESULTS [--doc docs/performance.md]

MODEL is the folder that OUT (one or several) was converted from; every GGUF file of its name in
RIVALS takes part. A converted folder serves many points: shares of neurons and heads are set in
memory, as a predictor depends on neither. KL is measured against MODEL as stored, selection forced
at every position; times come from plain `generate()`, rivals' from around `llama_decode`.
RESULTS/NAME.jsonl keeps every row as it is measured, so that a run that was stopped goes on with
the same command; RESULTS/NAME.md is the table, NAME.svg the plot. With --doc the table takes the
place of what the file holds between the marks of NAME, and the plot lies beside it.
"""

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

import hireconvert
from hireconvert.arms import Arm, Load, Reference, one_round, warm_up
from hireconvert.bench import check_request, machine, prompt_and_windows, read_text, versions
from hireconvert.errors import HireError
from hireconvert.figures import number, size
from hireconvert.inspection import dense_table
from hireconvert.plots import SpeedPoint, quality_against_speed
from hireconvert.render import make_reporter
from hireconvert.roofline import measure_stream, stream_bytes
from hireconvert.runtime.hire_predict import is_copied, num_active, varies
from hireconvert.session import DENSE, Request, Session, load_rivals, open_session, stored_dtype
from hireconvert.subjects import TorchModel, TorchSubject, Way

KEEPS = (1.0, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)
OURS = "ours"
PACKAGE = Path(hireconvert.__file__).parent
_HEAD: dict[str, Any] = {
    "kind": "q",
    "bits": 8,
    "block": 0,
    "rank": None,
    "num_candidates": 64,
    "unselected": "estimate",
    "certified": True,
    "certify_top": 64,
    "on_uncertified": "dense",
}
HEADS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "own": None,  # as converted
    "int8": _HEAD,
    "int8 top 1": {**_HEAD, "certify_top": 1},
    "int4": {**_HEAD, "bits": 4, "block": 32, "certified": False},
}


# --------------------------------------------------------------------------- what takes part


def our_ways(
    keeps: Sequence[float | None], heads: Sequence[str], own_head: bool, own_share: str = "copies"
) -> dict[str, Way]:
    """Every share with every head, by a name that says both; 1 is dense through our kernels.

    None is what the folder has, `own_share`: neurons that all count by their copies, or a number of
    them that varies. The head `own`, as converted, is left out where the folder has none.
    """
    ways = {}
    for head in heads:
        if head == "own" and not own_head:
            continue
        for keep in keeps:
            way = Way(ffn=True, keep=keep, head=head != "dense", head_spec=HEADS[head])
            share = own_share if keep is None else f"keep {keep:g}"
            ways[f"{share}, head {head}"] = way
    return ways


def load_ours(session: Session, stack: ExitStack, folder: Path, options: Any) -> None:
    """The arms of one converted folder, with the bytes that follow from its own settings."""
    alone = replace(session.request, baseline=None)
    other, _ = stack.enter_context(open_session(folder, alone))
    model = TorchModel(folder, session.dtype, session.threads, kind="hire")
    label = f"{OURS} {folder.resolve().name}"
    subject = stack.enter_context(TorchSubject(label, model))
    layers = [layer for layer in (other.hire["ffn"] or {"layers": []})["layers"] if layer]
    keeps, own_share = options.keep, ""
    if layers and all(map(is_copied, layers)):  # shares would read the weights, not the copies
        keeps, own_share = [None], "copies"
    elif any(map(varies, layers)):  # the level that another share takes is not known
        kept = sum(map(num_active, layers)) / sum(layer["num_neurons"] for layer in layers)
        keeps, own_share = [None], f"keep {kept:.2f} by level"
    ways = our_ways(keeps, options.heads, other.hire["head"] is not None, own_share)
    for name, way in ways.items():
        session.add(f"{label}: {name}", subject, way, other.bytes_of(way, session.dtype))


def load(session: Session, stack: ExitStack, prompt: list[int], options: Any) -> Arm:
    """Load everything as arms of the session; gives the original, as it is stored."""
    load_rivals(session, stack, prompt)  # first: a wrong file should not cost minutes
    stored = stored_dtype(dense_table(session.dense))
    for dtype in dict.fromkeys((stored, session.dtype, "bfloat16")):
        model = TorchModel(session.dense, dtype, session.threads)
        subject = stack.enter_context(TorchSubject(f"{DENSE} {dtype}", model))
        session.add(f"PyTorch {dtype}", subject, Way(), session.bytes_of(Way(), dtype))
    for folder in options.converted:
        load_ours(session, stack, folder, options)
    return next(arm for arm in session.arms if arm.name == f"PyTorch {stored}")


# --------------------------------------------------------------------------- rows on disk


def code_digest() -> str:
    """Changes with the library and its kernels: rounds of different code are not mixed."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".so", ".pyd", ".dylib"):
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """Rows of a jsonl file; the first says how they were measured and must not change."""

    def __init__(self, path: Path, settings: Mapping[str, Any] | None) -> None:
        """`settings` None takes the rows as they are, however they were measured."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        if settings is None:
            return
        if not self.rows:
            self.add("settings", settings)
        elif self.rows[0] != {"row": "settings", **settings}:
            sys.exit(f"{path} was measured in another way; remove it or give another --out.")

    def add(self, row: str, content: Mapping[str, Any]) -> None:
        """One more row, on disk at once."""
        self.rows.append({"row": row, **content})
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(self.rows[-1]) + "\n")

    def of(self, row: str) -> list[dict[str, Any]]:
        """All rows of a kind."""
        return [each for each in self.rows if each["row"] == row]


def measure(session: Session, store: Store, reference: Arm, ids: Any, prompt: list[int]) -> None:
    """Quality of every arm, then the rounds; what the store holds already is left alone."""
    request, reporter = session.request, make_reporter(Console(stderr=True, highlight=False))
    known = {row["name"] for row in store.of("quality")}
    missing = [arm for arm in session.arms if arm.name not in known]
    if missing:
        with (
            reporter.stage("quality", len(ids) + len(missing)) as advance,
            Reference(reference, ids, advance) as original,
        ):
            for arm in missing:
                original.compare(arm)
                store.add("quality", {"name": arm.name, "kl": arm.kl, "top1": arm.top1})
                advance(arm.name)
    names = {arm.name for arm in session.arms}
    done = [row for row in store.of("round") if names <= row["ms"].keys()]
    todo, main = range(len(done), request.rounds), Load(prompt, 1, request.num_tokens)
    with reporter.stage("decoding", len(todo) + len(session.arms)) as advance:
        for arm in session.arms if todo else []:
            warm_up(arm, main)
            advance(f"{arm.name} is warm")
        for _ in todo:
            traces, wild = one_round(session.arms, main)
            times = {name: trace.median_ms for name, trace in traces.items()}
            store.add("round", {"ms": times, "unsteady": sorted(wild)})
            advance("round")
    reporter.close()


def note_arms(session: Session, store: Store) -> None:
    """What is known of every arm beside its figures, and of the machine."""
    for arm in session.arms:
        facts = {key: value for key, value in arm.subject.facts.items() if key != "load_ms"}
        row = {"name": arm.name, "bytes": arm.bytes_per_token, "threads": arm.subject.threads}
        store.add("arm", {**row, **facts})
    stream = measure_stream(stream_bytes(), session.threads)
    store.add("machine", {**machine(), **versions(), "stream": asdict(stream)})


# --------------------------------------------------------------------------- table and plot


def common_rounds(store: Store) -> list[dict[str, Any]]:
    """The rounds in which all arms of the last one took part."""
    rounds = store.of("round")
    if not rounds:
        sys.exit("no round was measured yet; run this without --only-draw.")
    return [row for row in rounds if rounds[-1]["ms"].keys() <= row["ms"].keys()]


def machine_of(store: Store) -> dict[str, Any]:
    """What was noted of the machine with the fastest stream: others were measured beside jobs."""
    return max(store.of("machine"), key=lambda row: row["stream"]["gb_per_s"])


def points(store: Store) -> list[dict[str, Any]]:
    """One row an arm of the last round, from the fastest to the slowest.

    Medians are over the rounds in which all of these took part: only those compare.
    """
    quality = {row["name"]: row for row in store.of("quality")}
    arms = {row["name"]: row for row in store.of("arm")}
    stream = machine_of(store)["stream"]["gb_per_s"]
    rounds, found = common_rounds(store), []
    for name in rounds[-1]["ms"]:
        times, arm = [row["ms"][name] for row in rounds], arms[name]
        ms = statistics.median(times)
        rate = arm["bytes"] / ms / 1e6
        row = {"name": name, "ms": ms, "low": min(times), "high": max(times)}
        row["unsteady"] = sum(name in each["unsteady"] for each in rounds)
        row |= {"rate": rate, "roofline": rate / stream, "bytes": arm["bytes"]}
        row |= {"kl": quality[name]["kl"], "top1": quality[name]["top1"]}
        found.append({**row, "threads": arm["threads"]})
    return sorted(found, key=lambda row: row["ms"])


def rival_of(point: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Any:
    """The fastest file of llama.cpp whose KL is no worse than the point's, or None."""
    rivals = [row for row in rows if row["name"].startswith("llama.cpp")]
    fit = [row for row in rivals if None not in (row["kl"], point["kl"])]
    fit = [row for row in fit if row["kl"] <= point["kl"]]
    return min(fit, key=lambda row: row["ms"], default=None)


def table(rows: Sequence[Mapping[str, Any]], store: Store) -> str:
    """Everything as Markdown."""
    facts, settings = machine_of(store), store.rows[0]
    llama = next((row for row in store.of("arm") if "system" in row), None)
    lines = [
        f"{facts['processor']}, at most {settings['threads']} threads, torch {facts['torch']}, "
        f"transformers {facts['transformers']}. Memory streams "
        f"{facts['stream']['gb_per_s']:.1f} GB/s over {size(facts['stream']['num_bytes'])}. "
        f"Medians of {len(common_rounds(store))} rounds of {settings['num_tokens']} tokens after "
        f"{settings['context']}, batch 1. KL in nats on {settings['kl_tokens']:,} tokens of "
        f"{settings['text']}. Ours in {settings['dtype']}.",
        "",
        "| what | ms per token | range | bytes per token | GB/s | of the stream | KL | same top 1 "
        "| threads | fastest rival with a KL no worse: its ms over ours |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    if llama is not None:
        lines[0] += f" llama.cpp {llama['version']}: {llama['system'].strip(' |')}."
    for row in rows:
        rival, beaten = rival_of(row, rows), ""
        if rival is not None and row["name"].startswith(OURS):
            beaten = f"{rival['ms'] / row['ms']:.2f} ({rival['name'].rpartition('.')[2]})"
        mark = f" ({row['unsteady']} unsteady)" if row["unsteady"] else ""
        lines.append(
            f"| {row['name']} | {row['ms']:.2f} | {row['low']:.2f}-{row['high']:.2f}{mark} "
            f"| {size(row['bytes'])} | {row['rate']:.1f} | {row['roofline']:.0%} "
            f"| {number(row['kl'], '.4f')} | {row['top1']:.1%} | {row['threads']} | {beaten} |"
        )
    return "\n".join(lines) + "\n"


def series(name: str) -> str:
    """Which points of the plot belong together."""
    if name.startswith(OURS):
        folder, _, settings = name.removeprefix(f"{OURS} ").partition(": ")
        return f"hireconvert {folder}, {settings.rpartition(', ')[2]}"
    return "llama.cpp" if name.startswith("llama.cpp") else "PyTorch"


def short_name(name: str) -> str:
    """What stands beside the point: the share of neurons, the type of a file, the dtype."""
    if name.startswith(OURS):
        return name.partition(": ")[2].partition(",")[0].removeprefix("keep ")
    return name.rpartition(".")[2] if name.startswith("llama.cpp") else name.rpartition(" ")[2]


def draw(rows: Sequence[Mapping[str, Any]], store: Store) -> str:
    """The plot as SVG text."""
    shown = [
        SpeedPoint(
            name=short_name(row["name"]),
            series=series(row["name"]),
            joined=row["name"].startswith(OURS),
            ms=row["ms"],
            bytes_per_token=row["bytes"],
            kl=row["kl"],
        )
        for row in rows
    ]
    return quality_against_speed(shown, store.of("machine")[-1]["stream"]["gb_per_s"])


def replace_between_marks(document: Path, name: str, content: str) -> None:
    """Put the content between the marks of NAME; where there are none, at the end with marks."""
    begin, end = f"<!-- frontier {name} -->", f"<!-- end of frontier {name} -->"
    text = document.read_text(encoding="utf-8") if document.exists() else "# Performance\n"
    block = f"{begin}\n\n{content}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(text):
        text = pattern.sub(lambda _: block, text)
    else:
        text = f"{text.rstrip()}\n\n## {name}\n\n{block}\n"
    document.write_text(text, encoding="utf-8")


def publish(store: Store, name: str, out: Path, document: Path | None) -> None:
    """Write table and plot, and put them into the document."""
    rows = points(store)
    text, picture = table(rows, store), draw(rows, store)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    (out / f"{name}.svg").write_text(picture, encoding="utf-8")
    print(text)
    if document is not None:
        image = document.parent / f"performance-{name}.svg"
        image.write_text(picture, encoding="utf-8")
        replace_between_marks(document, name, f"{text}\n![{name}]({image.name})\n")


# --------------------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    for flag in ("--model", "--rivals", "--text", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--converted", type=Path, nargs="+", required=True)
    parser.add_argument("--doc", type=Path)
    parser.add_argument("--keep", type=float, nargs="*", default=list(KEEPS))
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=["dense", "own", "int8"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--num-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kl-tokens", type=int, default=4096)
    parser.add_argument("--only-draw", action="store_true", help="from rows measured before")
    options = parser.parse_args(argv)
    if options.kl_tokens < 2:
        parser.error("--kl-tokens: quality needs 2 tokens at least")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing and publish."""
    options = parse(argv)
    rivals = tuple(sorted(options.rivals.glob(f"{options.model.resolve().name}.*.gguf")))
    request = Request(
        baseline=str(options.model),
        rivals=tuple(path for path in rivals if not path.stem.endswith(".F32")),
        threads=options.threads,
        dtype=options.dtype,
        contexts=(options.context,),
        num_tokens=options.num_tokens,
        rounds=options.rounds,
        kl_tokens=options.kl_tokens,
    )
    shown = ("threads", "dtype", "context", "num_tokens", "kl_tokens")
    settings = {key: vars(options)[key] for key in shown}
    settings |= {"text": options.text.name, "code": code_digest()}
    path = options.out / f"{options.name}.jsonl"
    store = Store(path, None if options.only_draw else settings)
    try:
        if not options.only_draw:
            check_request(request)
            with open_session(options.converted[0], request) as (session, stack):
                prompt, ids = prompt_and_windows(session, read_text(options.text))
                reference = load(session, stack, prompt, options)
                note_arms(session, store)
                measure(session, store, reference, ids, prompt)
        publish(store, options.name, options.out, options.doc)
    except HireError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
