"""Fetch llama.cpp from npm, pinned by hash, and build the program that `bench --rival` runs.

    python benchmarks/fetch_llama.py [--out FOLDER]

Two packages: the prebuilt libraries of one llama.cpp, and its own source of the same commit (a git
bundle), for the headers and for the converter that `make_rivals.py` runs. Needs npm, git, gcc and
pip. Without --out the program lies where `hireconvert bench` looks for it.
"""

import argparse
import base64
import hashlib
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hireconvert.baselines import cache_folder

HERE = Path(__file__).parent
PROGRAM = "llama_rival"
# What npm calls the integrity of the archive, for each package.
LIBRARIES = (
    "@node-llama-cpp/linux-x64@3.22.1",
    "5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg==",
)
SOURCE = (
    "node-llama-cpp@3.22.1",
    "bltIipuWmc123H7tMIgDGKSsSrhmhlQYeVUC48XTjVW7XGJJiJJyCdlTMzQ/LiWoPkGDpcL4FviDpgw7qfTiDw==",
)
COMMIT = "de3ff815ea7d559ee917f063901b8986f038abc6"
LINKED = ("libllama.v0.5.0.so", "libggml.v0.5.0.so", "libggml-base.so")


def run(command: Sequence[str | Path], **options: object) -> str:
    """Standard output; exits with the command's last lines when it fails."""
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error.strerror}. Install it and run this again.")
    if done.returncode != 0:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        sys.exit(f"{' '.join(map(str, command[:3]))} failed:\n{last_lines}")
    return done.stdout


def fetch(package: str, sha512: str, folder: Path) -> Path:
    """The unpacked archive of an npm package whose hash is the expected one."""
    folder.mkdir()
    run(["npm", "pack", "--silent", "--pack-destination", folder, package])
    (archive,) = folder.glob("*.tgz")
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != sha512:
        sys.exit(f"{package}: found SHA-512 {found}, expected {sha512}. Not used.")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / "package"


def build(libraries: Path, source: Path, out: Path) -> None:
    """Compile the program beside the libraries that it loads."""
    for path in libraries.glob("*.so"):
        shutil.copy2(path, out)
    command = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{source / 'include'}", f"-I{source / 'ggml' / 'include'}"]
    command += [str(HERE / f"{PROGRAM}.c"), "-o", str(out / PROGRAM)]
    run([*command, *(out / name for name in LINKED), "-Wl,-rpath,$ORIGIN"])


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch, check and build; prints where the program lies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=cache_folder() / "llama")
    out = parser.parse_args(argv).out
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit(
            "these libraries are for Linux on x86-64. Elsewhere compile benchmarks/llama_rival.c "
            "against llama.cpp yourself and let HIRE_LLAMA name it."
        )
    with tempfile.TemporaryDirectory(prefix="fetching-") as scratch:
        work = Path(scratch)
        libraries = fetch(*LIBRARIES, work / "libraries") / "bins" / "linux-x64"
        bundle = fetch(*SOURCE, work / "source") / "llama" / "gitRelease.bundle"
        source = work / "llama.cpp"
        run(["git", "clone", "--quiet", bundle, source])
        found = run(["git", "-C", source, "rev-parse", "HEAD"]).strip()
        if found != COMMIT:
            sys.exit(f"the bundle holds commit {found}, expected {COMMIT}.")
        ready = work / "ready"
        ready.mkdir()
        build(libraries, source, ready)
        for name in ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE"):
            run(["cp", "-r", source / name, ready])
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        run([*pip, "--target", ready / "python", "-r", HERE / "requirements.txt"])
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(ready, out)
    print(out / PROGRAM)


if __name__ == "__main__":
    main()
