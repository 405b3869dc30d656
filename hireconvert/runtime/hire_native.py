"""Native CPU kernels for rows that decode, where hireconvert is installed with its library.

A checkpoint's runtime needs nothing outside itself: without the library, or for settings that it
does not cover, the PyTorch path runs, and the line logged at load says so. Shape suffixes: N rows
(tokens), D width, F neurons.
"""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from .hire_predict import is_copied, is_refined, is_relative, keeps_all, num_active, varies
from .hire_select import LEVEL_RULES

ABI = 5
# What a checkpoint selects for unless told otherwise (`max_sparse_rows`). More rows that select
# are masked by PyTorch, which was slower than these kernels where both were measured (a step of
# SmolLM2, 16 rows: 205 ms, these 59, the dense model 68 in float32 and 131 in bfloat16).
MOST_ROWS = 32
_REST_BLOCK = 16


def find_library(name: str) -> tuple[Any, str]:
    """(the module of hireconvert that calls kernels, or None; why there is none)."""
    try:
        # By name: whoever reads the files of a checkpoint need not have it.
        base = importlib.import_module("hireconvert._native")
        found = importlib.import_module(f"hireconvert.{name}")
    except ImportError as error:
        return None, f"no native library ({error})"
    if base.ABI != ABI:
        return None, f"the native library has ABI {base.ABI}, this checkpoint needs {ABI}"
    return found, ""


native, _MISSING = find_library("_native")


def activation_name(act: Any) -> str | None:
    """What the kernels call an activation, known by what it computes; None when they lack it."""
    point = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([-1e3, -50.0, 50.0, 1e3])])
    with torch.no_grad():
        found = act(point)
    known = {
        "silu": F.silu(point),
        "gelu_tanh": F.gelu(point, approximate="tanh"),
        "gelu_erf": F.gelu(point),
        "relu": F.relu(point),
        "relu2": F.relu(point).square(),
        "gelu_quick": point * torch.sigmoid(1.702 * point),
    }
    for name, value in known.items():
        if torch.allclose(found, value, rtol=1e-5, atol=1e-6):
            return name
    return None


def _by_level(spec: Mapping[str, Any]) -> bool:
    """Whether a row keeps just the neurons whose estimated score reaches the layer's level."""
    every = spec["num_candidates"] == spec["num_neurons"]
    rule = spec["selection"]["rule"]
    return every and spec["keep"] == "candidates" and rule in LEVEL_RULES


def _numbers(spec: Mapping[str, Any]) -> dict[str, Any]:
    """How many neurons the library is to compute."""
    candidates = spec["num_candidates"]
    if varies(spec):
        level = float(spec["selection"]["level"])
        kept = {"num_candidates": candidates, "num_kept": candidates}
        return {**kept, "level": level, "relative": is_relative(spec)}
    return {"num_candidates": candidates, "num_kept": num_active(spec), "level": None}


def _beyond_spec(spec: Mapping[str, Any], width: int) -> str | None:
    """What of a layer's spec the kernels do not cover."""
    predictor, rest = spec["predictor"], spec.get("unselected")
    if predictor["kind"] != "q":  # a config may then leave out what only copies have
        return f"predictor {predictor['kind']}"
    if predictor["bits"] == 8:
        return "predictor of 8 bits"
    if predictor["num_inputs"] < width:
        return "predictor of some inputs"
    if predictor["groups"] or spec["group_size"] > 1 or spec["num_common"] > 0:
        return "groups or common neurons"
    if varies(spec) and not _by_level(spec):
        return "a number of neurons that varies, but not by a level of estimates alone"
    if keeps_all(spec) and not is_copied(spec):
        return "every neuron is kept"
    if rest is not None and rest["block"] % _REST_BLOCK and rest["block"] < width:
        return f"unselected neurons in blocks of {rest['block']}"
    return None


def obstacle(spec: Mapping[str, Any], parts: Any) -> str | None:
    """Why a layer takes the PyTorch path; None when the kernels run it."""
    if native is None:
        return _MISSING
    if native.level() is None:
        return f"{native.VARIABLE} is off"
    weights = [part.module.weight for part in parts.matrices()]
    types, devices = {w.dtype for w in weights}, {w.device.type for w in weights}
    if devices != {"cpu"}:
        return f"weights on {sorted(devices)[0]}"
    if len(types) > 1 or not types <= set(native.TYPES):
        return f"weights of {sorted(map(str, types))[0]}"
    reason = _beyond_spec(spec, parts.up.weight_out_in().shape[1])
    if reason is None and activation_name(parts.act) is None:
        reason = f"activation {type(parts.act).__name__}"
    return reason


