"""A stand-in without a grid for a model whose weights lie on one: noise as large as its steps.

    python tools/research/dither.py MODEL OUT

The models at hand were quantized once, so quantizing them again at their own grid costs nothing,
and a race against such files would mean nothing. `twin.py` takes FFN weights off the grid without
changing the function, but leaves columns of unequal size, which formats of equal blocks along a row
must serve with one scale: a rival made from it is worse than one made from the model (Gemma's Q8_0:
KL .20 instead of what 8 bits cost). Here every weight matrix keeps its norms and gets uniform noise
of one step of its block's grid, what rounding took away on the way to it. The result is another
model, a little worse than MODEL; everything measured on it is measured against it.

A step is the smallest gap between values of a block of 32 inputs. bfloat16, as MODEL has it.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from twin import save_plain

BLOCK, ROWS = 32, 4096


def dithered(weight_MD: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 [M, D]: the weights with noise in plus or minus half a step of their block."""
    blocks = weight_MD.float().unflatten(1, (-1, BLOCK))
    gap = blocks.sort(-1).values.diff(dim=-1)
    step = gap.masked_fill(gap <= 0, torch.inf).amin(-1, keepdim=True)
    step = step.masked_fill(step.isinf(), 0.0)  # a block of equal values
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + step * noise).flatten(1)


@torch.no_grad()
def main() -> None:
    """Write OUT."""
    source, out = (Path(name) for name in sys.argv[1:])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for weight in dict.fromkeys(model.parameters()):  # tied matrices once
        if weight.dim() == 2:
            for rows in weight.split(ROWS):  # a vocabulary at once would need gigabytes
                rows.copy_(dithered(rows, generator))
    save_plain(model, AutoTokenizer.from_pretrained(source), out)


if __name__ == "__main__":
    main()
