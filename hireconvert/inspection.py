"""Look into a finished folder: `inspect` reads headers, `verify` proves that it works."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hireconvert.accounting import (
    ITEM_BYTES,
    TensorTable,
    head_entry,
    layer_rows,
    token_bytes,
)
from hireconvert.errors import InputError
from hireconvert.figures import figure
from hireconvert.headers import read_headers
from hireconvert.loading import (
    CHECKSUMS,
    REPORT,
    check_shipped_runtime,
    check_tensors,
    native_config,
    read_config,
)
from hireconvert.workspace import file_sha256

DECODED = 8  # tokens that `verify` decodes

# Runs as a stranger would: this library is not importable, the code is what the folder ships.
_FRESH_PROCESS = """
import json, sys
sys.modules["hireconvert"] = None
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True)
problems = {key: sorted(map(str, info[key])) for key in
            ("missing_keys", "unexpected_keys", "mismatched_keys")}
token = torch.arange(1, 9)[None] % model.config.get_text_config().vocab_size
model.eval().hire_stats(reset=True)
cache, finite = None, True
with torch.no_grad():
    for _ in range(1 + int(sys.argv[2])):
        output = model(token, past_key_values=cache, use_cache=True)
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
        finite = finite and bool(output.logits[:, -1, token[0, 0]].isfinite().all())
print(json.dumps({"class": type(model).__name__, "problems": problems, "finite": finite,
                  "stats": model.hire_stats()}))
"""


def dense_table(folder: Path) -> TensorTable:
    """The tensors of the dense view: dtype and shape by name."""
    return {name: (header.dtype, header.shape) for name, header in read_headers(folder).items()}


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """What `folder` keeps, predicts and reads, per layer and in sum; reads headers only.

    Raises InputError when it is not a converted model or its parts do not fit together.
    """
    raw = read_config(folder)
    config = native_config(folder)
    hire, text = config.hire, config.get_text_config()
    check_tensors(folder, config)
    tensors = dense_table(folder)
    dtype, _ = head_entry(tensors, text.vocab_size)
    measured = _measured_layers(folder)
    rows = layer_rows(hire, text.hidden_size, ITEM_BYTES[dtype])
    for row in rows:
        found = measured.get(row["layer"], {})
        row["recall"] = figure(found, "recall")
        spread = [figure(found, "kept", end) for end in ("p10", "p90")]
        row["kept_per_token"] = None if None in spread else found["kept"]
    return {
        "architecture": raw["architectures"][0],
        "model_type": raw["model_type"],
        "recipe": _report(folder).get("recipe", "unknown"),
        "format_version": hire["format_version"],
        "runtime": check_shipped_runtime(folder),
        "layers": rows,
        "head": hire["head"],
        "bytes_per_token": token_bytes(hire, tensors, text),
    }


def _measured_layers(folder: Path) -> dict[int, dict[str, Any]]:
    """What the report tells of each layer; rows that tell of none are left out."""
    rows = _report(folder).get("layers")
    found = [row for row in (rows if isinstance(rows, list) else []) if isinstance(row, dict)]
    return {row["layer"]: row for row in found if isinstance(row.get("layer"), int)}


def _report(folder: Path) -> dict[str, Any]:
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / REPORT} is not JSON: {error}") from error
    return report if isinstance(report, dict) else {}


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """{"checks": [{"name", "detail"}]} of all checks; raises InputError at the first that fails."""
    return {"checks": [{"name": name, "detail": detail} for name, detail in _checks(folder)]}


def _checks(folder: Path) -> Iterator[tuple[str, str]]:
    read_config(folder)
    yield "checksums", f"{check_checksums(folder)} files"
    yield "shipped code", f"known, version {check_shipped_runtime(folder)}"
    config = native_config(folder)
    count = check_tensors(folder, config)
    yield "predictors", f"{count} tensors fit config.hire"
    result = _run_fresh_process(folder)
    for problem, keys in result["problems"].items():
        if keys:
            raise InputError(f"{folder}: {problem.replace('_', ' ')}: {', '.join(keys[:5])}")
    yield "fresh process", f"loads as {result['class']} without hireconvert"
    yield "sparse path", _check_counters(folder, config.hire, result)


def check_checksums(folder: Path) -> int:
    """The number of files in SHA256SUMS; raises InputError on a changed, missing or extra file."""
    path = folder / CHECKSUMS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    listed: dict[str, str] = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        listed[name] = digest
    # The card is edited and .git or .cache appear when a folder travels over the Hub.
    present = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    }
    for name in sorted(listed.keys() | (present - {CHECKSUMS})):
        if name not in present:
            raise InputError(f"{folder}: {name} is listed in {CHECKSUMS} but missing.")
        if name not in listed:
            raise InputError(f"{folder}: {name} is not listed in {CHECKSUMS}.")
        if file_sha256(folder / name) != listed[name]:
            raise InputError(
                f"{folder}: {name} was changed: its SHA-256 is not that of {CHECKSUMS}."
            )
    return len(listed)


def _run_fresh_process(folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_MODULES_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        process = subprocess.run(
            [sys.executable, "-c", _FRESH_PROCESS, str(folder.resolve()), str(DECODED)],
            cwd=cache,
            env=environment,
            capture_output=True,
            text=True,
        )
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise InputError(f"{folder} does not load and decode in a fresh process: {lines[-1]}")
    result: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    return result


def _check_counters(folder: Path, hire: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What the counters of the fresh process prove; raises InputError where they do not."""
    stats, pieces = result["stats"], []
    if not result["finite"]:
        raise InputError(f"{folder}: decoding gave NaN or inf as the best logit.")
    layers = (
        [index for index, layer in enumerate(hire["ffn"]["layers"]) if layer] if hire["ffn"] else []
    )
    for index in layers:
        counts = stats["layers"].get(str(index), {"rows": 0, "dense_rows": 0})
        sparse = counts["rows"] - counts["dense_rows"]
        if sparse != DECODED:
            raise InputError(
                f"{folder}: FFN layer {index} selected in {sparse} of {DECODED} decoded tokens."
            )
    if layers:
        kept = stats["ffn"]["kept"] / DECODED / len(layers)
        pieces.append(f"{len(layers)} FFN layers kept {kept:.0f} neurons per token")
    if hire["head"]:
        counts = stats["head"]
        sparse = counts["rows"] - counts["dense_rows"]
        if sparse < DECODED:
            raise InputError(
                f"{folder}: the head selected in {sparse} of {DECODED} decoded tokens."
            )
        pieces.append(f"head rescored {counts['rescored'] / counts['rows']:.0f} rows per token")
    return "; ".join(pieces)
