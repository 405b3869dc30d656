"""The model to convert, opened read-only: a Hub id, a safetensors folder or a GGUF file.

Everything that can be told from names, sizes, headers and config is checked before a weight is
downloaded or read, and every refusal says what was found, what was expected and what to do.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hireconvert import gguf, hub
from hireconvert.errors import InputError, UsageError
from hireconvert.headers import (
    BUILD_ERRORS,
    INDEX_FILE,
    SINGLE_FILE,
    TensorHeader,
    causal_class,
    check_against_config,
    check_finite,
    check_loading_info,
    read_headers,
    read_json,
    stored_dtype,
    weight_files,
)
from hireconvert.workspace import Workspace, file_sha256, write_json

__all__ = ["DenseCheckpoint", "SourceHeaders", "TensorHeader", "open_checkpoint"]

CONFIG_FILE = "config.json"
# Any one group is a vocabulary that Transformers can build a tokenizer from.
VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tekken.json",),
)
TEXT_FILES = {name for group in VOCABULARIES for name in group} | {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
}
# Where an older save_pretrained left the path the model was loaded from: never ours to repeat.
PATH_KEYS = ("_name_or_path", "_model_name_or_path")
TOKENIZER_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError)
SOURCE = "source"
WARNINGS_FILE = "warnings.json"


@dataclass(frozen=True)
class SourceHeaders:
    """What a dry run may know: config and tensor headers, no weights.

    `disk_bytes` is what opening the model will write: the download or the dequantized folder,
    0 for a folder that is already here.
    """

    source: str
    base_model: str | None
    config: dict[str, Any]
    headers: dict[str, TensorHeader]
    warnings: tuple[str, ...]
    disk_bytes: int


@dataclass(frozen=True)
class DenseCheckpoint:
    """A checked safetensors folder. `source` and `warnings` hold no local path."""

    folder: Path
    source: str
    base_model: str | None
    config: dict[str, Any]
    headers: dict[str, TensorHeader]
    fingerprint: str
    warnings: tuple[str, ...]

    def load_model(
        self, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
    ) -> PreTrainedModel:
        """The model in eval mode on the CPU, `dtype` None meaning as stored.

        Transformers' own class is used wherever there is one; the repository's code runs only
        where there is none and `trust_remote_code` is given. Raises InputError on a poor fit.
        """
        auto: Any = AutoModelForCausalLM  # its typing knows no second result
        model, info = auto.from_pretrained(
            self.folder,
            dtype=dtype or stored_dtype(self.headers),
            trust_remote_code=trust_remote_code and not is_native(self.config),
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
        )
        check_loading_info(info, type(model).__name__)
        loaded: PreTrainedModel = model.eval()
        return loaded

    def load_tokenizer(self, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises InputError when its files cannot be used."""
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:
            # The tokenizers library raises nothing finer than Exception itself for a bad file.
            if type(error) is not Exception and not isinstance(error, TOKENIZER_ERRORS):
                raise
            raise InputError(
                f"the tokenizer of {self.source} cannot be loaded: {error}. Expected files that "
                "AutoTokenizer reads without code of their own."
            ) from error
        return tokenizer


def open_checkpoint(
    model: str, *, work: Path, revision: str | None = None, trust_remote_code: bool = False
) -> DenseCheckpoint:
    """The model, checked; a Hub model is downloaded to the Hub's cache, a GGUF file to work/source.

    Raises InputError for whatever cannot be converted, HubError when the Hub does not deliver,
    UsageError for a revision where there is none.
    """
    place = find(model, revision)
    if isinstance(place, hub.HubRepo):
        return _open_hub(place, trust_remote_code)
    if place.is_dir():
        return _open_folder(place, "folder", None, trust=trust_remote_code)
    return _open_gguf(place, work)


