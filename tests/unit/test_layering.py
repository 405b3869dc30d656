"""The import layers of docs/design.md, read from the source; and what an import costs."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hireconvert"
STAGE_LAYER = 3
LIBRARY = {
    "runtime.hire_native": ["_native"],
    "runtime.hire_blocks": ["_native_step"],
    "runtime.hire_head_native": ["_native_head"],
    "runtime.hire_token": ["_native_token"],
}


def layers() -> dict[str, int]:
    """{module: layer} from the table of docs/design.md."""
    table: dict[str, int] = {}
    for line in (ROOT / "docs" / "design.md").read_text().splitlines():
        row = re.match(r"\| (\d) \| (.*?) \|", line)
        if row:
            table.update({name: int(row[1]) for name in re.findall(r"`([\w.]+)`", row[2])})
    return table


def modules() -> dict[str, Path]:
    """{dotted name below hireconvert: file}, the package's own __init__ left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Modules of hireconvert that a file imports, also inside functions."""
    known, found = modules(), set()
    package = name.rpartition(".")[0] if path.name != "__init__.py" else name
    for node in ast.walk(ast.parse(path.read_text())):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(["hireconvert", *[part for part in up if part], base]).strip(".")
            targets = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        below = {t.removeprefix("hireconvert.") for t in targets if t.startswith("hireconvert.")}
        found |= below & set(known)
    return found - {name}


def graph() -> dict[str, set[str]]:
    return {name: imports(name, path) for name, path in modules().items()}


def layer_of(name: str) -> int | None:
    table = layers()
    if name in table:
        return table[name]
    return 0 if name.split(".")[0] == "runtime" else None


def test_every_module_has_its_layer():
    table = layers()
    assert len(table) > 10
    homeless = [name for name in modules() if layer_of(name) is None]
    assert not homeless, f"add these modules to the table of docs/design.md: {homeless}"
    gone = [name for name in table if name not in modules()]
    assert not gone, f"docs/design.md names modules that do not exist: {gone}"


def test_imports_point_down():
    wrong = [
        f"{name} ({layer_of(name)}) imports {target} ({layer_of(target)})"
        for name, targets in graph().items()
        for target in targets
        if layer_of(target) > layer_of(name) or (layer_of(target) == layer_of(name) == STAGE_LAYER)
    ]
    assert not wrong, wrong


def test_there_are_no_cycles():
    edges, done = graph(), set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_the_reader_of_imports_sees_all_forms(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import hireconvert.errors\nfrom hireconvert import quantize\n"
        "def f():\n    from hireconvert.runtime.hire_ffn import SparseFfn\n"
    )
    assert imports("x", path) == {"errors", "quantize", "runtime.hire_ffn"}
    assert "runtime.hire_ffn" in graph()["runtime.hire_config"]


def test_the_runtime_imports_nothing_of_the_package():
    for name, targets in graph().items():
        if name.startswith("runtime"):
            assert all(target.startswith("runtime") for target in targets), name
            text = modules()[name].read_text()
            assert not re.search(r"^\s*(import|from) hireconvert", text, re.MULTILINE), name
            # By name, and in one file each, the modules of the library that it can do without.
            assert re.findall(r'find_library\("(.*)"\)', text) == LIBRARY.get(name, []), name
            assert "importlib" not in text or name == "runtime.hire_native", name


def test_only_the_command_line_prints():
    printing = {
        name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    assert printing <= {"cli"}


def test_no_import_is_relative_outside_the_runtime():
    for name, path in modules().items():
        if name.startswith("runtime"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), name


def test_importing_the_package_is_light():
    code = (
        "import sys, hireconvert; heavy = {'torch', 'transformers', 'datasets', 'gguf'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]" and not done.stderr


def readme_tree() -> list[str]:
    """Paths of the tree drawn in README.md, an indented block whose lines start with a name."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^ {4}hireconvert/.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    paths, stack = [], []
    assert block
    for line in block[0].splitlines():
        entry = re.match(r"^ {4}( *)([\w.\-]+/?)(?:\s|$)", line)
        if entry:
            depth = len(entry[1]) // 2
            stack = [*stack[:depth], entry[2]]
            paths.append("".join(stack))
    return paths


def test_the_readme_tree_is_what_lies_on_disk():
    drawn = {path for path in readme_tree() if path.endswith(".py")}
    on_disk = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "hireconvert").rglob("*.py")
        if not path.stem.startswith("__")
    }
    assert drawn == on_disk
