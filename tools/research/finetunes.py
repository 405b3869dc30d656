"""What a finetune's parts are worth: short runs that differ in one thing, beside no training.

    python tools/research/finetunes.py --model FOLDER --data DIR --out OUT.md [--tokens 16384]
        [--keep 0.4] [--runs NAME ...]

Neurons that are not kept count as zero (with estimates little is left to train for: docs/log.md).
DIR holds heldout_wiki.txt, heldout_c4.txt and finetune/, the text to train on. Figures are paired
against the original dense model on windows of 512 of both texts: with the best neurons by exact
score, then with those that a low-rank predictor names, fitted to the trained weights. Recall and
score mass are that predictor's, of the same bytes for every run, and of the one fitted to the
original weights, which a run that keeps its predictor would ship. Rows already in OUT.jsonl are
not made again. Shape suffixes: N rows (scored positions), D width, F neurons, W windows, T tokens.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from evidence_finetune import figures, texts

from hireconvert.calibrate import calibrate, layer_file, load_rows
from hireconvert.data import evaluation_windows, training_tokens
from hireconvert.distill import distill_layer
from hireconvert.evaluate import hidden_states
from hireconvert.families import (
    FfnWeights,
    Layout,
    ffn_parts,
    find_layout,
    num_layers,
    read_ffn_weights,
)
from hireconvert.finetune import finetune
from hireconvert.runtime.hire_predict import Predictor
from hireconvert.schema import DataRecipe, FfnRecipe, FinetuneRecipe
from hireconvert.scoring import layer_counts, measured
from hireconvert.student import Selection, selecting

FIT_ROWS, HELD_ROWS = 4096, 1024
ARMS = ("exact", "named", "dense")
LM = {"kl": 0.0, "lm": 1.0}
FEATURES = {"kl": 0.0, "features": 1.0}
# By name: what differs from the recipe's defaults without annealing; the share kept (None: --keep).
RUNS: dict[str, tuple[dict[str, Any], float | None]] = {
    "untrained": ({}, None),
    "KL, exact scores select": ({}, None),
    "the share kept falls from .7 over 30 %": ({"anneal": 0.3}, None),
    "predictors select": ({"mask": "predicted"}, None),
    "exact scores, then predictors": ({"mask": "oracle_then_predicted"}, None),
    "layer outputs alone": ({"loss": FEATURES}, None),
    "KL and layer outputs": ({"loss": {"features": 1.0}}, None),
    "the text's next tokens alone": ({"loss": LM}, None),
    "the same, dense: nothing selects": ({"loss": LM}, 1.0),
    "FFN weights alone": ({"parameters": "ffn"}, None),
    "attention too": ({"parameters": "all_but_embeddings"}, None),
    "low-rank updates, rank 32, 4 times the rate": (
        {"lora_rank": 32, "learning_rate": 2.0e-4},
        None,
    ),
    "twice the rate": ({"learning_rate": 1.0e-4}, None),
}

Predictors = list[tuple[dict[str, Any], dict[str, torch.Tensor]]]


def predictor(
    index: int, weights: FfnWeights, fit_ND: torch.Tensor, held_ND: torch.Tensor, ffn: FfnRecipe
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One layer's predictor as the recipe, which is the same for all layers, has it."""
    recipe, keep = ffn.predictor, ffn.keep_fraction
    assert not isinstance(recipe, list) and not isinstance(keep, list)
    made = distill_layer(weights, fit_ND, held_ND, ffn, recipe, keep, seed=index, ordered=True)
    return made.spec, made.tensors


@contextmanager
def selects(
    model: Any, layout: Layout, counts: dict[str, Any], predictors: Predictors | None
) -> Iterator[None]:
    """Every layer keeps its best neurons, of those that its predictor names if there is one."""
    with selecting(model, layout, [counts] * num_layers(model), Selection(0.0, 1)) as student:
        for layer, (spec, tensors) in zip(student.layers, predictors or (), strict=False):
            width = layer.parts.down_FD().shape[1]
            layer.predict_by(Predictor(spec["predictor"], tensors, width), spec)
        yield


