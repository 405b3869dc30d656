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
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from .hire_config import (
    PREDICTOR_FILE,
    check_hire_config,
    check_predictor_tensors,
    describe,
    head_tensor_shapes,
    layer_tensor_shapes,
)
from .hire_ffn import COUNTER_NAMES as FFN_COUNTER_NAMES
from .hire_ffn import SparseFfn
from .hire_head import COUNTER_NAMES as HEAD_COUNTER_NAMES
from .hire_head import SparseHead
from .hire_install import HireState, cached_tokens, install_ffn, install_head

RUNTIME_FILES = (
    "modeling_hire.py",
    "hire_config.py",
    "hire_install.py",
    "hire_predict.py",
    "hire_ffn.py",
    "hire_head.py",
)
SCOPES = ("decode", "all", "off")
logger = logging.getLogger("hire")


class HireBaseMixin:
    """The base model: installs the sparse layers and decides, once per call, who selects."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_hire_config(config)
        super().__init__(config, *args, **kwargs)
        hire = config.hire
        self.hire_state = HireState(hire)
        self.register_buffer("hire_fallbacks", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.hire_layers: dict[int, SparseFfn] = {}
        if hire["ffn"] is not None:
            layers = self.get_submodule(hire["layout"]["layers"])
            for index, spec in enumerate(hire["ffn"]["layers"]):
                if spec is not None:
                    self.hire_layers[index] = install_ffn(
                        layers[index], hire["layout"], spec, self.hire_state
                    )
        self.post_init()

    def _hire_decide(self, shape: torch.Size, cache: Any) -> None:
        state = self.hire_state
        batch, queries = shape[0], shape[1]
        state.sparse, state.dense_rows_N = False, None
        if state.scope == "off":
            return
        if state.scope == "all":
            self._hire_decide_all(batch, queries, cached_tokens(cache) or 0)
            return
        hint, state.decode_hint = state.decode_hint, None
        decoding = cached_tokens(cache) != 0 if hint is None else hint
        if not decoding:
            if not torch.compiler.is_compiling():
                self.hire_prepare()
            return
        if queries > state.max_decode_queries:
            return
        if batch * queries > state.max_sparse_rows:
            self.hire_fallbacks.add_(1)
            state.warn_once(
                f"{batch * queries} rows run dense: max_sparse_rows is {state.max_sparse_rows}"
            )
            return
        state.sparse = True

    def _hire_decide_all(self, batch: int, queries: int, cached: int) -> None:
        state = self.hire_state
        if not torch.compiler.is_compiling():
            self.hire_prepare()
        state.sparse = True
        if cached < state.dense_prefix:
            dense_Q = (
                torch.arange(cached, cached + queries, device=self.device) < state.dense_prefix
            )
            state.dense_rows_N = dense_Q.repeat(batch)

    def hire_prepare(self) -> None:
        """Build derived tensors, or rebuild those whose weights changed; cheap when none did."""
        if not all(layer.usable() for layer in self.hire_layers.values()):
            self.hire_state.warn_once(
                "FFN weights are not plain Linear or Conv1D layers: every row runs dense"
            )
            self.hire_state.scope = "off"
            return
        for layer in self.hire_layers.values():
            layer.prepare()


class HireCausalMixin:
    """The language model: a HiRE base model below it, the sparse head beside its weight."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_hire_config(config)
        super().__init__(config, *args, **kwargs)
        prefix = self.base_model_prefix
        setattr(self, prefix, hire_class(type(getattr(self, prefix)))(config))
        if config.hire["head"] is not None:
            cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
            install_head(self.get_output_embeddings(), config.hire["head"], cap, self.hire_state)
        self.post_init()

    @property
    def hire_state(self) -> HireState:
        """The state shared with every layer; it belongs to the base model."""
        return getattr(self, self.base_model_prefix).hire_state

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Native inputs; notes whether the cache holds tokens, which a graph cannot ask."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        cache = inputs.get("past_key_values")
        inputs["hire_decode"] = cache is not None and int(cache.get_seq_length()) > 0
        return inputs

    def generate(self, *args: Any, generation_config: Any = None, **kwargs: Any) -> Any:
        """Native `generate`; the head certifies, estimates or runs dense as the settings need."""
        with self._hire_generation(generation_config, kwargs):
            return super().generate(*args, generation_config=generation_config, **kwargs)

    @contextmanager
    def _hire_generation(self, generation_config: Any, kwargs: Mapping[str, Any]) -> Iterator[None]:
        state = self.hire_state
        before = (state.generating, state.head_mode)
        state.generating, state.head_mode = True, self._hire_head_mode(generation_config, kwargs)
        try:
            yield
        finally:
            state.generating, state.head_mode = before

    def _hire_head_mode(self, generation_config: Any, kwargs: Mapping[str, Any]) -> str:
        """`recipe` where the certificate covers these settings, else what `on_uncertified` says."""
        spec = self.config.hire["head"]
        if spec is None or not spec["certified"]:
            return "recipe"
        settings = {**self.generation_config.to_dict()}
        if generation_config is not None:
            settings.update({k: v for k, v in generation_config.to_dict().items() if v is not None})
        settings.update({k: v for k, v in kwargs.items() if k in settings})
        reason = uncertified_reason(settings, kwargs, spec["certify_top"])
        if reason is None:
            return "recipe"
        self.hire_state.warn_once(
            f"{reason}: more than the certified top {spec['certify_top']} "
            f"is needed, the head runs '{spec['on_uncertified']}'"
        )
        return spec["on_uncertified"]

    # ----------------------------------------------------------------- scopes and statistics

    def set_hire_scope(self, scope: str, *, dense_prefix: int = 0, head: bool = True) -> None:
        """Choose who selects: `decode` steps, `all` positions >= dense_prefix, or none (`off`).

        `head=False` leaves the LM head dense whatever the scope. Raises ValueError.
        """
        if scope not in SCOPES:
            raise ValueError(f"scope is {scope!r}, expected one of {list(SCOPES)}")
        if dense_prefix < 0:
            raise ValueError(f"dense_prefix is {dense_prefix}, expected at least 0")
        state = self.hire_state
        state.scope, state.dense_prefix, state.sparse_head = scope, dense_prefix, head
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


