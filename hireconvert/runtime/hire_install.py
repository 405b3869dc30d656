"""Putting selection into a native model: instances change class, weights and names stay put."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .hire_ffn import FfnParts, SparseFfn
from .hire_head import SparseHead
from .hire_memory import default_mode

logger = logging.getLogger("hire")
# Mixins stand in front of a native class that is known only at run time.
Native: Any = object


class HireState:
    """What the layers of one model need to know about the call in progress."""

    def __init__(self, hire: Mapping[str, Any]) -> None:
        self.max_decode_queries: int = hire["max_decode_queries"]
        self.max_sparse_rows: int = hire["max_sparse_rows"]
        self.scope = "decode"
        self.dense_prefix = 0
        self.sparse_head = True
        self.native_step = True
        # `inference` drops pages of dense weights once a prompt has been read (hire_memory).
        self.memory = default_mode()
        self.prompt_read = False
        # generate() sets these for its duration: whether it runs, and how the head serves it.
        self.generating = False
        self.head_mode = "recipe"
        # How many of the best rows a call certifies; None: the recipe's number.
        self.head_top: int | None = None
        # Whether the FFN weights are plain layers; serving engines and adapters replace them.
        self.usable = True
        # Set by the causal forward while it runs: the base model need not decide again.
        self.decided = False
        self.sparse = False
        self.dense_rows_N: torch.Tensor | None = None
        self.warned: set[str] = set()

    def warn_once(self, message: str) -> None:
        """Log a fallback the first time it happens."""
        if message not in self.warned and not torch.compiler.is_compiling():
            self.warned.add(message)
            logger.warning("hire: %s", message)


def cached_tokens(cache: Any) -> int | None:
    """Tokens the cache holds; None inside a graph, where a static cache keeps them in a tensor."""
    if cache is None:
        return 0
    if torch.compiler.is_compiling():
        layers = getattr(cache, "layers", None)
        return 0 if layers and not layers[0].is_initialized else None
    return int(cache.get_seq_length())


class HireFfnMixin(Native):
    """Placed in front of a native FFN class by changing an instance's class; weights stay put."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        state = self.hire_state
        if not state.sparse:
            return super().forward(hidden_states, *args, **kwargs)
        rows = self.hire(hidden_states.flatten(0, -2), state.dense_rows_N)
        return rows.view_as(hidden_states)


class HireInlineMixin(Native):
    """For layers without an FFN module: the first matrix runs the whole FFN, the last passes on."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        state = self.hire_state
        if not state.sparse:
            return self.hire.dense(hidden_states)
        rows = self.hire(hidden_states.flatten(0, -2), state.dense_rows_N)
        return rows.view(*hidden_states.shape[:-1], rows.shape[-1])


class HirePassMixin(Native):
    """The last matrix of an inline FFN: the first uses its weight, its input is the output."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class HireHeadMixin(Native):
    """Placed in front of the output embedding's class."""

    def hire_row(self) -> Any:
        """One row of a decode step as the library computes it, by itself; None where it cannot."""
        state = self.hire_state
        due = state.scope == "decode" and state.sparse_head and state.max_sparse_rows > 0
        if not due or state.head_mode == "dense":
            return None
        certify = self.hire.spec["certified"] and state.head_mode != "estimate"
        return self.hire.row(certify, state.head_top)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        state = self.hire_state
        self.hire.unselected = None
        rows = hidden_states.shape[:-1].numel()
        due = state.scope == "all" or (
            state.scope == "decode" and (state.sparse or state.generating)
        )
        if not due or not state.sparse_head:
            return super().forward(hidden_states)
        many = state.scope == "decode" and rows > state.max_sparse_rows
        if many:
            state.warn_once(
                f"head runs dense: {rows} rows, max_sparse_rows is {state.max_sparse_rows}"
            )
        if many or state.head_mode == "dense" or hidden_states.dtype == torch.float64:
            self.hire.count_dense(rows)
            return super().forward(hidden_states)
        certify = self.hire.spec["certified"] and state.head_mode != "estimate"
        logits = self.hire(hidden_states.flatten(0, -2), self, certify, state.head_top)
        return logits.view(*hidden_states.shape[:-1], -1)


@functools.cache
def mixed(mixin: Any, native: Any) -> Any:
    """`native` with `mixin` in front; one class for each pair."""
    return type(f"Hire{native.__name__}", (mixin, native), {"__module__": __name__})


def place(mixin: Any, module: Any) -> None:
    """Put a mixin in front of a module's class."""
    module.__class__ = mixed(mixin, module.__class__)


def decoder_layers(base: nn.Module, path: str) -> nn.ModuleList:
    """The decoder layers below the base model. Raises ValueError when `path` names none."""
    try:
        layers = base.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"config.hire: layout.layers does not fit the model: {error}") from error
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"config.hire: layout.layers is {path!r}, which is no list of layers")
    return layers


def _check_parts(parts: FfnParts, spec: Mapping[str, Any]) -> None:
    if not all(isinstance(part.module, nn.Linear | Conv1D) for part in parts.matrices()):
        raise ValueError("config.hire: layout names modules that are no Linear or Conv1D layers")
    num_neurons, width = parts.up.weight_out_in().shape
    shapes = [part.weight_out_in().shape for part in parts.matrices()]
    if any(shape != (num_neurons, width) for shape in shapes[:-1]) or shapes[-1] != (
        width,
        num_neurons,
    ):
        raise ValueError(f"config.hire: layout names matrices of shapes {list(map(list, shapes))}")
    if any(True for _ in parts.act.parameters()):
        raise ValueError("config.hire: layout.act names a module with weights")
    if spec["num_neurons"] != num_neurons:
        raise ValueError(
            f"config.hire: num_neurons is {spec['num_neurons']}, the layer has {num_neurons}"
        )
    if spec["predictor"]["num_inputs"] > width:
        raise ValueError(
            f"config.hire: num_inputs is {spec['predictor']['num_inputs']}, "
            f"the layer is {width} wide"
        )


def install_ffn(
    layer: nn.Module, layout: Mapping[str, Any], spec: Mapping[str, Any], state: HireState
) -> SparseFfn:
    """Put selection into one decoder layer without moving or renaming a weight.

    Raises ValueError when the layer is not what the layout and the spec say.
    """
    try:
        owner = layer.get_submodule(layout["ffn"]) if layout["ffn"] else layer
        parts = FfnParts.resolve(owner, layout)
    except AttributeError as error:
        raise ValueError(f"config.hire: layout does not fit the model: {error}") from error
    _check_parts(parts, spec)
    if layout["ffn"]:
        target = owner
        place(HireFfnMixin, owner)
    else:
        target = parts.up.module
        place(HireInlineMixin, target)
        place(HirePassMixin, parts.down.module)
        setattr(layer, layout["act"], nn.Identity())
    target.hire = SparseFfn(spec, owner, layout, parts)
    object.__setattr__(target, "hire_state", state)
    return target.hire


def install_head(
    head: nn.Module, spec: Mapping[str, Any], cap: float | None, state: HireState
) -> None:
    """Put the sparse head beside the output embedding's weight. Raises ValueError."""
    if not isinstance(head, nn.Linear):
        raise ValueError(f"config.hire: the head is a {type(head).__name__}, expected a Linear")
    place(HireHeadMixin, head)
    head.hire = SparseHead(spec, cap)
    object.__setattr__(head, "hire_state", state)
