"""Tools that nothing else runs: tables find their place in the log, one FFN is timed."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import ROOT, load_script


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(ROOT)  # where its path of the log begins
    return load_script("evidence", monkeypatch)


def test_every_table_has_its_place(tool: ModuleType) -> None:
    found = tool.steps(Path("data"), Path("out"))
    assert {step.name for step in found if step.table} >= {"gate-smollm2", "quality-qwen25"}
    tool.check_marks(found)


def test_a_table_takes_the_place_of_the_last(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.md"
    log.write_text("before\n<!-- begin lossless -->\nold\n<!-- end lossless -->\nafter\n")
    monkeypatch.setattr(tool, "LOG", log)
    tool.write_table("lossless", "| new |\n")
    assert log.read_text() == (
        "before\n<!-- begin lossless -->\n| new |\n<!-- end lossless -->\nafter\n"
    )


def test_a_missing_place_is_told_before_anything_runs(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log.md").write_text("nothing")
    monkeypatch.setattr(tool, "LOG", tmp_path / "log.md")
    monkeypatch.setattr(tool.subprocess, "run", lambda *args, **kwargs: pytest.fail("ran"))
    arguments = ["--data", "data", "--out", str(tmp_path / "out"), "--only", "lossless"]
    monkeypatch.setattr(sys, "argv", ["evidence.py", *arguments])
    with pytest.raises(SystemExit, match="must hold the marks <!-- begin lossless -->"):
        tool.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("refined", [[], ["--refined"]], ids=["stored", "refined"])
def test_one_ffn_is_timed(
    refined: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = load_script("bench_ffn", monkeypatch)
    monkeypatch.setattr(bench, "STREAM_BYTES", 2**16)
    monkeypatch.setattr(bench, "SHAPES", {"smollm2": (64, 96)})
    arguments = ["--memory", "1", "--rounds", "2", "--keep", "0.25", *refined]
    monkeypatch.setattr(sys, "argv", ["bench_ffn.py", *arguments])
    bench.main()
    rows = [
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if "keep 0.25" in line
    ]
    assert rows and all(float(row[1]) > 0 and float(row[4]) > 0 for row in rows)
