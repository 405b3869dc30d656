"""Text to seeded, packed token windows, for calibration and for evaluation.

Shapes: W windows, T tokens a window, N rows sampled at once, V vocabulary.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hireconvert.documents import SEPARATOR, hub_documents, read_documents, split_documents
from hireconvert.errors import InputError
from hireconvert.schema import DataRecipe

__all__ = [
    "EvalWindows",
    "TokenData",
    "adds_bos",
    "build_tokens",
    "evaluation_windows",
    "load_tokens",
    "read_documents",
    "sample_from_model",
    "save_tokens",
]

Progress = Callable[[int, int], None]  # tokens done, tokens in all
Sampler = Callable[[int, int], torch.Tensor]  # tokens wanted, seed -> int64 rows of sampled tokens

_POOL_CHARACTERS = 400_000_000  # local text beyond this is not read; it would have to fit in memory
_TOP_K = 50  # the tail of a small model's distribution is noise no real text looks like


@dataclass(frozen=True)
class TokenData:
    """Packed windows to fit on and, from other documents where possible, to measure on."""

    fit_WT: torch.Tensor  # int64, BOS first where the tokenizer adds one
    held_WT: torch.Tensor
    num_documents: int  # that tokens were taken from
    text_sha256: str  # of the documents used, in their order
    source: str  # `self`, `hub:name@revision`, or a file name without its folder
    starts_with_bos: bool


@dataclass(frozen=True)
class EvalWindows:
    """Windows to measure perplexity on."""

    ids_WT: torch.Tensor  # int64, BOS first where the tokenizer adds one
    num_scored: int  # tokens predicted: all but the first of each window
    sha256: str  # of the text


@dataclass(frozen=True)
class _Piece:
    ids: list[int]
    digest: bytes


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts a BOS token before plain text."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a").input_ids
    return bos is not None and len(ids) > 0 and ids[0] == bos


def build_tokens(
    recipe: DataRecipe,
    tokenizer: Any,
    *,
    seed: int,
    sample: Sampler | None = None,
    progress: Progress | None = None,
) -> TokenData:
    """Return the calibration tokens of a recipe: ceil(tokens / window) windows of each kind.

    `sample` is called for source `self`. Documents are shuffled with the seed, joined by a blank
    line (sampled rows follow each other) and cut into windows. Raises InputError, HubError.
    """
    with_bos = adds_bos(tokenizer)
    new_T = recipe.window - with_bos
    num_fit, num_held = (
        -(-count // recipe.window) for count in (recipe.num_tokens, recipe.num_held_tokens)
    )
    total = (num_fit + num_held) * new_T
    if recipe.source == "self":
        assert sample is not None, "source self needs a sampler"
        rows = sample(total, seed).tolist()

    def pieces(cap: int | None) -> Iterator[_Piece]:
        found: Iterator[_Piece]
        if recipe.source == "self":
            found = (_Piece(row, _digest(np.asarray(row, "<i8").tobytes())) for row in rows)
        else:
            found = _pieces(_shuffled_documents(recipe, tokenizer, seed), tokenizer, cap)
        return _reported(found, total, progress)

    # A window's worth of each document, so that many have a say; all of them if that is too little.
    needed = (num_fit * new_T, num_held * new_T)
    fit, held = (
        _divide(pieces(new_T), *needed)
        or _divide(pieces(None), *needed)
        or _cut(list(pieces(None)), *needed, name=_public_name(recipe))
    )
    bos = [tokenizer.bos_token_id] if with_bos else []
    digest = hashlib.sha256(b"".join(piece.digest for piece in fit + held)).hexdigest()
    return TokenData(
        fit_WT=_pack(fit, num_fit, new_T, bos),
        held_WT=_pack(held, num_held, new_T, bos),
        num_documents=len({piece.digest for piece in fit + held}),
        text_sha256=digest,
        source=_public_name(recipe),
        starts_with_bos=with_bos,
    )


def evaluation_windows(
    text: str, tokenizer: Any, *, num_tokens: int | None = None, window: int = 1024
) -> EvalWindows:
    """Return windows of `window` new tokens without overlap, each starting with BOS where defined.

    Documents (two or more blank lines apart) are joined by one blank line. `num_tokens` new tokens
    at most, rounded down to whole windows; below one window, one shorter window. Raises InputError
    when the text does not fill a window.
    """
    joined = SEPARATOR.join(split_documents(text))
    ids = tokenizer(joined, add_special_tokens=False, verbose=False).input_ids
    if num_tokens is not None:
        ids = ids[:num_tokens]
        window = min(window, num_tokens)
    num_windows = len(ids) // window
    if num_windows == 0 or window < 2:
        wanted = f"expected one window of at least {max(window, 2)}"
        raise InputError(f"the text to evaluate on has {len(ids)} tokens; {wanted}")
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    digest = _digest(joined.encode())
    ids_WT = _pack([_Piece(ids, digest)], num_windows, window, bos)
    return EvalWindows(ids_WT, num_windows * (ids_WT.shape[1] - 1), digest.hex())


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


def save_tokens(tokens: TokenData, folder: Path) -> None:
    """Write the tokens into an existing folder: tokens.safetensors and tokens.json."""
    tensors = {"fit": tokens.fit_WT.contiguous(), "held": tokens.held_WT.contiguous()}
    save_file(tensors, folder / "tokens.safetensors")
    facts = {key: value for key, value in vars(tokens).items() if not key.endswith("_WT")}
    (folder / "tokens.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def load_tokens(folder: Path) -> TokenData:
    """Return what `save_tokens` wrote, bit for bit. Raises InputError when it is damaged."""
    try:
        tensors = load_file(folder / "tokens.safetensors")
        facts = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        return TokenData(fit_WT=tensors["fit"], held_WT=tensors["held"], **facts)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        found = f"the stored tokens are damaged: {error}"
        raise InputError(f"{folder}: {found}; delete the folder and start again") from error


# ---------------------------------------------------------------------------------------- packing


def _shuffled_documents(recipe: DataRecipe, tokenizer: Any, seed: int) -> Iterable[str]:
    if recipe.source.startswith("hub:"):
        return hub_documents(recipe, tokenizer, seed=seed)
    documents, size = [], 0
    for document in read_documents(
        recipe.source, recipe.text_column, recipe.chat_column, tokenizer
    ):
        documents.append(document)
        size += len(document)
        if size > _POOL_CHARACTERS:
            break
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return (documents[index] for index in order.tolist())


def _pieces(documents: Iterable[str], tokenizer: Any, cap: int | None) -> Iterator[_Piece]:
    blank_line = tokenizer(SEPARATOR, add_special_tokens=False).input_ids
    for document in documents:
        text = document + SEPARATOR
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if cap is not None and len(ids) > cap:
            ids = ids[:cap] + blank_line
        yield _Piece(ids, _digest(document.encode()))


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _reported(pieces: Iterator[_Piece], total: int, progress: Progress | None) -> Iterator[_Piece]:
    done = 0
    for piece in pieces:
        done += len(piece.ids)
        if progress is not None:
            progress(min(done, total), total)
        yield piece


def _divide(
    pieces: Iterator[_Piece], num_fit: int, num_held: int
) -> tuple[list[_Piece], list[_Piece]] | None:
    """Return documents with at least `num_fit` tokens and others with at least `num_held`."""
    held = _take(pieces, num_held)
    fit = _take(pieces, num_fit)
    if _size(fit) >= num_fit:
        return fit, held
    # Everything has been read. A long document may have been spent on the held-out side: give
    # that side the short ones.
    shortest_first = iter(sorted(held + fit, key=lambda piece: len(piece.ids)))
    held = _take(shortest_first, num_held)
    fit = list(shortest_first)
    return (fit, held) if _size(fit) >= num_fit else None


def _cut(
    pieces: list[_Piece], num_fit: int, num_held: int, *, name: str
) -> tuple[list[_Piece], list[_Piece]]:
    """Return the beginning and the end of text whose documents cannot be told apart."""
    if _size(pieces) < num_fit + num_held:
        found = f"{_size(pieces)} tokens in {len(pieces)} documents"
        wanted = f"the minimum is {num_fit + num_held} (data.num_tokens + data.num_held_tokens)"
        raise InputError(f"{name}: too little text: {found}; {wanted}")
    return _take(iter(pieces), num_fit), _tail(pieces, num_held)


def _take(pieces: Iterator[_Piece], num_tokens: int) -> list[_Piece]:
    taken: list[_Piece] = []
    size = 0
    while size < num_tokens and (piece := next(pieces, None)) is not None:
        taken.append(piece)
        size += len(piece.ids)
    return taken


def _tail(pieces: list[_Piece], num_tokens: int) -> list[_Piece]:
    taken: list[_Piece] = []
    for piece in reversed(pieces):
        ids = piece.ids[-num_tokens:]
        taken.insert(0, _Piece(ids, piece.digest))
        num_tokens -= len(ids)
        if num_tokens <= 0:
            break
    return taken


def _size(pieces: list[_Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _pack(pieces: list[_Piece], num_windows: int, new_T: int, bos: list[int]) -> torch.Tensor:
    stream = list(chain.from_iterable(piece.ids for piece in pieces))[: num_windows * new_T]
    ids_WT = torch.tensor(stream, dtype=torch.int64).view(num_windows, new_T)
    bos_W1 = torch.tensor(bos, dtype=torch.int64).expand(num_windows, len(bos))
    return torch.cat([bos_W1, ids_WT], dim=1)


def _public_name(recipe: DataRecipe) -> str:
    if recipe.source.startswith("hub:"):
        return recipe.source + (f"@{recipe.revision}" if recipe.revision else "")
    return recipe.source if recipe.source == "self" else Path(recipe.source).name


# --------------------------------------------------------------------------------------- sampling


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
