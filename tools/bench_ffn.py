"""One FFN of a model's shape, batch 1, weights out of cache: dense in PyTorch against the kernels.

python tools/bench_ffn.py --shape smollm2 --dtype float32 --threads 1
python tools/bench_ffn.py --shape llama1b llama3b llama8b --dtype bfloat16 --threads 2 --refined

Every round times all arms in turn over copies of one random layer that together exceed the caches;
medians of rounds and their range go to stdout. `dense, kernels` predicts and selects nothing: what
is gained beyond it is owed to sparsity, what it gains itself to the kernels. It reads every weight
at the precision of the sparse arms, as the native step runs a dense FFN: as stored, or with
--refined as 8-bit codes with a scale for 32. Parts of a call come from arms that keep one neuron,
without and with the rest, and from selection alone. With one thread times are those of the thread,
which other jobs disturb less.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from hireconvert import _native, _native_step
from hireconvert._pages import together
from hireconvert.attention import round_rows
from hireconvert.families import FfnWeights
from hireconvert.quantize import GridFormat, encode_down, encode_matrix, fit_grid, round_codes
from hireconvert.rounding import low_scales, refined_values

SHAPES = {
    "smollm2": (576, 1536),
    "gemma": (640, 2048),
    "qwen": (896, 4864),
    "llama1b": (2048, 8192),
    "llama3b": (3072, 8192),
    "llama8b": (4096, 14336),
}
REST = {"bits": 4, "block": 32, "symmetric": True, "levels": "normal"}
FORM = GridFormat(**REST)
STREAM_BYTES = 256 * 2**20
# By name: what to call in turn, and the bytes that one call reads.
Arms = dict[str, tuple[list[Callable[[torch.Tensor], Any]], float]]


def tensors_of(width: int, neurons: int, dtype: torch.dtype) -> dict[str, Any]:
    """A random layer and its 4-bit copies."""
    tensors: dict[str, Any] = {
        name: torch.randn(neurons, width).mul(width**-0.5).to(dtype)
        for name in ("gate", "up", "down")
    }
    weight_MD = torch.cat([tensors["gate"], tensors["up"]]).float()
    grid = fit_grid(weight_MD, FORM)
    tensors |= encode_matrix(round_codes(weight_MD, grid), grid)
    tensors |= encode_down(tensors["down"].float(), FORM)
    tensors |= {"mean": torch.zeros(width), "column_scale": torch.ones(width)}
    tensors |= {"bias": torch.zeros(2 * neurons), "norm": tensors["down"].float().norm(dim=1)}
    # Scores are expected errors, as in the shipped recipes; those of copies of 4 bits.
    tensors |= {"soft": torch.full((2 * neurons,), 0.07).half(), "rest_error": torch.tensor([0.07])}
    return tensors


def refine(tensors: dict[str, Any]) -> None:
    """Round the layer's matrices to the copies and 4 bits more, as `ffn.rows: refined` does."""
    spec, dtype = {"rows": "refined", "predictor": REST, "unselected": REST}, tensors["up"].dtype
    gate, up, down = (tensors[name].float() for name in ("gate", "up", "down"))
    tensors |= low_scales(FfnWeights(gate, up, down, None, None, F.silu), spec, tensors)
    first, down = refined_values(torch.cat([gate, up]), down, spec, tensors)
    tensors["gate"], tensors["up"] = first.to(dtype).chunk(2)
    tensors["down"] = down.to(dtype)


