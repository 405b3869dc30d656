"""Recall of 4-bit copies under choices of grid, column scales and damping; a few layers.

    python tools/research/codes.py --model DIR --acts FILE.pt --out FILE.jsonl [--keep 0.35]

Every line: the choice, bits per weight, recall of the true top at over 1.0 and --over on wiki and
c4 rows, the same when estimates are softened by their own error (`soft`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from perplexity import ffn_weights
from twin import append_result, load_twin

from hireconvert.fitting import input_moments
from hireconvert.quantize import GridFormat, decode_codes, feedback_codes, fit_grid, round_codes
from hireconvert.runtime.hire_predict import kth_score, top_k_mask
from hireconvert.scoring import exact_scores, round_half_up


def recall(scores: torch.Tensor, member: torch.Tensor, kept: int, count: int) -> float:
    """Share of members among the `count` best estimated."""
    return float((top_k_mask(scores, count) & member).sum(1).float().mean() / kept)


def copied(
    weight: torch.Tensor, moment: torch.Tensor, choice: tuple[GridFormat, float, float | None]
) -> torch.Tensor:
    """The decoded copy under (grid format, column scale power, damping or None: plain rounding)."""
    form, power, damping = choice
    size = moment.diagonal().clamp_min(1e-20).pow(power / 2)
    scale = (size / size.log().mean().exp()).clamp(1e-3, 1e3).float()
    scaled, scaled_moment = weight * scale, moment / torch.outer(scale, scale)
    grid = fit_grid(scaled, form, importance_D=scaled_moment.diagonal())
    if damping is None:
        return decode_codes(round_codes(scaled, grid), grid) / scale
    return decode_codes(feedback_codes(scaled, grid, scaled_moment, damping=damping), grid) / scale


def main() -> None:
    """Tries every choice on some layers and averages."""
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--model", "--acts", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--keep", type=float, default=0.35)
    parser.add_argument("--over", type=float, default=1.29)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 10, 18, 26])
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model, _ = load_twin(args.model)
    acts = torch.load(args.acts, mmap=True)
    sym, wide, free = (
        GridFormat(4, 64, True),
        GridFormat(4, 128, True),
        GridFormat(4, 128, False),
    )
    choices = [(sym, 0.5, None), (sym, 0.5, 0.01)]
    choices += [(sym, power, 0.01) for power in (0.0, 0.25, 0.75, 1.0)]
    choices += [(sym, 0.5, damping) for damping in (0.001, 0.1)]
    choices += [(wide, 0.5, 0.01), (free, 0.5, 0.01)]
    for choice in choices:
        totals: dict[str, float] = {}
        for i in args.layers:
            weights = ffn_weights(model.model.layers[i].mlp)
            matrix = torch.cat([weights.gate_FD, weights.up_FD])
            fit = acts["fit"][i]
            moments = input_moments(fit, matrix.norm(dim=0), fit.shape[1], centre=True)
            copy = copied(matrix, moments.full_DD, choice)
            x = torch.cat([acts[t][i][:512] for t in ("wiki", "c4")])
            norms = weights.down_FD.norm(dim=1)
            truth = exact_scores(weights, x, norms)
            kept = round_half_up(args.keep * truth.shape[1])
            count = round_half_up(args.over * kept)
            member = truth >= kth_score(truth, kept)
            some = fit[::5] - moments.mean_D
            constant = matrix @ moments.mean_D
            gate, up = (some @ matrix.T + constant).chunk(2, 1)
            near_gate, near_up = (some @ copy.T + constant).chunk(2, 1)
            gate_error = (weights.act(gate) - weights.act(near_gate)).std(0)
            up_error = (up - near_up).std(0)
            zg, zu = ((x - moments.mean_D) @ copy.T + constant).chunk(2, 1)
            hard = (weights.act(zg) * zu).abs() * norms
            soft = (weights.act(zg) ** 2 + gate_error**2).sqrt()
            soft = soft * (zu**2 + up_error**2).sqrt() * norms
            found = {"narrow": recall(hard, member, kept, kept)}
            found["over"] = recall(hard, member, kept, count)
            found["soft_narrow"] = recall(soft, member, kept, kept)
            found["soft_over"] = recall(soft, member, kept, count)
            for key, value in found.items():
                totals[key] = totals.get(key, 0.0) + value / len(args.layers)
        form = choice[0]
        bits = form.bits + (16 if form.symmetric else 32) / form.block
        line = {"bits": bits, "block": form.block, "symmetric": form.symmetric}
        line |= {"power": choice[1], "damping": choice[2]}
        line |= {key: round(value, 5) for key, value in totals.items()}
        append_result(args.out, line)
        print(line, flush=True)


if __name__ == "__main__":
    main()
