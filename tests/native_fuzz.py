"""Run by tests/unit/test_native_build.py in a process of its own, over a library with sanitizers.

Every mutation of what a layer is packed from is refused with ValueError or runs; the sanitizers
end the process at the first access out of bounds. Prints how many were refused and how many ran.
"""

import random
import sys
from typing import Any

import torch

from hireconvert import _native
from tests import native_step_fuzz
from tests.native import BY_LEVEL, CASES, COPIES, Case, rows_of, settings_of, tensors_of

NASTY: tuple[Any, ...] = (None, True, -1, 0, 1, 2, 3, 5, 16, 31, 33, 97, 2**31, 2**62, 0.5, "q")
# Behind the low-bit rows up to 64 bytes are read, and nothing else may be.
BEHIND = {"rest": 64, "low": 64}


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor in memory of exactly its size, where the sanitizer sees its end."""
    moved = {}
    for name, tensor in tensors.items():
        room = torch.zeros(tensor.nbytes + BEHIND.get(name, 0), dtype=torch.uint8)
        piece = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        moved[name] = piece.copy_(tensor)
    return moved


def changed(tensor: torch.Tensor, dice: random.Random) -> torch.Tensor:
    """A tensor of another shape or type, or with other content."""
    axis = dice.randrange(tensor.dim())
    length = tensor.shape[axis]
    if tensor.dtype in (torch.uint8, torch.int8):
        noise = torch.randint(0, 256, tensor.shape, dtype=torch.uint8).view(tensor.dtype)
    else:
        noise = torch.full_like(tensor, dice.choice([0.0, float("nan"), float("inf"), 6e4]))
    return dice.choice(
        [
            noise,
            tensor.narrow(axis, 0, max(length - 1, 0)),
            torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis),
            tensor[None],
            tensor.flatten(),
            tensor.to(dice.choice([torch.float64, torch.int64, torch.bfloat16, torch.uint8])),
            tensor.transpose(0, -1),
        ]
    )


def mutated(settings: dict[str, Any], tensors: dict[str, Any], dice: random.Random) -> None:
    """One to three changes in place."""
    for _ in range(dice.randint(1, 3)):
        if dice.random() < 0.5:
            place = settings
            if settings["rest"] and dice.random() < 0.4:
                place = settings["rest"]
            place[dice.choice([key for key in place if key != "rest"])] = dice.choice(NASTY)
        else:
            name = dice.choice(list(tensors))
            tensor = tensors[name]
            if tensor is None or dice.random() < 0.1:
                tensors[name] = None
            else:
                tensors[name] = changed(tensor, dice)


def run(case: Case, settings: dict[str, Any], tensors: dict[str, Any]) -> None:
    layer = _native.FfnLayer.pack(settings, tensors)
    if layer is None:  # weights that are not their copies
        return
    x_ND = rows_of(case, _native.ROWS_TOGETHER + 1).to(layer.dtype)
    layer.run(torch.zeros(2, layer.numbers["width"], dtype=layer.dtype))
    layer.run(x_ND)


def main(number: int) -> None:
    _native.together = apart
    torch.set_num_threads(2)
    dice, refused, ran = random.Random(0), 0, 0
    cases = [*CASES.values(), *BY_LEVEL.values(), *COPIES.values()]
    for case in cases:
        run(case, settings_of(case), tensors_of(case))
    for score_F in (torch.rand(1), torch.rand(97), torch.zeros(64)):
        for num in (1, (len(score_F) + 1) // 2, len(score_F)):
            _native.top_k(score_F, num)
    ready = [(case, tensors_of(case)) for case in cases if case.neurons < 300]
    for _ in range(number):
        case, tensors = dice.choice(ready)
        settings, tensors = settings_of(case), dict(tensors)
        mutated(settings, tensors, dice)
        try:
            run(case, settings, tensors)
            ran += 1
        except ValueError as error:
            assert str(error).startswith("native: "), error
            refused += 1
    native_step_fuzz.main(number)
    print(refused, ran)


if __name__ == "__main__":
    main(int(sys.argv[1]))
