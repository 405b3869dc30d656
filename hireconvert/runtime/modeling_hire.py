"""HiRE models: dense weights under native names, sparse decoding beside them.

`HireXModel` and `HireXForCausalLM` are made on demand from the native classes of the same name
without the prefix (`HireLlamaForCausalLM` from `LlamaForCausalLM`); `config.hire` says where the
FFN parts lie and what is selected (docs/format.md of hireconvert). Nothing happens at import.

The base model's forward decides once per call whether its rows select, and every layer follows:

    decode   the cache already holds tokens and the query is at most `max_decode_queries` long
    prefill  everything else: dense
    scope    `set_hire_scope("all" | "off")` overrides both, for scoring and for comparison
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers import GenerationMixin

from .hire_config import check_hire_config
from .hire_ffn import COUNTER_NAMES as FFN_COUNTER_NAMES
from .hire_ffn import SparseFfn
from .hire_head import COUNTER_NAMES as HEAD_COUNTER_NAMES
from .hire_head import SparseHead
from .hire_install import (
    HireState,
    Native,
    cached_tokens,
    decoder_layers,
    install_ffn,
    install_head,
)
from .hire_io import HireIoMixin, share_conversions
from .hire_memory import MODES, release
from .hire_native import off_copies
from .hire_sample import sample
from .hire_step import NativeStep

SCOPES = ("decode", "all", "off")
_GENERATE_ARGUMENTS = tuple(inspect.signature(GenerationMixin.generate).parameters)[1:]


class HireBaseMixin(Native):
    """The base model: installs the sparse layers and decides, once per call, who selects."""

    hire_causal = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_hire_config(config)
        share_conversions(type(self), self.hire_native, config.model_type)
        super().__init__(config, *args, **kwargs)
        hire = config.hire
        self.hire_state = HireState(hire)
        self.register_buffer("hire_fallbacks", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.hire_layers: dict[int, SparseFfn] = {}
        self.hire_step = NativeStep()
        if hire["ffn"] is not None:
            layers = decoder_layers(self, hire["layout"]["layers"])
            for index, spec in enumerate(hire["ffn"]["layers"]):
                if spec is not None:
                    self.hire_layers[index] = install_ffn(
                        layers[index], hire["layout"], spec, self.hire_state
                    )
        self.post_init()

    def _hire_decide(self, call: Mapping[str, Any], hint: bool | None) -> None:
        state, cache = self.hire_state, call.get("past_key_values")
        state.sparse, state.dense_rows_N = False, None
        given = call.get("input_ids")
        given = call.get("inputs_embeds") if given is None else given
        if state.scope == "off" or given is None:
            return
        batch, queries = given.shape[:2]
        if state.scope == "all":
            self.hire_refresh(True)
            self._hire_decide_all(batch, queries, cached_tokens(cache) or 0)
            return
        decoding = cached_tokens(cache) != 0 if hint is None else hint
        # What generate() did before the first step holds for the others; training never decodes.
        if not (decoding and state.generating) and not (self.training and not decoding):
            self.hire_refresh(not decoding and not state.generating)
        if not decoding or queries > state.max_decode_queries:
            return
        rows, most = batch * queries, state.max_sparse_rows
        if rows > most or not state.usable:
            self.hire_fallbacks.add_(1)
            if state.usable:
                state.warn_once(f"{rows} rows run dense: max_sparse_rows is {most}")
            return
        state.sparse = True

    def _hire_decide_all(self, batch: int, queries: int, cached: int) -> None:
        state = self.hire_state
        state.sparse = state.usable
        if cached < state.dense_prefix:
            dense_Q = (
                torch.arange(cached, cached + queries, device=self.device) < state.dense_prefix
            )
            state.dense_rows_N = dense_Q.repeat(batch)

    def hire_steps(self) -> bool:
        """Whether the call in progress may be one of the library's."""
        state = self.hire_state
        steps = state.sparse and state.native_step and state.scope == "decode"
        return steps and not torch.compiler.is_compiling()

    def hire_refresh(self, thorough: bool) -> None:
        """Build derived tensors, or rebuild those whose weights changed; nothing inside a graph.

        `thorough` looks at the weights' content too, which a write through `.data` changes alone.
        """
        if torch.compiler.is_compiling():
            return
        state, layers = self.hire_state, list(self.hire_layers.values())
        if thorough or any(layer.prepared is None for layer in layers):
            state.usable = all(layer.find_parts() for layer in layers)
        if not state.usable:
            state.warn_once(
                "FFN weights are not plain Linear or Conv1D layers: every row runs dense"
            )
            return
        before = [layer.prepared for layer in layers]
        for layer in layers:
            layer.prepare(thorough)
        if any(layer.prepared is not old for layer, old in zip(layers, before, strict=True)):
            if state.scope == "decode" and any(map(off_copies, layers)):
                state.warn_once(
                    "FFN weights are no longer the copies they were rounded to (trained, merged or "
                    "loaded in another type): they are read as they are"
                )
            # What was packed or widened is read in place of the file.
            release([t for layer in layers for t in layer.predictor_tensors.values()])
        self.hire_step.prepare(self, thorough)


