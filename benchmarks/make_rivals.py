"""Make the GGUF files that `bench --rival` runs from the weights of a folder, by llama.cpp itself.

    python benchmarks/make_rivals.py MODEL --out FOLDER [--types Q8_0 ...] [--importance TEXT]

llama.cpp's converter writes the weights in float32, its quantizer the rest from that one file, so
that all rivals come from the same numbers. Types whose blocks do not fit the width of a matrix fall
back to others, as llama.cpp decides: the sizes printed are what was written. Files that lie there
already are kept.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fetch_llama import run
from importance import importance, write

from hireconvert.errors import InputError
from hireconvert.subjects import find_program

TYPES = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "IQ4_NL")
SOURCE_TYPE = "F32"
WEIGHED = ("Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "IQ4_NL")
IMPORTANCE_TOKENS = 16384


def convert(model: Path, target: Path, program: Path) -> None:
    """Write the folder's weights in float32."""
    folder = program.parent
    paths = [str(folder / "gguf-py"), str(folder / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    unfinished = target.with_suffix(".partial")
    command = [sys.executable, folder / "convert_hf_to_gguf.py", model, "--outtype", "f32"]
    run([*command, "--outfile", unfinished], env=environment)
    unfinished.replace(target)


def make(model: Path, out: Path, types: Sequence[str], text: Path | None) -> list[Path]:
    """The files, one a type, named MODEL.TYPE.gguf; with a text those of WEIGHED as TYPE_im too."""
    try:
        program = find_program()
    except InputError as error:
        sys.exit(str(error))
    out.mkdir(parents=True, exist_ok=True)
    name = model.resolve().name
    source = out / f"{name}.{SOURCE_TYPE}.gguf"
    wanted = {out / f"{name}.{kind}.gguf": (kind, None) for kind in types}
    if text is not None:
        weights = out / f"{name}.importance"
        weighed = [kind for kind in types if kind in WEIGHED]
        wanted |= {out / f"{name}.{kind}_im.gguf": (kind, weights) for kind in weighed}
        if not weights.is_file():
            write(importance(model, text, IMPORTANCE_TOKENS), weights)
    for target, (kind, weights) in wanted.items():
        if target.is_file():
            continue
        if not source.is_file():
            convert(model, source, program)
        unfinished = target.with_suffix(".partial")
        command = [program, "quantize", source, unfinished, kind, str(os.cpu_count() or 1)]
        run([*command, *([] if weights is None else [weights])])
        unfinished.replace(target)
    return list(wanted)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the files and print their paths and sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder of safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--importance", type=Path, metavar="TEXT", help="calibration text")
    arguments = parser.parse_args(argv)
    for path in make(arguments.model, arguments.out, arguments.types, arguments.importance):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
