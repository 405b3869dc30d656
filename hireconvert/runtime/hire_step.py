"""The native decode step: all decoder layers of a decoded token in one call of the library.

It serves up to MOST_NEW rows that select, new positions of one sequence or one of each of several,
over a cache of transformers that grows; everything else takes the PyTorch path. Shape suffixes:
S sequences, Q new positions (of one, or one of each), D width, B decoder layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .hire_blocks import (
    PROJECTIONS,
    Obstacle,
    Ropes,
    check_model,
    dense_blocks,
    last_norm,
    steps,
    try_out,
    with_ffns,
)
from .hire_cache import MOST_NEW, Caches, served
from .hire_codes import coded_names, with_codes
from .hire_ffn import content_stamp, weight_stamp
from .hire_native import native as library
from .hire_token import Tokens, altered, embedding_of, serves
from .hire_token import native as native_tokens

_QUIET = "transformers.utils.output_capturing"  # its hooks do nothing unless asked for outputs
_GLOBAL_HOOKS = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
)
_KNOWN = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values",
    "use_cache", "return_dict", "cache_position",
}  # fmt: skip


# --------------------------------------------------------------------------- a model, prepared


def _modules(base: Any) -> Iterator[nn.Module]:
    yield base.rotary_emb
    yield base.norm
    for layer in base.layers:
        yield from layer.modules()


@dataclass
class _Plan:
    """What the library runs, and what it was made from."""

    blocks: list[Any]  # as the library has them, but for the sparse FFNs
    step: Any
    ropes: Ropes
    windows: list[int]
    dtype: torch.dtype
    modules: list[nn.Module]
    hooks: list[Any]
    small: torch.Tensor
    coded: list[Any]  # modules whose weights were copied as codes
    content: tuple[float, ...]

    def is_fresh(self) -> bool:
        """Whether what was copied of the model is still what the model holds."""
        same = torch.equal(self.small, _small(self.modules))
        return same and self.content == content_stamp(self.coded)

    def hooked(self) -> bool:
        """Whether somebody wants to see what the modules compute."""
        if not any(self.hooks):
            return False
        return any(
            getattr(hook, "__module__", None) != _QUIET
            for hooks in self.hooks
            for hook in hooks.values()
        )


def _stamp(base: Any, modules: Sequence[nn.Module]) -> Any:
    """Changes when a module, a weight or a packed FFN is replaced, or a weight written to."""
    weights = [m for m in modules if "weight" in m._parameters]
    natives = [layer.prepared and layer.prepared.native for layer in base.hire_layers.values()]
    plain = [m if hasattr(m, "bias") else _Unbiased(m) for m in weights]
    own = (list(map(id, modules)), list(map(type, modules)), weight_stamp(plain))
    return own, list(map(id, natives))


class _Unbiased:
    """A norm, as `weight_stamp` looks at layers."""

    bias = None

    def __init__(self, module: Any) -> None:
        self.weight = module.weight


def _small(modules: Sequence[nn.Module]) -> torch.Tensor:
    """Everything that is copied: norms and biases."""
    vectors = [
        parameter.detach().float()
        for module in modules
        for parameter in module._parameters.values()
        if parameter is not None and parameter.dim() == 1
    ]
    return torch.cat(vectors) if vectors else torch.zeros(0)


class NativeStep:
    """The native step of one base model; it knows the model only while it is called."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self.reason: str | None = "not prepared"
        self._seen: Any = None  # the stamp that `reason` was found for
        self._tried: list[type] | None = None  # modules that computed what PyTorch does
        self._caches = Caches()
        self._last_hidden: torch.Tensor | None = None  # what the last step gave
        # Whether the language model's logits are its head's of that and no more; None: not known.
        self._head_alone: bool | None = None

    def __deepcopy__(self, memo: Any) -> "NativeStep":
        return NativeStep()  # another model has other weights

    def __reduce__(self) -> Any:
        return NativeStep, ()

    @property
    def blocks(self) -> Sequence[Any]:
        """The decoder layers as the library has them; none where it does not run the model."""
        return () if self._plan is None else self._plan.step.blocks

    def obstacle(self, base: Any) -> str | None:
        """Why the model takes the PyTorch path, FFNs not looked at; None when it does not."""
        try:
            check_model(base)
            blocks, ropes, _ = dense_blocks(base)
            with_ffns(base, blocks)
            try_out(base, blocks, ropes)
            self._tried = list(map(type, _modules(base)))
        except Obstacle as error:
            return str(error)
        return None

    def path(self, base: Any) -> str:
        """One phrase for the log."""
        reason = self.obstacle(base)
        if reason is None:
            return f"native decode step ({library.machinery()})"
        return f"decode step by PyTorch ({reason})"

    def prepare(self, base: Any, thorough: bool) -> None:
        """Describe the model to the library, or again when a weight or module has changed."""
        if thorough:
            self._head_alone = None
        if steps is None or base.training:
            return
        modules = list(_modules(base)) if hasattr(base, "rotary_emb") else []
        own, natives = _stamp(base, modules)
        stamp = ((own, library.level(), library.steps_allowed()), natives)
        plan, seen = self._plan, self._seen
        if seen == stamp and (plan is None or not thorough or plan.is_fresh()):
            return
        self._seen, self._plan = stamp, None
        if plan is not None and seen[0] == stamp[0] and plan.is_fresh():
            self._renew(base, plan)
            return
        try:
            check_model(base)
            if any("forward" in vars(module) for module in modules):
                raise Obstacle("a module whose forward was replaced")
            blocks, ropes, windows = dense_blocks(base)
            types = list(map(type, modules))
            if types != self._tried:
                try_out(base, blocks, ropes)
                self._tried = types
            blocks = with_codes(base, blocks, steps, PROJECTIONS)
            step = steps.Step(with_ffns(base, blocks), last_norm(base))
        except Obstacle as error:
            self.reason = str(error)
            return
        self.reason = None
        names = coded_names(base, PROJECTIONS).values()
        coded = [layer.self_attn.get_submodule(name) for layer in base.layers for name in names]
        hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._plan = _Plan(
            blocks, step, ropes, windows, blocks[0].cache_type, modules,
            [*hooks, *_GLOBAL_HOOKS], _small(modules), coded, content_stamp(coded),
        )  # fmt: skip

    def _renew(self, base: Any, plan: _Plan) -> None:
        """The same layers with the sparse FFNs that are there now."""
        try:
            step = steps.Step(with_ffns(base, plan.blocks), last_norm(base))
        except Obstacle as error:
            self.reason = str(error)
            return
        self._plan = replace(plan, step=step)

    def run(self, base: Any, call: Mapping[str, Any]) -> Any:
        """The base model's output, its cache one step further; None where PyTorch must run."""
        hidden = self.hidden(base, call)
        if hidden is None:
            return None
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=call["past_key_values"]
        )

    def hidden(self, base: Any, call: Mapping[str, Any]) -> torch.Tensor | None:
        """What the base model gives for the new positions [S, Q, D]; None as in `run`."""
        plan = self._plan
        if plan is None or base.training or not _plain(base.config, call) or plan.hooked():
            return None
        cache: Any = call.get("past_key_values")
        embedded: Any = call.get("inputs_embeds")
        given: Any = call.get("input_ids") if embedded is None else embedded
        if given.device.type != "cpu" or not served(cache):
            return None
        start, (num_sequences, num) = cache.get_seq_length(), given.shape[:2]
        rows = _rows(call, plan.ropes, num_sequences, num, start)
        if rows is None:
            return None
        angles, unseen_Q = rows
        held = self._caches.claim(cache, plan.step, plan.windows, num_sequences=num_sequences)
        if held is None:
            return None
        if embedded is None:
            embedded = base.embed_tokens(given)
        x_QD = embedded.flatten(0, 1).to(torch.float32, copy=True).contiguous()
        bad = plan.step.run(
            x_QD, held.past_B5, angles, held.longest() + num, unseen_Q=unseen_Q, seen=start
        )
        if bad >= 0:
            return None  # NaN or inf: the cache is as it was
        held.advance(cache, num)
        self._last_hidden = x_QD.to(embedded.dtype).view_as(embedded)
        return self._last_hidden

    def token(self, base: Any, head: Any, call: Mapping[str, Any]) -> Any:
        """The language model's output, its own forward left out; None where that must run.

        It is left out where `learn` saw that it adds nothing to this: on a small model its checks
        and outputs take a tenth of a token.
        """
        self._last_hidden, keep = None, call.get("logits_to_keep", 0)
        if not self._head_alone or type(keep) is not int or call.get("labels") is not None:
            return None
        if base._forward_hooks or base._forward_pre_hooks:
            return None
        own = {key: call[key] for key in call.keys() - {"labels", "logits_to_keep"}}
        hidden = self.hidden(base, own)
        if hidden is None:
            return None
        logits = head(hidden[:, -keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=call["past_key_values"])

    def open(self, base: Any, head: Any, cache: Any) -> Any:
        """The tokens that follow in one call each, where `learn` saw that no more is needed.

        None where something has to see or do what lies between, as in `hidden` and `token`.
        """
        plan, call = self._plan, {"past_key_values": cache, "input_ids": cache}
        if not self._head_alone or plan is None or base.training or not served(cache):
            return None
        if not _plain(base.config, call) or plan.hooked() or not plan.ropes.fixed:
            return None
        parts = (base, base.embed_tokens, head)
        if any(map(altered, parts)) or not serves(head):
            return None
        embedding = embedding_of(base.embed_tokens)
        held = self._caches.claim(cache, plan.step, plan.windows)
        if embedding is None or held is None:
            return None
        num, row = held.room(), head.hire_row() if hasattr(head, "hire") else None
        token = native_tokens.Token(
            plan.step,
            held.past_B5,
            held.kept(cache),
            angles=plan.ropes.tables(cache.get_seq_length(), num),
            embedding=embedding,
            head=row,
            most=held.longest() + num,
        )

        def listened() -> bool:
            return plan.hooked() or any(map(altered, parts))

        return Tokens(
            token, head, sparse=row is not None, cache=cache, held=held, listened=listened
        )

    def learn(self, head: Any, output: Any) -> None:
        """Note whether the language model's output of a step is the head's logits and no more."""
        hidden, self._last_hidden = self._last_hidden, None
        if hidden is None or self._head_alone is not None:
            return
        counts = head.hire.counts.clone() if hasattr(head, "hire") else None
        logits, found = head(hidden), output["logits"]
        if counts is not None:
            head.hire.counts.copy_(counts)
        self._head_alone = (
            type(output) is CausalLMOutputWithPast
            and set(output.keys()) == {"logits", "past_key_values"}
            and torch.equal(found, logits)
        )


def _plain(config: Any, call: Mapping[str, Any]) -> bool:
    """Whether nothing is asked for but hidden states of new positions over a cache."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if call.get("past_key_values") is None or call.get("use_cache") is False:
        return False
    if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
        return False
    if call.get("return_dict") is False or config.output_attentions or config.output_hidden_states:
        return False
    return config.return_dict and all(
        key in _KNOWN or value is None or value is False for key, value in call.items()
    )


def _rows(
    call: Mapping[str, Any], ropes: Ropes, num_sequences: int, num: int, start: int
) -> tuple[list[torch.Tensor], torch.Tensor | None] | None:
    """(the angles of a call's rows, what sequences do not see: see `Step.run`).

    None where the library does not serve such rows.
    """
    mask, ids = call.get("attention_mask"), call.get("position_ids")
    if num_sequences == 1:
        served = num <= MOST_NEW and _everything(mask, start + num) and _in_order(ids, start, num)
        return (ropes.tables(start, num), None) if served else None
    if num != 1 or num_sequences > MOST_NEW or not ropes.fixed:
        return None
    unseen_S = _unseen(mask, num_sequences, start)
    if unseen_S is None:
        return None
    if ids is None:
        return [table.repeat(num_sequences, 1) for table in ropes.tables(start, 1)], unseen_S
    if ids.shape != (num_sequences, 1) or int(ids.min()) < 0:
        return None
    return ropes.rows(ids[:, 0]), unseen_S


def _unseen(mask: Any, num_sequences: int, start: int) -> torch.Tensor | None:
    """int64 [S]: how many positions in front an attention mask hides of each sequence.

    None where it hides others; the new position, behind `start` others, is always seen.
    """
    if mask is None:
        return torch.zeros(num_sequences, dtype=torch.int64)
    if not isinstance(mask, torch.Tensor) or mask.shape != (num_sequences, start + 1):
        return None
    seen_SP = mask.bool()
    unseen_S = (~seen_SP).sum(dim=1)
    in_front = torch.equal(seen_SP, torch.arange(start + 1) >= unseen_S[:, None])
    return unseen_S if in_front and int(unseen_S.max()) <= start else None


def _everything(mask: Any, length: int) -> bool:
    """Whether an attention mask hides nothing."""
    if mask is None:
        return True
    return isinstance(mask, torch.Tensor) and mask.shape == (1, length) and bool(mask.all())


def _in_order(ids: Any, start: int, num: int) -> bool:
    """Whether position ids are those that follow from the cache's length."""
    if ids is None:
        return True
    if ids.shape != (1, num):
        return False
    return ids.tolist()[0] == list(range(start, start + num))
