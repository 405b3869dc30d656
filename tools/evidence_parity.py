"""Decoding against scope `all` on a real model: perplexity of the same tokens, both ways.

    python tools/evidence_parity.py --model FOLDER --out OUT.md [--dtypes float32,bfloat16]

Text is what every Python carries (pydoc_data.topics), so that anybody can repeat the table. Rows
of the table appear as they are measured. Shape suffixes: N rows, D width, T tokens.
"""

import argparse
import copy
import pydoc_data.topics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hireconvert.calibrate import calibrate, layer_file, load_rows
from hireconvert.distill import distill_layer
from hireconvert.families import find_layout, num_layers, read_ffn_weights
from hireconvert.runtime import modeling_hire
from hireconvert.schema import FfnRecipe, PredictorRecipe

WINDOW, NUM_WINDOWS, CALIBRATION = 1024, 6, 1024


def windows(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration and evaluation token ids, [1, T] and [windows, T]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids_T = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    wanted = CALIBRATION + NUM_WINDOWS * WINDOW
    return ids_T[None, :CALIBRATION], ids_T[CALIBRATION:wanted].view(NUM_WINDOWS, WINDOW)


def converted(native: PreTrainedModel, calibration_1T: torch.Tensor) -> Any:
    """A HiRE model as the shipped recipes make it at keep 0.5: 4 bits, every candidate kept."""
    layout = find_layout(native)
    predictor = PredictorRecipe(kind="q", bits=4, block=96, symmetric=False)
    recipe = FfnRecipe(keep_fraction=0.5, over_select=1.19, keep="candidates", predictor=predictor)
    results = []
    with tempfile.TemporaryDirectory() as out:
        calibrate(native, layout, calibration_1T, calibration_1T[:, :64], out=Path(out))
        for index in range(num_layers(native)):
            fit_ND, held_ND = load_rows(Path(out), layer_file(index))
            weights = read_ffn_weights(native, layout, index)
            results.append(distill_layer(weights, fit_ND, held_ND, recipe, predictor, 0.5, seed=0))
    config = copy.deepcopy(native.config)
    config.hire = {
        "format_version": 1,
        "layout": layout,
        "ffn": {"layers": [result.spec for result in results]},
        "head": None,
        "max_decode_queries": 32,
        "max_sparse_rows": 8,
    }
    model = modeling_hire.hire_class(type(native))(config).eval()
    model.load_state_dict(native.state_dict())
    model.tie_weights()
    for layer, result in zip(model.model.hire_layers.values(), results, strict=True):
        layer.predictor_tensors = result.tensors
    return model


@torch.no_grad()
def losses(model: Any, windows_WT: torch.Tensor, stepwise: bool) -> torch.Tensor:
    """Negative log likelihood of every token but the first of each window, float64 [N]."""
    found = []
    for ids_T in windows_WT:
        if stepwise:
            cache, logits = None, []
            for position in range(ids_T.shape[0] - 1):
                out = model(ids_T[None, position : position + 1], past_key_values=cache)
                cache = out.past_key_values
                logits.append(out.logits[0, -1])
            logits_TV = torch.stack(logits)
        else:
            logits_TV = model(ids_T[None, :-1], use_cache=False).logits[0]
        log_TV = logits_TV.float().log_softmax(-1)
        found.append(-log_TV.gather(1, ids_T[1:, None])[:, 0].double())
    return torch.cat(found)


def both_ways(model: Any, windows_WT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses token by token and in one pass; a HiRE model selects at all positions but 0."""
    sparse = hasattr(model, "set_hire_scope")
    if sparse:
        model.set_hire_scope("all", dense_prefix=1)
    one = losses(model, windows_WT, False)
    if sparse:
        model.set_hire_scope("decode")
        model.hire_stats(reset=True)
    step = losses(model, windows_WT, True)
    if sparse:
        rows = model.hire_stats()["layers"][0]["rows"]
        assert rows == step.numel() - windows_WT.shape[0], "decoding did not select"
    return step, one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder, its dense view is used")
    parser.add_argument("--out", type=Path, required=True, help="the table, in Markdown")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    calibration_1T, windows_WT = windows(arguments.model)
    native = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, trust_remote_code=False
    ).eval()
    model = converted(native, calibration_1T)
    lines = [
        f"Decoding token by token against one pass, {windows_WT.numel()} tokens, 1 thread.",
        "HiRE: 4 bits, keep 0.5, over 1.19, candidates; scope `all` with dense_prefix 1.",
        "",
        "| dtype | model | token by token | one pass | difference | 95 % interval "
        "| mean abs, nats |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name in arguments.dtypes.split(","):
        for label, candidate in (("HiRE", model), ("dense", native)):
            candidate.to(getattr(torch, name))
            step, one = both_ways(candidate, windows_WT)
            first, second = float(step.mean().exp()), float(one.mean().exp())
            noise = 1.96 * float((step - one).std()) / step.numel() ** 0.5
            lines.append(
                f"| {name} | {label} | {first:.5f} | {second:.5f} | {first / second - 1:+.5%} "
                f"| +/- {noise:.5%} | {float((step - one).abs().mean()):.2e} |"
            )
            arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
