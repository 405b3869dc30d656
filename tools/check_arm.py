"""The library on 64-bit ARM, on a machine that is none: compiled for it, and run in an emulator.

python tools/check_arm.py --work build/arm            (some minutes; all of --tests: an hour)
python tools/check_arm.py --work build/arm --tests tests/parity/test_native_head.py

Fetches into --work what it needs, 170 MB from PyPI and Debian (an amd64 Debian with apt and dpkg):
ziglang, a cross-compiler; qemu-user-static; Python and PyTorch for ARM. Compiles every source for
Linux and macOS without a warning, then has Python on the emulated ARM decode the layers and heads
of the tests' cases. The portable level must give this machine's portable bits; the NEON levels,
which add in the order of AVX2, the bits of that. `--tests` runs tests of the repository there.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "hireconvert" / "native"
TARGETS = ("aarch64-linux-gnu.2.28", "aarch64-macos")
STRICT = (
    "-std=c11", "-O2", "-g0", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off",
    "-Wall", "-Wextra", "-Werror",
)  # fmt: skip
LIBRARY = "_kernels.cpython-311-aarch64-linux-gnu.so"
DEBIAN = (
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libssl3",
    "zlib1g", "libexpat1", "libffi8", "libbz2-1.0", "liblzma5", "libgomp1", "libstdc++6",
    "libgcc-s1", "libuuid1", "libsqlite3-0", "libncursesw6", "libtinfo6", "libreadline8",
)  # fmt: skip
TORCH = "torch==2.8.0"  # the last whose wheel for ARM does not ask for CUDA
PYTHON = (
    "filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec",
    "transformers>=5.20,<6", "numpy", "psutil", "pytest", "pytest-timeout", "pydantic", "pyyaml",
    "typer", "rich", "safetensors", "huggingface_hub>=1.0",
)  # fmt: skip


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> None:
    """Raises SystemExit where a command fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:300]} failed ({done.returncode})")


def fetch_debian(work: Path) -> None:
    """qemu for this machine and a Python for ARM, unpacked and not installed."""
    packages = work / "debian"
    for folder in ("lists/partial", "cache/archives/partial", "debs"):
        (packages / folder).mkdir(parents=True, exist_ok=True)
    source = packages / "sources.list"
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    source.write_text(
        f"deb [arch=arm64,amd64 signed-by={key}] http://deb.debian.org/debian bookworm main\n"
    )
    (packages / "status").touch()
    settings = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64,amd64", "Dir::State": packages,
        "Dir::State::status": packages / "status", "Dir::Cache": packages / "cache",
        "Dir::Etc::sourcelist": source, "Dir::Etc::sourceparts": "/dev/null",
        "Debug::NoLocking": "1", "APT::Sandbox::User": "root",
    }  # fmt: skip
    options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    run("apt-get", *options, "-qq", "update")
    names = [*DEBIAN, "qemu-user-static:amd64"]
    run("apt-get", *options, "-qq", "download", *names, cwd=packages / "debs")
    for package in (packages / "debs").glob("*.deb"):
        run("dpkg-deb", "-x", package, work / "root")
    shutil.rmtree(packages)


def fetch_python(work: Path) -> None:
    """PyTorch and what the tests need, for ARM; the cross-compiler, for this machine."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet")
    platforms = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
    foreign = ["--target", work / "site", "--python-version", "3.11", "--only-binary=:all:"]
    foreign += [part for name in platforms for part in ("--platform", name)]
    # Dependencies by name: pip would judge their markers by this machine.
    run(*pip, *foreign, "--no-deps", TORCH, "accelerate")
    run(*pip, *foreign, *PYTHON)
    run(*pip, "--target", work / "zig", "ziglang")


def compile_for(target: str, work: Path) -> list[Path]:
    """The objects of all sources. Raises SystemExit on a warning."""
    objects = []
    out = work / target
    out.mkdir(exist_ok=True)
    for path in sorted(SOURCES.glob("*.c")):
        objects.append(out / f"{path.stem}.o")
        zig(work, "-target", target, *STRICT, "-c", path, "-o", objects[-1])
    return objects


def zig(work: Path, *arguments: str | Path) -> None:
    """The cross-compiler."""
    cache = str(work / "zig_cache")
    run(
        sys.executable, "-m", "ziglang", "cc", *arguments,
        PYTHONPATH=str(work / "zig"), ZIG_GLOBAL_CACHE_DIR=cache, ZIG_LOCAL_CACHE_DIR=cache,
    )  # fmt: skip


def emulate(work: Path, *arguments: str | Path) -> None:
    """Python on ARM, in the copy of the repository; a CPU with FEAT_DotProd and without SVE."""
    root = work / "root"
    run(
        root / "usr/bin/qemu-aarch64-static", "-cpu", "max,sve=off", "-L", root,
        root / "usr/bin/python3.11", *arguments,
        cwd=work / "tree", PYTHONPATH=f"{work / 'tree'}:{work / 'site'}",
        PYTHONHOME=str(root / "usr"), OMP_NUM_THREADS="1", LD_LIBRARY_PATH="",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch, compile, compare; what was compared goes to stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tests", nargs="*", default=[])
    options = parser.parse_args(argv)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "root").exists():
        fetch_debian(work)
    if not (work / "zig").exists():
        fetch_python(work)
    objects = {target: compile_for(target, work) for target in TARGETS}
    print(f"compiled for {' and '.join(TARGETS)}", flush=True)
    shutil.rmtree(work / "tree", ignore_errors=True)
    for folder in ("hireconvert", "tests", "tools"):
        shutil.copytree(
            ROOT / folder, work / "tree" / folder, ignore=shutil.ignore_patterns("*.so", "__pyc*")
        )
    shutil.copy(ROOT / "pyproject.toml", work / "tree")
    built = work / "tree" / "hireconvert" / LIBRARY
    shared = ("-shared", "-pthread", "-lm", *objects[TARGETS[0]])
    zig(work, "-target", TARGETS[0], *shared, "-o", built)
    cases = work / "cases.pt"
    run(sys.executable, "-m", "tools.arm_cases", "write", cases, cwd=ROOT, OMP_NUM_THREADS="1")
    emulate(work, "-m", "tools.arm_cases", "compare", cases)
    if options.tests:
        emulate(work, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options.tests)


if __name__ == "__main__":
    main()
