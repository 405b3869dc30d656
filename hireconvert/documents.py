"""Documents out of text files, JSON lines, parquet, folders of them, and Hub datasets.

Whatever cannot be read is the user's to mend: InputError (HubError for the Hub), never a guess.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from jinja2 import TemplateError

from hireconvert.errors import HubError, InputError
from hireconvert.schema import DataRecipe

SEPARATOR = "\n\n"  # one blank line between documents, wherever they are joined
_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_SHUFFLE_BUFFER = 10_000  # rows; a streamed dataset is shuffled within a buffer
_INSTALL = "install it: pip install 'hireconvert[data]'"

TextOf = Callable[[Mapping[str, Any], str], str]  # row, where it stands -> its document


def split_documents(text: str) -> list[str]:
    """Return the documents of plain text: two or more blank lines stand between them."""
    pieces = re.split(r"\n(?:[ \t]*\n){2,}", text)
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def read_documents(
    source: str | Path,
    text_column: str = "text",
    chat_column: str | None = None,
    tokenizer: Any = None,
) -> Iterator[str]:
    """Yield the documents of a local file or folder, empty ones left out, files by name.

    A chat column goes through the tokenizer's chat template. Raises InputError.
    """
    text_of = _reader(text_column, chat_column, tokenizer)
    path = Path(source).expanduser()
    found = False
    for file in _files(path):
        if file.stat().st_size == 0:
            raise InputError(f"{file}: the file is empty")
        for document in _documents_of(file, text_of, chat_column):
            found = True
            yield document
    if not found:
        raise InputError(f"{path}: no text in it")


def hub_documents(recipe: DataRecipe, tokenizer: Any, *, seed: int) -> Iterator[str]:
    """Yield the documents of a streamed Hub dataset, shuffled. Raises InputError, HubError."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"reading Hub datasets needs the datasets package; {_INSTALL}") from error
    text_of = _reader(recipe.text_column, recipe.chat_column, tokenizer)
    name = recipe.source.removeprefix("hub:")
    # The bases are OSError and the HTTPError of whichever HTTP library this hub version uses.
    network = HfHubHTTPError.__bases__
    failures = (*network, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        rows = datasets.load_dataset(
            name, recipe.config, split=recipe.split, revision=recipe.revision, streaming=True
        )
        stream = iter(rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER))
    except failures as error:
        raise HubError(f"{recipe.source}: the dataset cannot be opened: {error}") from error
    number = 0
    while True:
        number += 1
        try:
            row = next(stream, None)
        except failures as error:
            raise HubError(f"{recipe.source}, row {number}: reading failed: {error}") from error
        if row is None:
            return
        if document := text_of(row, f"{recipe.source}, row {number}"):
            yield document


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise InputError(f"{path}: unknown kind of file; expected {', '.join(_SUFFIXES)}")
        return [path]
    hidden = [part for part in path.rglob("*") if part.name.startswith(".")]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and file.name.endswith(_SUFFIXES) and file not in hidden
    )
    if not files:
        raise InputError(f"{path}: the folder holds no {', '.join(_SUFFIXES)} file")
    return files


def _documents_of(file: Path, text_of: TextOf, chat_column: str | None) -> Iterator[str]:
    if file.suffix == ".txt":
        if chat_column is not None:
            raise InputError(f"{file}: plain text has no chat column {chat_column!r}")
        try:
            yield from split_documents(file.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 text (byte {error.start})") from error
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error
        return
    rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
    yield from (document for where, row in rows if (document := text_of(row, where)))


def _json_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}, line {number}", _json_row(line, f"{file}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read beyond line {number}: {error}") from error


def _json_row(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _parquet_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{file}: reading parquet needs pyarrow; {_INSTALL}") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable parquet file: {error}") from error


def _reader(text_column: str, chat_column: str | None, tokenizer: Any) -> TextOf:
    if chat_column is None:
        return lambda row, where: _text(_column(row, text_column, where), text_column, where)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"chat column {chat_column!r}: the tokenizer has no chat template")
    return lambda row, where: _chat(_column(row, chat_column, where), tokenizer, where)


def _column(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        there = ", ".join(map(str, row)) or "none"
        raise InputError(f"{where}: there is no column {column!r}; the columns are: {there}")
    return row[column]


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: column {column!r} holds {type(value).__name__}, expected text")
    return value.strip("\n") if value.strip() else ""


def _chat(messages: Any, tokenizer: Any, where: str) -> str:
    whole = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in messages
    )
    if not whole:
        raise InputError(f"{where}: expected chat messages, a list of {{role, content}} objects")
    if not messages:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError) as error:
        raise InputError(f"{where}: the chat template refuses these messages: {error}") from error
