"""Tiny models on disk: a safetensors folder and a GGUF file, both with a byte-level tokenizer."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SIZES: dict[str, Any] = {
    "vocab_size": len(ALPHABET) + 3,  # the last row is padding
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def tiny_config(**changes: Any) -> LlamaConfig:
    """A Llama of two layers."""
    return LlamaConfig(**(SIZES | changes))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with BOS and EOS."""
    vocab = {token: i for i, token in enumerate(["<bos>", "<eos>", *ALPHABET])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """The model in bfloat16, its weights large enough that the FFN matters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(**changes))
    for parameter in model.parameters():
        parameter.data.mul_(6 if parameter.dim() > 1 else 1)
    return model.to(torch.bfloat16)


def save_tiny(folder: Path, **changes: Any) -> Path:
    """The folder, with model and tokenizer in it."""
    tiny_llama(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(path: Path, *, keys: dict[str, Any] | None = None, drop: str = "") -> Path:
    """The tiny Llama as a GGUF file in float32; `keys` adds metadata, `drop` omits one tensor."""
    config, weights = tiny_config(), tiny_llama().float().state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<bos>", "<eos>", *ALPHABET, "ab"])
    writer.add_token_types([3, 3] + [1] * len(ALPHABET) + [1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_string("tokenizer.chat_template", "{{ messages[0]['content'] }}")
    for key, value in (keys or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}
        add.get(type(value), writer.add_uint32)(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in weights.items():
        stem, suffix = name.rsplit(".", 1)
        native = names.get_name(stem)
        if name == "lm_head.weight" or native == drop:
            continue
        if "attn_q" in native or "attn_k" in native:  # llama.cpp interleaves the rotated halves
            heads = tensor.unflatten(0, (-1, 2, config.head_dim // 2))
            tensor = heads.transpose(1, 2).flatten(0, 2).contiguous()
        writer.add_tensor(f"{native}.{suffix}", tensor.numpy().astype(np.float32))
    if keys and "rope_freqs" in keys:
        writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
