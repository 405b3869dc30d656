"""Tensor tables and bytes that follow from shapes and the `hire` dict alone (docs/format.md).

D width, F neurons, M predictor outputs, R rank, V vocabulary. What a sparse FFN reads is counted
by the runtime (`hire_predict.layer_bytes`); here are the tables of stored tensors, head and sums.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import ceil, prod
from typing import Any, TypeAlias

from hireconvert.errors import InputError
from hireconvert.runtime.hire_config import (
    down_tensors,
    expected_tensors,
    head_tensor_shapes,
    low_tensors,
)
from hireconvert.runtime.hire_predict import (
    FFN_PARTS,
    head_copy_bytes,
    layer_bytes,
    num_active,
    varies,
)

ITEM_BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8}
CODE_SCALE_BYTES = {8: 4, 4: 2}  # of a block of the attention's codes, by their bits
_DTYPES = {  # of predictor tensors; others are F32
    "planes": "U8",
    **dict.fromkeys(("scale_codes", "factor_in_codes", "factor_out_codes"), "I8"),
    **dict.fromkeys(("scale", "offset", "factor_in", "factor_out", "soft"), "F16"),
}
TensorTable: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]


def num_outputs(layer: Mapping[str, Any], *, gated: bool) -> int:
    """M: what the predictor of this layer computes one number for."""
    if layer["predictor"]["groups"]:
        return int(layer["num_neurons"]) // int(layer["group_size"])
    return int(layer["num_neurons"]) * (2 if gated else 1)


def predictor_table(predictor: Mapping[str, Any], width: int, outputs: int) -> TensorTable:
    """{name: (safetensors dtype, shape)} of one predictor with D = width, M = outputs."""
    shapes = expected_tensors(predictor, width, outputs)
    return {name: (_DTYPES.get(name, "F32"), shape) for name, shape in shapes.items()}


def down_table(layer: Mapping[str, Any], width: int) -> TensorTable:
    """As `predictor_table`, of the copy that counts for neurons not selected; none without it."""
    shapes = down_tensors(layer.get("unselected"), layer["num_neurons"], width)
    return {
        name: (_DTYPES.get(name.removeprefix("down_"), "F32"), shape)
        for name, shape in shapes.items()
    }


def low_table(layer: Mapping[str, Any], width: int, outputs: int) -> TensorTable:
    """As `predictor_table`, of the scales of refined rows; none where rows are stored."""
    return {name: ("F16", shape) for name, shape in low_tensors(layer, width, outputs).items()}


def _layers(hire: Mapping[str, Any]) -> list[Mapping[str, Any] | None]:
    return list(hire["ffn"]["layers"]) if hire["ffn"] else []


def num_matrices(hire: Mapping[str, Any]) -> int:
    """Matrices of one FFN: 3 with a gate, else 2."""
    return 3 if hire["ffn"] and hire["layout"]["gate"] else 2


def hire_tensors(hire: Mapping[str, Any], width: int, head_width: int) -> TensorTable:
    """Every tensor that hire/predictors.safetensors must hold, under its full name.

    `width` is that of the layers; `head_width`, of the head's input, differs in a few models.
    """
    table: TensorTable = {}
    for index, layer in enumerate(_layers(hire)):
        if layer is not None:
            outputs = num_outputs(layer, gated=num_matrices(hire) == 3)
            own = predictor_table(layer["predictor"], width, outputs) | down_table(layer, width)
            own |= low_table(layer, width, outputs)
            table |= {f"layers.{index}.{name}": entry for name, entry in own.items()}
    if hire["head"]:
        shapes = head_tensor_shapes(hire["head"], head_width)
        table |= {name: ("F32", shape) for name, shape in shapes.items()}
    return table


def head_width(config: Any) -> int:
    """The width of the head's input; `config` is the text configuration."""
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def table_bytes(table: TensorTable) -> int:
    """Bytes of the tensors of a table."""
    return sum(ITEM_BYTES[dtype] * prod(shape) for dtype, shape in table.values())


def head_entry(tensors: TensorTable, vocabulary: int) -> tuple[str, tuple[int, int]]:
    """(dtype, [V, D]) of the matrix that makes logits: the untied head, or the tied embedding."""
    found = {name: tensors[name] for name in tensors if _has_vocabulary(name, tensors, vocabulary)}
    if not found:
        raise InputError(f"the weights hold no matrix of {vocabulary} rows, so no output head.")
    name = min(found, key=lambda name: ("embed" in name or "wte" in name, name))
    dtype, shape = found[name]
    return dtype, (shape[0], shape[1])


def _has_vocabulary(name: str, tensors: TensorTable, vocabulary: int) -> bool:
    """Whether a tensor is an embedding or a head: a matrix outside the layers, a row a token."""
    shape = tensors[name][1]
    inside = any(part.isdigit() for part in name.split("."))
    return len(shape) == 2 and shape[0] >= vocabulary and not inside and not _is_position(name)


def _is_position(name: str) -> bool:
    return name.endswith(("embed_positions.weight", "wpe.weight"))