def uncertified_reason(
    settings: Mapping[str, Any], kwargs: Mapping[str, Any], top: int
) -> str | None:
    """Why generation settings need more logits than the certified `top`; None when they do not."""

    def on(name: str, *neutral: Any) -> bool:
        return settings.get(name) not in (None, False, *neutral)

    if (settings.get("num_beams") or 1) > 1 or on("penalty_alpha"):
        return "beam or contrastive search"
    if kwargs.get("logits_processor") or kwargs.get("prefix_allowed_tokens_fn"):
        return "a custom logits processor"
    if on("output_scores") or on("output_logits"):
        return "scores over all rows"
    changes = {
        "repetition_penalty": 1.0,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
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


def hire_class(native: type) -> type:
    """The HiRE twin of a native base model or causal LM class, named `Hire` + its name."""
    return getattr(sys.modules[__name__], f"Hire{native.__name__}")


def _causal_forward(native: type) -> Any:
    @functools.wraps(native.forward)
    def forward(self: Any, *args: Any, hire_decode: bool | None = None, **kwargs: Any) -> Any:
        self.hire_state.decode_hint = hire_decode
        output = native.forward(self, *args, **kwargs)
        head = getattr(self.get_output_embeddings(), "hire", None)
        # Soft-capping comes after the head and would turn -inf into a finite number.
        if head is not None and head.unselected is not None and hasattr(output, "logits"):
            output.logits = output.logits.masked_fill(
                head.unselected.view_as(output.logits), -torch.inf
            )
        return output

    return forward


def _base_forward(native: type) -> Any:
    @functools.wraps(native.forward)
    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        embeds = kwargs.get("inputs_embeds")
        given = input_ids if input_ids is not None else embeds
        if given is not None:
            self._hire_decide(given.shape, kwargs.get("past_key_values"))
        return native.forward(self, input_ids, *args, **kwargs)

    return forward


class HireIoMixin:
    """Loading and saving: predictors and runtime files travel with the weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Native loading, then the predictors; see PreTrainedModel.from_pretrained.

        Raises OSError when the predictor file is missing, ValueError when it does not fit.
        """
        result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        model._hire_load(pretrained_model_name_or_path, kwargs)
        return result

    def _hire_parts(self) -> tuple[Any, SparseHead | None]:
        base = getattr(self, self.base_model_prefix, self)
        output = self.get_output_embeddings() if isinstance(self, HireCausalMixin) else None
        return base, getattr(output, "hire", None)

    def _hire_load(self, source: Any, kwargs: Mapping[str, Any]) -> None:
        base, head = self._hire_parts()
        if base.hire_layers or (head is not None and head.spec["kind"] == "lr"):
            keys = (
                "cache_dir",
                "force_download",
                "local_files_only",
                "token",
                "revision",
                "subfolder",
            )
            options = {key: kwargs[key] for key in keys if kwargs.get(key) is not None}
            path = cached_file(source, PREDICTOR_FILE, **options)
            self._hire_assign(path, base, head)
        for counter in [layer.counts for layer in base.hire_layers.values()] + [
            base.hire_fallbacks
        ]:
            counter.zero_()  # Transformers fills non-persistent buffers with whatever memory held
        if head is not None:
            head.counts.zero_()
        logger.warning("hire: %s", describe(self.config.hire))

    def _hire_assign(self, path: str, base: Any, head: SparseHead | None) -> None:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        for index, layer in base.hire_layers.items():
            prefix = f"layers.{index}."
            own = {
                k.removeprefix(prefix): tensors.pop(k)
                for k in list(tensors)
                if k.startswith(prefix)
            }
            check_predictor_tensors(own, layer_tensor_shapes(layer), prefix)
            layer.predictor_tensors, layer.prepared = own, None
        head_tensors = {k: tensors.pop(k) for k in list(tensors) if k.startswith("head.")}
        if head is not None:
            width = self.get_output_embeddings().weight.shape[1]
            check_predictor_tensors(head_tensors, head_tensor_shapes(head.spec, width), "")
            head.predictor_tensors, head.prepared = head_tensors, None
        if tensors:
            raise ValueError(
                f"{PREDICTOR_FILE}: {sorted(tensors)[0]} is not called for by config.hire"
            )

    def save_pretrained(
        self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Native saving plus predictors, runtime files and both auto_map entries."""
        if push_to_hub:
            raise ValueError(
                "save_pretrained(push_to_hub=True) would upload half a model; use push_to_hub()"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        base, head = self._hire_parts()
        tensors = {
            f"layers.{index}.{name}": tensor
            for index, layer in base.hire_layers.items()
            for name, tensor in layer.predictor_tensors.items()
        }
        if head is not None:
            tensors.update(head.predictor_tensors)
        if tensors:
            (folder / PREDICTOR_FILE).parent.mkdir(exist_ok=True)
            save_file(
                {k: v.contiguous() for k, v in tensors.items()},
                folder / PREDICTOR_FILE,
                {"format": "pt"},
            )
        for name in RUNTIME_FILES:
            shutil.copyfile(Path(__file__).parent / name, folder / name)
        self._hire_patch_config(folder / "config.json")

    def _hire_patch_config(self, path: Path) -> None:
        """Native architecture name and both auto_map entries, whichever of the two was saved."""
        config = json.loads(path.read_text())
        own = type(self).__name__
        entries = {
            key: value.rpartition(".")[2].rpartition("--")[2]
            for key, value in (getattr(self.config, "auto_map", None) or {}).items()
        }
        if isinstance(self, HireCausalMixin):
            entries["AutoModelForCausalLM"] = own
            entries["AutoModel"] = type(getattr(self, self.base_model_prefix)).__name__
        else:
            entries["AutoModel"] = own
        config["auto_map"] = {key: f"modeling_hire.{name}" for key, name in entries.items()}
        config["architectures"] = [entries.get("AutoModelForCausalLM", own).removeprefix("Hire")]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def __getattr__(name: str) -> type:
    """Make `HireX` from transformers' `X` when asked for; AutoModel finds classes this way."""
    native = (
        getattr(transformers, name.removeprefix("Hire"), None) if name.startswith("Hire") else None
    )
    if not isinstance(native, type) or not issubclass(native, transformers.PreTrainedModel):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    causal = name.endswith("ForCausalLM") or name.endswith("LMHeadModel")
    mixin = HireCausalMixin if causal else HireBaseMixin
    body = {"__module__": __name__, "__doc__": f"HiRE twin of {native.__name__}."}
    twin = type(name, (HireIoMixin, mixin, native), body)
    twin.forward = _causal_forward(native) if causal else _base_forward(native)
    globals()[name] = twin
    return twin
