"""Changes of a converted folder, applied to its files in memory.

A change is an object with the key `op`, as plain JSON can hold it; a list of them is a mutant.
Applying goes on from what the changes before it left, and passes over what is gone.

    json     file, path, action (set, remove, rename, add, swap), value
    text     file, at, text: characters put over those of a text file
    entry    file, name, field, value: one field of a tensor in a safetensors header
    header   file, how, value: the header as a whole
    recast   file, name, how, value: the file written anew with one tensor changed
    values   file, name, how, value, seed: bytes of one tensor
    raw      file, how, value: bytes of any file
"""

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

FOLDER = b"\0folder"  # a folder in the place of a file
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
_GONE = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, SafetensorError,
)  # fmt: skip
Files = dict[str, bytes]
Change = dict[str, Any]


def places(tree: Any, above: tuple[Any, ...] = ()) -> list[list[Any]]:
    """The path of everything below the root of a tree of objects and lists."""
    keys: Any = list(tree) if isinstance(tree, dict) else ()
    keys = range(len(tree)) if isinstance(tree, list) else keys
    found: list[list[Any]] = []
    for key in keys:
        found.append([*above, key])
        found += places(tree[key], (*above, key))
    return found


def at_path(tree: Any, path: list[Any]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def parse(content: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file. Raises ValueError."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("no object")
    return header, content[8 + length :]


def _unparse(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def apply(files: Mapping[str, bytes], changes: list[Change]) -> Files:
    """The folder after the changes; what is not there any more is passed over."""
    changed = dict(files)
    for change in changes:
        file = change["file"]
        if file not in changed or changed[file] == FOLDER:
            continue
        try:
            content = _APPLY[change["op"]](changed[file], change, files)
        except _GONE:
            continue
        if content is None:
            del changed[file]
        else:
            changed[file] = content
    return changed


def _apply_json(content: bytes, change: Change, _: Mapping[str, bytes]) -> bytes:
    tree = json.loads(content)
    *above, last = change["path"]
    owner, action = at_path(tree, above), change["action"]
    if action == "set":
        owner[last] = change["value"]
    elif action == "remove":
        owner.pop(last)
    elif action == "rename":
        owner[change["value"]] = owner.pop(last)
    elif action == "add":
        owner.append(owner[last]) if isinstance(owner, list) else owner.update({"unknown": 1})
    else:
        *other, end = change["value"]
        owner[last], at_path(tree, other)[end] = at_path(tree, change["value"]), owner[last]
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _apply_text(content: bytes, change: Change, _: Mapping[str, bytes]) -> bytes:
    at, text = change["at"], change["text"].encode("utf-8", "surrogatepass")
    return content[:at] + text + content[at + len(text) :]


def _apply_entry(content: bytes, change: Change, _: Mapping[str, bytes]) -> bytes:
    header, data = parse(content)
    header[change["name"]][change["field"]] = change["value"]
    return _unparse(json.dumps(header).encode(), data)


def _apply_header(content: bytes, change: Change, _: Mapping[str, bytes]) -> bytes:
    header, data = parse(content)
    how, name, value = change["how"], change["name"], change["value"]
    if how == "length":  # small numbers are added
        length = value if value > 8 else len(content) - len(data) - 8 + value
        return (length % 2**64).to_bytes(8, "little") + content[8:]
    made: dict[str, Callable[[], Any]] = {
        "root": lambda: value,
        "drop": lambda: {key: header[key] for key in header if key != name},
        "rename": lambda: {value if key == name else key: header[key] for key in header},
        "metadata": lambda: header | {"__metadata__": value},
        "entry": lambda: header | {name: value},
        "order": lambda: dict(reversed(header.items())),
        "share": lambda: header | {f"{name}.x": header[name]},  # the same bytes
        "extra": lambda: header | {name: header[name] | {"more": 1}},
    }
    text = json.dumps(made[how]() if how in made else header).encode()
    if how == "duplicate":
        text = text[:-1] + b"," + json.dumps({name: header[name]}).encode()[1:]
    elif how == "spaces":
        text += b" " * value
    elif how == "deep":
        text = b"[" * value + b"]" * value
    return _unparse(text, data)


def _apply_recast(content: bytes, change: Change, _: Mapping[str, bytes]) -> bytes:
    tensors, name, how = load_bytes(content), change["name"], change["how"]
    tensor = tensors.pop(name)
    if how == "drop":
        return save_bytes(tensors, {"format": "pt"})
    if how == "rename":
        return save_bytes({**tensors, change["value"]: tensor}, {"format": "pt"})
    if how == "extra":
        return save_bytes({**tensors, name: tensor, change["value"]: tensor}, {"format": "pt"})
    made: dict[str, Callable[[], torch.Tensor]] = {
        "cast": lambda: tensor.to(getattr(torch, change["value"])),
        "less": lambda: tensor[:-1],
        "more": lambda: torch.cat([tensor, tensor]),
        "flat": lambda: tensor.flatten(),
        "deeper": lambda: tensor[None],
        "turned": lambda: tensor.transpose(0, -1),
        "none": lambda: tensor[:0],
        "scalar": lambda: tensor.flatten()[0],
    }
    return save_bytes({**tensors, name: made[how]().contiguous()}, {"format": "pt"})


def _apply_values(content: bytes, change: Change, _: Mapping[str, bytes]) -> bytes:
    header, data = parse(content)
    entry, dice = header[change["name"]], random.Random(change["seed"])
    start, end = entry["data_offsets"]
    dtype = FLOATS.get(entry["dtype"], torch.uint8)
    tensor = torch.frombuffer(bytearray(data[start:end]), dtype=dtype)
    how, value = change["how"], change["value"]
    if how == "random":
        # Another change may have put the end anywhere: as many bytes as there are.
        size = tensor.numel() * dtype.itemsize
        noise = torch.frombuffer(bytearray(dice.randbytes(size)), dtype=dtype)
        # Without one bit of the exponent they are numbers: small ones, or all but the largest.
        unit = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}
        if dtype in unit:
            bits = noise.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
            bit = dice.choice([unit[dtype], 8 * dtype.itemsize - 2])
            bits &= ~(1 << bit)
        tensor = noise
    elif how == "scale":
        limit = torch.finfo(dtype).max if dtype.is_floating_point else 255
        tensor = (tensor.double() * value).clamp(-limit, limit).to(dtype)
    else:
        count = {"all": len(tensor), "some": max(1, len(tensor) // 9), "one": 1}[how]
        limit = torch.finfo(dtype).max if dtype.is_floating_point else 255
        value = value if value in NOT_FINITE or value != value else max(-limit, min(limit, value))
        tensor[dice.sample(range(len(tensor)), count)] = value
    new = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return content[: len(content) - len(data)] + data[:start] + new + data[end:]


def _apply_raw(content: bytes, change: Change, files: Mapping[str, bytes]) -> bytes | None:
    how, value = change["how"], change["value"]
    if how == "byte":
        at, byte = value
        return content[:at] + bytes([byte]) + content[at + 1 :]
    if how == "cut":
        return content[:value]
    if how == "grow":
        return content + b"\0" * value
    if how == "delete":
        return None
    if how == "folder":
        return FOLDER
    return files[value] if how == "put" else b""


_APPLY: dict[str, Callable[[bytes, Change, Mapping[str, bytes]], bytes | None]] = {
    "json": _apply_json,
    "text": _apply_text,
    "entry": _apply_entry,
    "header": _apply_header,
    "recast": _apply_recast,
    "values": _apply_values,
    "raw": _apply_raw,
}
