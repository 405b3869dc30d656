"""Squared error of FFN outputs by what names the candidates, on a checkpoint with `unselected`.

    python tools/research/errors.py OUT --fit calib.txt --text heldout.txt [--keep 0.1 0.25 0.4]

size      |estimated hidden value| times the length of the output vector (score `norm`)
expected  the typical error of the estimate (score `error`), errors taken on --fit
true      the error that each neuron's estimate makes: what no predictor knows

Error over squared length of the dense output, geometric mean over layers.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hireconvert.runtime.hire_predict import expected_errors


def inputs(model: Any, layers: list[Any], ids_T: torch.Tensor) -> list[torch.Tensor]:
    """What each layer's FFN receives, [N, D]; a prompt runs dense."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.parts.up.module.register_forward_pre_hook(
            lambda _module, args: found.append(args[0].flatten(0, -2).float())
        )
        for layer in layers
    ]
    model(input_ids=ids_T[None])
    for hook in hooks:
        hook.remove()
    return found


def layer_errors(
    layer: Any, fit_ND: torch.Tensor, x_ND: torch.Tensor, shares: list[float]
) -> dict[tuple[float, str], float]:
    """The error of one layer for each share and each way to name candidates."""
    layer.prepare()
    widened, parts, act = layer.widened(), layer.parts, layer.parts.act
    gate_FD, up_FD = layer.prepared.gate_FD.float(), layer.prepared.up_FD.float()
    down_FD, copy_FD = parts.down_FD().float(), widened.estimate_FD
    first_MD = torch.cat([gate_FD, up_FD])
    soft_M = (widened.predictor.estimate(fit_ND) - fit_ND @ first_MD.T).std(0)
    norm_F = down_FD.norm(dim=1)
    rest_error = float(((down_FD - copy_FD).norm(dim=1) / norm_F).mean())
    z_NM = widened.predictor.estimate(x_ND)
    value_NF = widened.predictor.values(z_NM, act, gated=True)
    h_NF = act(x_ND @ gate_FD.T) * (x_ND @ up_FD.T)
    true_NF = torch.hypot((h_NF - value_NF) * norm_F, h_NF * (down_FD - copy_FD).norm(dim=1))
    named = {
        "size": value_NF.abs() * norm_F,
        "expected": expected_errors(z_NM, soft_M, act, rest_error, gated=True) * norm_F,
        "true": true_NF,
    }
    dense_ND, found = h_NF @ down_FD, {}
    for share in shares:
        for name, score_NF in named.items():
            index = score_NF.topk(round(share * len(norm_F)), dim=-1).indices
            mask_NF = torch.zeros_like(h_NF).scatter_(1, index, 1.0)
            y_ND = (h_NF * mask_NF) @ down_FD + (value_NF * (1 - mask_NF)) @ copy_FD
            error = (y_ND - dense_ND).square().sum() / dense_ND.square().sum()
            found[share, name] = float(error)
    return found


def main() -> None:
    """Prints a line a share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    for flag in ("--fit", "--text"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.1, 0.25, 0.4])
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(
        args.out, trust_remote_code=True, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    layers = [module for module in model.modules() if type(module).__name__ == "SparseFfn"]
    fit, text = (
        inputs(model, layers, tokenizer(path.read_text(), return_tensors="pt").input_ids[0, :n])
        for path, n in ((args.fit, args.tokens), (args.text, args.tokens))
    )
    found = [layer_errors(*each, args.keep) for each in zip(layers, fit, text, strict=True)]
    for share in args.keep:
        means = {
            name: math.exp(sum(math.log(one[share, name]) for one in found) / len(found))
            for name in ("size", "expected", "true")
        }
        print(f"{share:g}", *(f"{name} {mean:.3e}" for name, mean in means.items()))


if __name__ == "__main__":
    main()