def pack(
    spec: Mapping[str, Any],
    parts: Any,
    tensors: Mapping[str, torch.Tensor],
    norm_F: torch.Tensor,
    packed: Any = None,
) -> Any:
    """The layer as the kernels read it, or None when the PyTorch path runs it.

    That it does too where weights that should be their copies are others: trained, merged or cast
    since. `packed`, when there is one, is the same layer with other numbers of neurons; what they
    share is not packed again.
    """
    copied = is_copied(spec)
    if obstacle(spec, parts) is not None:
        return None
    if packed is not None and copied == (packed.numbers["num_candidates"] == 0):
        return packed if copied else packed.counting(**_numbers(spec))
    settings = {
        "activation": activation_name(parts.act),
        **_numbers(spec),
        "rest": spec.get("unselected"),
        "refined": is_refined(spec),
        "copies": copied,
        **{key: spec["predictor"][key] for key in ("bits", "block", "symmetric")},
        "levels": spec["predictor"].get("levels", "even"),
    }
    named = {
        "gate": None if parts.gate is None else parts.gate.weight_out_in(),
        "gate_bias": None if parts.gate is None else parts.gate.bias(),
        "up": parts.up.weight_out_in(),
        "up_bias": parts.up.bias(),
        "down": parts.down_FD(),
        "down_bias": parts.down.bias(),
        "norm": torch.ones_like(norm_F) if spec["score"] == "plain" else norm_F,
    }
    if spec["score"] == "error":
        named["rest_error"] = torch.tensor([spec["unselected"]["error"]])
    return native.FfnLayer.pack(settings, {**tensors, **named})


def serves(layer: Any, x_ND: torch.Tensor) -> bool:
    """Whether a packed layer (or None) runs these rows."""
    return (
        layer is not None
        and x_ND.shape[0] <= MOST_ROWS
        and x_ND.dtype == layer.dtype
        and x_ND.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not (layer.varies and torch.compiler.is_compiling())
    )


def run(ffn: Any, x_ND: torch.Tensor) -> torch.Tensor:
    """The output [N, D] of a sparse FFN that `serves` these rows; those with NaN or inf run dense.

    `ffn` is a SparseFfn; its counters are kept.
    """
    layer = ffn.prepared.native

    def dense_where(finite_N: torch.Tensor, x_ND: torch.Tensor, y_ND: torch.Tensor) -> torch.Tensor:
        return torch.where(finite_N[:, None], y_ND, ffn.dense(x_ND).view_as(y_ND))

    if not torch.compiler.is_compiling():
        y_ND, finite_N = layer.run(x_ND, ffn.counts)
        return y_ND if finite_N is None else dense_where(finite_N, x_ND, y_ND)
    y_ND, finite_N = torch.ops.hire_native.ffn(x_ND, layer.handle)  # one operator of the graph
    num_rows, number = x_ND.shape[0], finite_N.sum()
    kept, candidates = num_active(ffn.spec) * number, ffn.spec["num_candidates"] * number
    ffn.count(num_rows, num_rows - number, kept=kept, candidates=candidates)
    return torch.cond(
        finite_N.all(), lambda f, x, y: y.clone(), dense_where, (finite_N, x_ND, y_ND)
    )


def _reason(layer: Any) -> str | None:
    """Why a layer takes the PyTorch path, as far as is known before it is packed."""
    found = obstacle(layer.spec, layer.parts)
    return found or ("weights that are not their copies" if off_copies(layer) else None)


def off_copies(layer: Any) -> bool:
    """Whether a layer was to be packed as copies, but its weights are others."""
    prepared = layer.prepared
    if prepared is None or prepared.native is not None or not is_copied(layer.spec):
        return False
    return obstacle(layer.spec, layer.parts) is None


def path(layers: Iterable[Any]) -> str:
    """One phrase for the log: what runs the sparse FFN layers, and why if it is not the kernels."""
    reasons = [_reason(layer) for layer in layers]
    others = sorted({reason for reason in reasons if reason is not None})
    if not reasons:
        return "PyTorch path"
    if not others:
        return f"native FFN kernels ({native.machinery()})"
    if None not in reasons:
        return f"PyTorch path ({'; '.join(others)})"
    count = reasons.count(None)
    return (
        f"native FFN kernels ({native.machinery()}) in {count} layers, "
        f"PyTorch path in {len(reasons) - count} ({'; '.join(others)})"
    )