def native_arm(
    tensors: dict[str, Any], num: int, rest: Any, memory: int, x: torch.Tensor | None = None
) -> tuple[list[Callable[[torch.Tensor], Any]], float]:
    """(copies to call in turn that exceed `memory` bytes, bytes that one call reads).

    With `x` kept is what reaches the level that `num` neurons reach there.
    """
    neurons = tensors["up"].shape[0]
    refined = "low_scale" in tensors
    settings = {"activation": "silu", "num_candidates": num, "num_kept": num, "rest": rest, **REST}
    layer = _native.FfnLayer.pack(settings | {"refined": refined}, tensors)
    if x is not None:
        layer.run(x)
        level = float(layer.last()["score"].sort(descending=True).values[num - 1])
        layer = layer.counting(num, num, level)
    numbers = layer.numbers
    row = 3 * numbers["stride"] * tensors["up"].element_size()
    total = num * numbers.get("low_bytes", row)
    if refined or num < neurons:
        total += layer.tensors["tiles"].nbytes
        total += layer.tensors["rest"].nbytes if rest is not None else 0
    copies = max(2, memory // total)
    layers = [
        layer,
        *(_native.FfnLayer(numbers, together(layer.tensors)) for _ in range(copies - 1)),
    ]
    return [each.run for each in layers], total


def dense_arm(
    tensors: dict[str, Any], dtype: torch.dtype, memory: int
) -> tuple[list[Callable[[torch.Tensor], Any]], float]:
    """The three products of PyTorch."""

    def one() -> Callable[[torch.Tensor], Any]:
        gate, up = (tensors[name].to(dtype).clone() for name in ("gate", "up"))
        down = tensors["down"].to(dtype).t().contiguous()
        return lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    total = 3 * tensors["up"].numel() * dtype.itemsize
    return [one() for _ in range(max(2, memory // total))], total


def matrices_arm(
    tensors: dict[str, Any], memory: int, *, coded: bool
) -> tuple[list[Callable[[torch.Tensor], Any]], float]:
    """Dense by the kernels of the projections: as stored, or in 8-bit codes, a scale for 32."""
    block = REST["block"]
    weights = [torch.cat([tensors["gate"], tensors["up"]]), tensors["down"].t().contiguous()]
    if coded:
        weights = [round_rows(weight.float(), block) for weight in weights]

    def one() -> Callable[[torch.Tensor], Any]:
        held: list[torch.Tensor] = []
        matrices: Any = [_native_step.Matrix(weight.clone()) for weight in weights]
        if coded:
            matrices = _native_step.coded(matrices, block, [8] * len(matrices))
        both = [matrix.described(held) for matrix in matrices]
        needed = [_native.LIBRARY.hire_matvec_scratch(ctypes.addressof(each), 1) for each in both]
        scratch = _native.scratch(max(needed))
        z, y = torch.empty(1, both[0].outputs), torch.empty(1, both[1].outputs)
        threads, number = torch.get_num_threads(), _native.LEVELS.index(_native.level() or "")

        def product(matrix: Any, x: torch.Tensor, out: torch.Tensor) -> None:
            _native.LIBRARY.hire_matvec(
                ctypes.addressof(matrix), x.data_ptr(), out.data_ptr(), 1, scratch.data_ptr(),
                threads, number,
            )  # fmt: skip

        def run(x: torch.Tensor, held: Any = held) -> Any:
            x = x.float()
            product(both[0], x, z)
            gate, up = z.chunk(2, dim=1)
            hidden = F.silu(gate).mul_(up)
            product(both[1], hidden, y)
            return y, held

        return run

    size = 1 + 4 / block if coded else tensors["up"].element_size()
    total = 3 * tensors["up"].numel() * size
    return [one() for _ in range(max(2, int(memory // total)))], total


def stream_rate() -> float:
    """GB/s of summing one large float32 tensor, the best of five."""
    block = torch.ones(STREAM_BYTES // 4)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - start)
    return STREAM_BYTES / min(seconds) / 1e9


def selection_arm(neurons: int, num: int) -> tuple[list[Callable[[torch.Tensor], Any]], float]:
    """The k largest of scores that lie in the cache, many times, with the cost of a call."""
    score = torch.rand(neurons)
    return [lambda _: _native.top_k(score, num)] * 200, 4.0 * neurons


def timed(arms: Arms, x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Microseconds of a call, by arm and round, the arms in turn."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in arms}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, (calls, _) in arms.items():
                start = clock()
                for call in calls:
                    call(x)
                if turn:
                    times[name].append((clock() - start) / len(calls) * 1e6)
    return times


def arms_of(
    tensors: dict[str, Any], options: argparse.Namespace, memory: int, x: torch.Tensor
) -> tuple[Arms, Arms]:
    """(arms that are compared, arms that stand for parts of a call)."""
    neurons, dtype = tensors["up"].shape[0], tensors["up"].dtype
    arms: Arms = {f"dense, PyTorch, {str(dtype)[6:]}": dense_arm(tensors, dtype, memory)}
    arms["dense, kernels"] = matrices_arm(tensors, memory, coded=options.refined)
    if options.refined:
        refine(tensors)
    # Refined rows are what copies hold and more: without the copy of down they have no meaning.
    rests = {"": None, ", rest by estimate": REST} if not options.refined else {"": REST}
    for keep in options.keep:
        for name, rest in rests.items():
            num = max(1, round(keep * neurons))
            arms[f"keep {keep}{name}"] = native_arm(tensors, num, rest, memory)
            if options.by_level and num < neurons:
                arms[f"keep {keep}{name}, by level"] = native_arm(tensors, num, rest, memory, x)
    parts: Arms = {"selection": selection_arm(neurons, neurons // 4)}
    parts["estimates and rest"] = native_arm(tensors, 1, REST, memory // 2)
    if not options.refined:
        parts["estimates"] = native_arm(tensors, 1, None, memory // 2)
    return arms, parts


def measure(shape: str, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """Print one table."""
    width, neurons = SHAPES[shape]
    tensors = tensors_of(width, neurons, dtype)
    x, rounds = torch.randn(1, width).to(dtype), options.rounds
    arms, parts = arms_of(tensors, options, options.memory * 10**6, x)
    times = timed(arms | parts, x, rounds)
    middles = {name: statistics.median(found) for name, found in times.items()}
    base, own = middles[next(iter(arms))], middles["dense, kernels"]
    print(
        f"\n{shape}: {width} x {neurons}, {dtype}, {torch.get_num_threads()} threads, "
        f"{_native.level()}, stream {stream_rate():.1f} GB/s\n"
    )
    print("| arm | us | range | MB | GB/s | PyTorch / arm | kernels' dense / arm |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, (_, size) in arms.items():
        middle, low, high = middles[name], min(times[name]), max(times[name])
        print(
            f"| {name} | {middle:.0f} | {low:.0f}-{high:.0f} | {size / 1e6:.2f} "
            f"| {size / middle / 1e3:.1f} | {base / middle:.2f} | {own / middle:.2f} |"
        )
    print("\n| part of a call | us | MB | GB/s |\n|---|--:|--:|--:|")
    for name, (_, size) in parts.items():
        middle = middles[name]
        print(f"| {name} | {middle:.1f} | {size / 1e6:.2f} | {size / middle / 1e3:.1f} |")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=["smollm2"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--refined", action="store_true", help="rows in 8 bits (ffn.rows: refined)")
    parser.add_argument("--by-level", action="store_true", help="also what reaches a level")
    parser.add_argument("--memory", type=int, default=400, help="MB of weights an arm goes through")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for shape in options.shape:
        measure(shape, getattr(torch, options.dtype), options)


if __name__ == "__main__":
    main()
