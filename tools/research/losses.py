"""Recall of low-rank predictors untrained and trained by each loss, on a few layers.

    python tools/research/losses.py --model DIR --acts FILE.pt --out FILE.jsonl [--layers 3 15 26]

Held recall is on text of the calibration's kind, test recall on wiki and c4 rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from perplexity import ffn_weights
from twin import append_result, load_twin

from hireconvert.distill import distill_layer
from hireconvert.recipe import FfnRecipe, PredictorRecipe
from hireconvert.scoring import measured

STARTS: tuple[dict[str, Any], ...] = (
    {"kind": "lr", "rank": 128},
    {"kind": "lr", "rank": 256, "factor_bits": 8},
    {"kind": "qlr", "bits": 2, "rank": 48},
)


def main() -> None:
    """One line a layer, start and loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--model", "--acts", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 15, 26])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=0.002)
    parser.add_argument("--starts", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model, _ = load_twin(args.model)
    acts = torch.load(args.acts, mmap=True)
    recipe = FfnRecipe(keep_fraction=0.5, over_select=1.3)
    for start in STARTS[: args.starts]:
        losses: tuple[str | None, ...] = (None, "bce", "regression", "listwise")
        for loss in losses if start["kind"] == "lr" and start["rank"] == 128 else losses[:2]:
            for i in args.layers:
                train = {"loss": loss, "steps": args.steps, "batch_rows": 512}
                train |= {"learning_rate": args.rate}
                predictor = PredictorRecipe(**start, distill=train if loss else None)
                weights = ffn_weights(model.model.layers[i].mlp)
                fit, held = acts["fit"][i], acts["held"][i][::4].contiguous()
                result = distill_layer(weights, fit, held, recipe, predictor, 0.5, seed=0)
                x = torch.cat([acts[text][i][:512] for text in ("wiki", "c4")])
                test = measured(weights, x, result.spec, result.tensors)
                line = {"start": start, "loss": loss, "layer": i, "steps": args.steps}
                line |= {"held": result.report["recall"], "test": test["recall"]}
                line |= {"test_at_kept": test["recall_at_kept"], "test_mass": test["score_mass"]}
                line["path"] = result.report.get("distill_recalls")
                append_result(args.out, line)
                print(line, flush=True)


if __name__ == "__main__":
    main()