def read_source_headers(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> SourceHeaders:
    """Config and headers of the model, checked, with no weight read or downloaded.

    Raises the same errors as `open_checkpoint`, as far as headers can tell.
    """
    place = find(model, revision)
    if isinstance(place, hub.HubRepo):
        located = hub.locate(place.repo_id, place.revision)
        folder, headers, warnings = _survey_hub(located, trust_remote_code)
        config = _public_config(read_json(folder / CONFIG_FILE))
        source = f"hub:{place.repo_id}@{folder.name}"
        total = sum(header.num_bytes for header in headers.values())
        return SourceHeaders(source, place.repo_id, config, headers, tuple(warnings), total)
    if place.is_dir():
        raw, headers, warnings = _survey_folder(place, trust_remote_code)
        return SourceHeaders("folder", None, _public_config(raw), headers, tuple(warnings), 0)
    file = gguf.read_gguf(place)
    hf_config = gguf.gguf_config(file)
    warnings = gguf.check_metadata(file, hf_config)
    headers = gguf.gguf_headers(file, hf_config)
    total = sum(header.num_bytes for header in headers.values())
    config = _public_config(hf_config.to_dict())
    source = f"gguf:{place.name}"
    return SourceHeaders(source, gguf.base_model(file), config, headers, tuple(warnings), total)


def find(model: str, revision: str | None = None) -> Path | hub.HubRepo:
    """The local path that `model` names, or else the Hub repository (not asked for yet).

    Raises InputError when it is neither, UsageError for a revision of something local.
    """
    path = Path(model).expanduser()
    if path.exists():
        if revision is not None:
            raise UsageError(f"--revision {revision} needs a Hub id, but {model} is a local path.")
        if path.is_file() and path.suffix != ".gguf":
            raise InputError(
                f"{model} is a file of type {path.suffix or 'unknown'}; expected a folder with "
                f"{CONFIG_FILE} and safetensors, a .gguf file, or a Hub id. For single safetensors "
                "give the folder they lie in."
            )
        return path
    repo_id, _, pinned = model.partition("@")
    if pinned and revision is not None and pinned != revision:
        raise UsageError(f"{model} names the revision {pinned}, --revision names {revision}.")
    if model.endswith(".gguf") or not re.fullmatch(hub.HUB_ID, repo_id):
        raise InputError(
            f"{model} does not exist. Expected a folder of safetensors, a .gguf file, or a Hub id "
            "such as org/name or org/name@revision."
        )
    return hub.HubRepo(repo_id, pinned or revision, None, None)


def is_native(raw: dict[str, Any]) -> bool:
    """Whether Transformers itself has a config class for this config.json."""
    return raw.get("model_type") in CONFIG_MAPPING


def check_config(raw: dict[str, Any], *, trust: bool) -> tuple[PreTrainedConfig | None, list[str]]:
    """The config object (None where only the repository's own code can build it) and warnings.

    Raises InputError unless config.json describes a plain causal language model.
    """
    if "hire" in raw:
        raise InputError(
            "the model is already converted: its config.json has a `hire` section. Convert the "
            "dense model it was made from, or use eval, generate or inspect on it as it is."
        )
    if raw.get("quantization_config") or raw.get("compression_config"):
        method = (raw.get("quantization_config") or {}).get("quant_method", "unknown")
        raise InputError(
            f"the checkpoint is quantized (quantization_config, method {method}), which is not "
            "supported. Expected float32, float16 or bfloat16 weights: convert the unquantized "
            "model."
        )
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InputError(
            f"{CONFIG_FILE} has no `model_type`, so the model's family is unknown. Expected the "
            f"{CONFIG_FILE} that save_pretrained writes, with for example model_type llama."
        )
    auto_map = raw.get("auto_map")
    if not is_native(raw):
        _check_custom(model_type, auto_map, trust)
        return None, []
    warnings = []
    if auto_map:
        warnings.append(
            f"the repository's own code (auto_map) is not used: Transformers has {model_type}"
        )
    return _native_config(raw, model_type), warnings


def _check_custom(model_type: str, auto_map: Any, trust: bool) -> None:
    if not isinstance(auto_map, dict) or "AutoModelForCausalLM" not in auto_map:
        raise InputError(
            f"model_type {model_type!r} is unknown to Transformers {transformers.__version__} and "
            "the repository brings no AutoModelForCausalLM of its own. Check the spelling, or "
            "upgrade transformers."
        )
    if not trust:
        raise InputError(
            f"model_type {model_type!r} needs code that lies in the model repository (auto_map). "
            "It is not run unless you ask: read it, then give --trust-remote-code."
        )


def _native_config(raw: dict[str, Any], model_type: str) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(raw)
    except BUILD_ERRORS as error:
        raise InputError(f"{CONFIG_FILE} is no valid {model_type} config: {error}") from error
    try:
        expected = causal_class(config).__name__
    except KeyError:
        expected = ""
    named = raw.get("architectures") or [expected]
    # GPT-NeoX decodes whatever its `is_decoder` says; an encoder also has a masked-LM form.
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    encodes = config.is_encoder_decoder or (masked and not getattr(config, "is_decoder", True))
    generates = not encodes and expected.endswith(("ForCausalLM", "LMHeadModel"))
    if not generates or expected not in named:
        raise InputError(
            f"the model is not a causal language model that generates text: {CONFIG_FILE} says "
            f"model_type {model_type}, architectures {named}; expected a decoder-only text model "
            "such as LlamaForCausalLM."
        )
    return config


def _survey_folder(
    folder: Path, trust: bool
) -> tuple[dict[str, Any], dict[str, TensorHeader], list[str]]:
    names = [path.name for path in folder.iterdir()]
    if not names:
        raise InputError(f"the folder {folder} is empty; expected {CONFIG_FILE} and safetensors.")
    if CONFIG_FILE not in names:
        raise InputError(
            f"the folder {folder} has no {CONFIG_FILE}; expected a folder that save_pretrained "
            "wrote: config.json, safetensors and tokenizer files."
        )
    raw = read_json(folder / CONFIG_FILE)
    config, warnings = check_config(raw, trust=trust)
    check_tokenizer_files(names)
    for name in sorted(TEXT_FILES):
        if name.endswith(".json") and name in names:
            read_json(folder / name)
    headers = read_headers(folder)
    if config is not None:
        check_against_config(config, headers)
    return raw, headers, warnings


def check_tokenizer_files(names: Iterable[str]) -> None:
    """Raise InputError unless one complete vocabulary is among the file names."""
    present = set(names)
    if not any(present.issuperset(group) for group in VOCABULARIES):
        raise InputError(
            "the model has no tokenizer: none of tokenizer.json, tokenizer.model, or vocab.json "
            "with merges.txt lies beside its config. Save the tokenizer into the same folder with "
            "`tokenizer.save_pretrained`."
        )


def _open_folder(
    folder: Path, source: str, base_model: str | None, *, trust: bool
) -> DenseCheckpoint:
    raw, headers, warnings = _survey_folder(folder, trust)
    check_finite(folder, headers)
    return DenseCheckpoint(
        folder=folder,
        source=source,
        base_model=base_model,
        config=_public_config(raw),
        headers=headers,
        fingerprint=_fingerprint(folder, headers),
        warnings=tuple(warnings),
    )


def _open_gguf(path: Path, work: Path) -> DenseCheckpoint:
    file = gguf.read_gguf(path)
    made_from = {"gguf_sha256": file_sha256(path), "transformers": transformers.__version__}
    workspace = Workspace(work)
    if not workspace.is_done(SOURCE, made_from):
        config = gguf.gguf_config(file)
        warnings = gguf.check_metadata(file, config)
        gguf.gguf_headers(file, config)
        with workspace.building(SOURCE, made_from) as folder:
            warnings += gguf.write_dense_folder(file, config, folder)
            write_json(folder / WARNINGS_FILE, {"warnings": warnings})
    folder = workspace.path(SOURCE)
    opened = _open_folder(folder, f"gguf:{path.name}", gguf.base_model(file), trust=False)
    kept = read_json(folder / WARNINGS_FILE)["warnings"]
    return DenseCheckpoint(**{**vars(opened), "warnings": (*opened.warnings, *kept)})


def _survey_hub(repo: hub.HubRepo, trust: bool) -> tuple[Path, dict[str, TensorHeader], list[str]]:
    """Folder with the small files, headers and warnings; nothing large is downloaded."""
    if repo.files is not None:
        if CONFIG_FILE not in repo.files:
            raise InputError(
                f"{repo.label} has no {CONFIG_FILE}; expected a Transformers model repository."
            )
        if SINGLE_FILE not in repo.files and INDEX_FILE not in repo.files:
            weight_files(repo.files, None)
        check_tokenizer_files(repo.files)
    folder = hub.download(repo, hub.SMALL_FILES + (hub.CODE_FILES if trust else ()))
    config, warnings = check_config(read_json(folder / CONFIG_FILE), trust=trust)
    if repo.files is None:  # only the cache can be asked
        hub.download(repo, hub.WEIGHT_FILES)
        headers = read_headers(folder)
    else:
        headers = hub.remote_headers(repo)
    if config is not None:
        check_against_config(config, headers)
    return folder, headers, warnings


def _open_hub(repo: hub.HubRepo, trust: bool) -> DenseCheckpoint:
    located = hub.locate(repo.repo_id, repo.revision)
    folder, headers, _ = _survey_hub(located, trust)
    hub.download(located, tuple(sorted({header.file for header in headers.values()})))
    source = f"hub:{repo.repo_id}@{folder.name}"
    return _open_folder(folder, source, repo.repo_id, trust=trust)


def _public_config(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in PATH_KEYS}


def _fingerprint(folder: Path, headers: dict[str, TensorHeader]) -> str:
    """SHA-256 over names and contents of every file that decides what the model computes."""
    wanted = {CONFIG_FILE, INDEX_FILE, *TEXT_FILES}
    wanted |= {header.file for header in headers.values()}
    total = hashlib.sha256()
    for name in sorted(wanted | {path.name for path in folder.glob("*.py")}):
        if (folder / name).is_file():
            total.update(f"{name}\0{file_sha256(folder / name)}\n".encode())
    return total.hexdigest()
