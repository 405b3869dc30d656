"""The gate: its file read strictly, every limit held against its figure, silence a breach."""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hireconvert.errors import UsageError
from hireconvert.gate import Check, Gate, check, checks, load_gate, mean_difference
from hireconvert.junit import write_junit

VIEW = {"perplexity": 10.1, "kl_mean": 0.01, "kl_p99": 0.1, "top1_agreement": 0.95}
INTERVAL = {"point": 0.01, "low": 0.005, "high": 0.015, "n": 8}
TEXT: dict[str, Any] = {
    "all": {**VIEW, "nonfinite_rows": 0},
    "all_prefix": {**VIEW, "nonfinite_rows": 0},
    "increase": {"all": INTERVAL, "all_prefix": INTERVAL},
    "selection": {"recall_mean": 0.98, "recall_worst": 0.96, "kept_overall": 0.5},
    "head": {"top1_agreement_reference": 1.0, "kl_mean": 0.001},
}


def task(point: float, margin: float, baseline: float = 0.5) -> dict[str, Any]:
    ends = {"point": point, "low": point - margin, "high": point + margin}
    return {"baseline": baseline, "converted": baseline + point, "difference": ends}


RESULTS: dict[str, Any] = {
    "texts": {"wiki.txt": TEXT, "code.txt": TEXT},
    "tasks": {"piqa": task(-0.002, 0.01), "copying": task(0.0, 0.02, baseline=0.2)},
    "speed": {"ratio": 1.2},
}
# Every limit that RESULTS keeps, by a little.
KEPT: dict[str, Any] = {
    "perplexity_increase": {"max": 0.011, "high": 0.016},
    "perplexity": {"max": 10.2},
    "kl_mean": {"max": 0.011},
    "kl_p99": {"max": 0.11},
    "top1_agreement": {"min": 0.94},
    "recall_mean": {"min": 0.97},
    "recall_worst": {"min": 0.95},
    "kept": {"min": 0.49, "max": 0.51},
    "head_top1_agreement": {"min": 0.99},
    "head_kl_mean": {"max": 0.002},
    "tasks": {"piqa": {"min": -0.003, "low": -0.013}},
    "tasks_mean": {"min": -0.002, "low": -0.013},
    "every_task": {"low": -0.021},
    "speed_ratio": {"min": 1.1},
}


def gate(**limits: Any) -> Gate:
    return Gate.model_validate(limits)


def changed(path: str, value: Any) -> dict[str, Any]:
    """RESULTS with one figure replaced; "texts.*" is the last text."""
    results = json.loads(json.dumps(RESULTS))  # shares no part, unlike a deep copy
    *above, last = path.split(".")
    node: Any = results
    for key in above:
        node = node["code.txt" if key == "*" else key]
    node[last] = value
    return results


def test_a_good_result_keeps_every_limit() -> None:
    assert set(KEPT) | {"dense_rows"} == set(Gate.model_fields)
    found = checks(gate(**KEPT), RESULTS)
    assert check(gate(**KEPT), RESULTS) == []
    per_text = 2 + (len(KEPT) - 5) + 1  # both ends of the increase, the others, dense_rows
    assert len(found) == 2 * per_text + 2 + 2 + 1 + 1
    assert {each.subject for each in found} == {"wiki.txt", "code.txt", "copying", ""}


# key of the gate, the figure, a value that breaches, the limit as named
BREACHES = [
    ("perplexity_increase", "texts.*.increase.all.point", 0.012, "perplexity_increase.max"),
    ("perplexity_increase", "texts.*.increase.all_prefix.high", 0.02, "perplexity_increase.high"),
    ("perplexity", "texts.*.all_prefix.perplexity", 10.3, "perplexity"),
    ("kl_mean", "texts.*.all.kl_mean", 0.012, "kl_mean"),
    ("kl_p99", "texts.*.all_prefix.kl_p99", 0.12, "kl_p99"),
    ("top1_agreement", "texts.*.all.top1_agreement", 0.9, "top1_agreement"),
    ("recall_mean", "texts.*.selection.recall_mean", 0.9, "recall_mean"),
    ("recall_worst", "texts.*.selection.recall_worst", 0.9, "recall_worst"),
    ("kept", "texts.*.selection.kept_overall", 0.25, "kept"),
    ("kept", "texts.*.selection.kept_overall", 1.0, "kept"),
    ("head_top1_agreement", "texts.*.head.top1_agreement_reference", 0.5, "head_top1_agreement"),
    ("head_kl_mean", "texts.*.head.kl_mean", 0.5, "head_kl_mean"),
    ("tasks", "tasks.piqa.difference.point", -0.1, "tasks.piqa.min"),
    ("tasks", "tasks.piqa.difference.low", -0.1, "tasks.piqa.low"),
    ("tasks_mean", "tasks.copying.difference.point", -0.1, "tasks_mean.min"),
    ("tasks_mean", "tasks.copying.difference.low", -0.1, "tasks_mean.low"),
    ("every_task", "tasks.copying.difference.low", -0.1, "every_task.low"),
    ("speed_ratio", "speed.ratio", 1.0, "speed_ratio"),
    ("kl_mean", "texts.*.all.nonfinite_rows", 1, "dense_rows"),
]