class Bench:
    """The original model, the windows, and what is measured on them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.original = self.load()
        self.layout = find_layout(self.original)
        predictor = {"kind": "lr", "rank": arguments.rank, "distill": None}
        over = {"over_select": arguments.over_select, "predictor": predictor}
        self.ffn = FfnRecipe(keep_fraction=arguments.keep, **over)
        self.windows = {
            name: evaluation_windows(
                text, self.tokenizer, num_tokens=arguments.held_tokens, window=512
            ).ids_WT
            for name, text in texts(arguments.data).items()
            if name != "stdlib"
        }
        dense = self.original
        self.dense = {name: hidden_states(dense, ids) for name, ids in self.windows.items()}
        self.text = training_tokens(
            DataRecipe(
                source=str(arguments.data / "finetune"),
                num_tokens=arguments.tokens + FIT_ROWS + HELD_ROWS,
                window=512,
            ),
            self.tokenizer,
            {},
            seed=0,
        ).fit_WT
        self.fit_WT = self.text[arguments.tokens // 512 :]  # not trained on
        self.kept, _ = self.fitted(self.original, [])

    def load(self) -> Any:
        """A fresh copy of the original."""
        model = AutoModelForCausalLM.from_pretrained(self.arguments.model, dtype=torch.float32)
        return model.eval().requires_grad_(False)

    def trained(self, changes: dict[str, Any], keep: float | None) -> Any:
        """The model after a run."""
        model = self.load()
        recipe = FinetuneRecipe(num_tokens=self.arguments.tokens, **{"anneal": 0.0, **changes})
        ffn = self.ffn if keep is None else self.ffn.model_copy(update={"keep_fraction": keep})

        def fit(
            index: int, weights: FfnWeights, fit_ND: torch.Tensor, held_ND: torch.Tensor
        ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
            return predictor(index, weights, fit_ND, held_ND, ffn)

        windows_WT = self.text[: self.arguments.tokens // 512]
        finetune(model, self.layout, windows_WT, recipe=recipe, ffn=ffn, seed=0, fit=fit)
        return model

    def row(self, name: str) -> dict[str, Any]:
        """One run and its figures."""
        changes, keep = RUNS[name]
        start = time.time()
        model = self.load() if name == "untrained" else self.trained(changes, keep)
        return {"name": name, "seconds": time.time() - start, **self.measured(model)}

    @torch.no_grad()
    def fitted(self, model: Any, kept: Predictors) -> tuple[Predictors, dict[str, Any]]:
        """Predictors of a model as it is now, and what they and those `kept` recall.

        That is (recall, score mass) on the windows, means over layers.
        """
        held_WT = torch.cat(list(self.windows.values()))
        new: Predictors = []
        totals: dict[str, Any] = {}
        with TemporaryDirectory() as folder:
            calibrate(model, self.layout, self.fit_WT, held_WT, out=Path(folder))
            for index in range(num_layers(model)):
                weights = read_ffn_weights(model, self.layout, index)
                fit_ND, x_ND = load_rows(Path(folder), layer_file(index))
                rows = fit_ND[:-HELD_ROWS], fit_ND[-HELD_ROWS:]
                new.append(predictor(index, weights, *rows, self.ffn))
                for name, own in (("recall_new", new), ("recall_kept", kept or new)):
                    found = measured(weights, x_ND, *own[index])
                    both = torch.tensor([found["recall"], found["score_mass"]])
                    totals[name] = totals.get(name, 0) + both
        return new, {name: (total / len(new)).tolist() for name, total in totals.items()}

    @torch.no_grad()
    def measured(self, model: Any) -> dict[str, Any]:
        """The figures of a model."""
        new, recalls = self.fitted(model, self.kept)
        neurons = ffn_parts(model, self.layout, 0).down_FD().shape[0]
        counts = layer_counts(neurons, self.ffn, self.arguments.keep)
        found = {}
        for arm, predictors in (("exact", None), ("named", new)):
            with selects(model, self.layout, counts, predictors):
                found[arm] = self.figures(model)
        return {"dense": self.figures(model), **found, **recalls}

    def figures(self, model: Any) -> dict[str, Any]:
        """Of each text: perplexity over the original's with its interval, and mean KL."""
        found = {}
        for name, ids_WT in self.windows.items():
            each = figures(self.original, self.dense[name], hidden_states(model, ids_WT), ids_WT)
            ratio = each["ratio"]
            percent = [100 * (value - 1) for value in (ratio.point, ratio.low, ratio.high)]
            found[name] = {"percent": percent, "kl": each["kl"]}
        return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| run | exact scores select: perplexity %, wiki (95 %) | c4 | KL | a predictor names: KL "
        "| dense view: perplexity % | KL | recall, score mass: predictor fitted anew | kept |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        exact, dense = row["exact"], row["dense"]
        kl = {arm: "{:.4f}, {:.4f}".format(*(t["kl"] for t in row[arm].values())) for arm in ARMS}
        cells = [row["name"]]
        cells += ["{:+.2f} ({:+.2f}, {:+.2f})".format(*one["percent"]) for one in exact.values()]
        cells += [kl["exact"], kl["named"]]
        cells += ["{:+.2f}, {:+.2f}".format(*(one["percent"][0] for one in dense.values()))]
        cells += [kl["dense"]]
        cells += ["{:.4f}, {:.4f}".format(*row[key]) for key in ("recall_new", "recall_kept")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--model", "--data", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--held-tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--over-select", type=float, default=1.25)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    store = arguments.out.with_suffix(".jsonl")
    rows = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    bench = Bench(arguments)
    for name in arguments.runs:
        if name in [row["name"] for row in rows]:
            continue
        rows.append(bench.row(name))
        with store.open("a") as lines:
            lines.write(json.dumps(rows[-1]) + "\n")
        arguments.out.write_text(table(rows))
        print(f"{rows[-1]['seconds']:.0f} s: " + table(rows[-1:]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