class HireCausalMixin(Native):
    """The language model: a HiRE base model below it, the sparse head beside its weight."""

    hire_causal = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_hire_config(config)
        share_conversions(type(self), self.hire_native, config.model_type)
        super().__init__(config, *args, **kwargs)
        prefix = self.base_model_prefix
        setattr(self, prefix, hire_class(type(getattr(self, prefix)))(config))
        self._hire_install_head(None)
        self.post_init()

    def _hire_install_head(self, before: SparseHead | None) -> None:
        spec = self.config.hire["head"]
        if spec is None:
            return
        head = self.get_output_embeddings()
        if hasattr(head, "hire"):  # a tied head is resized with the embedding and stays
            return
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        install_head(head, spec, cap, self.hire_state)
        if before is not None:
            head.hire.predictor_tensors = before.predictor_tensors

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head (resizing the vocabulary does) and put the sparse head beside it."""
        before = getattr(self.get_output_embeddings(), "hire", None)
        super().set_output_embeddings(new_embeddings)
        self._hire_install_head(before)

    @property
    def hire_state(self) -> HireState:
        """The state shared with every layer; it belongs to the base model."""
        return getattr(self, self.base_model_prefix).hire_state

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Native inputs; notes whether the cache holds tokens, which a graph cannot ask."""
        if inputs_embeds is not None:  # generate() looks for a parameter of this name
            kwargs["inputs_embeds"] = inputs_embeds
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        cache = inputs.get("past_key_values")
        decoding = cache is not None and int(cache.get_seq_length()) > 0
        if not decoding:
            self.hire_prepare()  # the forward may be a compiled graph, which cannot
        elif self.hire_state.prompt_read and self.hire_state.memory == "inference":
            self.hire_release()
        self.hire_state.prompt_read = not decoding
        inputs["hire_decode"] = decoding
        return inputs

    def hire_prepare(self) -> None:
        """Build derived tensors now; needed only before a forward compiled without `generate`."""
        getattr(self, self.base_model_prefix).hire_refresh(True)
        self._hire_refresh_head(True)

    def _hire_refresh_head(self, thorough: bool) -> None:
        head = self.get_output_embeddings()
        if hasattr(head, "hire") and not torch.compiler.is_compiling():
            head.hire.prepare(head, thorough)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Native `generate`; the head certifies, estimates or runs dense as the settings need."""
        state = self.hire_state
        before = (state.generating, state.head_mode, state.head_top)
        unsaid = getattr(self, "_hire_uncertified", None)  # of a call around this one
        state.generating = True
        given = {**dict(zip(_GENERATE_ARGUMENTS, args, strict=False)), **kwargs}
        self._hire_custom = bool(
            given.get("logits_processor") or given.get("prefix_allowed_tokens_fn")
        )
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._hire_say_uncertified()
            self._hire_uncertified = unsaid
            state.generating, state.head_mode, state.head_top = before

    @functools.wraps(GenerationMixin._sample)
    def _sample(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            return super()._sample(input_ids, *args, **kwargs)
        return sample(self, super()._sample, input_ids, **kwargs)

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        """Native resolution of the settings, which then choose the head's mode."""
        resolved = super()._prepare_generation_config(*args, **kwargs)
        if self.hire_state.generating:
            settings = resolved[0].to_dict()
            self.hire_state.head_mode = self._hire_head_mode(settings)
            # Greedy decoding reads the best row alone; what reads more has another mode.
            self.hire_state.head_top = None if settings.get("do_sample") else 1
        return resolved

    def _hire_head_mode(self, settings: Mapping[str, Any]) -> str:
        """`recipe` where the certificate covers these settings, else what `on_uncertified` says."""
        spec, self._hire_uncertified = self.config.hire["head"], None
        if spec is None or not spec["certified"]:
            return "recipe"
        reason = uncertified_reason(settings, self._hire_custom, spec["certify_top"])
        if reason is None:
            return "recipe"
        # Said where the loop over tokens turns out to need them (`hire_sample`), or at the end.
        self._hire_uncertified = (
            f"{reason}: more than the certified top {spec['certify_top']} "
            f"is needed, the head runs '{spec['on_uncertified']}'"
        )
        return spec["on_uncertified"]

    def _hire_say_uncertified(self) -> None:
        """Say, once, why the head does not run as converted, where that is yet to be said."""
        said = getattr(self, "_hire_uncertified", None)
        self._hire_forget_uncertified()
        if said is not None:
            self.hire_state.warn_once(said)

    def _hire_forget_uncertified(self) -> None:
        self._hire_uncertified = None

    # ----------------------------------------------------------------- scopes and statistics

    def set_hire_memory(self, mode: str) -> None:
        """`keep_dense`, or `inference`: `hire_release` after every prompt. Raises ValueError."""
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected one of {list(MODES)}")
        self.hire_state.memory = mode

    def hire_release(self) -> int:
        """Drop what is mapped from files and unwritten; reads bring it back. Returns the bytes."""
        base, head = self._hire_parts()
        parts = [*base.hire_layers.values(), *([] if head is None else [head])]
        held = [part.predictor_tensors for part in parts]
        size = release([*self.parameters(), *(tensor for own in held for tensor in own.values())])
        if size == 0:
            self.hire_state.warn_once("no weight lies in an unwritten file: nothing is released")
        return size

    def set_hire_scope(
        self, scope: str, *, dense_prefix: int = 0, head: bool = True, step: bool = True
    ) -> None:
        """Choose who selects: `decode` steps, `all` positions >= dense_prefix, or none (`off`).

        `head=False` leaves the LM head dense whatever the scope, `step=False` the decode step to
        PyTorch and the FFN kernels. Raises ValueError.
        """
        if scope not in SCOPES:
            raise ValueError(f"scope is {scope!r}, expected one of {list(SCOPES)}")
        if dense_prefix < 0:
            raise ValueError(f"dense_prefix is {dense_prefix}, expected at least 0")
        state = self.hire_state
        state.scope, state.dense_prefix, state.sparse_head = scope, dense_prefix, head
        state.native_step = step
        state.sparse, state.dense_rows_N = False, None

    def hire_stats(self, reset: bool = False) -> dict[str, Any]:
        """Counts since the last reset: per layer and summed for the FFN, and for the head."""
        base = getattr(self, self.base_model_prefix)
        layers = {
            index: dict(zip(FFN_COUNTER_NAMES, layer.counts.tolist(), strict=True))
            for index, layer in base.hire_layers.items()
        }
        total = {name: sum(layer[name] for layer in layers.values()) for name in FFN_COUNTER_NAMES}
        head = getattr(self.get_output_embeddings(), "hire", None)
        head_counts = (
            {} if head is None else dict(zip(HEAD_COUNTER_NAMES, head.counts.tolist(), strict=True))
        )
        stats = {
            "ffn": total,
            "layers": layers,
            "head": head_counts,
            "dense_fallbacks": int(base.hire_fallbacks),
        }
        if reset:
            self._hire_reset_counts()
        return stats

    def _hire_reset_counts(self) -> None:
        base = getattr(self, self.base_model_prefix)
        base.hire_fallbacks.zero_()
        for layer in base.hire_layers.values():
            layer.counts.zero_()
        head = getattr(self.get_output_embeddings(), "hire", None)
        if head is not None:
            head.counts.zero_()


