"""One self-contained HTML page about a converted folder, from its report and evaluations of it.

Read are headers, hire_report.json, recipe.yaml and the JSON of `hireconvert eval`; no model runs.
Folders come from strangers: every value is checked for its kind where it is used and escaped.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hireconvert import plots, webpage
from hireconvert.errors import InputError, UsageError
from hireconvert.figures import ABSENT, figure, interval, number, rest, size, worse_scope
from hireconvert.inspection import inspect_checkpoint
from hireconvert.loading import CHECKSUMS, REPORT, read_config
from hireconvert.webpage import Html
from hireconvert.workspace import file_sha256, flatten, write_atomically

Tree = Mapping[str, Any]
_SHOWN_LENGTH = 120  # of a single value
_SHOWN_RECIPE = 20_000
_LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")"""


@dataclass(frozen=True)
class _Evaluation:
    """The JSON of one `hireconvert eval`."""

    name: str
    tree: Tree

    @property
    def bytes_share(self) -> float | None:
        """Bytes read per token as a share of dense."""
        read, dense = (figure(self.tree, "bytes_per_token", key) for key in ("converted", "dense"))
        return None if read is None or not dense else read / dense


@dataclass(frozen=True)
class _Subject:
    """Everything the page tells of; `own` are the evaluations of this very folder."""

    facts: Tree
    hire: Tree  # config.hire, checked
    report: Tree
    recipe: str
    own: list[_Evaluation]
    others: list[_Evaluation]


def write_report(folder: Path, evaluations: Sequence[Path], target: Path) -> None:
    """Write the page about `folder`; `target` appears whole or not at all.

    Raises InputError when the folder or an evaluation cannot be used or matplotlib is missing,
    UsageError when the page cannot be written.
    """
    if folder.resolve() in target.resolve().parents:
        raise UsageError(
            f"{target} lies in {folder}, whose checksums it would break; name a file outside."
        )
    if target.is_dir():
        raise UsageError(f"cannot write {target}: it is a folder; name a file.")
    subject = _read(folder, evaluations)
    title = _title(subject)
    content = webpage.page(title, webpage.joined(_sections(subject, title)))
    try:
        write_atomically(target, content.encode(errors="replace"))  # lone surrogates
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}.") from error


# --------------------------------------------------------------------------- reading


def _read(folder: Path, evaluations: Sequence[Path]) -> _Subject:
    facts = inspect_checkpoint(folder)
    report = _read_json(folder / REPORT, "the report of a conversion")
    try:
        recipe = (folder / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"{folder / 'recipe.yaml'} cannot be read: {error.strerror}. It comes with every "
            "converted folder; fetch the folder again."
        ) from error
    sums = folder / CHECKSUMS
    digest = file_sha256(sums) if sums.is_file() else None
    found = [_Evaluation(path.stem, _read_evaluation(path)) for path in evaluations]
    own = [each for each in found if digest and _at(each.tree, "checkpoint", "sums") == digest]
    others = [each for each in found if each not in own]
    hire = read_config(folder)["hire"]
    return _Subject(facts, hire, report, recipe[:_SHOWN_RECIPE], own, others)


def _read_evaluation(path: Path) -> Tree:
    tree = _read_json(path, "the JSON of `hireconvert eval`")
    if not isinstance(tree.get("texts"), dict):
        raise InputError(f"{path} is not the JSON of `hireconvert eval`: it has no texts.")
    return tree


def _read_json(path: Path, what: str) -> Tree:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; it is {what}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not {what}: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} is not {what}: it holds no object.")
    return tree


