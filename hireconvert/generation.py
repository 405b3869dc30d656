"""Text from a finished folder, piece by piece, through the installed runtime."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TextStreamer

from hireconvert.errors import InputError
from hireconvert.loading import load


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy, top_k 0 is off."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        if self.temperature == 0:
            # Neutral values, or a generation_config.json made for sampling would complain.
            return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p if self.top_p > 0 else 1.0,
        }


class _Pieces(TextStreamer):
    """Hands each finished piece of text on instead of printing it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by Transformers for each piece."""
        self._write(text)


def stream(
    folder: Path,
    prompt: str,
    write: Callable[[str], None],
    *,
    sampling: Sampling,
    chat: bool = True,
) -> None:
    """Call `write` with the continuation of `prompt`, piece by piece, as it is decoded.

    The chat template is used when there is one and `chat` is true. Raises InputError when the
    folder cannot be loaded, has no tokenizer or the prompt is empty.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty; give some text with -p.")
    model: Any = load(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no tokenizer that can be loaded: {error}") from error
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        # The template writes its own special tokens, so the tokenizer must not add them again.
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(sampling.seed)
    model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        streamer=_Pieces(tokenizer, write),
        max_new_tokens=sampling.max_new_tokens,
        **sampling.arguments(),
    )