def uncertified_reason(settings: Mapping[str, Any], custom: bool, top: int) -> str | None:
    """Why generation settings need more logits than the certified `top`; None when they do not."""

    def on(name: str, *neutral: Any) -> bool:
        return settings.get(name) not in (None, False, *neutral)

    if (settings.get("num_beams") or 1) > 1 or on("penalty_alpha"):
        return "beam or contrastive search"
    if custom:
        return "a custom logits processor"
    if on("output_scores") or on("output_logits"):
        return "scores over all rows"
    changes: dict[str, Any] = {
        "repetition_penalty": 1.0,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "top_h": None,
        "bad_words_ids": [],
        "sequence_bias": {},
        "guidance_scale": 1.0,
        "min_length": 0,
        "min_new_tokens": 0,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "exponential_decay_length_penalty": None,
        "watermarking_config": None,
        "remove_invalid_values": False,
    }
    for name, neutral in changes.items():
        if on(name, neutral):
            return name
    if not settings.get("do_sample"):
        return None
    top_k = settings.get("top_k") or 0
    if not 0 < top_k <= top:
        return f"sampling with top_k={top_k or None}"
    return None


def hire_class(native: Any) -> Any:
    """The HiRE twin of a native base model or causal LM class, named `Hire` + its name."""
    return getattr(sys.modules[__name__], f"Hire{native.__name__}")


