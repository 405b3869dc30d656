"""Importance of input channels, as llama.cpp's quantizer takes it: mean squares over real text.

What `llama-imatrix` measures, by PyTorch hooks and under the names that GGUF files use, because the
prebuilt libraries come without that program. As there, the embedding and a tied head get none.

Shape suffixes: W windows, T tokens, D inputs of a matrix.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hireconvert.attention import decoder_layer
from hireconvert.bench import read_text
from hireconvert.data import evaluation_windows
from hireconvert.families import base_model, find_layout

WINDOW = 512
# Below a decoder layer, and what GGUF calls it; every family that is raced has these.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@torch.no_grad()
def importance(folder: Path, text: Path, num_tokens: int) -> dict[str, torch.Tensor]:
    """float32 [D] by GGUF name of each matrix: the mean square of its inputs.

    Raises InputError when the text cannot be read, AttributeError for a family with other names.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_WT = evaluation_windows(
        read_text(text), tokenizer, num_tokens=num_tokens, window=WINDOW
    ).ids_WT
    sums: dict[str, torch.Tensor] = {}

    def adds(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).square().sum(0)

        return hook

    layout = find_layout(model)
    for index in range(model.config.get_text_config().num_hidden_layers):
        layer = decoder_layer(model, layout, index)
        for below, name in NAMES.items():
            module = layer.get_submodule(below)
            module.register_forward_pre_hook(adds(f"blk.{index}.{name}.weight"))
    for ids_T in ids_WT:
        base_model(model)(input_ids=ids_T[None], use_cache=False)
    return {name: total / ids_WT.numel() for name, total in sums.items()}


def write(found: dict[str, torch.Tensor], path: Path) -> None:
    """The file that `llama_rival quantize` reads: a name, a number of values, the values."""
    lines = []
    for name, values_D in found.items():
        numbers = " ".join(f"{value:.6g}" for value in values_D.tolist())
        lines.append(f"{name} {values_D.numel()} {numbers}\n")
    path.write_text("".join(lines), encoding="utf-8")