@pytest.mark.parametrize(("key", "path", "value", "limit"), BREACHES)
def test_each_limit_is_breached_by_its_figure(
    key: str, path: str, value: float, limit: str
) -> None:
    found = check(gate(**{key: KEPT[key]}), changed(path, value))
    assert limit in [each.limit for each in found]
    if path.startswith("texts"):
        assert {each.subject for each in found} == {"code.txt"}


@pytest.mark.parametrize(("key", "path", "value", "limit"), BREACHES)
@pytest.mark.parametrize("absent", [None, math.nan])
def test_a_figure_that_was_not_measured_is_a_breach(
    key: str, path: str, value: float, limit: str, absent: float | None
) -> None:
    del value
    assert limit in [each.limit for each in check(gate(**{key: KEPT[key]}), changed(path, absent))]


@pytest.mark.parametrize("key", KEPT)
def test_results_without_anything_breach_every_limit(key: str) -> None:
    for results in ({}, {"texts": {}, "tasks": None, "speed": None}, {"texts": {"a": {}}}):
        found = check(gate(**{key: KEPT[key]}), results)
        assert any(each.limit.startswith(key) for each in found)
        assert all(each.found is None for each in found)


def test_a_model_left_dense_breaches() -> None:
    dense = {**TEXT, "all": None, "all_prefix": None, "increase": {}, "selection": None}
    found = check(gate(**KEPT), {**RESULTS, "texts": {"a": dense}})
    assert {"kept", "kl_mean", "recall_mean", "perplexity"} <= {each.limit for each in found}
    assert "dense_rows" not in {each.limit for each in found}  # its head selects
    found = check(gate(tasks=KEPT["tasks"]), {**RESULTS, "texts": {"a": {**dense, "head": None}}})
    assert [each.limit for each in found] == ["dense_rows"]


def test_a_head_alone_is_held_to_its_own_limits() -> None:
    dense = {**TEXT, "all": None, "all_prefix": None, "increase": {}, "selection": None}
    limits = {"head_top1_agreement": {"min": 1.0}}
    assert check(gate(**limits), {"texts": {"a": dense}}) == []


def test_tasks_too_hard_for_the_baseline_are_left_out() -> None:
    limits = {"every_task": {"low": -0.015, "if_baseline_reaches": 0.3}}
    assert check(gate(**limits), RESULTS) == []
    limits["every_task"]["if_baseline_reaches"] = 0.1
    assert [each.subject for each in check(gate(**limits), RESULTS)] == ["copying"]
    limits["every_task"]["if_baseline_reaches"] = 0.9
    (breach,) = check(gate(**limits), RESULTS)
    assert breach.found is None  # no task was left to hold the limit against
    (held,) = (
        each
        for each in checks(gate(**limits), changed("tasks.piqa.baseline", None))
        if each.limit == "every_task.low"
    )
    assert held.subject == "piqa"  # an unknown accuracy is no reason to leave it out


def test_limits_for_one_kind_of_task() -> None:
    results = {
        **RESULTS,
        "tasks": {
            "piqa": {**task(-0.002, 0.01), "kind": "likelihood"},
            "copying": {**task(-0.1, 0.02), "kind": "generated"},
        },
    }
    likelihood = {"kind": "likelihood", "min": -0.005, "low": -0.013}
    assert check(gate(tasks_mean=likelihood, every_task=likelihood), results) == []
    generated = {**likelihood, "kind": "generated"}
    found = check(gate(tasks_mean=generated, every_task=generated), results)
    assert {each.subject for each in found} == {"", "copying"} and len(found) == 4
    (breach,) = check(gate(tasks_mean={"kind": "lm_eval", "min": -1.0}), results)
    assert breach.found is None


