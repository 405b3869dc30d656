"""Threads of the library's own (`native/team.c` without OpenMP): every size, callers at once,
children after a fork, and no time of the CPU while they wait."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "hireconvert" / "native"
COMPILER = shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="this machine has no gcc")


@pytest.fixture(scope="module", params=["", "-fsanitize=thread"])
def check(request, tmp_path_factory) -> Path:
    """The program of tests/team_check.c, plain and under the thread sanitizer."""
    program = tmp_path_factory.mktemp("team") / "check"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-pthread", f"-I{SOURCES}"]
    files = [ROOT / "tests" / "team_check.c", SOURCES / "team.c"]
    command = [COMPILER, *flags, *filter(None, [request.param]), *files, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, mode: str) -> str:
    done = subprocess.run([program, mode], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("mode", ["sizes", "callers"])
def test_work_is_shared_and_seen_by_all(check, mode):
    run(check, mode)


@pytest.mark.parametrize("check", [""], indirect=True)
def test_children_have_teams_of_their_own(check):
    run(check, "fork")


@pytest.mark.parametrize("check", [""], indirect=True)
def test_who_waits_sleeps(check):
    """Half a second idle, and half a second of three threads at a barrier."""
    idle, waiting = map(float, run(check, "sleep").split())
    assert idle < 0.05 and waiting < 0.05


@pytest.mark.parametrize("pair", [("avx2", "neon"), ("neon", "portable")])
def test_every_level_has_the_same_functions(pair):
    """A level that this machine does not run would not be missed by any other test."""
    text = {name: (SOURCES / f"simd_{name}.h").read_text() for name in pair}
    names = [
        {line.split("(")[0].split()[-1].lstrip("*") for line in body.splitlines()
         if line.startswith("static inline")}
        for body in text.values()
    ]  # fmt: skip
    first, second = ({name for name in found if name.startswith(("v_", "w_"))} for found in names)
    helpers = {"w_bits", "w_widened", "v_pow2_half", "v_bf16_half", "v_code_half"}
    assert first - helpers == second - helpers


@pytest.mark.parametrize(("refuses", "wanted", "threads"), [
    (False, "", 0), (False, "off", 1), (True, "", 1),
])  # fmt: skip
def test_setup_takes_own_threads_where_openmp_is_not(refuses, wanted, threads, tmp_path):
    """OpenMP's, those of HIRE_OPENMP=off, and those of a compiler that knows no -fopenmp."""
    native = tmp_path / "hireconvert" / "native"
    native.mkdir(parents=True)
    for name in ("team.c", "team.h", "kernels.h", "low_rows.h"):
        shutil.copy(SOURCES / name, native)
    shutil.copy(ROOT / "setup.py", tmp_path)
    compiler = tmp_path / "cc"
    known = 'case "$*" in *-fopenmp*) exit 1;; esac\n' if refuses else ""
    compiler.write_text(f'#!/bin/sh\n{known}exec {COMPILER} "$@"\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CC": str(compiler), "HIRE_OPENMP": wanted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [library] = (tmp_path / "hireconvert").glob("_kernels*")
    assert ctypes.CDLL(str(library)).hire_threads() == threads
