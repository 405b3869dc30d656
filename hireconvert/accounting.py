"""Bytes one decoded token reads, from shapes and the `hire` dict alone (docs/design.md).

D width, F neurons, M predictor outputs, R rank, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

FP16, FP32 = 2, 4


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one FFN per decoded token, and of its predictor on disk."""

    dense: int
    predictor: int
    gate_up: int
    down: int
    predictor_on_disk: int

    @property
    def converted(self) -> int:
        """All that the sparse path reads."""
        return self.predictor + self.gate_up + self.down


def num_outputs(layer: Mapping[str, Any], *, gated: bool) -> int:
    """M: what the predictor of this layer computes one number for."""
    if layer["predictor"]["groups"]:
        return int(layer["num_neurons"]) // int(layer["group_size"])
    return int(layer["num_neurons"]) * (2 if gated else 1)


def predictor_bytes(predictor: Mapping[str, Any], width: int, outputs: int) -> tuple[int, int]:
    """(bytes read per token, bytes on disk) of one predictor with D = width, M = outputs."""
    kind = predictor["kind"]
    read = disk = FP32 * (width + outputs)  # mean and bias
    if kind in ("q", "qlr"):
        read += FP32 * width  # column_scale
        disk += FP32 * width
        per_input, total = _plane_bytes(predictor, width, outputs)
        disk += total
        channel_major = predictor["num_inputs"] < width
        read += per_input * predictor["num_inputs"] if channel_major else total
    if kind in ("lr", "qlr"):
        rank, bits = predictor["rank"], predictor["factor_bits"]
        factors = sum(_matrix_bytes(*shape, bits) for shape in ((rank, width), (outputs, rank)))
        read, disk = read + factors, disk + factors
    return read, disk


def _plane_bytes(predictor: Mapping[str, Any], width: int, outputs: int) -> tuple[int, int]:
    """(bytes per input channel when channel-major, bytes in all) of bit planes and scales."""
    channel_major = predictor["num_inputs"] < width
    rows, columns = (width, outputs) if channel_major else (outputs, width)
    blocks = ceil(columns / (predictor["block"] or columns))
    scales = FP16 * blocks * (1 if predictor["symmetric"] else 2)
    per_row = predictor["bits"] * ceil(columns / 8) + scales
    return per_row, per_row * rows


def _matrix_bytes(rows: int, columns: int, bits: int) -> int:
    if bits == 16:
        return FP16 * rows * columns
    return rows * (ceil(columns * bits / 8) + FP32)


def layer_bytes(
    layer: Mapping[str, Any], width: int, *, gated: bool, weight_bytes: int
) -> LayerBytes:
    """The bytes of one converted layer; `weight_bytes` is the size of one stored dense weight."""
    row = width * weight_bytes
    matrices = 2 if gated else 1
    kept = layer["num_candidates"] if layer["keep"] == "candidates" else layer["num_kept"]
    read, disk = predictor_bytes(layer["predictor"], width, num_outputs(layer, gated=gated))
    return LayerBytes(
        dense=layer["num_neurons"] * row * (matrices + 1),
        predictor=read,
        gate_up=layer["num_candidates"] * row * matrices,
        down=kept * row,
        predictor_on_disk=disk,
    )


def head_bytes(
    head: Mapping[str, Any] | None, vocabulary: int, width: int, *, weight_bytes: int
) -> tuple[int, int]:
    """(dense, converted) bytes of the head; a certified head is counted at its num_candidates."""
    dense = vocabulary * width * weight_bytes
    if head is None:
        return dense, dense
    if head["kind"] == "lr":
        estimate = FP16 * head["rank"] * (vocabulary + width)
    else:
        blocks = ceil(width / (head["block"] or width))
        estimate = vocabulary * (ceil(width * head["bits"] / 8) + FP32 * blocks)
    if head["certified"]:
        estimate += FP32 * vocabulary  # e_i, the error norm of every row
    return dense, estimate + head["num_candidates"] * width * weight_bytes
