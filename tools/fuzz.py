"""Mutated checkpoints and hard states for the certificate, under the sanitizers of gcc.

python tools/fuzz.py --count 100000 --seed 1 --minutes 60 --out build/findings
python tools/fuzz.py --replay build/findings/finding-1-42.json
python tools/fuzz.py --certificate 1000000 --model models/smollm2 --text notes.txt

The kernels are built with -fsanitize=address,undefined into a temporary folder, beside a copy of
the package and its tests, and tests/fuzz_checkpoints.py or tests/fuzz_certificate.py runs there:
they say what is changed and what may come of it. A build is used again as long as no source has
changed. Progress goes to stderr, one JSON summary to stdout; the exit status is 1 if anything was
found. `--start` goes on where another run stopped; all options but `--certificate` are theirs.
"""

import hashlib
import importlib.machinery
import os
import shutil
import subprocess
import sys
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Conversions out of range are not among `undefined`; the vector kernels' own cannot be seen.
FLAGS = (
    "-std=c11", "-fPIC", "-O1", "-g1", "-fopenmp", "-fno-sanitize-recover=all",
    "-fsanitize=address,undefined,float-cast-overflow",
)  # fmt: skip
# An allocation beyond the limit fails as it does where memory is short.
ASAN = (
    "detect_leaks=0:quarantine_size_mb=32:max_allocation_size_mb=1000:allocator_may_return_null=1"
)


def digest(paths: list[Path]) -> str:
    """Of names and content."""
    found = hashlib.sha256(" ".join(FLAGS).encode())
    for path in paths:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def library() -> Path:
    """The kernels with sanitizers, built unless this very source was built before."""
    sources = ROOT / "hireconvert" / "native"
    name = digest(sorted(sources.iterdir()))
    folder = Path(tempfile.gettempdir()) / f"hireconvert-sanitized-{name}"
    made = folder / "kernels.so"
    if made.exists():
        return made
    print("building the kernels with sanitizers, a minute or two", file=sys.stderr, flush=True)
    folder.mkdir(exist_ok=True)
    objects = {path: folder / f"{path.stem}.o" for path in sources.glob("*.c")}

    def compile_one(path: Path) -> None:
        subprocess.run(["gcc", *FLAGS, "-c", "-o", objects[path], path], check=True)

    with ThreadPool(2) as pool:
        largest = sorted(objects, key=lambda path: "kernels_" not in path.name)
        pool.map(compile_one, largest, chunksize=1)
    partial = folder / "partial.so"
    subprocess.run(["gcc", *FLAGS, "-shared", "-o", partial, *objects.values()], check=True)
    partial.rename(made)
    return made


def shared(name: str) -> Path:
    """A library of the compiler's."""
    found = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return Path(found.stdout.strip()).resolve()


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    module = "tests.fuzz_checkpoints"
    if "--certificate" in arguments:
        arguments[arguments.index("--certificate")] = "--count"
        module = "tests.fuzz_certificate"
    kernels = library()
    with tempfile.TemporaryDirectory() as name:
        # A copy: the tree may be worked on while this runs for an hour.
        for part in ("hireconvert", "tests"):
            without = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / part, Path(name) / part, ignore=without)
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        shutil.copy(kernels, Path(name) / "hireconvert" / f"_kernels{suffix}")
        environment = {
            # With that of C++, or torch's own exceptions would be taken for errors.
            "LD_PRELOAD": f"{shared('libasan.so')} {shared('libstdc++.so')}",
            "ASAN_OPTIONS": ASAN,
            "PYTHONPATH": name,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-P", "-m", module, *arguments]
        return subprocess.run(command, env=os.environ | environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