def dense_bytes(tensors: TensorTable, config: Any) -> int:
    """Bytes of the weights one dense token reads: all but the rows of tables it looks up.

    Of experts the share that a token is routed to. `config` is the text configuration.
    """
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    routed = (getattr(config, "num_experts_per_tok", None) or 0) / experts if experts else 1.0
    head = head_entry(tensors, config.vocab_size)
    total = float(ITEM_BYTES[head[0]] * prod(head[1]))
    for name, (dtype, shape) in tensors.items():
        if _is_position(name) or _has_vocabulary(name, tensors, config.vocab_size):
            continue
        count = ITEM_BYTES[dtype] * prod(shape)
        total += count * (routed if ".experts." in name else 1.0)
    return int(total)


def layer_rows(hire: Mapping[str, Any], width: int, weight_bytes: int) -> list[dict[str, Any]]:
    """One row for each decoder layer: counts, predictor, bytes read per token."""
    rows: list[dict[str, Any]] = []
    for index, layer in enumerate(_layers(hire)):
        if layer is None:
            rows.append({"layer": index, "neurons": None, "kind": None})
            continue
        predictor = layer["predictor"]
        read = layer_bytes(layer, width, num_matrices(hire), weight_bytes)
        rows.append(
            {
                "layer": index,
                "neurons": layer["num_neurons"],
                "kept": num_active(layer),
                "candidates": layer["num_candidates"],
                "selection": str(layer["selection"]["rule"]) if varies(layer) else "fixed",
                "group_size": layer["group_size"],
                "kind": predictor["kind"],
                "rank": predictor["rank"] if predictor["kind"] != "q" else None,
                "bits": predictor["bits"] if predictor["kind"] != "lr" else None,
                "inputs": predictor["num_inputs"],
                "rows": layer.get("rows", "stored"),
                "unselected": layer.get("unselected"),
                "predictor_bytes": read["predictor"],
                "unselected_bytes": read["unselected"],
                "read_bytes": sum(read[part] for part in FFN_PARTS),
                "dense_bytes": read["dense"],
            }
        )
    return rows


def head_bytes(head: Mapping[str, Any] | None, shape_VD: Sequence[int], weight_bytes: int) -> int:
    """Bytes that the head reads per row; a certified head is counted at its fewest rows.

    Of kind `q` what the native kernels read: the PyTorch path reads its own copy in full.
    """
    vocabulary, width = shape_VD
    if head is None:
        return vocabulary * width * weight_bytes
    asked = min(head["certify_top"] if head["certified"] else head["num_candidates"], vocabulary)
    exact = asked * width * weight_bytes
    if head["kind"] == "lr":
        bounds = 8 * vocabulary if head["certified"] else 0
        return 2 * head["rank"] * (vocabulary + width) + bounds + exact
    every, read_on = head_copy_bytes(shape_VD, head["bits"])
    return every + min(2 * asked, vocabulary) * read_on + exact


def attention_tensors(
    attention: Mapping[str, Any] | None, tensors: TensorTable
) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """(bits, dtype, shape) of every stored matrix that `config.hire.attention` names."""
    matrices = {} if attention is None else attention["matrices"]
    names = "|".join(map(re.escape, matrices))
    for key, (dtype, shape) in tensors.items() if matrices else ():
        found = re.search(rf"\.\d+\.({names})\.weight$", key)
        if found and len(shape) == 2:
            yield matrices[found[1]], dtype, shape


def attention_bytes(attention: Mapping[str, Any] | None, tensors: TensorTable) -> tuple[int, int]:
    """Bytes of the attention's matrices as they are stored and as codes with their scales.

    Both are 0 where none is rounded.
    """
    dense = converted = 0
    if attention is None:
        return dense, converted
    for bits, dtype, shape in attention_tensors(attention, tensors):
        scales = ceil(shape[1] / attention["block"])
        dense += ITEM_BYTES[dtype] * prod(shape)
        converted += shape[0] * (ceil(shape[1] * bits / 8) + CODE_SCALE_BYTES[bits] * scales)
    return dense, converted


def token_bytes(hire: Mapping[str, Any], tensors: TensorTable, config: Any) -> dict[str, Any]:
    """Bytes read per decoded token, dense and converted, and the speed-up that they bound.

    `tensors` are the dense weights, `config` the text configuration. The cache of keys and values
    is not counted.
    """
    dtype, shape_VD = head_entry(tensors, config.vocab_size)
    weight_bytes = ITEM_BYTES[dtype]
    layers = [layer for layer in _layers(hire) if layer]
    rows = [
        layer_bytes(layer, config.hidden_size, num_matrices(hire), weight_bytes) for layer in layers
    ]
    parts = {key: sum(row[key] for row in rows) for key in FFN_PARTS}
    ffn_dense, ffn = sum(row["dense"] for row in rows), sum(parts.values())
    head_dense = head_bytes(None, shape_VD, weight_bytes)
    head = head_bytes(hire["head"], shape_VD, weight_bytes)
    dense = dense_bytes(tensors, config)
    attention_dense, attention = attention_bytes(hire.get("attention"), tensors)
    converted = dense - ffn_dense - head_dense - attention_dense + ffn + head + attention
    return {
        "dense": dense,
        "converted": converted,
        "speedup_bound": round(dense / converted, 4),
        "ffn": {"dense": ffn_dense, "converted": ffn, **parts},
        "head": {"dense": head_dense, "converted": head},
        "attention": {"dense": attention_dense, "converted": attention},
    }
