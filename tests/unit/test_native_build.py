"""The C files: no warnings, no undefined behaviour, and an installation that does without them."""

import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

from tests.native import LEVELS, _native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "hireconvert" / "native"
COMPILER = shutil.which("gcc")
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
pytestmark = pytest.mark.skipif(COMPILER is None, reason="this machine has no gcc")
STRICT = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-Wpedantic", "-fPIC")


def build(out: Path, *flags: str) -> None:
    """Each source by itself, two at a time: the heavy ones take a minute with sanitizers."""

    def run(*command: str) -> None:
        done = subprocess.run(
            [COMPILER, *STRICT, *flags, *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]

    objects = {path: str(out.with_name(f"{path.stem}.o")) for path in SOURCES.glob("*.c")}
    with ThreadPool(2) as pool:
        largest = sorted(objects, key=lambda path: "kernels_" not in path.name)
        pool.map(lambda path: run("-c", "-o", objects[path], str(path)), largest, chunksize=1)
    run("-shared", "-o", str(out), *objects.values())


def run_python(code: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=500,
        check=False,
    )


def test_every_machine_has_the_portable_level_and_says_its_abi():
    assert LEVELS[0] == "portable"
    header = (SOURCES / "kernels.h").read_text()
    assert int(re.search(r"#define HIRE_ABI (\d+)", header)[1]) == _native.ABI
    fields = re.search(r"typedef struct \{(.*?)\} hire_layer;", header, re.DOTALL)[1]
    fields = re.sub(r"/\*.*?\*/", "", fields, flags=re.DOTALL)
    names = re.findall(r"(\w+);", fields)
    assert names == [*_native._NUMBERS, *_native._POINTERS]


@pytest.mark.parametrize("flags", [("-O2", "-fopenmp"), ("-O0",)])
def test_the_sources_compile_without_a_warning(flags, tmp_path):
    build(tmp_path / "kernels.so", *flags)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """A folder with the package and its tests, the library built with sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    package = folder / "hireconvert"
    shutil.copytree(
        ROOT / "hireconvert", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copytree(ROOT / "tests", folder / "tests")
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp")
    build(package / f"_kernels{SUFFIX}", "-O1", *checks)
    return folder


def of_the_compiler(name: str) -> str:
    """Where a library of the compiler's lies."""
    found = subprocess.run(
        [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return str(Path(found.stdout.strip()).resolve())


@pytest.mark.parametrize("fuzz", ["native_fuzz", "native_head"])
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_read_or_written_out_of_bounds(level, fuzz, sanitized):
    """Some hundred mutations of what layers and heads are packed from, under the sanitizers."""
    done = run_python(
        ["-P", "-m", f"tests.{fuzz}", "150" if level == LEVELS[-1] else "40"],
        LD_PRELOAD=of_the_compiler("libasan.so"),
        ASAN_OPTIONS="detect_leaks=0",
        HIRE_NATIVE=level,
        PYTHONPATH=str(sanitized),
        OMP_NUM_THREADS="2",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    refused, ran = map(int, done.stdout.split())
    assert refused > 10 and ran > 2


def test_mutated_checkpoints_are_refused_or_decode(sanitized, tmp_path):
    """The first of the mutants of tools/fuzz.py."""
    libraries = [of_the_compiler(name) for name in ("libasan.so", "libstdc++.so")]
    done = run_python(
        ["-P", "-m", "tests.fuzz_checkpoints", "--count", "150", "--out", str(tmp_path)],
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0:max_allocation_size_mb=1000:allocator_may_return_null=1",
        PYTHONPATH=str(sanitized),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads(done.stdout)
    assert summary["ran"] == summary["refused"] + summary["decodes"] == 150
    assert summary["refused"] > 50 and summary["decodes"] > 30


def test_a_finding_can_be_run_again(tmp_path):
    """A mutant that is fine, told as a finding: the tool makes it anew and says what came of it."""
    change = {"op": "json", "file": "config.json", "path": ["hire", "head"], "action": "set"}
    finding = {"case": 0, "level": "portable", "generate": True}
    path = tmp_path / "finding.json"
    for changes, kind in (([], "decodes"), ([{**change, "value": 3}], "refused")):
        path.write_text(json.dumps({**finding, "changes": changes}))
        done = run_python(
            ["-P", "-m", "tests.fuzz_checkpoints", "--replay", str(path)], PYTHONPATH=str(ROOT)
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["kind"] == kind


def test_the_package_lives_without_a_library(tmp_path):
    package = tmp_path / "hireconvert"
    shutil.copytree(
        ROOT / "hireconvert", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = (
        "from hireconvert.runtime import hire_native as n;"
        "assert n.native is None; print(n._MISSING)"
    )
    done = run_python(["-P", "-c", code], PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "installed without a C compiler and has no native library" in done.stdout


def test_a_library_that_does_not_load_is_none(tmp_path):
    """As where the OpenMP runtime is missing: a reason in the log, not a traceback."""
    package = tmp_path / "hireconvert"
    shutil.copytree(
        ROOT / "hireconvert", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (package / f"_kernels{SUFFIX}").write_bytes(b"no library")
    code = "from hireconvert.runtime import hire_native as n; print(n.native, n._MISSING)"
    done = run_python(["-P", "-c", code], PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("None ") and "cannot be loaded" in done.stdout


def test_setup_goes_on_where_nothing_compiles(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(SOURCES, tree / "hireconvert" / "native")
    shutil.copy(ROOT / "setup.py", tree)
    for compiler, built in (("/bin/false", False), (COMPILER, True)):
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=tree,
            env={**os.environ, "CC": compiler},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert bool(list((tree / "hireconvert").glob("_kernels*"))) == built
