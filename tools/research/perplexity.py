"""Perplexity and recall of predictors on an off-grid twin, one JSON line a setting and keep.

    python tools/research/perplexity.py --model DIR --acts FILE.pt --data DATA --out FILE.jsonl \\
        --settings FILE.json [--keep 0.5 0.35] [--windows 4]

The settings file is a list of {"name", "ffn": FfnRecipe fields, "predictor": PredictorRecipe
fields}. Dense and oracle figures on the same windows come first. A setting already in the file
of results is skipped, so a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from twin import (
    append_result,
    heldout_documents,
    load_twin,
    masked_likelihood,
    negative_log_likelihood,
    oracle,
    read_results,
    text_windows,
)

from hireconvert.distill import LayerResult, distill_layer
from hireconvert.families import FfnWeights
from hireconvert.recipe import FfnRecipe, PredictorRecipe
from hireconvert.runtime.hire_predict import Predictor, top_k_mask, varies
from hireconvert.runtime.hire_select import candidate_mask
from hireconvert.runtime.hire_select import kept_mask as runtime_mask
from hireconvert.scoring import estimated_units, layer_counts, levelled, measured

TEXTS = ("wiki", "c4")
RECALL_ROWS = 512


def ffn_weights(module: Any) -> FfnWeights:
    """The matrices of one gated FFN module."""
    down = module.down_proj.weight.T.contiguous()
    return FfnWeights(
        module.gate_proj.weight, module.up_proj.weight, down, None, None, module.act_fn
    )


def permuted(weights: FfnWeights, order: torch.Tensor | None) -> FfnWeights:
    """The weights in the order the export stores them."""
    if order is None:
        return weights
    moved = [t[order] for t in (weights.gate_FD, weights.up_FD, weights.down_FD)]
    return FfnWeights(*moved, None, None, weights.act)


def kept_mask(unit_NS: torch.Tensor, score_NF: torch.Tensor, spec: dict[str, Any]) -> torch.Tensor:
    """What the runtime keeps (its own code but in the plain case, which is faster here)."""
    if spec["group_size"] > 1 or spec["num_common"] or varies(spec):
        return runtime_mask(spec, candidate_mask(spec, unit_NS), unit_NS, score_NF)
    candidate_NF = top_k_mask(unit_NS, spec["num_candidates"])
    if spec["keep"] == "candidates":
        return candidate_NF
    return top_k_mask(score_NF.where(candidate_NF, -1.0), spec["num_kept"])


class PredictedMask:
    """The mask that the shipped runtime selects, from one result a layer."""

    def __init__(self, weights: list[FfnWeights], layers: list[LayerResult]) -> None:
        self.layers = layers
        width = weights[0].up_FD.shape[1]
        self.weights = [permuted(w, r.permutation_F) for w, r in zip(weights, layers, strict=True)]
        self.norms = [w.down_FD.norm(dim=1) for w in self.weights]
        self.predictors = [Predictor(r.spec["predictor"], r.tensors, width) for r in layers]

    def __call__(self, index: int, x_ND: torch.Tensor, scores_NF: torch.Tensor) -> torch.Tensor:
        result = self.layers[index]
        order = result.permutation_F
        scores = scores_NF if order is None else scores_NF[:, order]
        units = estimated_units(
            self.weights[index], self.predictors[index], x_ND, self.norms[index], result.spec
        )
        mask = kept_mask(units, scores, result.spec)
        if order is None:
            return mask
        return torch.zeros_like(mask).scatter_(1, order.expand_as(mask), mask)


class Study:
    """One model, its test windows and its captured inputs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, tokenizer = load_twin(args.model)
        self.windows = {
            name: text_windows(
                tokenizer, heldout_documents(args.data / f"heldout_{name}.txt"), args.windows
            )
            for name in TEXTS
        }
        self.acts = torch.load(args.acts, mmap=True)
        self.weights = [ffn_weights(layer.mlp) for layer in self.model.model.layers]
        last = len(self.weights)
        self.layers = range(1, last, 3) if args.recall_only else range(last)
        self.done = {(r["name"], r["keep"]): r for r in read_results(args.out)}

    def perplexities(self, name: str, keep: float, mask: Any) -> None:
        """Dense or oracle figures, unless they are there already."""
        if (name, keep) in self.done:
            return
        self.record(name, keep, mask, {})

    def record(self, name: str, keep: float, mask: Any, extra: dict[str, Any]) -> None:
        """Measures both texts and writes one line."""
        line: dict[str, Any] = {"name": name, "keep": keep, **extra}
        for text, windows in self.windows.items():
            if mask is None:
                loss, tokens = negative_log_likelihood(self.model, windows)
            else:
                loss, tokens = masked_likelihood(self.model, windows, mask)
            line |= {f"{text}_nll": loss, f"{text}_ppl": math.exp(loss), f"{text}_tokens": tokens}
        append_result(self.args.out, line)
        self.done[name, keep] = line
        print({k: v for k, v in line.items() if k != "setting"}, flush=True)

    def fit(self, setting: dict[str, Any], keep: float) -> list[LayerResult]:
        """One predictor a layer."""
        recipe = FfnRecipe(keep_fraction=keep, **setting.get("ffn", {}))
        predictor = PredictorRecipe(**setting["predictor"])
        stride = self.args.fit_stride
        return [
            distill_layer(
                self.weights[i],
                self.acts["fit"][i][::stride].contiguous(),
                self.acts["held"][i][::4].contiguous(),
                recipe,
                predictor,
                keep,
                seed=0,
            )
            for i in self.layers
        ]

    def run(self, setting: dict[str, Any]) -> None:
        """All keeps of one setting; a fit that does not depend on the keep is used again."""
        name, layers = setting["name"], None
        for keep in self.args.keep:
            if (name, keep) in self.done:
                continue
            started = time.time()
            plain = setting["predictor"].get("distill") is None and not (
                setting.get("ffn", {}).keys() & {"group_size", "common_path"}
            )
            if layers is None or not plain:
                layers = self.fit(setting, keep)
            recipe = FfnRecipe(keep_fraction=keep, **setting.get("ffn", {}))
            counts = layer_counts(self.weights[0].up_FD.shape[0], recipe, keep)
            pairs = zip(self.layers, layers, strict=True)
            layers = [self.recounted(index, result, counts) for index, result in pairs]
            extra = {**self.recalls(layers), "fit_s": round(time.time() - started, 1)}
            extra["setting"] = setting
            if self.args.recall_only:
                line = {"name": name, "keep": keep, **extra}
                append_result(self.args.out, line)
                print(
                    name, round(extra["recall_at_kept"], 4), round(extra["recall"], 4), flush=True
                )
                continue
            self.record(name, keep, PredictedMask(self.weights, layers), extra)

    def recounted(self, index: int, result: LayerResult, counts: dict[str, Any]) -> LayerResult:
        """The predictor of one layer with other counts, and the level that goes with them."""
        weights = permuted(self.weights[index], result.permutation_F)
        fit_ND = self.acts["fit"][index][:: self.args.fit_stride].contiguous()
        spec = {**counts, "predictor": result.spec["predictor"]}
        spec = levelled(weights, fit_ND, spec, result.tensors)
        return LayerResult(spec, result.tensors, result.permutation_F)

    def recalls(self, layers: list[LayerResult]) -> dict[str, Any]:
        """Recall on the dense model's inputs of the test texts, and shares of dense bytes."""
        found: dict[str, list[float]] = {"recall": [], "recall_at_kept": [], "score_mass": []}
        kept: list[dict[str, float]] = []
        read: list[dict[str, float]] = []
        for i, result in zip(self.layers, layers, strict=True):
            inputs = torch.cat([self.acts[text][i][:RECALL_ROWS] for text in TEXTS])
            report = measured(
                permuted(self.weights[i], result.permutation_F), inputs, result.spec, result.tensors
            )
            for key, values in found.items():
                values.append(report[key])
            neurons, dense = result.spec["num_neurons"], report["bytes"]["dense"]
            read.append({key: value / dense for key, value in report["bytes"].items()})
            kept.append({key: value / neurons for key, value in report.get("kept", {}).items()})
        means = {key: sum(values) / len(values) for key, values in found.items()}
        share = mean_of(read)
        means["predictor_share"] = share["predictor"]
        means["total_share"] = share["predictor"] + share["candidates"] + share["kept"]
        return {**means, "recall_worst": min(found["recall"]), "kept_share": mean_of(kept)}


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each key."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def main() -> None:
    """Runs dense, the oracle at every keep, then every setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--model", "--acts", "--data", "--out", "--settings"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--fit-stride", type=int, default=1, help="every n-th calibration row")
    parser.add_argument("--recall-only", action="store_true", help="every third layer, no texts")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    study = Study(args)
    if not args.recall_only:
        study.perplexities("dense", 1.0, None)
        for keep in args.keep:
            study.perplexities("oracle", keep, oracle(keep))
    for setting in json.loads(args.settings.read_text(encoding="utf-8")):
        study.run(setting)


if __name__ == "__main__":
    main()
