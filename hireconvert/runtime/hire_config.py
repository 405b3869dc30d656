"""What `config.hire` and the predictor file may hold (docs/format.md), checked before use.

Shape suffixes: D width, M predictor outputs, R rank.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .hire_ffn import SparseFfn
from .hire_predict import (
    LONGEST_NORMAL_BLOCK,
    has_normal_levels,
    is_copied,
    is_refined,
    is_rounded,
    keeps_all,
    num_active,
    varies,
)
from .hire_select import RULES

FORMAT_VERSION = 1
PREDICTOR_FILE = "hire/predictors.safetensors"
LOW_BITS = 4  # bits of refined rows below those of the copies
_LARGEST = 3.0e38  # levels are compared with float32 numbers
_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_SLICE = re.compile(_PATH.pattern + r"(:0/2|:1/2)?")


def _integer(spec: Mapping[str, Any], key: str, low: int, high: int, where: str) -> int:
    value = spec.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"config.hire: {where}.{key} is {value!r}, expected an integer in [{low}, {high}]"
        )
    return value


def _choice(spec: Mapping[str, Any], key: str, choices: tuple[Any, ...], where: str) -> None:
    value = spec.get(key)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(
            f"config.hire: {where}.{key} is {value!r}, expected one of {list(choices)}"
        )


def _object(spec: Any, where: str) -> None:
    if not isinstance(spec, Mapping):
        raise ValueError(
            f"config.hire: {where} is {type(spec).__name__}, expected an object or null"
        )


def _check_copy(spec: Mapping[str, Any], where: str) -> None:
    """The low-bit copy of a matrix."""
    normal = False
    if "levels" in spec:
        _choice(spec, "levels", ("even", "normal"), where)
        normal = has_normal_levels(spec)
    _choice(spec, "bits", (4,) if normal else (2, 3, 4, 8), where)
    _integer(spec, "block", 1, LONGEST_NORMAL_BLOCK if normal else 2**24, where)
    _choice(spec, "symmetric", (True,) if normal else (True, False), where)


def _check_predictor(spec: Mapping[str, Any], where: str) -> None:
    _choice(spec, "kind", ("lr", "q", "qlr"), where)
    _choice(spec, "groups", (True, False), where)
    _integer(spec, "num_inputs", 1, 2**24, where)
    if spec["kind"] != "lr":
        _check_copy(spec, where)
    if spec["kind"] != "q":
        _integer(spec, "rank", 1, 2**20, where)
        _choice(spec, "factor_bits", (16, 8, 4), where)
    if "soften" in spec:
        _choice(spec, "soften", (False,) if spec["groups"] else (True, False), where)


def _number(spec: Mapping[str, Any], key: str, low: float, high: float, where: str) -> None:
    value: Any = spec.get(key)
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not low <= value <= high:  # NaN fails as well
        raise ValueError(
            f"config.hire: {where}.{key} is {value!r}, expected a number in [{low:g}, {high:g}]"
        )


def _check_selection(layer: Mapping[str, Any], where: str) -> None:
    spec = layer["selection"]
    _object(spec, where)
    # Predicted group scores are logarithms, of which only an order is known.
    groups = layer["predictor"]["groups"]
    _choice(spec, "rule", ("threshold",) if groups else RULES, where)
    low, high = (0.0, 1.0) if spec["rule"] == "score_mass" else (-_LARGEST, _LARGEST)
    _number(spec, "level", low, high, where)
    _number(spec, "mean_kept", layer["num_common"], layer["num_candidates"], where)
    if spec["rule"] == "relative" and layer["keep"] != "candidates":
        raise ValueError(f"config.hire: {where}.rule is 'relative', but keep is {layer['keep']!r}")


def _check_unselected(layer: Mapping[str, Any], where: str) -> None:
    spec = layer["unselected"]
    _object(spec, where)
    if layer["predictor"]["groups"]:
        raise ValueError(f"config.hire: {where} needs estimates of neurons, not of groups")
    _check_copy(spec, where)


def _check_error(layer: Mapping[str, Any], where: str) -> None:
    unselected = layer.get("unselected")
    if unselected is None or layer["predictor"].get("soften") is not True:
        raise ValueError(
            f"config.hire: {where}.score is 'error' without unselected and predictor.soften"
        )
    _number(unselected, "error", 0.0, _LARGEST, f"{where}.unselected")


def _check_rows(layer: Mapping[str, Any], where: str) -> None:
    _choice(layer, "rows", ("stored", "refined", "copies"), where)
    rows = layer["rows"]
    if rows == "stored":
        return
    predictor, unselected = layer["predictor"], layer.get("unselected") or {}
    copies = [predictor["kind"], predictor.get("bits"), unselected.get("bits"), predictor["groups"]]
    if copies != ["q", 4, 4, False]:
        raise ValueError(f"config.hire: {where}.rows is {rows!r} without 4-bit copies of neurons")
    if is_copied(layer) and not keeps_all(layer):
        raise ValueError(
            f"config.hire: {where}.rows is 'copies', by which all {layer['num_neurons']} neurons "
            "count, but fewer are kept"
        )


def _check_attention(spec: Any) -> None:
    _object(spec, "attention")
    _integer(spec, "block", 1, 2**24, "attention")
    matrices = spec.get("matrices")
    _object(matrices, "attention.matrices")
    if not matrices or not all(isinstance(n, str) and _PATH.fullmatch(n) for n in matrices):
        raise ValueError(
            f"config.hire: attention.matrices is {matrices!r}, expected names of modules"
        )
    for name in matrices:
        _choice(matrices, name, (4, 8), "attention.matrices")


def _check_layer(spec: Any, where: str) -> None:
    _object(spec, where)
    total = _integer(spec, "num_neurons", 1, 2**31, where)
    group = _integer(spec, "group_size", 1, total, where)
    common = _integer(spec, "num_common", 0, total - group, where)
    kept = _integer(spec, "num_kept", common + group, total, where)
    candidates = _integer(spec, "num_candidates", kept, total, where)
    if any(count % group for count in (total, common, kept, candidates)):
        raise ValueError(
            f"config.hire: {where} has counts that are no multiples of group_size {group}"
        )
    _choice(spec, "score", ("norm", "plain", "error"), where)
    _choice(spec, "keep", ("top_k", "candidates"), where)
    if not isinstance(spec.get("predictor"), Mapping):
        raise ValueError(f"config.hire: {where}.predictor is missing")
    _check_predictor(spec["predictor"], f"{where}.predictor")
    if spec.get("selection") is not None:
        _check_selection(spec, f"{where}.selection")
    if spec.get("unselected") is not None:
        _check_unselected(spec, f"{where}.unselected")
    if spec["score"] == "error":
        _check_error(spec, where)
    if "rows" in spec:
        _check_rows(spec, where)


def _check_head(spec: Any) -> None:
    _object(spec, "head")
    _choice(spec, "kind", ("q", "lr"), "head")
    _integer(spec, "num_candidates", 1, 2**31, "head")
    _integer(spec, "certify_top", 1, 2**31, "head")
    _choice(spec, "unselected", ("estimate", "-inf"), "head")
    _choice(spec, "certified", (True, False), "head")
    _choice(spec, "on_uncertified", ("dense", "estimate"), "head")
    if spec["kind"] == "q":
        _choice(spec, "bits", (8, 4), "head")
        _integer(spec, "block", 0, 2**24, "head")
    else:
        _integer(spec, "rank", 1, 2**20, "head")


def _check_layout(layout: Any) -> None:
    names = ("layers", "ffn", "gate", "up", "down", "act")
    if not isinstance(layout, Mapping) or any(name not in layout for name in names):
        raise ValueError(f"config.hire: layout must be an object with the names {list(names)}")
    for name in names:
        path = layout[name]
        absent = (name == "gate" and path is None) or (name == "ffn" and path == "")
        pattern = _SLICE if name in ("gate", "up") else _PATH
        if not absent and (not isinstance(path, str) or not pattern.fullmatch(path)):
            raise ValueError(f"config.hire: layout.{name} is {path!r}, not the name of a module")
    if layout["ffn"] == "" and layout["gate"] is not None:
        raise ValueError("config.hire: layout has a gate but no FFN module")


def _check_ffn(hire: Mapping[str, Any], num_layers: int) -> None:
    _check_layout(hire.get("layout"))
    layers = hire["ffn"].get("layers") if isinstance(hire["ffn"], Mapping) else None
    if not isinstance(layers, list) or len(layers) != num_layers:
        found = len(layers) if isinstance(layers, list) else type(layers).__name__
        raise ValueError(f"config.hire: ffn.layers has {found} entries, expected {num_layers}")
    for index, spec in enumerate(layers):
        if spec is not None:
            _check_layer(spec, f"ffn.layers[{index}]")


def check_hire_config(config: Any) -> None:
    """Raise ValueError, naming the field, when `config.hire` is not what docs/format.md allows."""
    hire = getattr(config, "hire", None)
    if not isinstance(hire, Mapping):
        raise ValueError("config.hire is missing: this is not a HiRE checkpoint")
    version = hire.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"config.hire: format_version is {version!r}, this runtime reads {FORMAT_VERSION}"
        )
    _integer(hire, "max_decode_queries", 1, 2**20, "hire")
    _integer(hire, "max_sparse_rows", 1, 2**20, "hire")
    for name in ("ffn", "head"):
        if name not in hire:
            raise ValueError(f"config.hire: {name} is missing; it is an object or null")
    if hire["ffn"] is not None:
        _check_ffn(hire, config.get_text_config().num_hidden_layers)
    if hire["head"] is not None:
        _check_head(hire["head"])
    if hire.get("attention") is not None:
        _check_layout(hire.get("layout"))
        _check_attention(hire["attention"])


def _copy_tensors(spec: Mapping[str, Any], rows: int, length: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a low-bit copy [rows, length]."""
    scales = (rows, -(-length // spec["block"]))
    shapes: dict[str, tuple[int, ...]] = {"planes": (spec["bits"], rows, -(-length // 8))}
    if has_normal_levels(spec):
        return {**shapes, "scale_codes": scales, "scale_unit": (rows,)}
    return {**shapes, "scale": scales} | ({} if spec["symmetric"] else {"offset": scales})


def expected_tensors(
    spec: Mapping[str, Any], width: int, num_outputs: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the predictor tensors that one layer's spec calls for."""
    shapes: dict[str, tuple[int, ...]] = {"mean": (width,), "bias": (num_outputs,)}
    if spec["kind"] in ("q", "qlr"):
        rows, length = (width, num_outputs) if spec["num_inputs"] < width else (num_outputs, width)
        shapes |= _copy_tensors(spec, rows, length)
        shapes["column_scale"] = (width,)
    if spec["kind"] in ("lr", "qlr"):
        rank, bits = spec["rank"], spec["factor_bits"]
        for name, rows, columns in (("factor_in", rank, width), ("factor_out", num_outputs, rank)):
            if bits == 16:
                shapes[name] = (rows, columns)
            else:
                shapes[f"{name}_codes"] = (rows, columns if bits == 8 else -(-columns // 2))
                shapes[f"{name}_scale"] = (rows,)
    if spec.get("soften"):
        shapes["soft"] = (num_outputs,)
    return shapes


def down_tensors(
    spec: Mapping[str, Any] | None, num_neurons: int, width: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the low-bit copy that neurons not selected are counted with."""
    if spec is None:
        return {}
    shapes = _copy_tensors(spec, num_neurons, width)
    return {f"down_{name}": shape for name, shape in shapes.items()}


def low_tensors(
    layer: Mapping[str, Any], width: int, num_outputs: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the scales of refined rows."""
    if not is_refined(layer):
        return {}
    blocks = [-(-width // layer[key]["block"]) for key in ("predictor", "unselected")]
    return {
        "low_scale": (num_outputs, blocks[0]),
        "down_low_scale": (layer["num_neurons"], blocks[1]),
    }


def _check_type(tensor: torch.Tensor, name: str, where: str) -> None:
    codes = {"planes": torch.uint8, "down_planes": torch.uint8}
    codes |= {"factor_in_codes": torch.int8, "factor_out_codes": torch.int8}
    codes |= {"scale_codes": torch.int8, "down_scale_codes": torch.int8}
    wanted = codes.get(name)
    if tensor.dtype != wanted if wanted else not tensor.is_floating_point():
        expected = wanted or "a floating-point type"
        raise ValueError(f"{PREDICTOR_FILE}: {where}{name} is {tensor.dtype}, expected {expected}")
    if wanted is None and not bool(tensor.float().isfinite().all()):
        raise ValueError(f"{PREDICTOR_FILE}: {where}{name} holds NaN or inf")


def check_predictor_tensors(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raise ValueError when tensors are missing, mis-shaped, mistyped or hold NaN or inf."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{PREDICTOR_FILE}: {where}{name} is missing")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{PREDICTOR_FILE}: {where}{name} has shape {tuple(tensors[name].shape)}, "
                f"expected {shape}"
            )
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ValueError(f"{PREDICTOR_FILE}: {where}{name} is not called for by config.hire")
        _check_type(tensor, name, where)
    if "column_scale" in tensors and not bool((tensors["column_scale"] > 0).all()):
        raise ValueError(
            f"{PREDICTOR_FILE}: {where}column_scale holds values that are not positive"
        )


def layer_tensor_shapes(layer: SparseFfn) -> dict[str, tuple[int, ...]]:
    """Shapes of the predictor tensors that one installed layer needs."""
    spec, parts = layer.spec, layer.parts
    num_neurons, width = parts.up.weight_out_in().shape
    outputs = num_neurons // spec["group_size"]
    if not spec["predictor"]["groups"]:
        outputs = num_neurons * (1 if parts.gate is None else 2)
    if is_rounded(spec) and spec["predictor"]["num_inputs"] < width:
        raise ValueError(
            f"config.hire: rows are {spec['rows']!r}, but the predictor copies some inputs"
        )
    copy = down_tensors(spec.get("unselected"), num_neurons, width)
    low = low_tensors(spec, width, outputs)
    return {**expected_tensors(spec["predictor"], width, outputs), **copy, **low}


def head_tensor_shapes(spec: Mapping[str, Any], width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the head's spec calls for; none when quantized."""
    if spec["kind"] != "lr":
        return {}
    if spec["rank"] > width:
        raise ValueError(f"config.hire: head.rank is {spec['rank']}, the head is {width} wide")
    return {"head.factor_in": (spec["rank"], width), "head.lift": (width, spec["rank"])}


def describe(hire: Mapping[str, Any], path: str = "PyTorch path") -> str:
    """One line that says which path decoding will take; `path` is what runs the FFN layers."""
    every = [spec for spec in (hire["ffn"] or {"layers": []})["layers"] if spec is not None]
    layers, pieces = [spec for spec in every if not is_copied(spec)], []
    if len(layers) < len(every):
        pieces.append(f"{len(every) - len(layers)} FFN layers as 4-bit copies")
    if layers:
        active = sum(num_active(spec) for spec in layers)
        kept = active / sum(spec["num_neurons"] for spec in layers)
        kinds = sorted({spec["predictor"]["kind"] for spec in layers})
        mean = " on average" if any(varies(spec) for spec in layers) else ""
        rest = any(spec.get("unselected") is not None for spec in layers)
        pieces.append(
            f"{len(layers)} sparse FFN layers keep {kept:.2f} of their neurons{mean} "
            f"(predictor {', '.join(kinds)}{'; the rest by estimate' if rest else ''})"
        )
    head = hire["head"]
    if head is not None:
        pieces.append(f"{'certified ' if head['certified'] else ''}sparse head ({head['kind']})")
    return (
        "decoding with "
        + " and ".join(pieces or ["dense layers only"])
        + f", {path}; prefill is dense"
    )
