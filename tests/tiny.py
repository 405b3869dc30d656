"""Tiny models, built in code: one native model per family, and HiRE models made from them.

Weights are drawn large enough that the FFN decides what is predicted (a test asserts it), so that
a wrong FFN cannot hide behind the residual stream.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hireconvert.calibrate import calibrate, layer_file, load_rows
from hireconvert.distill import distill_layer
from hireconvert.families import find_layout, num_layers, permute_ffn, read_ffn_weights
from hireconvert.rounding import round_ffn
from hireconvert.runtime import modeling_hire
from hireconvert.runtime.hire_predict import is_rounded
from hireconvert.schema import FfnRecipe, PredictorRecipe

WIDTH, NEURONS, VOCAB = 32, 96, 96
_SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {
    **_SHAPE,
    "head_dim": 8,
    "sliding_window": 16,
    "query_pre_attn_scalar": 8,
    "tie_word_embeddings": True,
}
_OPT = {
    "hidden_size": WIDTH,
    "ffn_dim": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": WIDTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {
    "n_embd": WIDTH,
    "n_inner": NEURONS,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCAB,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# name: (class, settings)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_SHAPE, "num_hidden_layers": 3, "tie_word_embeddings": True}),
    "llama_bias": ("Llama", {**_SHAPE, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama_gelu": ("Llama", {**_SHAPE, "hidden_act": "gelu"}),
    "llama_relu": ("Llama", {**_SHAPE, "hidden_act": "relu"}),
    "llama_relu2": ("Llama", {**_SHAPE, "hidden_act": "relu2"}),
    "mistral": ("Mistral", {**_SHAPE, "sliding_window": 16}),
    "qwen2": ("Qwen2", {**_SHAPE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**_SHAPE, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_GEMMA, "final_logit_softcapping": 5.0}),
    "gemma3_text": ("Gemma3", _GEMMA),
    "phi3": ("Phi3", {**_SHAPE, "pad_token_id": 0}),
    "opt": ("OPT", {**_OPT, "do_layer_norm_before": True}),
    "opt_post_norm": ("OPT", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "gpt2": ("GPT2", {**_GPT2, "activation_function": "gelu_new"}),
}
FAMILIES = tuple(_FAMILIES)
_CONFIGS = {"Gemma3": "Gemma3TextConfig", "GPT2": "GPT2Config"}
_MODELS = {"GPT2": "GPT2LMHeadModel"}
_MIXTRAL = {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}


def _scale(model: PreTrainedModel, seed: int) -> None:
    """Draw all weights anew, so that no part of the model drowns out the FFN."""
    generator = torch.Generator().manual_seed(seed)
    inputs = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter is inputs:  # Gemma multiplies embeddings by the root of the width
            parameter.data = noise / WIDTH**0.5 if "gemma" in model.config.model_type else noise
        elif "post_feedforward_layernorm" in name:
            parameter.data = 3.0 + noise
        elif parameter.dim() < 2:
            gain = "norm" in name or "ln_" in name
            centre = parameter.data if gain else torch.zeros_like(parameter)
            parameter.data = centre + 0.1 * noise
        else:
            into = parameter.shape[0] if "gpt2" in model.config.model_type else parameter.shape[-1]
            down = any(part in name for part in ("down_proj", "fc2", "mlp.c_proj"))
            parameter.data = noise * (3.0 if down else 1.0) / into**0.5
    model.tie_weights()


def tiny_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A native causal model in float32 and evaluation mode; `mixtral` besides FAMILIES."""
    stem, settings = ("Mixtral", _MIXTRAL) if family == "mixtral" else _FAMILIES[family]
    config = getattr(transformers, _CONFIGS.get(stem, f"{stem}Config"))(**settings)
    config.architectures = [_MODELS.get(stem, f"{stem}ForCausalLM")]
    model = getattr(transformers, config.architectures[0])(config).eval()
    _scale(model, seed)
    return model


