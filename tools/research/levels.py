"""What sixteen levels lose of an FFN's matrices: even ones, with and without offsets, and others.

    python tools/research/levels.py MODEL [--layer 10] [--rows 1536]

Squared error over squared weights after plain rounding, by matrix (down by neurons). Tables of
levels have a scale of either sign for each block, the best of `CLIPS` and refitted to its codes.
`own` is a table fitted to the matrix itself (Lloyd), the bound for one that serves all.
"""

import argparse
from pathlib import Path

import torch
from safetensors import safe_open

from hireconvert.quantize import GridFormat, decode_codes, fit_grid, round_codes
from hireconvert.runtime.hire_predict import NORMAL_LEVELS

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
CLIPS = [1.15 - 0.02 * step for step in range(20)]
LLOYD_ROUNDS, LLOYD_ROWS = 6, 512
FORMS = {
    "even, offsets, blocks of 32": GridFormat(4, 32, False),
    "even, offsets, blocks of 64": GridFormat(4, 64, False),
    "even, symmetric, blocks of 32": GridFormat(4, 32, True),
    "normal (shipped), blocks of 32": GridFormat(4, 32, True, levels="normal"),
    "normal (shipped), blocks of 64": GridFormat(4, 64, True, levels="normal"),
}


def relative(found_MD: torch.Tensor, weight_MD: torch.Tensor) -> float:
    """Squared error over squared weights."""
    return float((found_MD - weight_MD).square().sum() / weight_MD.square().sum())


def nearest(values: torch.Tensor, table_16: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest levels."""
    return torch.bucketize(values, (table_16[1:] + table_16[:-1]) / 2)


def scales(blocks_MGB: torch.Tensor, table_16: torch.Tensor) -> torch.Tensor:
    """[M, G, 1] of least error."""
    widest = blocks_MGB.abs().amax(-1, keepdim=True).clamp_min(1e-8) / table_16.abs().max()
    best, scale = torch.full_like(widest, torch.inf), widest
    for clip in [side * clip for clip in CLIPS for side in (-1, 1)]:
        level = table_16[nearest(blocks_MGB / (widest * clip), table_16)]
        square = level.square().sum(-1, keepdim=True).clamp_min(1e-20)
        new = (level * blocks_MGB).sum(-1, keepdim=True) / square
        new = torch.where(new == 0, widest, new)
        left = table_16[nearest(blocks_MGB / new, table_16)] * new - blocks_MGB
        error = left.square().sum(-1, keepdim=True)
        scale = torch.where(error < best, new, scale)
        best = torch.minimum(best, error)
    return scale


def by_table(weight_MD: torch.Tensor, table_16: torch.Tensor, block: int) -> float:
    """What the table loses of the matrix, scales in float16."""
    blocks = weight_MD.unflatten(1, (-1, block))
    scale = scales(blocks, table_16).half().float()
    return relative((table_16[nearest(blocks / scale, table_16)] * scale).flatten(1), weight_MD)


def fitted_table(weight_MD: torch.Tensor, block: int) -> torch.Tensor:
    """The table that Lloyd's iteration finds for the matrix, from IQ4_NL's."""
    table = torch.tensor(IQ4_NL, dtype=torch.float32)
    blocks = weight_MD[:LLOYD_ROWS].unflatten(1, (-1, block))
    for _ in range(LLOYD_ROUNDS):
        place = (blocks / scales(blocks, table)).flatten()
        code = nearest(place, table)
        total, count = torch.zeros(16), torch.zeros(16)
        total.scatter_add_(0, code, place)
        count.scatter_add_(0, code, torch.ones_like(place))
        table = (total / count.clamp_min(1)).sort().values
        table = table * 127 / table.abs().max()
    return table


@torch.no_grad()
def main() -> None:
    """Print one row a format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--rows", type=int, default=1536)
    args = parser.parse_args()
    matrices = {}
    with safe_open(args.model / "model.safetensors", "pt") as file:
        for name in ("gate", "up", "down"):
            weight = file.get_tensor(f"model.layers.{args.layer}.mlp.{name}_proj.weight").float()
            matrices[name] = (weight.T if name == "down" else weight)[: args.rows].contiguous()
    rows: dict[str, list[float]] = {name: [] for name in FORMS}
    tables = {"IQ4_NL": torch.tensor(IQ4_NL).float(), "normal": torch.tensor(NORMAL_LEVELS).float()}
    for weight_MD in matrices.values():
        for name, form in FORMS.items():
            grid = fit_grid(weight_MD, form)
            found_MD = decode_codes(round_codes(weight_MD, grid), grid)
            rows[name].append(relative(found_MD, weight_MD))
        for name, table in {**tables, "own": fitted_table(weight_MD, 32)}.items():
            key = f"table {name}, float16 scales, blocks of 32"
            rows.setdefault(key, []).append(by_table(weight_MD, table, 32))
    for name, errors in rows.items():
        print(f"| {name} | " + " | ".join(f"{error:.5f}" for error in errors) + " |")


if __name__ == "__main__":
    main()
