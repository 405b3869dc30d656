"""The native LM head, where hireconvert is installed with its library; else the PyTorch path runs.

Shape suffixes: N rows (tokens), D width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from .hire_native import find_library

native, _MISSING = find_library("_native_head")


def obstacle(spec: Mapping[str, Any], head: Any) -> str | None:
    """Why a head takes the PyTorch path; None when the kernels run it."""
    if native is None:
        return _MISSING
    if native.level() is None:
        return f"{native.VARIABLE} is off"
    if spec["kind"] != "q":
        return f"head of kind {spec['kind']}"
    weight, bias = head.weight, head.bias
    if weight.device.type != "cpu":
        return f"head on {weight.device.type}"
    if weight.dtype not in native.TYPES or (bias is not None and bias.dtype not in native.TYPES):
        return f"head of {weight.dtype}"
    if not weight.is_contiguous() or weight.shape[1] > native.MOST_WIDTH:
        return f"head of {list(weight.shape)} in strides {list(weight.stride())}"
    return None


def pack(spec: Mapping[str, Any], head: Any) -> Any:
    """The head as the kernels read it, or None when the PyTorch path runs it."""
    if obstacle(spec, head) is not None:
        return None
    packed = native.HeadLayer(head.weight, head.bias, bits=spec["bits"])
    return packed if packed.finite else None


def serves(packed: Any, x_ND: torch.Tensor) -> bool:
    """Whether a packed head (or None) runs these rows."""
    return (
        packed is not None
        and x_ND.device.type == "cpu"
        and not (torch.is_grad_enabled() and x_ND.requires_grad)
        and not torch.is_autocast_enabled("cpu")
    )


def run(sparse: Any, head: Any, x_ND: torch.Tensor, certify: bool, count: int) -> torch.Tensor:
    """Logits float32 [N, V] of a SparseHead whose packed head `serves` these rows.

    `count` rows are certified, or rescored. Rows with NaN or inf run dense; counters are kept.
    """
    packed, cap, marked = sparse.prepared.native, sparse.cap, sparse.spec["unselected"] == "-inf"

    def dense_where(
        finite_N: torch.Tensor, x_ND: torch.Tensor, logits_NV: torch.Tensor
    ) -> torch.Tensor:
        dense_NV = F.linear(x_ND.to(head.weight.dtype), head.weight, head.bias).float()
        return torch.where(finite_N[:, None], logits_NV, dense_NV)

    rows, size = x_ND.shape[0], head.weight.shape[0]
    if torch.compiler.is_compiling():  # one operator of the graph
        logits_NV, rescored_NV, finite_N, read_2 = torch.ops.hire_native.head(
            x_ND, packed.handle, certify, count, cap or 0.0
        )
        logits_NV = torch.cond(
            finite_N.all(), lambda f, x, y: y.clone(), dense_where, (finite_N, x_ND, logits_NV)
        )
        rescored, refined, bad = read_2[0], read_2[1], rows - finite_N.sum()
    else:
        call = packed.run(x_ND, count, certify=certify, cap=cap, mask=marked)
        logits_NV, rescored_NV, finite_N = call.logits_NV, call.rescored_NV, call.finite_N
        rescored, refined, bad = call.num_rescored, call.num_refined, 0
        if finite_N is not None:
            logits_NV, bad = dense_where(finite_N, x_ND, logits_NV), int((~finite_N).sum())
    sparse.count(
        calls=1,
        rows=rows,
        rescored=rescored + bad * size,
        dense_rows=bad,
        uncertified_rows=0 if certify else rows - bad,
        refined=refined,
    )
    if marked:
        selected_NV = rescored_NV if finite_N is None else rescored_NV | ~finite_N[:, None]
        sparse.unselected = ~selected_NV
    return logits_NV


def row(sparse: Any, certify: bool, count: int) -> Any:
    """What `run` does with one row, for `hireconvert._native_token`; None without a packed head."""
    packed = sparse.prepared.native
    if packed is None:
        return None
    return native.RowCall(packed, sparse.counts, count=count, certify=certify, cap=sparse.cap)


def path(spec: Mapping[str, Any], head: Any) -> str:
    """One phrase for the log: what runs the head, and why if it is not the kernels."""
    reason = obstacle(spec, head)
    if reason is None:
        return f"native head kernels ({native.machinery()})"
    return f"PyTorch path for the head ({reason})"
