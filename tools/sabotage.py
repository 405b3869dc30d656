"""Converted folders spoiled on purpose, each in a way that still loads and passes its checksums.

What a quality gate must catch by figures alone: `SABOTAGES` holds each way by name, a function that
changes a folder in place. Shapes are those of docs/format.md.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hireconvert.export import write_checksums
from hireconvert.headers import read_headers
from hireconvert.loading import PREDICTORS

# Axis of each predictor tensor along which shuffling gives a row of the copy to another neuron
# (or, where single input channels can be read, to another channel).
_AXES = {"planes": 1, "scale": 0, "offset": 0, "scale_codes": 0, "scale_unit": 0}
_FACTORS = ("factor_out", "factor_out_codes", "factor_out_scale")


def spoiled(folder: Path, target: Path, name: str) -> Path:
    """A copy of `folder` at `target`, spoiled in the way `name`, its checksums written anew."""
    shutil.copytree(folder, target)
    SABOTAGES[name](target)
    write_checksums(target)
    return target


def _change_hire(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config["hire"])
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _change_layers(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    def change_all(hire: dict[str, Any]) -> None:
        for layer in filter(None, hire["ffn"]["layers"]):
            change(layer)

    _change_hire(folder, change_all)


def shuffle_predictors(folder: Path) -> None:
    """Every predictor speaks of other neurons; all counts stay as they were."""
    path, generator = folder / PREDICTORS, torch.Generator().manual_seed(0)
    tensors = load_file(path)
    for layer in sorted({key.rpartition(".")[0] for key in tensors if key.startswith("layers.")}):
        for names in (_AXES, dict.fromkeys(_FACTORS, 0)):
            found = {f"{layer}.{name}": axis for name, axis in names.items()}
            found = {key: axis for key, axis in found.items() if key in tensors}
            order = None
            for key, axis in found.items():
                if order is None:
                    order = torch.randperm(tensors[key].shape[axis], generator=generator)
                tensors[key] = tensors[key].index_select(axis, order).contiguous()
    save_file(tensors, path, {"format": "pt"})


def halve_kept(folder: Path) -> None:
    """Half as many neurons are kept, from half as many candidates."""

    def halve(layer: dict[str, Any]) -> None:
        group, common = layer["group_size"], layer["num_common"]
        for key in ("num_kept", "num_candidates"):
            units = (layer[key] - common) // group
            layer[key] = common + group * max(1, units // 2)

    _change_layers(folder, halve)


def damage_layer(folder: Path) -> None:
    """The FFN of the middle layer writes each of its outputs to another place."""
    hire = json.loads((folder / "config.json").read_text(encoding="utf-8"))["hire"]
    index, layout = len(hire["ffn"]["layers"]) // 2, hire["layout"]
    parts = (layout["layers"], str(index), layout["ffn"], layout["down"], "weight")
    suffix = ".".join(part for part in parts if part)
    (name,) = (key for key in read_headers(folder) if f".{key}".endswith(f".{suffix}"))
    path = folder / read_headers(folder)[name].file
    tensors = load_file(path)
    tensors[name] = tensors[name].roll(tensors[name].shape[0] // 2, dims=0).contiguous()
    save_file(tensors, path, {"format": "pt"})


def keep_everything(folder: Path) -> None:
    """Selection runs and keeps every neuron: as good as dense, and as slow."""

    def widen(layer: dict[str, Any]) -> None:
        layer["num_kept"] = layer["num_candidates"] = layer["num_neurons"]

    _change_layers(folder, widen)


def leave_dense(folder: Path) -> None:
    """The FFN's selection is gone from the configuration, and its predictors with it."""
    _change_hire(folder, lambda hire: hire.update(ffn=None, layout=None))
    path = folder / PREDICTORS
    tensors = {key: t for key, t in load_file(path).items() if not key.startswith("layers.")}
    if tensors:
        save_file(tensors, path, {"format": "pt"})
    else:
        path.unlink()


SABOTAGES: dict[str, Callable[[Path], None]] = {
    "predictor shuffled": shuffle_predictors,
    "k halved": halve_kept,
    "one layer damaged": damage_layer,
    "sparse path disabled: keeps every neuron": keep_everything,
    "sparse path disabled: no selection": leave_dense,
}
