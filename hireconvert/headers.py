"""What safetensors files declare, checked against file size, index and the model's config.

A safetensors file is 8 bytes (little-endian length n), n bytes of JSON, then the tensors' bytes.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hireconvert.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
NAMES_SHOWN = 4
# What torch and Transformers raise when a config asks for an impossible model.
BUILD_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as a safetensors header declares it; `file` is a name inside the folder."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    num_bytes: int


def weight_files(names: Iterable[str], index: dict[str, Any] | None) -> list[str]:
    """Names of the safetensors files that make up the model, sorted.

    `names` are the files present at the top of the folder, `index` the parsed index file if there
    is one. Raises InputError when there are no weights, only pickles, or a named shard is absent.
    """
    present = set(names)
    if SINGLE_FILE in present:
        return [SINGLE_FILE]
    if index is None:
        raise InputError(_no_weights_message(present))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{INDEX_FILE} has no `weight_map` naming a file for each tensor.")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if shard not in present:
            raise InputError(
                f"{INDEX_FILE} names the shard {shard!r}, which is missing from the model folder "
                f"({len(shards)} shards expected). Fetch the missing file."
            )
    return shards


def _no_weights_message(present: set[str]) -> str:
    pickles = sorted(name for name in present if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        return (
            f"the model holds only pickle weights ({_some(pickles)}), which can run code when "
            f"opened and are refused. Expected safetensors ({SINGLE_FILE}): save the model again "
            "with `save_pretrained`, or pick a revision that has safetensors."
        )
    others = sorted(name for name in present if name.endswith(".safetensors"))
    found = f"found {_some(others)}, " if others else "found no weight file, "
    return f"{found}expected {SINGLE_FILE}, or {INDEX_FILE} and the shards it names."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises InputError naming the file when it is anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path.name} is not valid JSON ({error}). It may be cut short: fetch it again."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path.name} holds a {type(value).__name__}, expected a JSON object.")
    return value


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor's header, from the files' own headers only; no weight is read.

    Raises InputError for missing, truncated, corrupt or contradictory files.
    """
    index = read_json(folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else None
    names = [path.name for path in folder.iterdir()]
    headers: dict[str, TensorHeader] = {}
    for file in weight_files(names, index):
        for name, header in read_file_header(folder / file).items():
            if name in headers:
                raise InputError(f"tensor {name!r} is in both {headers[name].file} and {file}.")
            headers[name] = header
    if index is not None and SINGLE_FILE not in names:
        check_index(index, headers)
    return headers


def check_index(index: dict[str, Any], headers: dict[str, TensorHeader]) -> None:
    """Raise InputError when a tensor is not in the shard that the index names for it."""
    for name, shard in index["weight_map"].items():
        if name not in headers or headers[name].file != shard:
            raise InputError(
                f"{INDEX_FILE} says that tensor {name!r} is in {shard}, but it is not there. "
                "Index and shards belong to different downloads: fetch them again."
            )


def read_file_header(path: Path) -> dict[str, TensorHeader]:
    """Headers of one safetensors file, held against the size of the file."""
    file_bytes, header_bytes, raw = _raw_header(path)
    try:
        declared = json.loads(raw)
        entries = {key: value for key, value in declared.items() if key != "__metadata__"}
        headers = {name: _parse_entry(entry, path.name) for name, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(
            f"the header of {path.name} is corrupt ({type(error).__name__}: {error}). Fetch the "
            "file again."
        ) from error
    found = file_bytes - 8 - header_bytes
    if found != end:
        state = "truncated" if found < end else "longer than it says"
        raise InputError(
            f"{path.name} is {state}: its header declares {end} bytes of tensors, the file holds "
            f"{found}. Fetch it again."
        )
    return headers


def _raw_header(path: Path) -> tuple[int, int, bytes]:
    """(bytes of the file, bytes of its header, the header)."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as handle:
            header_bytes = int.from_bytes(handle.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise InputError(
                    f"{path.name} is not a complete safetensors file: it has {file_bytes} bytes "
                    f"and declares a header of {header_bytes}. Fetch it again."
                )
            return file_bytes, header_bytes, handle.read(header_bytes)
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror}.") from error


def _parse_entry(entry: dict[str, Any], file: str) -> TensorHeader:
    return make_header(str(entry["dtype"]), entry["shape"], entry["data_offsets"], file)


def make_header(dtype: str, shape: list[int], offsets: list[int], file: str) -> TensorHeader:
    """One checked header. Raises InputError for a quantized dtype, ValueError for nonsense."""
    if dtype not in DTYPES:
        raise InputError(
            f"{file} stores tensors as {dtype}: a quantized checkpoint, which is not supported. "
            f"Expected floating point weights ({', '.join(FLOAT_DTYPES)})."
        )
    if not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise ValueError(f"impossible shape {shape}")
    start, end = offsets
    if type(start) is not int or type(end) is not int:
        raise ValueError(f"impossible offsets {offsets}")
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if not 0 <= start <= end or end - start != num_bytes:
        raise ValueError(f"shape {shape} of {dtype} does not fill bytes {start} to {end}")
    return TensorHeader(dtype, tuple(shape), file, num_bytes)


def check_finite(folder: Path, headers: dict[str, TensorHeader]) -> None:
    """Read every floating point tensor once; raise InputError naming one with NaN or inf."""
    for file in sorted({header.file for header in headers.values()}):
        with safe_open(folder / file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if headers[name].dtype not in FLOAT_DTYPES:
                    continue
                num_bad = int((~torch.isfinite(tensors.get_tensor(name))).sum())
                if num_bad:
                    raise InputError(
                        f"tensor {name!r} in {file} has {num_bad} values that are NaN or infinite. "
                        "The checkpoint is damaged: fetch or export it again."
                    )


def stored_dtype(headers: dict[str, TensorHeader]) -> torch.dtype:
    """The floating point type that holds most of the bytes."""
    totals = dict.fromkeys(FLOAT_DTYPES, 0)
    for header in headers.values():
        if header.dtype in totals:
            totals[header.dtype] += header.num_bytes
    return DTYPES[max(totals, key=lambda dtype: totals[dtype])]


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Transformers' own causal language model for `config`. KeyError when it has none."""
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def check_against_config(config: PreTrainedConfig, headers: dict[str, TensorHeader]) -> None:
    """Raise InputError unless names and shapes are those of the model that `config` describes.

    Transformers' own loader decides, on the meta device, so that its renames, prefixes, tied and
    ignorable tensors count as they will when the weights are loaded.
    """
    model_class: Any = causal_class(config)  # its typing knows no second result
    num_layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(num_layers, int) or num_layers > len(headers):
        raise InputError(
            f"config.json asks for {num_layers} layers, but the weights hold only {len(headers)} "
            "tensors. The two belong to different models."
        )
    tensors = {
        name: torch.empty(header.shape, dtype=DTYPES[header.dtype], device="meta")
        for name, header in headers.items()
    }
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the report becomes our message instead
    show_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        _, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            dtype=stored_dtype(headers),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except BUILD_ERRORS as error:
        raise InputError(
            f"no {model_class.__name__} can be built from config.json: {error}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if show_bars:
            transformers_logging.enable_progress_bar()
    check_loading_info(info, model_class.__name__)


def check_loading_info(info: dict[str, Any], model: str) -> None:
    """Raise InputError when a load missed, misplaced or mis-shaped any tensor."""
    lines = []
    if info["missing_keys"]:
        lines.append(f"missing: {_some(sorted(info['missing_keys']))}")
    if info["unexpected_keys"]:
        lines.append(f"unexpected: {_some(sorted(info['unexpected_keys']))}")
    for name, found, expected in sorted(info["mismatched_keys"])[:NAMES_SHOWN]:
        lines.append(f"shape of {name}: found {tuple(found)}, expected {tuple(expected)}")
    if lines:
        raise InputError(
            f"the weights are not those of the {model} that config.json describes:\n  "
            + "\n  ".join(lines)
            + "\nWeights and config belong to different models, or one of them is damaged."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
