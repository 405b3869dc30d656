"""A GGUF file as an ordinary safetensors folder, or a refusal naming what would be lost.

Transformers dequantizes the tensors; this file reads the metadata itself, because whatever
Transformers has no place for is dropped there without a word.
"""

import importlib.util
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from hireconvert.errors import InputError
from hireconvert.headers import BUILD_ERRORS, TensorHeader, causal_class, check_loading_info

# Value types of the format: struct code of the fixed-size ones; 8 is a string, 9 an array.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9
MAX_ARRAY_KEPT = 1024  # longer ones are vocabularies, which only Transformers needs
UNQUANTIZED = (0, 1)  # tensor types F32 and F16: more precise than the bfloat16 we store

# Keys that Transformers does not read for some architectures but whose value its config class
# already has for the published models; they are compared, and a difference is an error.
COMPARED = (
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention.sliding_window",
    "feed_forward_length",
    "vocab_size",
)
# Facts about the file or its training that do not change what the model computes.
HARMLESS = ("rope.scaling.finetuned", "attention.causal", "context_length", "tensor_data_layout")
# Block counts of the two models whose attention scale is not 1/sqrt(head_dim); the format leaves
# it to the reader to know.
OTHER_ATTENTION_SCALE = {("gemma2", 46): 144, ("gemma3", 62): 168}
# `tokenizer.ggml.pre` names meaning: each digit alone, then GPT-2's own splitting.
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
GPT2_SPLITTING = ("default", "gpt-2", "gpt2")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the file declares it, dimensions in torch order."""

    shape: tuple[int, ...]
    type_id: int


@dataclass(frozen=True)
class GgufFile:
    """Metadata (long arrays as None) and tensor declarations of one GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model family, such as "llama" or "gemma3"."""
        return str(self.metadata["general.architecture"])

    def of_architecture(self) -> dict[str, Any]:
        """The keys that describe the model, without the architecture's prefix."""
        prefix = self.architecture + "."
        return {
            key.removeprefix(prefix): value
            for key, value in self.metadata.items()
            if key.startswith(prefix)
        }


class _Cursor:
    """A position in the mapped file; every read is checked against its end."""

    def __init__(self, view: mmap.mmap) -> None:
        self.view = view
        self.position = 0

    def take(self, code: str) -> Any:
        values = struct.unpack_from("<" + code, self.view, self.position)
        self.position += struct.calcsize("<" + code)
        return values[0] if len(values) == 1 else values

    def skip(self, num_bytes: int) -> int:
        start = self.position
        if num_bytes > len(self.view) - start:
            raise struct.error("a value reaches past the end of the file")
        self.position += num_bytes
        return start

    def string(self) -> str:
        length = self.take("Q")
        start = self.skip(length)
        return self.view[start : start + length].decode("utf-8")

    def value(self, value_type: int) -> Any:
        if value_type == STRING:
            return self.string()
        if value_type != ARRAY:
            return self.take(SCALARS[value_type])
        element_type, count = self.take("IQ")
        if element_type == STRING:
            for _ in range(count):
                self.skip(self.take("Q"))
            return None
        start = self.skip(count * struct.calcsize("<" + SCALARS[element_type]))
        if count > MAX_ARRAY_KEPT:
            return None
        return struct.unpack_from(f"<{count}{SCALARS[element_type]}", self.view, start)


