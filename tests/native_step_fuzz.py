"""Decode steps under the sanitizers, in memory of exactly the promised sizes.

Shape suffixes: Q new positions, D width, J key/value heads, P positions, E head size.
"""

import random
from dataclasses import replace
from typing import Any

import torch

from hireconvert import _native
from hireconvert._native_step import MOST_ROWS, SLACK, Block, Codes, Matrix, Step, matvec
from hireconvert._packing import ACTIVATIONS, TYPES
from tests.native import Case, codes_of, settings_of, short_codes_of, tensors_of


def weight(
    dice: random.Random, outputs: int, inputs: int, dtype: torch.dtype, block: int | None
) -> Matrix | Codes:
    """As stored, or, with a block (0: whole rows), now and then as codes."""
    bias = torch.randn(outputs) if dice.random() < 0.5 else None
    if block is not None and dice.random() < 0.4:
        block = min(block or inputs, inputs)
        scale = torch.rand(outputs, -(-inputs // block))
        if dice.random() < 0.5:
            codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
            return replace(codes_of(codes, scale, block), bias_O=bias)
        codes = torch.randint(0, 16, (outputs, inputs))
        return replace(short_codes_of(codes, scale.bfloat16(), block), bias_O=bias)
    return Matrix(torch.randn(outputs, inputs).to(dtype), bias)


def sparse(dice: random.Random, width: int, neurons: int, gated: bool) -> Any:
    if dice.random() < 0.4:
        return None
    kept = dice.randint(1, neurons)
    rest = dice.choice([None, (4, 16, True), (2, 1000, False)])
    case = Case(width, neurons, dice.randint(kept, neurons), kept, gated=gated, rest=rest)
    layer = _native.FfnLayer.pack(settings_of(case), tensors_of(case))
    return layer if dice.random() < 0.6 else layer.counting(neurons, neurons, dice.random())


def random_block(dice: random.Random, width: int) -> Block:
    size, pairs = dice.choice([2, 6, 16, 20, 64]), dice.randint(1, 3)
    heads, neurons = pairs * dice.randint(1, 3), dice.randint(1, 70)
    dtype, gated = dice.choice(TYPES), dice.random() < 0.7
    shapes = {
        "q": (heads * size, width), "k": (pairs * size, width), "v": (pairs * size, width),
        "o": (width, heads * size), "up": (neurons, width), "down": (width, neurons),
    }  # fmt: skip
    if gated:
        shapes["gate"] = (neurons, width)
    optional = {"attended_norm": width, "ffn_out_norm": width, "q_norm": size, "k_norm": size}
    norms = {"attention_norm": torch.rand(width), "ffn_norm": torch.rand(width)}
    norms |= {name: torch.rand(n) for name, n in optional.items() if dice.random() < 0.5}
    block = dice.choice([None, 0, 32, 64])
    return Block(
        matrices={
            name: weight(dice, *shape, dtype, block if name in "qkvo" else None)
            for name, shape in shapes.items()
        },
        norms=norms,
        head_dim=size,
        rotary=2,
        eps=1e-6,
        scaling=size**-0.5,
        activation=dice.choice(ACTIVATIONS),
        window=dice.choice([0, 1, 3, 50]),
        softcap=dice.choice([0.0, 5.0]),
        cache_type=dice.choice(TYPES),
        ffn=sparse(dice, width, neurons, gated),
        counts=torch.zeros(5, dtype=torch.int64),
    )


def cache_of(
    block: Block, cached: int, new: int, sequences: int
) -> tuple[list[Any], list[torch.Tensor]]:
    """A row of `past`, and the memory that it points at: room for the new positions, no more."""
    keys, room = block.matrices["k"], cached + new
    outputs = keys.outputs if isinstance(keys, Codes) else len(keys.weight_OI)
    pairs = outputs // block.head_dim
    numel = sequences * pairs * room * block.head_dim
    memory = [
        torch.zeros(numel + SLACK // torch.tensor([], dtype=block.cache_type).element_size())
        .to(block.cache_type)
        for _ in range(2)
    ]  # fmt: skip
    first = min(cached, 2)
    row = [memory[0].data_ptr(), memory[1].data_ptr(), room * block.head_dim, first, cached - first]
    return row, memory


def run(dice: random.Random) -> None:
    width, num_rows = dice.choice([1, 5, 16, 33, 64]), dice.randint(1, MOST_ROWS)
    blocks = [random_block(dice, width) for _ in range(dice.randint(1, 3))]
    step, held = Step(blocks), []
    past = step.past()
    cached = dice.choice([0, 1, 5, 17, 70])
    apart = dice.random() < 0.5  # every row a sequence of its own
    for index, block in enumerate(blocks):
        row, memory = cache_of(block, cached, *((1, num_rows) if apart else (num_rows, 1)))
        past[index] = torch.tensor(row)
        held.append(memory)
    angles = torch.rand(2, num_rows, 2)
    x_QD = torch.randn(num_rows, width)
    if dice.random() < 0.2:
        x_QD[-1, -1] = dice.choice([float("nan"), float("inf"), 1e30])
    unseen_Q = torch.tensor([dice.randint(0, cached) for _ in range(num_rows)]) if apart else None
    most = cached + (1 if apart else num_rows)
    bad = step.run(x_QD, past, [angles[0], angles[1]], most, unseen_Q=unseen_Q, seen=cached)
    assert bad >= 0 or bool(x_QD.isfinite().all())


def main(number: int) -> None:
    """That many steps of random layers."""
    dice = random.Random(1)
    torch.manual_seed(0)
    for _ in range(number):
        run(dice)
        outputs, inputs = dice.randint(1, 40), dice.randint(1, 100)
        matrix = weight(dice, outputs, inputs, dice.choice(TYPES), dice.choice([None, 0, 32, 64]))
        matvec(matrix, torch.randn(dice.randint(1, MOST_ROWS), inputs))
