"""Writes the FFN inputs of an off-grid twin: calibration, held-out of it, and the test texts.

python tools/research/capture.py --model DIR --data DATA --out FILE.pt
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from twin import captured_inputs, heldout_documents, load_twin, pool_documents, text_windows


def main() -> None:
    """Captures fit (code and technical), held (the same sources), wiki and c4 rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fit-windows", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.time()
    model, tokenizer = load_twin(args.model)
    half = args.fit_windows // 2
    fit, held = [], []
    for source in ("code", "technical"):
        documents = pool_documents(args.data / "finetune" / f"{source}.jsonl.gz")
        windows = text_windows(tokenizer, documents, half + 1)
        fit.append(windows[:half])
        held.append(windows[half:])
    texts = {"fit": torch.cat(fit), "held": torch.cat(held)}
    for name in ("wiki", "c4"):
        path = args.data / f"heldout_{name}.txt"
        texts[name] = text_windows(tokenizer, heldout_documents(path), 1)
    rows = {name: captured_inputs(model, windows) for name, windows in texts.items()}
    torch.save(rows, args.out)
    print(
        args.out, {k: tuple(v[0].shape) for k, v in rows.items()}, round(time.time() - start), "s"
    )


if __name__ == "__main__":
    main()
