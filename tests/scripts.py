"""Scripts of tools/ as modules, which they are not: for tests that call into them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/NAME.py, run as a module for the time of one test."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where its dataclasses look for types
    spec.loader.exec_module(module)
    return module
