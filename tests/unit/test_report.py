"""The report page: complete, self-contained, and safe whatever a folder or an evaluation holds."""

import base64
import builtins
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hireconvert import plots, webpage
from hireconvert.errors import InputError, UsageError
from hireconvert.loading import CHECKSUMS
from hireconvert.report import write_report
from hireconvert.workspace import file_sha256
from tests.cli import Cli
from tests.tiny_files import save_tiny

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>$x_{$\x00-->'
VIEW = {"kl_mean": 0.01, "kl_p99": 0.1, "top1_agreement": 0.95, "nonfinite_rows": 0}
INTERVAL = {"point": 0.0123, "low": 0.005, "high": 0.015, "n": 8}
TEXT: dict[str, Any] = {
    "num_scored": 8184,
    "baseline_perplexity": 10.0,
    "dense": {**VIEW, "perplexity": 10.0},
    "all": {**VIEW, "perplexity": 10.1},
    "all_prefix": {**VIEW, "perplexity": 10.123},
    "increase": {"all": {**INTERVAL, "point": 0.01}, "all_prefix": INTERVAL},
    "selection": {
        "recall_curve": [
            {"over_select": 1.0, "recall_mean": 0.9, "recall_worst": 0.8},
            {"over_select": 2.0, "recall_mean": 1.0, "recall_worst": 0.99},
        ]
    },
}
CHECK = {"limit": "kl_mean", "subject": "wiki.txt", "found": 0.01, "least": None, "most": 0.02}
EVALUATION: dict[str, Any] = {
    "checkpoint": {"recipe": "tiny-ci", "sums": None},
    "bytes_per_token": {"dense": 100, "converted": 76},
    "baseline": {"source": "gguf:dense.gguf", "fingerprint": "0"},
    "texts": {"wiki.txt": TEXT},
    "tasks": {
        "piqa": {
            "num_items": 500,
            "baseline": 0.6,
            "converted": 0.59,
            "difference": {"point": -0.01, "low": -0.02, "high": 0.001},
        }
    },
    "gate": {"passed": True, "checks": [{**CHECK, "passed": True}]},
    "dtype": "float32",
    "versions": {"torch": "2.13"},
    "seconds": 12.5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, hireconvert: Cli) -> Path:
    root = tmp_path_factory.mktemp("report")
    ended = hireconvert("convert", save_tiny(root / "dense"), root / "out", "-r", "tiny-ci")
    assert ended.code == 0, ended.err
    return root / "out"


class Reader(HTMLParser):
    """Tags, attributes and text of a page, which must be well nested."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def close(self) -> None:
        super().close()
        assert not self._open


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    reader.close()
    return reader


def made(
    folder: Path, tmp_path: Path, *evaluations: dict[str, Any], own: bool = True
) -> tuple[Reader, Path]:
    """The page about a folder and evaluations, of itself if `own`."""
    paths = []
    for index, each in enumerate(evaluations):
        tree = copy.deepcopy(each)
        if own and isinstance(tree.get("checkpoint"), dict):
            tree["checkpoint"]["sums"] = file_sha256(folder / CHECKSUMS)
        paths.append(tmp_path / f"eval{index}.json")
        paths[-1].write_text(json.dumps(tree))
    write_report(folder, paths, tmp_path / "page.html")
    return read(tmp_path / "page.html"), tmp_path / "page.html"


def drawings(page: Path) -> dict[str, ElementTree.Element]:
    """The images by their captions; each must be an SVG of its own."""
    found = re.findall(
        r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)">', page.read_text()
    )
    return {name: ElementTree.fromstring(base64.b64decode(data)) for name, data in found}


def test_a_page_says_what_is_known(folder: Path, tmp_path: Path) -> None:
    reader, page = made(folder, tmp_path, EVALUATION)
    words = "\n".join(reader.words)
    for expected in (
        "LlamaForCausalLM with HiRE",
        "+1.23% (+0.50% to +1.50%)",  # the worse of the two scopes
        "-1.00% (-2.00% to +0.10%)",
        "trust_remote_code=True",
        "piqa",
        "kl_mean",
        "passed",
        "gguf:dense.gguf",
        "name: tiny-ci",
        "speed-up that the bytes bound",
    ):
        assert expected in words, expected
    assert set(drawings(page)) == {
        "Perplexity increase against bytes read per token",
        "Kept and candidate neurons of each layer",
        "Recall of the true top k against candidates over k",
    }


def test_a_page_fetches_nothing_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    reader, _ = made(folder, tmp_path, EVALUATION)
    assert not {"script", "link", "iframe", "object", "embed", "form"} & set(reader.tags)
    links = [value or "" for name, value in reader.attributes if name in ("src", "href")]
    assert links and all(link.startswith("data:image/svg+xml;base64,") for link in links)
    policy = [value for name, value in reader.attributes if name == "content"]
    assert any("default-src 'none'" in (value or "") for value in policy)
    assert str(tmp_path) not in (tmp_path / "page.html").read_text()


def test_the_same_figures_give_the_same_page(folder: Path, tmp_path: Path) -> None:
    _, page = made(folder, tmp_path, EVALUATION)
    first = page.read_bytes()
    made(folder, tmp_path, EVALUATION)
    assert page.read_bytes() == first


def test_a_page_without_evaluations(folder: Path, tmp_path: Path) -> None:
    reader, page = made(folder, tmp_path)
    words = " ".join(reader.words)
    assert "held-out calibration text" in words and "measured when converted" in words
    assert "Tasks" not in words and "quality gate" not in words
    assert "Kept and candidate neurons of each layer" in drawings(page)


def test_other_checkpoints_are_compared_and_not_taken_for_this_one(
    folder: Path, tmp_path: Path
) -> None:
    reader, page = made(folder, tmp_path, EVALUATION, own=False)
    words = " ".join(reader.words)
    assert "+1.23% (+0.50% to +1.50%)" in words
    assert "piqa" not in words and "quality gate" not in words
    assert "Perplexity increase against bytes read per token" in drawings(page)


def test_a_failed_gate_shows(folder: Path, tmp_path: Path) -> None:
    failed = {"passed": False, "checks": [{**CHECK, "found": None, "passed": False}]}
    reader, page = made(folder, tmp_path, {**EVALUATION, "gate": failed})
    assert "failed" in reader.words
    assert '<td class="bad">no</td>' in page.read_text()


# --------------------------------------------------------------------------- strangers


def poisoned(tree: Any) -> Any:
    """The tree with every text and every name replaced by markup."""
    if isinstance(tree, dict):
        known = {"texts", "all", "all_prefix", "increase", "tasks", "gate", "checks", "selection"}
        fixed = known | {
            "checkpoint",
            "sums",
            "difference",
            "recall_curve",
            "evaluation",
            "model",
            "bytes_per_token",
        }
        return {
            key if key in fixed or isinstance(value, int | float) else key + EVIL: poisoned(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [poisoned(value) for value in tree]
    return EVIL if isinstance(tree, str) else tree


def test_a_hostile_folder_injects_nothing(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in folder.rglob("*"):
        if path.is_file():
            (bad / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            (bad / path.relative_to(folder)).write_bytes(path.read_bytes())
    report = json.loads((bad / "hire_report.json").read_text())
    hostile = {**poisoned(report), "recipe": EVIL, "notes": [EVIL, 3, None, {"a": EVIL}]}
    hostile["model"] = {"base_model": EVIL, EVIL: EVIL}
    hostile["versions"] = {"hireconvert": EVIL, EVIL: [EVIL]}
    (bad / "hire_report.json").write_text(json.dumps(hostile))
    (bad / "recipe.yaml").write_text(EVIL + "</pre></details>")
    evaluation = poisoned(EVALUATION)
    evaluation["texts"] = {EVIL: poisoned(TEXT)}
    evaluation["gate"]["checks"][0] |= {"limit": EVIL, "subject": EVIL}
    reader, page = made(bad, tmp_path, {**evaluation, "checkpoint": {"sums": ""}})
    assert "alert(1)" in " ".join(reader.words)  # shown, as text
    assert "script" not in reader.tags and "<script" not in page.read_text()
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert reader.tags.count("img") == len(drawings(page)) == 3
    for drawing in drawings(page).values():
        assert not [each for each in drawing.iter() if each.tag.endswith("script")]


@pytest.mark.parametrize(
    "value", [None, 3, "text", [], [1], {}, {"a": 1}, True, -1e308, 10**400, "\ud800"]
)
def test_values_of_the_wrong_kind_are_left_out(folder: Path, tmp_path: Path, value: Any) -> None:
    trees = [{**EVALUATION, key: value} for key in EVALUATION if key != "texts"]
    broken = {"wiki.txt": value, "other": {**TEXT, "increase": value, "all": value}}
    made(folder, tmp_path, *trees, {**EVALUATION, "texts": broken})


def test_files_that_are_no_evaluation(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    for content in ("", "[]", "{}", '{"texts": 3}', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(InputError, match=r"eval\.json is not the JSON"):
            write_report(folder, [path], tmp_path / "page.html")
    with pytest.raises(InputError, match=r"no\.json cannot be read"):
        write_report(folder, [tmp_path / "no.json"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_where_a_page_may_not_lie(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="checksums"):
        write_report(folder, [], folder / "page.html")
    for target in (tmp_path / "absent" / "page.html", tmp_path, Path()):
        with pytest.raises(UsageError, match="cannot write"):
            write_report(folder, [], target)


def test_without_matplotlib(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"pip install 'hireconvert\[report\]'"):
        write_report(folder, [], tmp_path / "page.html")


# --------------------------------------------------------------------------- pieces


def test_everything_that_is_text_is_escaped() -> None:
    pieces = webpage.joined(
        [
            webpage.heading(EVIL),
            webpage.paragraph(EVIL),
            webpage.cards([(EVIL, EVIL, True)]),
            webpage.table([EVIL], [[EVIL]]),
            webpage.pairs({EVIL: EVIL}),
            webpage.code(EVIL),
            webpage.folded(EVIL, webpage.text(EVIL)),
            webpage.image("<svg/>", EVIL),
        ]
    )
    reader = Reader()
    reader.feed(webpage.page(EVIL, pieces))
    reader.close()
    assert "script" not in reader.tags and reader.tags.count("img") == 1


def test_figures_beyond_all_measure_are_drawn() -> None:
    points = [
        plots.QualityPoint("a", "b", share, rise, low, high)
        for share, rise, low, high in ((1e308, 1e308, -1e308, 1e308), (-1e308, 1e-300, 0.0, 0.0))
    ]
    ElementTree.fromstring(plots.quality_against_bytes(points))
    curve = [(1e308, 1e308, -1e308), (1.0, 0.5, 0.5)]
    ElementTree.fromstring(plots.recall_against_candidates(curve, [curve_of_a_layer()]))
    layers = [plots.LayerBudget(0, 1e308, -1e308, 1e308)]
    ElementTree.fromstring(plots.layer_budgets(layers))


def curve_of_a_layer() -> list[tuple[float, float]]:
    return [(1.0, 1e308), (1e308, 0.0)]


def test_plots_draw_what_they_are_given() -> None:
    layers = [plots.LayerBudget(0, 0.5, 0.6, 0.9), plots.LayerBudget(1, None, None, None)]
    points = [
        plots.QualityPoint(EVIL, EVIL, 0.7, 0.01, None, None),
        plots.QualityPoint("_é", "_hidden", 0.6, 0.02, 0.01, 0.03),
    ]
    pages = (
        plots.layer_budgets(layers),
        plots.recall_against_candidates([(1.0, 0.9, 0.8)], []),
        plots.recall_against_candidates([], [[(1.0, 0.9), (1.2, 0.95)]]),
        plots.quality_against_bytes(points),
    )
    for page in pages:
        root = ElementTree.fromstring(page)
        assert not [each for each in root.iter() if each.tag.endswith("script")]
    assert plots.layer_budgets(layers) != plots.layer_budgets(layers[:1])
