"""What `benchmarks/llama_rival.c` answers, without llama.cpp; the model's name says how it behaves.

    NAME serve MODEL THREADS

`tiny.gguf` serves a vocabulary of VOCABULARY tokens, two threads faster than one; `small.gguf` one
row fewer; `broken.gguf` cannot be loaded; `crash.gguf` dies while it decodes; `chatty.gguf` says
what is not JSON.
"""

import json
import os
import struct
import sys
from pathlib import Path

VOCABULARY = 259  # of tests/tiny_files.py


def install(folder: Path) -> Path:
    """A program that runs this file."""
    path = folder / "llama_rival"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" "$@"\n')
    path.chmod(0o755)
    return path


def answer(model: str, threads: list[int], line: str) -> object:
    """The answer to one line."""
    command, *words = line.split()
    if command == "threads":
        threads[0] = int(words[0])
        return {"threads": threads[0]}
    if command == "memory":
        return {"peak_bytes": 2000, "resident_bytes": 1000}
    if command == "decode":
        if model == "crash":
            sys.exit("no more memory")
        return {"prefill_ms": 1.0, "token_ms": [4.0 / threads[0]] * int(words[1])}
    rows, numbers = len(words) - 1, [float(column % 7) for column in range(VOCABULARY)]
    Path(words[0]).write_bytes(struct.pack(f"{VOCABULARY}f", *numbers) * rows)
    return {"rows": rows, "vocabulary": VOCABULARY}


def main() -> None:
    """Serve lines until there are no more."""
    model, threads = Path(sys.argv[2]).stem, [int(sys.argv[3])]
    if model == "broken":
        sys.stdout.write(json.dumps({"error": "llama.cpp cannot load this file"}) + "\n")
        sys.exit(1)
    facts = {"version": "0", "system": "FAKE = 1", "description": model}
    vocabulary = VOCABULARY - (model == "small")
    facts |= {"load_ms": 1.0, "bytes_per_token": 5000, "vocabulary": vocabulary}
    greeting = "hello" if model == "chatty" else json.dumps(facts)
    sys.stdout.write(greeting + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(model, threads, line)) + "\n")
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