def _arguments(native: Any) -> Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, Any]]:
    """A function that names the positional arguments of the native forward."""
    names = list(inspect.signature(native.forward).parameters)[1:]

    def named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**dict(zip(names, args, strict=False)), **kwargs}

    return named


def _causal_forward(native: Any) -> Any:
    named = _arguments(native)

    @functools.wraps(native.forward)
    def forward(self: Any, *args: Any, hire_decode: bool | None = None, **kwargs: Any) -> Any:
        call, state = named(args, kwargs), self.hire_state
        base, head = getattr(self, self.base_model_prefix), self.get_output_embeddings()
        # Decided here as well: some models (OPT) call their decoder past the base model's forward.
        base._hire_decide(call, hire_decode)
        if not state.generating and not self.training:
            self._hire_refresh_head(state.scope == "all" or not state.sparse)
        steps = state.generating and base.hire_steps()
        output = base.hire_step.token(base, head, call) if steps else None
        if output is None:
            state.decided = True
            try:
                output = native.forward(self, *args, **kwargs)
            finally:
                state.decided = False
            if steps:
                base.hire_step.learn(head, output)
        sparse = getattr(head, "hire", None)
        # Soft-capping comes after the head and would turn -inf into a finite number.
        if sparse is None or sparse.unselected is None:
            return output
        place = 0 if call.get("labels") is None else 1
        logits = output[place] if isinstance(output, tuple) else output.logits
        logits = logits.masked_fill(sparse.unselected.view_as(logits), -torch.inf)
        if isinstance(output, tuple):
            return (*output[:place], logits, *output[place + 1 :])
        output.logits = logits
        return output

    return forward


def _base_forward(native: Any) -> Any:
    named = _arguments(native)

    @functools.wraps(native.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.hire_state
        if not state.decided:
            self._hire_decide(named(args, kwargs), None)
        if self.hire_steps():
            output = self.hire_step.run(self, named(args, kwargs))
            if output is not None:
                return output
        return native.forward(self, *args, **kwargs)

    return forward


def __getattr__(name: str) -> type:
    """Make `HireX` from transformers' `X` when asked for; AutoModel finds classes this way."""
    native = (
        getattr(transformers, name.removeprefix("Hire"), None) if name.startswith("Hire") else None
    )
    if not isinstance(native, type) or not issubclass(native, transformers.PreTrainedModel):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    causal = name.endswith("ForCausalLM") or name.endswith("LMHeadModel")
    mixin = HireCausalMixin if causal else HireBaseMixin
    body = {
        "__module__": __name__,
        "__doc__": f"HiRE twin of {native.__name__}.",
        "hire_native": native,
    }
    twin: Any = type(name, (HireIoMixin, mixin, native), body)
    twin.forward = _causal_forward(native) if causal else _base_forward(native)
    globals()[name] = twin
    return twin
