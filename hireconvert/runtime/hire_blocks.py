"""What the native decode step needs to know of a model, and whether it computes the same.

A family is recognised by the modules that it has (the tables below), and then tried: a layer in
float32 over a small cache, and the whole model over one token, must give what transformers gives.
Whatever is unknown or comes out otherwise takes the PyTorch path, and the line logged at load says
so. Shape suffixes: Q new positions, D width, J key/value heads, E head size, P positions.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .hire_ffn import FfnParts
from .hire_native import activation_name, find_library
from .hire_native import native as library
from .hire_native import obstacle as ffn_obstacle
from .hire_predict import keeps_all

_BASE = {"embed_tokens", "layers", "norm", "rotary_emb"}
PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_HEAD_NORMS = {"q_norm": "q_norm", "k_norm": "k_norm"}
# Which norm of a layer stands where; the first table whose modules are the layer's.
_NORMS = (
    {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    {
        "attention_norm": "input_layernorm",
        "attended_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_out_norm": "post_feedforward_layernorm",
    },
)
# Of a model whose FFNs are all dense, which need not say where they lie.
_LAYOUT = {
    "ffn": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "act": "act_fn",
}  # fmt: skip
# Angles depend on the position alone: they are kept in a table.
_FIXED_ROPES = {"default", "linear", "llama3", "yarn"}
_TABLE = 512
_CLOSE, _CLOSE_HALF = 2e-3, 0.1

steps, _ = find_library("_native_step")


class Obstacle(Exception):
    """Why a model takes the PyTorch path."""


# --------------------------------------------------------------------------- what a model is


def _gain(module: nn.Module) -> tuple[torch.Tensor, float]:
    """(what a normalized vector is multiplied by, epsilon) of a root-mean-square norm."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module._parameters.get("weight")
    if not isinstance(eps, float) or len(module._parameters) != 1 or weight is None:
        raise Obstacle(f"norm {type(module).__name__}")
    gain = weight.detach().float()
    x = torch.linspace(-2.0, 3.0, gain.numel())[None]
    exact = copy.deepcopy(module).float()(x)
    normed = x * torch.rsqrt(x.square().mean() + eps)
    for candidate in (gain, 1.0 + gain):
        if torch.allclose(exact, normed * candidate, rtol=1e-4, atol=1e-5):
            return candidate, eps
    raise Obstacle(f"norm {type(module).__name__}")


def _linear(module: Any) -> Any:
    if type(module) is not nn.Linear:
        raise Obstacle(f"{type(module).__name__} in the place of a Linear")
    return steps.Matrix(module.weight.detach(), module.bias)


def _norm_names(layer: nn.Module, ffn: str) -> dict[str, str]:
    found = set(layer._modules) - {"self_attn", ffn}
    for names in _NORMS:
        if set(names.values()) == found:
            return dict(names)
    raise Obstacle(f"{type(layer).__name__} of {sorted(layer._modules)}")


def _ffn_parts(layer: nn.Module, layout: Mapping[str, Any] | None) -> FfnParts:
    layout = layout or _LAYOUT
    if layout["ffn"] != "mlp":
        raise Obstacle("an FFN that is no module of its layer")
    try:
        parts = FfnParts.resolve(layer.get_submodule("mlp"), layout)
    except AttributeError as error:
        raise Obstacle(f"{type(layer).__name__}: {error}") from error
    for part in parts.matrices():
        _linear(part.module)
    return parts