def read_gguf(path: Path) -> GgufFile:
    """Metadata and tensor table of a GGUF file; no weight is read.

    Raises InputError when the `gguf` package is absent, the file is not a complete GGUF file, or it
    is one part of several.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"{path.name} is a GGUF file and the `gguf` package that reads it is not installed. "
            "Run: pip install hireconvert[gguf]"
        )
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as m:
            file = _parse(path, _Cursor(m))
    except (struct.error, ValueError, KeyError, ArithmeticError, TypeError) as error:
        raise InputError(
            f"{path.name} is not a complete GGUF file ({error}). Fetch it again."
        ) from error
    kind = file.metadata.get("general.type", "model")
    if kind != "model" or file.metadata.get("split.count", 1) > 1:
        what = "one part of a split model" if kind == "model" else f"of type {kind!r}"
        raise InputError(
            f"{path.name} is {what}; expected one file holding a whole model. Merge the parts with "
            "`llama-gguf-split --merge`, or use the safetensors repository."
        )
    return file


def _parse(path: Path, cursor: _Cursor) -> GgufFile:
    from gguf import GGML_QUANT_SIZES  # optional: the extra `gguf`

    magic, version, num_tensors, num_keys = cursor.take("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"starts with {magic!r}, version {version}; expected b'GGUF', 2 or 3")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.take("I"))
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError("it names no `general.architecture`")
    tensors, end = {}, 0
    for _ in range(num_tensors):
        name = cursor.string()
        shape = tuple(cursor.take("Q") for _ in range(cursor.take("I")))[::-1]
        type_id, offset = cursor.take("IQ")
        block, block_bytes = GGML_QUANT_SIZES[type_id]
        tensors[name] = GgufTensor(shape, type_id)
        end = max(end, offset + math.prod(shape) // block * block_bytes)
    align = int(metadata.get("general.alignment", 32))
    cursor.skip(-cursor.position % align)
    if end > len(cursor.view) - cursor.position:
        raise ValueError(
            f"truncated: {end} bytes of tensors declared, "
            f"{len(cursor.view) - cursor.position} present"
        )
    return GgufFile(path, metadata, tensors)


def gguf_config(file: GgufFile) -> PreTrainedConfig:
    """The Transformers config equal to the file's metadata, `architectures` set.

    Raises InputError when Transformers cannot read the architecture, or it is not a causal LM.
    """
    num_blocks = file.of_architecture().get("block_count", 0)
    if not isinstance(num_blocks, int) or num_blocks > len(file.tensors):
        raise InputError(
            f"{file.path.name} declares {num_blocks} blocks but only {len(file.tensors)} tensors. "
            "The file is damaged: fetch it again."
        )
    try:
        config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
        model_class = causal_class(config)
    except BUILD_ERRORS as error:
        known = ", ".join(sorted(GGUF_CONFIG_MAPPING.keys() - {"general", "tokenizer"}))
        raise InputError(
            f"{file.path.name} holds a {file.architecture!r} model, which Transformers cannot read "
            f"from GGUF as a causal language model ({error}). It reads {known}. Use the "
            "safetensors repository instead."
        ) from error
    config.architectures = [model_class.__name__]
    config.dtype = torch.bfloat16
    # Transformers keeps the file's free-text title here; it is no place the model came from.
    vars(config).pop("_model_name_or_path", None)
    return config


def check_metadata(file: GgufFile, config: PreTrainedConfig) -> list[str]:
    """Warnings, one per key that Transformers drops and that may matter.

    Raises InputError when what it drops would make the converted model compute something else.
    """
    keys = file.of_architecture()
    scale = OTHER_ATTENTION_SCALE.get((file.architecture, keys.get("block_count", 0)))
    if scale and getattr(config, "query_pre_attn_scalar", scale) != scale:
        raise InputError(_wrong(file, "query_pre_attn_scalar", scale, config.query_pre_attn_scalar))
    for name in file.tensors:
        if name.startswith(("rope_freqs", "rope_factors")):
            raise InputError(_wrong(file, f"the tensor {name} (rope scaling)", "present", "unread"))
    mapping: dict[str, Any] = dict(GGUF_CONFIG_MAPPING)
    known = mapping.get(config.model_type.removesuffix("_text"), {})
    carried = {key for key, attribute in known.items() if attribute is not None}
    warnings = []
    for key, value in keys.items():
        full = f"{file.architecture}.{key}"
        if key in carried or key in HARMLESS:
            continue
        if key.startswith("rope.scaling."):
            if not _scales_nothing(keys):
                raise InputError(_wrong(file, full, value, "no rope scaling"))
        elif key in COMPARED:
            expected = _config_value(key, config)
            if expected is None or not math.isclose(float(value), float(expected)):
                raise InputError(_wrong(file, full, value, expected))
        else:
            warnings.append(f"GGUF key {full} = {value} is not carried over by Transformers")
    matrices = [t.type_id for t in file.tensors.values() if len(t.shape) > 1]
    if any(type_id in UNQUANTIZED for type_id in matrices):
        warnings.append("float16 or float32 matrices of the GGUF file are rounded to bfloat16")
    return warnings


def _wrong(file: GgufFile, what: str, found: object, used: object) -> str:
    return (
        f"{file.path.name} sets {what} = {found}, which Transformers does not carry over from GGUF "
        f"(it would use {used}), so the converted model would compute something else. Use the "
        "model's safetensors repository instead."
    )


def _scales_nothing(keys: dict[str, Any]) -> bool:
    if keys.get("rope.scaling.type", "none") == "none" and "rope.scaling.factor" not in keys:
        # An original length without a kind of scaling is a note, unless it differs from the used.
        original = keys.get("rope.scaling.original_context_length", keys.get("context_length"))
        return bool(original == keys.get("context_length"))
    return keys.get("rope.scaling.type") == "linear" and keys.get("rope.scaling.factor") == 1.0


def _config_value(key: str, config: PreTrainedConfig) -> Any:
    if key == "vocab_size":
        return config.vocab_size
    if key == "feed_forward_length":
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        return inner or 4 * config.hidden_size
    if key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        if key != "rope.dimension_count":
            return head_dim
        return int(head_dim * (getattr(config, "partial_rotary_factor", None) or 1.0))
    return getattr(config, key.removeprefix("attention."), None)


def gguf_headers(file: GgufFile, config: PreTrainedConfig) -> dict[str, TensorHeader]:
    """Headers that the dequantized bfloat16 folder will have, from the tensor table alone.

    Raises InputError when the file's tensors are not exactly those of the model.
    """
    try:
        with torch.device("meta"):
            model = causal_class(config)(config)
    except BUILD_ERRORS as error:
        raise InputError(
            f"no {config.model_type} model can be built from the metadata of {file.path.name}: "
            f"{error}. The file is damaged: fetch it again."
        ) from error
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())
    # The map of the whole model almost always suffices; Transformers' descent into every module
    # builds the same table hundreds of times (7 s for 30 layers).
    flat = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=list)
    native_names = get_gguf_hf_weights_map(flat, processor)
    if not file.tensors.keys() <= native_names.keys():
        native_names = get_gguf_hf_weights_map(model, processor)
    filled: dict[str, int] = {}
    for name, tensor in file.tensors.items():
        native = native_names.get(name, "lm_head.weight" if name == "output.weight" else "")
        if not native:
            raise InputError(_wrong(file, f"the tensor {name}", tensor.shape, "nothing"))
        filled[native] = filled.get(native, 0) + math.prod(tensor.shape)
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
    headers = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if filled.get(name, 0) != tensor.numel():
            raise InputError(
                f"{file.path.name} holds {filled.get(name, 0)} values for {name}, its metadata "
                f"asks for {tensor.numel()} (shape {tuple(tensor.shape)}). The file is damaged or "
                "its architecture is newer than the installed transformers and gguf packages."
            )
        headers[name] = TensorHeader(
            "BF16", tuple(tensor.shape), file.path.name, 2 * tensor.numel()
        )
    return headers


def base_model(file: GgufFile) -> str | None:
    """Hub id of the model that the file was quantized from, when its metadata names one."""
    for key in ("general.base_model.0.repo_url", "general.source.url", "general.repo_url"):
        url = file.metadata.get(key)
        if isinstance(url, str) and url.startswith("https://huggingface.co/"):
            parts = url.removeprefix("https://huggingface.co/").strip("/").split("/")
            if len(parts) == 2:
                return "/".join(parts)
    return None


def write_dense_folder(file: GgufFile, config: PreTrainedConfig, out: Path) -> list[str]:
    """Write the dequantized bfloat16 model and its tokenizer into `out`; return warnings."""
    model_class: Any = causal_class(config)  # its typing knows no second result
    model, info = model_class.from_pretrained(
        file.path.parent,
        config=config,
        gguf_file=file.path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    check_loading_info(info, type(model).__name__)
    end_of_turn = file.metadata.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and end_of_turn != config.eos_token_id:
        model.generation_config.eos_token_id = [config.eos_token_id, end_of_turn]
    model.save_pretrained(out)
    tokenizer, warnings = read_tokenizer(file)
    tokenizer.save_pretrained(out)
    return warnings


def read_tokenizer(file: GgufFile) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The file's tokenizer with its splitting rule mended, and warnings on what is not as stated.

    Raises InputError when Transformers cannot build it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file.path.name} has no usable tokenizer: {error}") from error
    warnings = []
    splitting = file.metadata.get("tokenizer.ggml.pre", "default")
    backend = tokenizer.backend_tokenizer
    # Transformers leaves GPT-2's rule in place where it does not know the one the file names.
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        if splitting in SINGLE_DIGITS:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        elif splitting not in GPT2_SPLITTING:
            warnings.append(
                f"GGUF key tokenizer.ggml.pre = {splitting} is not carried over: text is split by "
                "GPT-2's rule, so some of it becomes other tokens than the model was trained on"
            )
    stated = file.metadata.get("tokenizer.ggml.add_bos_token")
    adds_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if stated is not None and stated != adds_bos:
        warnings.append(
            f"GGUF key tokenizer.ggml.add_bos_token = {stated}, but the tokenizer that "
            f"Transformers builds {'adds' if adds_bos else 'does not add'} one"
        )
    return tokenizer, warnings
