"""Text to seeded, packed token windows, for calibration, training and evaluation.

Shapes: W windows, T tokens a window.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hireconvert.documents import SEPARATOR, hub_documents, read_documents, split_documents
from hireconvert.errors import InputError
from hireconvert.sampling import Progress, adds_bos
from hireconvert.schema import DataRecipe

__all__ = [
    "EvalWindows",
    "TokenData",
    "build_tokens",
    "evaluation_windows",
    "load_tokens",
    "read_documents",
    "save_tokens",
    "training_tokens",
]

Sampler = Callable[[int, int], torch.Tensor]  # tokens wanted, seed -> int64 rows of sampled tokens

_POOL_CHARACTERS = 400_000_000  # local text beyond this is not read; it would have to fit in memory


@dataclass(frozen=True)
class TokenData:
    """Packed windows to fit on and, from other documents where possible, to measure on.

    `held_from` names the documents of the held-out side by SHA-256, each with the number of its
    first held-out token: 0 but where one document had to serve both sides.
    """

    fit_WT: torch.Tensor  # int64, BOS first where the tokenizer adds one
    held_WT: torch.Tensor
    num_documents: int  # that tokens were taken from
    text_sha256: str  # of the documents used, in their order
    source: str  # `self`, `hub:name@revision`, or a file name without its folder
    starts_with_bos: bool
    held_from: Mapping[str, int] = field(default_factory=dict)


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
    start: int = 0  # tokens of the document that come before


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
    rows = _sampled_rows(recipe, sample, total, seed)

    def pieces(cap: int | None) -> Iterator[_Piece]:
        found = _stream(recipe, tokenizer, seed, rows, cap)
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
        held_from={
            piece.digest.hex(): min(p.start for p in held if p.digest == piece.digest)
            for piece in held
        },
    )


def training_tokens(
    recipe: DataRecipe,
    tokenizer: Any,
    held_from: Mapping[str, int],
    *,
    seed: int,
    sample: Sampler | None = None,
    progress: Progress | None = None,
) -> TokenData:
    """Return ceil(num_tokens / window) windows to train on, in training order, and none held out.

    What `TokenData.held_from` of the calibration names is left out, wherever it turns up. Of each
    document comes a window's worth, from anywhere in it; all of them if that is too little. A model
    samples (source `self`) under another seed than for calibration. Raises InputError, HubError.
    """
    with_bos = adds_bos(tokenizer)
    new_T = recipe.window - with_bos
    num_windows = -(-recipe.num_tokens // recipe.window)
    total = num_windows * new_T
    rows = _sampled_rows(recipe, sample, total, seed + 1)
    taken: list[_Piece] = []
    for cap in (new_T, None):
        found = _stream(recipe, tokenizer, seed, rows, None)
        allowed = _without_held(found, held_from)
        spans = allowed if cap is None else _spans(allowed, tokenizer, cap, seed)
        taken = _take(_reported(spans, total, progress), total)
        if _size(taken) >= total:
            break
    else:
        found_text = f"{_size(taken)} tokens in {len(taken)} documents without the held-out ones"
        wanted = f"the minimum is {total} (finetune.num_tokens)"
        raise InputError(f"{_public_name(recipe)}: too little text: {found_text}; {wanted}")
    bos = [tokenizer.bos_token_id] if with_bos else []
    ids_WT = _pack(taken, num_windows, new_T, bos)
    order_W = torch.randperm(num_windows, generator=torch.Generator().manual_seed(seed))
    return TokenData(
        fit_WT=ids_WT[order_W],
        held_WT=ids_WT[:0],
        num_documents=len({piece.digest for piece in taken}),
        text_sha256=hashlib.sha256(b"".join(piece.digest for piece in taken)).hexdigest(),
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


def _sampled_rows(
    recipe: DataRecipe, sample: Sampler | None, num_tokens: int, seed: int
) -> list[list[int]] | None:
    if recipe.source != "self":
        return None
    assert sample is not None, "source self needs a sampler"
    return sample(num_tokens, seed).tolist()


def _stream(
    recipe: DataRecipe, tokenizer: Any, seed: int, rows: list[list[int]] | None, cap: int | None
) -> Iterator[_Piece]:
    if rows is None:
        return _pieces(_shuffled_documents(recipe, tokenizer, seed), tokenizer, cap)
    return (_Piece(row, _digest(np.asarray(row, "<i8").tobytes())) for row in rows)


def _without_held(pieces: Iterator[_Piece], held_from: Mapping[str, int]) -> Iterator[_Piece]:
    for piece in pieces:
        if ids := piece.ids[: held_from.get(piece.digest.hex())]:
            yield _Piece(ids, piece.digest)


def _spans(pieces: Iterator[_Piece], tokenizer: Any, cap: int, seed: int) -> Iterator[_Piece]:
    """Cut each document to `cap` tokens from a random place: beginnings are of a kind."""
    generator = torch.Generator().manual_seed(seed)
    blank_line = tokenizer(SEPARATOR, add_special_tokens=False).input_ids
    for piece in pieces:
        if len(piece.ids) > cap:
            places = len(piece.ids) - cap + 1
            start = int(torch.randint(places, (), generator=generator))
            piece = _Piece(piece.ids[start : start + cap] + blank_line, piece.digest, start)
        yield piece


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
        taken.insert(0, _Piece(ids, piece.digest, len(piece.ids) - len(ids)))
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