def _windows(config: Any, count: int) -> list[int]:
    """What each layer sees: so many positions, 0 for all."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * count
    if not set(types) <= {"full_attention", "sliding_attention"} or len(types) != count:
        raise Obstacle(f"layers of {sorted(set(types))}")
    windows = [window if kind == "sliding_attention" else 0 for kind in types]
    # Transformers' own reading of the config must be the same.
    caches = [getattr(layer, "sliding_window", 0) for layer in DynamicCache(config=config).layers]
    if windows != caches[:count]:
        raise Obstacle("attention windows")
    return windows


def _block(base: Any, index: int, window: int, rope: int, rotary: int) -> Any:
    """The layer as the library reads it, its FFN dense. Raises Obstacle."""
    layer = base.layers[index]
    names = _norm_names(layer, "mlp")
    attention = layer.self_attn
    inside = set(PROJECTIONS.values()), set(_HEAD_NORMS.values())
    if not inside[0] <= set(attention._modules) <= inside[0] | inside[1]:
        raise Obstacle(f"{type(attention).__name__} of {sorted(attention._modules)}")
    if any(part._parameters or part._buffers for part in (layer, attention)):
        raise Obstacle(f"{type(attention).__name__} with parameters of its own")
    parts = _ffn_parts(layer, base.config.hire["layout"])
    name = activation_name(parts.act)
    if name is None:
        raise Obstacle(f"activation {type(parts.act).__name__}")
    matrices = {key: _linear(getattr(attention, name)) for key, name in PROJECTIONS.items()}
    for key, part in (("gate", parts.gate), ("up", parts.up), ("down", parts.down)):
        if part is not None:
            matrices[key] = steps.Matrix(part.weight_out_in().detach(), part.bias())
    modules = {key: getattr(layer, name) for key, name in names.items()}
    modules |= {k: getattr(attention, n) for k, n in _HEAD_NORMS.items() if hasattr(attention, n)}
    gains = {key: _gain(module) for key, module in modules.items()}
    if len({eps for _, eps in gains.values()}) > 1:
        raise Obstacle("norms of several epsilons")
    types = {matrix.weight_OI.dtype for matrix in matrices.values()}
    if len(types) > 1 or not types <= set(library.TYPES):
        raise Obstacle(f"weights of {sorted(map(str, types))[0]}")
    eager = base.config._attn_implementation == "eager"  # others leave the soft cap out
    softcap = getattr(attention, "attn_logit_softcapping", None) if eager else None
    return steps.Block(
        matrices=matrices,
        norms={key: gain for key, (gain, _) in gains.items()},
        head_dim=attention.head_dim,
        rotary=rotary,
        eps=gains["ffn_norm"][1],
        scaling=float(attention.scaling),
        activation=name,
        rope=rope,
        window=window,
        softcap=float(softcap or 0.0),
        cache_type=types.pop(),
    )


class Ropes:
    """Cosines and sines of positions, from the model's own module."""

    def __init__(self, base: Any) -> None:
        self._module = base.rotary_emb
        kinds = getattr(self._module, "rope_type", None)
        self.names: list[str | None] = [None]
        if isinstance(kinds, dict):
            self.names = sorted(kinds)
            kinds = set(kinds.values())
        else:
            kinds = {kinds}
        self.fixed = kinds <= _FIXED_ROPES
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.rotary = [cosine.shape[1] for cosine, _ in self._at(torch.arange(1))]

    def _at(self, position_P: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        x = torch.zeros(1, 1, 1)
        found = []
        for name in self.names:
            more = {} if name is None else {"layer_type": name}
            cosine, sine = self._module(x, position_P[None], **more)
            if cosine.dim() != 3 or cosine.shape != sine.shape or cosine.dtype != torch.float32:
                raise Obstacle(f"angles of {type(self._module).__name__}")
            found.append((cosine[0].contiguous(), sine[0].contiguous()))
        return found

    def tables(self, start: int, num: int) -> list[torch.Tensor]:
        """Cos and sin [num, rotary] of each rope in turn, of positions from `start` on."""
        if not self.fixed:
            pairs = self._at(torch.arange(start, start + num))
            return [table for pair in pairs for table in pair]
        return [table[start : start + num] for table in self._all(start + num)]

    def rows(self, position_P: torch.Tensor) -> list[torch.Tensor]:
        """The same of any positions, none negative. The ropes must be `fixed`."""
        return [table[position_P] for table in self._all(int(position_P.max()) + 1)]

    def _all(self, num: int) -> list[torch.Tensor]:
        """Of the first positions, `num` at least."""
        if not self._pairs or num > self._pairs[0][0].shape[0]:
            self._pairs = self._at(torch.arange(max(_TABLE, 2 * num)))
        return [table for pair in self._pairs for table in pair]


def check_model(base: Any) -> None:
    if steps is None:
        raise Obstacle("no native library")
    if library.level() is None or not library.steps_allowed():
        raise Obstacle("switched off")
    if set(base._modules) != _BASE or base._parameters:
        raise Obstacle(f"{type(base).__name__} of {sorted(base._modules)}")
    if base.config.num_hidden_layers != len(base.layers):
        raise Obstacle("layers left out")
    if base.config._attn_implementation not in ("eager", "sdpa"):
        raise Obstacle(f"attention by {base.config._attn_implementation}")
    if any(parameter.device.type != "cpu" for parameter in base.parameters()):
        raise Obstacle("weights that are not on the CPU")


def dense_blocks(base: Any) -> tuple[list[Any], Ropes, list[int]]:
    ropes = Ropes(base)
    windows = _windows(base.config, len(base.layers))
    kinds: Any = getattr(base.config, "layer_types", None)
    blocks = []
    for index, window in enumerate(windows):
        rope = 0 if ropes.names == [None] else ropes.names.index(kinds[index])
        blocks.append(_block(base, index, window, rope, ropes.rotary[rope]))
    return blocks, ropes, windows


def last_norm(base: Any) -> tuple[torch.Tensor, float]:
    """What stands behind the layers, as `steps.Step` takes it. Raises Obstacle."""
    return _gain(base.norm)


def with_ffns(base: Any, blocks: list[Any]) -> list[Any]:
    """The same blocks, with the sparse FFNs that the library packed."""
    done = []
    for index, block in enumerate(blocks):
        layer = base.hire_layers.get(index)
        if layer is None:
            done.append(block)
            continue
        ffn = layer.prepared and layer.prepared.native
        reason = ffn_obstacle(layer.spec, layer.parts)
        # Where every neuron is kept the dense matrices serve, unless copies of them were packed.
        if reason is not None and not keeps_all(layer.spec):
            raise Obstacle(f"FFN of layer {index}: {reason}")
        done.append(replace(block, ffn=ffn, counts=layer.counts))
    return done


# --------------------------------------------------------------------------- trying it


def _signature(layer: nn.Module, block: Any) -> tuple[Any, ...]:
    types = [id(type(module)) for module in layer.modules()]
    shapes = [(name, tuple(m.weight_OI.shape)) for name, m in block.matrices.items()]
    return (types, shapes, sorted(block.norms), block.rope, block.window > 0, block.softcap)


def _differs(found: torch.Tensor, expected: torch.Tensor, most: float) -> bool:
    error = (found.float() - expected.float()).norm()
    return not bool(error <= most * expected.float().norm())


@torch.no_grad()
def _try_layer(base: Any, index: int, block: Any, ropes: Ropes) -> None:
    """Run a float32 copy of the layer over two positions and a small cache, both ways."""
    layer = base.layers[index]
    shared = [base.config, base.hire_state, *base.hire_layers.values()]
    twin = copy.deepcopy(layer, {id(one): one for one in shared}).float().eval()
    cached, dice = 5, torch.Generator().manual_seed(index)
    heads = block.matrices["k"].weight_OI.shape[0] // block.head_dim
    shape, width = (1, heads, cached, block.head_dim), block.matrices["q"].weight_OI.shape[1]
    past = [torch.randn(shape, generator=dice) * gain for gain in (3.0, 1.0)]
    x_QD = torch.randn(2, width, generator=dice)
    cache, place = DynamicCache(), twin.self_attn.layer_idx
    cache.update(past[0], past[1], place)
    expected = []
    for row, x_D in enumerate(x_QD):
        position = torch.arange(cached + row, cached + row + 1)
        angles = ropes._at(position)[block.rope]
        out = twin(
            x_D[None, None],
            attention_mask=None,
            position_ids=position[None],
            past_key_values=cache,
            use_cache=True,
            position_embeddings=tuple(angle[None] for angle in angles),
        )
        expected.append((out[0] if isinstance(out, tuple) else out).view(1, -1) - x_D)
    found = x_QD.clone()
    keys, values = _run_alone(base, twin, block, ropes, found, past)
    written = cache.layers[place]
    if (
        _differs(found - x_QD, torch.cat(expected), _CLOSE)
        or _differs(keys, written.keys[0], _CLOSE)
        or _differs(values, written.values[0], _CLOSE)
    ):
        raise Obstacle(f"{type(layer).__name__} computes something else")


def _run_alone(
    base: Any, twin: Any, block: Any, ropes: Ropes, x_QD: torch.Tensor, past: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 layer over x in place; returns its keys and values [J, P, E]."""
    owner = _Alone(base.config, [twin])
    own = _block(owner, 0, 0, block.rope, block.rotary)
    step, cached, num = steps.Step([own]), past[0].shape[2], x_QD.shape[0]
    room = [torch.zeros(t[0].numel() + num * t.shape[1] * t.shape[3] + 16) for t in past]
    views = []
    for memory, tensor in zip(room, past, strict=True):
        _, heads, _, size = tensor.shape
        view = memory[: heads * (cached + num) * size].view(heads, cached + num, size)
        view[:, :cached] = tensor[0]
        views.append(view)
    told = step.past()
    told[0] = torch.tensor(
        [views[0].data_ptr(), views[1].data_ptr(), views[0].stride(0), 0, cached]
    )
    step.run(x_QD, told, ropes.tables(cached, num), cached + num)
    return views[0], views[1]


@dataclass
class _Alone:
    """A model of a few layers, as `_block` looks at one."""

    config: Any
    layers: list[Any]


@torch.no_grad()
def _try_model(base: Any, blocks: list[Any], ropes: Ropes) -> None:
    """One token through the whole model, both ways: what stands around the layers."""
    state = base.hire_state
    before = (state.sparse, state.decided)
    state.sparse, state.decided = False, True
    ids = torch.tensor([[base.config.vocab_size // 2]])
    try:
        output = base.hire_native.forward(base, input_ids=ids, use_cache=False)
    finally:
        state.sparse, state.decided = before
    step = steps.Step(blocks, last_norm(base))
    told, held = step.past(), []
    for index, block in enumerate(blocks):
        room = torch.zeros(2, block.matrices["k"].weight_OI.shape[0] + 32, dtype=block.cache_type)
        held.append(room)
        row = [room[0].data_ptr(), room[1].data_ptr(), block.head_dim, 0, 0]
        told[index] = torch.tensor(row)
    embedded = base.embed_tokens(ids)
    x_QD = embedded[0].to(torch.float32, copy=True)
    bad = step.run(x_QD, told, ropes.tables(0, 1), 1)
    expected = output[0][0]
    close = _CLOSE if expected.dtype == torch.float32 else _CLOSE_HALF
    if bad >= 0 or _differs(x_QD, expected, close):
        raise Obstacle(f"{type(base).__name__} computes something else")


def try_out(base: Any, blocks: list[Any], ropes: Ropes) -> None:
    """Raise Obstacle unless the library computes what transformers does."""
    tried = set()
    try:
        for index, block in enumerate(blocks):
            kind = repr(_signature(base.layers[index], block))
            if kind not in tried:
                tried.add(kind)
                _try_layer(base, index, block, ropes)
        _try_model(base, blocks, ropes)
    except (TypeError, ValueError, RuntimeError) as error:  # of a forward that takes other things
        raise Obstacle(f"{type(base).__name__}: {error}") from error