def test_named_tasks_have_their_own_limit() -> None:
    limits = {"tasks": {"copying": {"low": -0.5}}, "every_task": {"low": -0.015}}
    assert check(gate(**limits), RESULTS) == []


def test_mean_over_tasks() -> None:
    found = mean_difference({"a": task(0.03, 0.03), "b": task(-0.01, 0.04)})
    assert found is not None
    ends = found["difference"]
    assert ends["point"] == pytest.approx(0.01)
    assert ends["low"] == pytest.approx(0.01 - 0.025)  # sqrt(.03^2 + .04^2) / 2
    assert ends["high"] == pytest.approx(0.01 + 0.025)
    assert mean_difference({}) is None
    assert mean_difference({"a": task(0.0, 0.1), "b": {}}) is None


# --------------------------------------------------------------------------- the file


def read(tmp_path: Path, text: str) -> Gate:
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    return load_gate(path)


def test_a_file_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, "kl_mean: {max: 1e-2}\ntasks:\n  piqa: {low: -0.01}\n")
    assert found == gate(kl_mean={"max": 0.01}, tasks={"piqa": {"low": -0.01}})
    assert found.dense_rows.max == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl_meen: {max: 1}", "kl_meen: unknown key, did you mean kl_mean?"),
        ("kl_mean: {max: 1}\nkl_mean: {max: 2}", "line 2: not a valid gate: duplicate key"),
        ("kl_mean: {min: 1}", "kl_mean.min: unknown key"),
        ("kl_mean: 0.1", "kl_mean: 0.1 is not a section"),
        ("kl_mean: {max: low}", "kl_mean.max: 'low' is not a number"),
        ("kl_mean: {max: .inf}", "kl_mean.max: inf is not a finite number"),
        ("kept: {max: 0.5}", "kept.min: missing"),
        ("kept: {min: 0.6, max: 0.5}", "kept.min: 0.6 is above max, 0.5"),
        ("kept: {min: 40, max: 60}", "kept.min: 40 is not in [0, 1]"),
        ("perplexity_increase: {}", "perplexity_increase: holds no limit"),
        ("tasks: {piqa: {}}", "tasks.piqa: holds no limit"),
        ("tasks: {piqa: {mim: 1}}", "tasks.piqa.mim: unknown key, did you mean min?"),
        ("every_task: {kind: hard, low: 0}", "every_task.kind: 'hard' is not one of"),
        ("kl_mean: null", "holds no limit"),
        ("dense_rows: {max: 3}", "holds no limit"),
        ("tasks: {}", "holds no limit"),
        ("", "a gate is a mapping of keys"),
        ("- kl_mean", "a gate is a mapping of keys"),
    ],
)
def test_mistakes_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        read(tmp_path, text)
    assert message in str(raised.value) and "gate.yaml" in str(raised.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no\.yaml: the gate cannot be read"):
        load_gate(tmp_path / "no.yaml")


# --------------------------------------------------------------------------- JUnit


def test_junit_has_a_case_for_each_limit(tmp_path: Path) -> None:
    path = tmp_path / "gate.xml"
    path.write_text("older")
    nasty = 'a<b>&"\x00\x1b.txt'
    found = [
        Check("kl_mean", "wiki.txt", 0.02, most=0.01),
        Check("kl_p99", nasty, None, most=0.01),
        Check("kept", "wiki.txt", 0.5, least=0.4, most=0.6),
    ]
    write_junit(path, found, seconds=1.5)
    assert [each.name for each in tmp_path.iterdir()] == ["gate.xml"]
    (suite,) = ElementTree.parse(path).getroot()
    assert suite.attrib["tests"] == "3" and suite.attrib["failures"] == "2"
    cases = {case.attrib["name"]: case for case in suite}
    assert list(cases) == ["kl_mean [wiki.txt]", 'kl_p99 [a<b>&"��.txt]', "kept [wiki.txt]"]
    failures = [case.find("failure") for case in suite]
    assert failures[0] is not None and failures[1] is not None and failures[2] is None
    assert failures[0].attrib["message"] == "0.02; at most 0.01 is wanted"
    assert failures[1].attrib["message"] == "not measured; at most 0.01 is wanted"


def test_junit_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        write_junit(tmp_path / "absent" / "gate.xml", [], seconds=0.0)
    assert list(tmp_path.iterdir()) == []
