"""The tool that rewrites measured tables: every step finds the place of its table in the log."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "tools" / "evidence.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "evidence", module)  # where its dataclass looks for types
    spec.loader.exec_module(module)
    return module


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
