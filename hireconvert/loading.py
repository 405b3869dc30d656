"""Load a finished folder with the installed runtime: no code of the folder runs."""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hireconvert.accounting import head_width, hire_tensors
from hireconvert.errors import InputError
from hireconvert.headers import BUILD_ERRORS, read_file_header, read_headers, read_json
from hireconvert.runtime import RUNTIME_FILES, modeling_hire
from hireconvert.runtime.hire_config import check_hire_config
from hireconvert.version import __version__
from hireconvert.workspace import file_sha256

PREDICTORS = Path("hire") / "predictors.safetensors"
CHECKSUMS = "SHA256SUMS"
REPORT = "hire_report.json"
RUNTIME_FOLDER = Path(modeling_hire.__file__).parent
KNOWN_HASHES = RUNTIME_FOLDER / "known_hashes.json"
MOST_SAID = 600
# What Transformers raises when a folder's files ask for a model that cannot be built or filled.
LOAD_ERRORS = (OSError, ImportError, IndexError, SafetensorError, *BUILD_ERRORS)


def runtime_versions() -> dict[tuple[str, str], set[str]]:
    """{(file, sha256): versions} of every released runtime file and of the installed ones."""
    known: dict[tuple[str, str], set[str]] = {}
    for entry in json.loads(KNOWN_HASHES.read_text(encoding="utf-8")):
        known.setdefault((entry["file"], entry["sha256"]), set()).add(entry["version"])
    for name in RUNTIME_FILES:
        known.setdefault((name, file_sha256(RUNTIME_FOLDER / name)), set()).add(__version__)
    return known


def check_shipped_runtime(folder: Path) -> str:
    """The version of the runtime files in `folder`.

    Raises InputError when a file is unknown or two files belong to different versions.
    """
    paths = sorted(folder.glob("*.py"))
    if "modeling_hire.py" not in [path.name for path in paths]:
        raise InputError(f"{folder} holds no modeling_hire.py, so hireconvert did not write it.")
    known = runtime_versions()
    common: set[str] | None = None
    for path in paths:
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from error
        versions = known.get((path.name, digest))
        if versions is None:
            raise InputError(
                f"{path} is not a runtime file of hireconvert: its SHA-256 {digest} is not a known "
                "one. It was edited, or written by a newer version. Read it before you load it "
                "with trust_remote_code, or upgrade hireconvert."
            )
        common = versions if common is None else common & versions
    if not common:
        raise InputError(f"the runtime files in {folder} belong to different versions.")
    return max(common)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a converted folder, its `hire` dict checked for form.

    Raises InputError when the folder is not a converted one or the dict is out of range.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{folder} holds no config.json; name a converted model.")
    config = read_json(path)
    if not isinstance(config.get("hire"), dict):
        raise InputError(f"{path} has no `hire` object: this is not a converted model.")
    for key in ("dtype", "torch_dtype"):
        if not isinstance(config.get(key), str | dict | None):
            raise InputError(f"{path}: {key} is {config[key]!r:.99}, expected the name of a type.")
    return config