def _at(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _rows(tree: Any, *path: str) -> list[Tree]:
    """The objects in a list."""
    found = _at(tree, *path)
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def _objects(tree: Any, *path: str) -> dict[str, Tree]:
    """The objects in an object."""
    found = _at(tree, *path)
    entries = found.items() if isinstance(found, Mapping) else ()
    return {str(key): each for key, each in entries if isinstance(each, Mapping)}


def _word(tree: Any, *path: str) -> str:
    """What is shown of a value: no more than a line."""
    value = _at(tree, *path)
    shown = ABSENT if value is None else str(value)
    return shown if len(shown) <= _SHOWN_LENGTH else shown[: _SHOWN_LENGTH - 3] + "..."


# --------------------------------------------------------------------------- the page


def _title(subject: _Subject) -> str:
    base = _at(subject.report, "model", "base_model") or subject.facts["architecture"]
    return f"{str(base)[:_SHOWN_LENGTH]} with HiRE"


def _sections(subject: _Subject, title: str) -> Iterator[Html]:
    yield webpage.heading(title, 1)
    made = f"Recipe {_word(subject.facts, 'recipe')}, made by hireconvert "
    yield webpage.paragraph(made + _word(subject.report, "versions", "hireconvert"), quiet=True)
    yield _summary(subject)
    yield from _loading()
    yield from _quality(subject)
    yield from _tasks(subject)
    yield from _gates(subject)
    yield from _bytes(subject)
    yield from _layers(subject)
    yield from _recall(subject)
    yield from _provenance(subject)


def _summary(subject: _Subject) -> Html:
    read = subject.facts["bytes_per_token"]
    share = read["converted"] / read["dense"]
    cards: list[tuple[str, str, bool | None]] = [
        (f"{share:.0%}", "of the dense model's bytes read per token", None),
        (f"{read['speedup_bound']:.2f}x", "speed-up that the bytes bound", None),
    ]
    increases = [
        figure(text, "increase", worse_scope(text) or "", "point")
        for each in subject.own
        for text in _objects(each.tree, "texts").values()
    ]
    known = [each for each in increases if each is not None]
    if known:
        cards.append((f"{max(known):+.2%}", "perplexity, on the worst text", None))
    elif (grown := _own_increase(subject.report)) is not None:
        cards.append((f"{grown:+.2%}", "perplexity, measured when converted", None))
    recall = figure(subject.report, "recall", "mean")
    if recall is not None:
        cards.append((f"{recall:.1%}", "of the true top neurons found", None))
    gates = [each.tree["gate"] for each in subject.own if _at(each.tree, "gate", "checks")]
    if gates:
        passed = all(_at(gate, "passed") is True for gate in gates)
        cards.append(("passed" if passed else "failed", "quality gate", passed))
    return webpage.cards(cards)


def _own_increase(report: Tree) -> float | None:
    evaluation = _at(report, "evaluation")
    if not isinstance(evaluation, Mapping):
        return None
    dense = figure(evaluation, "baseline_perplexity")
    sparse = figure(evaluation, worse_scope(evaluation) or "", "perplexity")
    return None if not dense or sparse is None else sparse / dense - 1


def _loading() -> Iterator[Html]:
    yield webpage.heading("How to load it")
    yield webpage.code(_LOAD)
    words = "Without trust_remote_code the folder loads as the ordinary dense model."
    yield webpage.paragraph(words, quiet=True)


def _quality(subject: _Subject) -> Iterator[Html]:
    yield webpage.heading("Quality")
    rows = [
        (each.name, name, *_text_cells(text))
        for each in (*subject.own, *subject.others)
        for name, text in _objects(each.tree, "texts").items()
    ]
    evaluation = _at(subject.report, "evaluation")
    if isinstance(evaluation, Mapping):
        rows.append(("conversion", "held-out calibration text", *_text_cells(evaluation)))
    if not rows:
        yield webpage.paragraph("Nothing was measured; run hireconvert eval.")
        return
    columns = ("evaluation", "text", "tokens", "baseline", "perplexity", "increase, 95 %")
    yield webpage.table((*columns, "KL mean", "KL p99", "same top token"), rows)
    words = "Perplexity is that of the worse sparse scope; the interval is a paired bootstrap."
    yield webpage.paragraph(words, quiet=True)
    points = list(_points((*subject.own, *subject.others)))
    if points:
        caption = "Perplexity increase against bytes read per token"
        yield webpage.image(plots.quality_against_bytes(points), caption)


def _text_cells(text: Tree) -> tuple[str, ...]:
    scope = worse_scope(text) or "dense"
    return (
        number(figure(text, "num_scored"), ",.0f"),
        number(figure(text, "baseline_perplexity"), ".3f"),
        number(figure(text, scope, "perplexity"), ".3f"),
        interval(_at(text, "increase", scope)),
        number(figure(text, scope, "kl_mean"), ".4f"),
        number(figure(text, scope, "kl_p99"), ".3f"),
        number(figure(text, scope, "top1_agreement"), ".1%"),
    )


def _points(evaluations: Sequence[_Evaluation]) -> Iterator[plots.QualityPoint]:
    for each in evaluations:
        share = each.bytes_share
        for name, text in _objects(each.tree, "texts").items():
            grown = _at(text, "increase", worse_scope(text) or "")
            point, low, high = (figure(grown, end) for end in ("point", "low", "high"))
            if share is not None and point is not None:
                yield plots.QualityPoint(each.name, name, share, point, low, high)


def _tasks(subject: _Subject) -> Iterator[Html]:
    rows = [
        (
            name,
            number(figure(task, "num_items"), ",.0f"),
            number(figure(task, "baseline"), ".1%"),
            number(figure(task, "converted"), ".1%"),
            interval(_at(task, "difference")),
        )
        for each in subject.own
        for name, task in _objects(each.tree, "tasks").items()
    ]
    if rows:
        yield webpage.heading("Tasks")
        columns = ("task", "items", "baseline", "converted", "difference, 95 %")
        yield webpage.table(columns, rows)


def _gates(subject: _Subject) -> Iterator[Html]:
    for each in subject.own:
        checks = _rows(each.tree, "gate", "checks")
        if not checks:
            continue
        yield webpage.heading(f"Gate ({each.name})")
        rows = [
            (
                _word(check, "limit"),
                _word(check, "subject"),
                number(figure(check, "found"), ".6g"),
                number(figure(check, "least"), ".6g"),
                number(figure(check, "most"), ".6g"),
                _at(check, "passed") is True,
            )
            for check in checks
        ]
        yield webpage.table(("limit", "of", "measured", "at least", "at most", "kept"), rows)


def _bytes(subject: _Subject) -> Iterator[Html]:
    read = subject.facts["bytes_per_token"]
    yield webpage.heading("Bytes read per token")
    parts = {"FFN": read["ffn"], "head": read["head"], "all": read}
    rows = [
        (name, size(part["dense"]), size(part["converted"]), part["converted"] / part["dense"])
        for name, part in parts.items()
        if part["dense"]
    ]
    shown = [(*row[:3], f"{row[3]:.0%}") for row in rows]
    yield webpage.table(("part", "dense", "converted", "share"), shown)
    yield webpage.paragraph("The cache of keys and values is not counted.", quiet=True)


def _layers(subject: _Subject) -> Iterator[Html]:
    layers = [each for each in subject.facts["layers"] if each["neurons"]]
    yield webpage.heading("Neurons of each layer")
    if not layers:
        yield webpage.paragraph("The FFN is dense in every layer.")
        return
    budgets = [
        plots.LayerBudget(
            layer=each["layer"],
            kept=each["kept"] / each["neurons"] if each["neurons"] else None,
            candidates=each["candidates"] / each["neurons"] if each["neurons"] else None,
            recall=figure(each, "recall"),
        )
        for each in subject.facts["layers"]
    ]
    yield webpage.image(plots.layer_budgets(budgets), "Kept and candidate neurons of each layer")
    keys = ("layer", "neurons", "kept", "candidates", "kind", "bits", "rank")
    parts = ("predictor_bytes", "unselected_bytes", "read_bytes", "dense_bytes")
    rows = [
        (
            *(ABSENT if each[key] is None else each[key] for key in keys),
            number(figure(each, "recall"), ".4f"),
            rest(each),
            *(size(each[key]) for key in parts),
        )
        for each in layers
    ]
    sizes = ("predictor reads", "rest reads", "reads", "dense")
    columns = (*keys[:4], "predictor", *keys[5:], "recall", "rest", *sizes)
    yield webpage.folded("every layer", webpage.table(columns, rows))


def _recall(subject: _Subject) -> Iterator[Html]:
    specs = subject.hire["ffn"]["layers"] if subject.hire["ffn"] else []
    ratios = {
        index: spec["num_candidates"] / spec["num_kept"] for index, spec in enumerate(specs) if spec
    }
    lines = []
    for each in _rows(subject.report, "layers"):
        ratio = ratios.get(_at(each, "layer")) if isinstance(_at(each, "layer"), int) else None
        ends = (figure(each, "recall_at_kept"), figure(each, "recall"))
        if ratio is not None and ends[0] is not None and ends[1] is not None:
            lines.append([(1.0, ends[0]), (ratio, ends[1])])
    curve = []
    texts = [text for each in subject.own for text in _objects(each.tree, "texts").values()]
    for row in _rows(texts[0] if texts else None, "selection", "recall_curve"):
        keys = ("over_select", "recall_mean", "recall_worst")
        x, mean, worst = (figure(row, key) for key in keys)
        if x is not None and mean is not None and worst is not None:
            curve.append((x, mean, worst))
    if curve or lines:
        yield webpage.heading("Recall against candidates")
        drawing = plots.recall_against_candidates(curve, lines)
        yield webpage.image(drawing, "Recall of the true top k against candidates over k")


def _provenance(subject: _Subject) -> Iterator[Html]:
    report = subject.report
    yield webpage.heading("Where it comes from")
    names = ("model", "versions", "data", "rule", "budget", "finetune")
    for name in names:
        entries = flatten(_objects(report).get(name, {}))
        shown = {key: _word(entries, key) for key in entries}
        if shown:
            yield webpage.folded(name, webpage.pairs(shown))
    for each in (*subject.own, *subject.others):
        made = {
            "baseline": _word(each.tree, "baseline", "source"),
            "dtype": _word(each.tree, "dtype"),
            "seconds": _word(each.tree, "seconds"),
        }
        made |= {
            key: _word(each.tree, "versions", key)
            for key in _objects(each.tree).get("versions", {})
        }
        yield webpage.folded(f"evaluation {each.name}", webpage.pairs(made))
    yield webpage.folded("recipe", webpage.code(subject.recipe))
    notes = _at(report, "notes")
    for note in notes if isinstance(notes, list) else []:
        yield webpage.paragraph(f"note: {str(note)[:500]}", quiet=True)
