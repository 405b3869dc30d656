"""Text that a model writes itself: what it is calibrated and trained on when no other is given.

Shapes: N rows sampled at once, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch

from hireconvert.documents import SEPARATOR

Progress = Callable[[int, int], None]  # tokens done, tokens in all

_TOP_K = 50  # the tail of a small model's distribution is noise no real text looks like


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts a BOS token before plain text."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a").input_ids
    return bos is not None and len(ids) > 0 and ids[0] == bos


def sample_from_model(
    model: Any,
    tokenizer: Any,
    num_tokens: int,
    *,
    seed: int,
    window: int = 1024,
    batch: int = 32,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Return at least `num_tokens` tokens the model writes itself, int64 [rows, tokens <= window].

    Ancestral sampling, temperature 1, from BOS or else a random word, `batch` rows at a time; the
    same for the same seed, thread count and machine. BOS and other special tokens are left out: a
    document's end becomes a blank line. Rows are short so that many share one read of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(window, -(-num_tokens // batch))
    total = -(-num_tokens // length)
    rows = []
    for start in range(0, total, batch):
        count = min(batch, total - start)
        report = _offset(progress, start * length, total * length, count)
        rows.append(_sample_rows(model, tokenizer, (count, length), generator, report))
    return torch.cat(rows)


@torch.inference_mode()
def _sample_rows(
    model: Any,
    tokenizer: Any,
    shape: tuple[int, int],
    generator: torch.Generator,
    report: Callable[[int], None],
) -> torch.Tensor:
    count, length = shape
    device = model.device
    special = _special_ids(model, tokenizer)
    separator = tokenizer(SEPARATOR, add_special_tokens=False).input_ids[0]
    with_bos = adds_bos(tokenizer)
    if with_bos:
        ids_N = torch.full((count,), tokenizer.bos_token_id)
    else:
        ids_N = _first_words(tokenizer, special, count, generator)
    written = [] if with_bos else [ids_N]
    ended_N = torch.full((count,), with_bos)  # a document starts here: it cannot end at once
    cache = None
    while len(written) < length:
        out = model(input_ids=ids_N[:, None].to(device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits_NV = out.logits[:, -1].float().cpu()
        logits_NV[:, special] = logits_NV[:, special].masked_fill(ended_N[:, None], -torch.inf)
        top_NK, top_ids_NK = logits_NV.topk(min(_TOP_K, logits_NV.shape[1]))
        drawn_N1 = torch.multinomial(top_NK.softmax(-1), 1, generator=generator)
        ids_N = top_ids_NK.gather(1, drawn_N1)[:, 0]
        ended_N = torch.isin(ids_N, special)
        ids_N = ids_N.masked_fill(ended_N, separator)
        written.append(ids_N)
        report(len(written))
    return torch.stack(written, dim=1)


def _special_ids(model: Any, tokenizer: Any) -> torch.Tensor:
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [] if end is None else [end]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = {*tokenizer.all_special_ids, *ends}
    # Rows beyond the tokenizer are padding, which a model may give any logit.
    ids.update(range(len(tokenizer), vocabulary))
    return torch.tensor(sorted(number for number in ids if number < vocabulary), dtype=torch.int64)


def _first_words(
    tokenizer: Any, special: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Return random tokens to start documents with, whole words as far as some are drawn."""
    allowed = torch.ones(len(tokenizer), dtype=torch.bool)
    allowed[special[special < len(tokenizer)]] = False
    ids = allowed.nonzero()[:, 0]
    drawn = ids[torch.randint(len(ids), (64 * count,), generator=generator)].tolist()
    words = [one for one in drawn if _is_word(tokenizer.decode([one]))]
    return torch.tensor((words + drawn)[:count])


def _is_word(text: str) -> bool:
    word = text.strip()
    return word.isascii() and word.isalpha() and (word[0].isupper() or text.startswith(" "))


def _offset(progress: Progress | None, done: int, total: int, count: int) -> Callable[[int], None]:
    if progress is None:
        return lambda steps: None
    return lambda steps: progress(done + steps * count, total)