def tokens(rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def layer_inputs(native: PreTrainedModel, *, rows: int = 96) -> list[torch.Tensor]:
    """What every FFN of a native model receives on random tokens, one [rows, D] a layer."""
    with tempfile.TemporaryDirectory() as folder:
        ids = tokens(1, rows)
        calibrate(native, find_layout(native), ids, ids[:, :2], out=Path(folder))
        return [
            load_rows(Path(folder), layer_file(index))[0] for index in range(num_layers(native))
        ]


def head_spec(**changes: Any) -> dict[str, Any]:
    """HEAD of docs/design.md: certified, int8 per row, unless changed."""
    return {
        "kind": "q",
        "bits": 8,
        "block": 0,
        "rank": None,
        "num_candidates": 8,
        "unselected": "estimate",
        "certified": True,
        "certify_top": 4,
        "on_uncertified": "dense",
        **changes,
    }


def hire_model(
    native: PreTrainedModel,
    *,
    ffn: dict[str, Any] | None = None,
    head: dict[str, Any] | None = None,
    **limits: int,
) -> Any:
    """A HiRE model with the weights of `native` and really fitted predictors.

    `ffn` holds fields of FfnRecipe (`keep_fraction`, `over_select`, `group_size`, ...) and under
    `predictor` those of PredictorRecipe; `head` changes fields of `head_spec`.
    """
    native = copy.deepcopy(native)
    layers, tensors, layout = [], [], None
    if ffn is not None:
        layout = find_layout(native)
        predictor = PredictorRecipe(**{"bits": 4, "block": 16, **ffn.get("predictor", {})})
        recipe = FfnRecipe(
            keep_fraction=ffn.get("keep_fraction", 0.5),
            predictor=predictor,
            **{k: v for k, v in ffn.items() if k not in ("predictor", "keep_fraction")},
        )
        for index, x_ND in enumerate(layer_inputs(native)):
            weights = read_ffn_weights(native, layout, index)
            keep = recipe.keep_fraction
            result = distill_layer(weights, x_ND, x_ND[:16], recipe, predictor, keep, seed=0)
            if result.permutation_F is not None:
                permute_ffn(native, layout, index, result.permutation_F)
            if is_rounded(result.spec):
                round_ffn(native, layout, index, result.spec, result.tensors)
            layers.append(result.spec)
            tensors.append(result.tensors)
    config = copy.deepcopy(native.config)
    config.hire = {
        "format_version": 1,
        "layout": layout,
        "ffn": None if ffn is None else {"layers": layers},
        "head": None if head is None else head_spec(**head),
        "max_decode_queries": limits.get("max_decode_queries", 32),
        "max_sparse_rows": limits.get("max_sparse_rows", 8),
    }
    model = modeling_hire.hire_class(type(native))(config).eval()
    model.load_state_dict(native.state_dict())
    model.tie_weights()
    for index, layer in base_of(model).hire_layers.items():
        layer.predictor_tensors = tensors[index]
    return model.to(native.dtype)


def base_of(model: Any) -> Any:
    """The base model below a causal one."""
    return getattr(model, model.base_model_prefix)


def sparse_layers(model: Any) -> list[Any]:
    """The sparse FFNs of a HiRE model, prepared."""
    model.hire_prepare()
    return list(base_of(model).hire_layers.values())


def shuffle_predictors(model: Any) -> None:
    """Spoil every predictor: its outputs belong to other neurons."""
    for layer in base_of(model).hire_layers.values():
        tensors = dict(layer.predictor_tensors)
        outputs = tensors["bias"].shape[0]
        order = torch.randperm(outputs, generator=torch.Generator().manual_seed(1))
        for name in ("bias", "factor_out", "factor_out_codes", "factor_out_scale"):
            if name in tensors:
                tensors[name] = tensors[name][order]
        if "planes" in tensors:
            tensors["planes"] = tensors["planes"].roll(3, dims=1)
            for name in ("scale", "scale_codes", "scale_unit"):
                if name in tensors:
                    tensors[name] = tensors[name].roll(3, dims=0)
        layer.predictor_tensors, layer.prepared = tensors, None


@torch.no_grad()
def stepwise(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [rows, length, V] of a forward per token, each over the cache of those before."""
    cache, logits = None, []
    for position in range(ids.shape[1]):
        out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)
