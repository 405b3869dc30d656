"""What rounding the weights read exactly costs: KL of the rounded model, dense and selecting.

    python tools/research/refine.py MODEL CONVERTED DATA [--tokens 2048] [--keep 0.25]

CONVERTED was made from MODEL with 4-bit `ffn.predictor` and `ffn.unselected`. One line a way of
rounding: mean KL to MODEL on heldout_wiki and heldout_c4 of DATA. `refined`: the copies and some
bits more, a step for each block fitted to what is left, or a share of the copy's own step.

Shape suffixes: M rows, D columns.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hireconvert
from hireconvert.data import evaluation_windows
from hireconvert.evaluate import hidden_states
from hireconvert.measures import hire_layers, hire_scope
from hireconvert.quantize import GridFormat, decode_codes, fit_grid, round_codes
from hireconvert.runtime.hire_predict import decode_blocks, decode_down

sys.path.insert(0, str(Path(__file__).parents[1]))
from evidence_finetune import figures, texts
from evidence_quality import keep_share, sparse_states

Round = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def by_grid(bits: int, block: int | None) -> Round:
    """Codes around zero, a scale for each block or row."""

    def rounded(w_MD: torch.Tensor, copy_MD: torch.Tensor, step_MD: torch.Tensor) -> torch.Tensor:
        top, size = 2 ** (bits - 1) - 1, block or w_MD.shape[1]
        parts = torch.nn.functional.pad(w_MD, (0, -w_MD.shape[1] % size)).unflatten(1, (-1, size))
        scale = (parts.abs().amax(-1, keepdim=True) / top).clamp_min(1e-30)
        return ((parts / scale).round() * scale).flatten(1)[:, : w_MD.shape[1]]

    return rounded


def refined(bits: int, share: float | None) -> Round:
    """The copy and `bits` more: steps fitted to what is left, or this share of the copy's step."""

    def rounded(w_MD: torch.Tensor, copy_MD: torch.Tensor, step_MD: torch.Tensor) -> torch.Tensor:
        left_MD = w_MD - copy_MD
        if share is None:
            grid = fit_grid(left_MD, GridFormat(bits, 32, symmetric=True))
            return copy_MD + decode_codes(round_codes(left_MD, grid), grid)
        middle = (2**bits - 1) / 2
        code_MD = (left_MD / (share * step_MD) + middle).round().clamp(0, 2 * middle)
        return copy_MD + (code_MD - middle) * share * step_MD

    return rounded


FFN: dict[str, Round | None] = {
    "stored": None,
    "refined, 4 bits": refined(4, None),
    "refined, 1/8 of the step": refined(4, 1 / 8),
    "refined, 1/16": refined(4, 1 / 16),
    "refined, 3 bits, 1/4": refined(3, 1 / 4),
    "refined, 2 bits, 1/2": refined(2, 1 / 2),
    "8 bits a row": by_grid(8, None),
    "8 bits in 32s": by_grid(8, 32),
    "6 bits in 32s": by_grid(6, 32),
}
ATTENTION = {"8 bits a row": by_grid(8, None), "8 bits in 32s": by_grid(8, 32)}
ATTENTION |= {"4 bits in 32s": by_grid(4, 32)}


@torch.no_grad()
def round_ffn(layer: Any, source: dict[str, torch.Tensor], way: Round | None) -> None:
    """Write the layer's matrices, rounded from `source`."""
    tensors, spec, parts = layer.predictor_tensors, layer.spec, layer.parts
    width = source["up"].shape[1]

    def step(name: str) -> torch.Tensor:
        return tensors[name].float().repeat_interleave(32, dim=1)[:, :width]

    first, down = torch.cat([source["gate"], source["up"]]), source["down"]
    if way is not None and "scale" not in tensors:
        raise SystemExit("the copies have normal levels; convert with levels=even, symmetric=false")
    if way is not None:
        factor = tensors["column_scale"].float()
        copy = decode_blocks(tensors, spec["predictor"], width)
        first = way(first * factor, copy, step("scale")) / factor
        down = way(down, decode_down(tensors, spec["unselected"], width), step("down_scale"))
    for name, new in zip(("gate", "up"), first.chunk(2), strict=True):
        getattr(parts, name).weight_out_in().copy_(new)
    parts.down_FD().copy_(down)
    layer.prepare()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "converted", "data"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--keep", type=float, default=0.25)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    native = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model = hireconvert.load(args.converted, dtype=torch.float32).eval()
    windows = {
        name: evaluation_windows(text, tokenizer, num_tokens=args.tokens, window=512).ids_WT
        for name, text in texts(args.data).items()
        if name in ("wiki", "c4")
    }
    dense = {name: hidden_states(native, ids_WT) for name, ids_WT in windows.items()}

    def tell(label: str, *, selecting: bool) -> None:
        found = []
        for name, ids_WT in windows.items():
            with hire_scope(model, "off"):
                states = [hidden_states(model, ids_WT)]
            if selecting:
                keep_share(model, args.keep, estimated=True)
                states.append(sparse_states(model, ids_WT, args.keep))
            found.append([figures(native, dense[name], each, ids_WT)["kl"] for each in states])
        print(label, " / ".join(" ".join(f"{kl:.5f}" for kl in each) for each in found), flush=True)

    layers = hire_layers(model)
    source = {
        index: {
            "gate": layer.parts.gate.weight_out_in().detach().clone(),
            "up": layer.parts.up.weight_out_in().detach().clone(),
            "down": layer.parts.down_FD().detach().contiguous().clone(),
        }
        for index, layer in layers.items()
    }
    for label, way in FFN.items():
        for index, layer in layers.items():
            round_ffn(layer, source[index], way)
        tell(f"ffn {label}: dense, selecting", selecting=True)
    for index, layer in layers.items():
        round_ffn(layer, source[index], None)
    weights = {n: p for n, p in model.named_parameters() if "self_attn" in n and p.dim() == 2}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    for label, rounded in ATTENTION.items():
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(rounded(kept[name], kept[name], kept[name]))
        tell(f"attention {label}: dense", selecting=False)


if __name__ == "__main__":
    main()