def native_config(folder: Path) -> PreTrainedConfig:
    """The configuration object of a converted folder, `hire` checked by the runtime.

    Raises InputError when Transformers or the runtime refuses it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_hire_config(config)
        _check_outputs(config)
    except LOAD_ERRORS as error:
        raise InputError(f"{folder / 'config.json'}: {brief(error)}") from error
    return config


def _check_outputs(config: Any) -> None:
    """Raise ValueError on settings that load and then fail in every forward, or undo decoding."""
    text = config.get_text_config()
    if not config.return_dict:
        raise ValueError("return_dict is false, expected true")
    if config.is_encoder_decoder:
        raise ValueError("is_encoder_decoder is true, expected a model that is a decoder alone")
    _check_wanted_outputs(config)
    _check_special_tokens(text)
    _check_layer_types(text)
    for name in ("num_attention_heads", "num_key_value_heads", "query_pre_attn_scalar"):
        number = getattr(text, name, None)
        if isinstance(number, int | float) and not number > 0:
            raise ValueError(f"{name} is {number!r}, expected a number above 0")
    windows = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None)
    negative = isinstance(window, int) and window < 0
    if negative or (windows and (type(window) is not int or window < 1)):
        raise ValueError(f"sliding_window is {window!r}, expected the size of the layers' windows")
    for name, value in vars(text).items():
        if "drop" in name and isinstance(value, int | float) and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}, expected a share from 0 to 1")
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):
        turned = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
        if turned is not None and not 0 < turned <= 1:
            raise ValueError(f"partial_rotary_factor is {turned!r}, expected a share up to 1")


def _check_layer_types(text: Any) -> None:
    """Raise ValueError on kinds of layers that Transformers knows and this family does not."""
    others = {*(getattr(text, "layer_types", None) or ())}
    others -= {"full_attention", "sliding_attention", "chunked_attention"}
    others -= {*(getattr(type(text)(), "layer_types", None) or ())} if others else set()
    # The default of a hybrid family may hold attention alone (LFM2): its source names the rest.
    source = inspect.getsource(sys.modules[type(text).__module__]) if others else ""
    others = {kind for kind in others if f'"{kind}"' not in source}
    if others:
        raise ValueError(f"layer_types holds {sorted(others)}, which {text.model_type} has not")


def _check_wanted_outputs(settings: Any) -> None:
    """Raise ValueError where a config names outputs by what is neither a flag nor layers."""
    for name in ("output_attentions", "output_hidden_states"):
        wanted = getattr(settings, name, None)
        listed = isinstance(wanted, list) and all(type(one) is int for one in wanted)
        if not (wanted is None or isinstance(wanted, bool) or listed):
            raise ValueError(f"{name} is {wanted!r:.99}, expected true or false")


def brief(error: Exception) -> str:
    """What an error says, in one line of at most MOST_SAID characters.

    A stranger's config is quoted in it, and Transformers' own errors take several lines.
    """
    said = " ".join(str(error).split())
    return said if len(said) <= MOST_SAID else f"{said[:MOST_SAID]} ..."


def check_tensors(folder: Path, config: Any) -> int:
    """The number of predictor tensors, after every header was checked; reads no weight.

    Raises InputError when dense weights are damaged or predictors do not fit `config.hire`.
    """
    read_headers(folder)
    text = config.get_text_config()
    try:
        expected = hire_tensors(config.hire, text.hidden_size, head_width(text))
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'}: {brief(error)}") from error
    path = folder / PREDICTORS
    if expected and not path.is_file():
        raise InputError(f"{path} is missing, but config.hire calls for {len(expected)} tensors.")
    headers = read_file_header(path) if path.is_file() else {}
    found = {name: (header.dtype, header.shape) for name, header in headers.items()}
    for name in sorted(expected.keys() | found.keys()):
        wanted, there = expected.get(name), found.get(name)
        if wanted != there:
            raise InputError(
                f"{path}: {name} is {_shown(there)}, but config.hire calls for {_shown(wanted)}."
            )
    return len(expected)


def _shown(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if entry is None else f"{entry[0]} {list(entry[1])}"


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, memory: str | None = None
) -> PreTrainedModel:
    """The converted model in `folder`, built from the installed runtime, in eval mode.

    The stored dtype is kept unless `dtype` is given. `memory` is `keep_dense` or `inference`
    (docs/design.md, Memory); None: what HIRE_MEMORY of the environment says, else `keep_dense`.
    Raises InputError when the folder is not a converted one, its shipped runtime is unknown, or its
    tensors do not fit its config, and ValueError on another `memory`.
    """
    folder = Path(folder)
    raw = read_config(folder)
    check_shipped_runtime(folder)
    config = native_config(folder)
    check_tensors(folder, config)
    auto_map = raw.get("auto_map")
    entry = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    name = str(entry).rpartition(".")[2]
    model_class = getattr(modeling_hire, name, None)
    if not name.startswith("Hire") or model_class is None:
        raise InputError(
            f"{folder / 'config.json'}: auto_map names {name!r:.99}, which the installed runtime "
            "does not have. Upgrade hireconvert, or load with trust_remote_code."
        )
    if not isinstance(config, model_class.config_class):
        raise InputError(
            f"{folder / 'config.json'}: model_type is {config.model_type!r:.99}, which "
            f"{name} of its auto_map does not read."
        )
    try:
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `require_all_keys` names them
        )
    except LOAD_ERRORS as error:
        raise InputError(f"{folder} cannot be loaded: {brief(error)}") from error
    require_all_keys(folder, info)
    _check_generation(folder, model.generation_config)
    if memory is not None:
        model.set_hire_memory(memory)
    return model.eval()


def _check_generation(folder: Path, settings: Any) -> None:
    try:
        _check_wanted_outputs(settings)
        _check_special_tokens(settings)
    except ValueError as error:
        raise InputError(f"{folder / 'generation_config.json'}: {error}.") from error


def _check_special_tokens(settings: Any) -> None:
    """Raise ValueError where a special token is no number that fits a tensor of ids."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = getattr(settings, name, None)
        ids = found if isinstance(found, list) else [found]
        if not all(one is None or (type(one) is int and abs(one) < 2**31) for one in ids):
            raise ValueError(f"{name} is {found!r:.99}, expected numbers below 2^31")


def require_all_keys(folder: Path, loading_info: dict[str, Any]) -> None:
    """Raise InputError when Transformers reports a missing, unexpected or mismatched tensor."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in loading_info[problem])
        if keys:
            raise InputError(
                f"{folder}: {len(keys)} {problem.replace('_', ' ')}, first {keys[0]}. The weights "
                "do not fit config.json; convert again or fetch the folder again."
            )
