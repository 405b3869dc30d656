"""One FFN of a model's shape, batch 1, weights out of cache: dense in PyTorch against the kernels.

python tools/bench_ffn.py --shape smollm2 --dtype float32 --threads 1

Every round times all arms in turn over copies of one random layer that together exceed the caches;
medians of rounds and their range go to stdout. `dense, kernels` reads every exact row and predicts
nothing: what is gained beyond it is owed to sparsity, what it gains itself to the kernels.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from hireconvert import _native
from hireconvert.quantize import GridFormat, encode_down, encode_matrix, fit_grid, round_codes

SHAPES = {"smollm2": (576, 1536), "qwen": (896, 4864), "llama1b": (2048, 8192)}
REST = {"bits": 4, "block": 32, "symmetric": False}
FORM = GridFormat(**REST)
STREAM_BYTES = 256 * 2**20


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
    return tensors


def native_arm(
    tensors: dict[str, Any], keep: float, rest: Any, copies: int
) -> tuple[list[Callable[[torch.Tensor], Any]], float]:
    """(the copies to call in turn, bytes that one call reads)."""
    neurons = tensors["up"].shape[0]
    num = max(1, round(keep * neurons))
    settings = {"activation": "silu", "num_candidates": num, "num_kept": num, "rest": rest, **REST}
    layer = _native.FfnLayer.pack(settings, tensors)
    numbers = layer.numbers
    total = num * 3 * numbers["stride"] * tensors["up"].element_size()
    if num < neurons:
        total += layer.tensors["tiles"].nbytes
        total += (neurons - num) * numbers.get("rest_bytes", 0)
    layers = [layer, *(_native.FfnLayer(numbers, layer.tensors) for _ in range(copies - 1))]
    return [each.run for each in layers], total


def dense_arm(
    tensors: dict[str, Any], dtype: torch.dtype, copies: int
) -> tuple[list[Callable[[torch.Tensor], Any]], float]:
    """The three products of PyTorch."""

    def one() -> Callable[[torch.Tensor], Any]:
        gate, up = (tensors[name].to(dtype).clone() for name in ("gate", "up"))
        down = tensors["down"].to(dtype).t().contiguous()
        return lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    return [one() for _ in range(copies)], 3.0 * tensors["up"].numel() * dtype.itemsize


def stream_rate() -> float:
    """GB/s of summing one large float32 tensor, the best of five."""
    block = torch.ones(STREAM_BYTES // 4)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - start)
    return STREAM_BYTES / min(seconds) / 1e9


def measure(shape: str, dtype: torch.dtype, rounds: int, memory: int) -> None:
    """Print one table."""
    width, neurons = SHAPES[shape]
    tensors = tensors_of(width, neurons, dtype)
    copies = max(2, memory // (3 * width * neurons * dtype.itemsize))
    arms = {f"dense, PyTorch, {str(dtype)[6:]}": dense_arm(tensors, dtype, copies)}
    arms["dense, kernels"] = native_arm(tensors, 1.0, None, copies)
    for keep in (0.5, 0.25):
        for name, rest in (("", None), (", rest by estimate", REST)):
            arms[f"keep {keep}{name}"] = native_arm(tensors, keep, rest, copies)
    x = torch.randn(1, width).to(dtype)
    times: dict[str, list[float]] = {name: [] for name in arms}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, (calls, _) in arms.items():
                start = time.perf_counter()
                for call in calls:
                    call(x)
                if turn:
                    times[name].append((time.perf_counter() - start) / copies * 1e6)
    base = statistics.median(times[next(iter(arms))])
    own = statistics.median(times["dense, kernels"])
    print(
        f"\n{shape}: {width} x {neurons}, {dtype}, {torch.get_num_threads()} threads, "
        f"{_native.level()}, stream {stream_rate():.1f} GB/s, {copies} copies\n"
    )
    print("| arm | us | range | MB | GB/s | PyTorch / arm | kernels' dense / arm |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, (_, size) in arms.items():
        middle, low, high = statistics.median(times[name]), min(times[name]), max(times[name])
        print(
            f"| {name} | {middle:.0f} | {low:.0f}-{high:.0f} | {size / 1e6:.2f} "
            f"| {size / middle / 1e3:.1f} | {base / middle:.2f} | {own / middle:.2f} |"
        )


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="smollm2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=int, default=400, help="MB of weights an arm goes through")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for shape in SHAPES if options.shape == "all" else [options.shape]:
        measure(shape, getattr(torch, options.dtype), options.rounds, options.memory * 10**6)


if __name__ == "__main__":
    main()
