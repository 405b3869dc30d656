"""Write a Llama of a known size with random weights, to time what no trained model here is.

python tools/random_model.py --shape 1b --tokenizer FOLDER --out MODEL

The tokenizer of a small model serves: times do not depend on which rows are read. Weights are drawn
as initialization draws them, so the figures hold for speed and bytes, never for quality.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# As published for Llama 3.2 1B and 3B and Llama 3.1 8B.
SHAPES = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "3b": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than published")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = {**shape, "num_hidden_layers": options.layers}
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, vocab_size=128256, rms_norm_eps=1e-5, dtype=torch.bfloat16,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    with torch.device("cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(options.out)
    for name in TOKENIZER:
        if (options.tokenizer / name).exists():
            shutil.copy(options.tokenizer / name, options.out / name)


if __name__ == "__main__":
    main()
