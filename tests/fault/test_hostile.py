"""Finished folders changed by somebody else: InputError or a model that decodes, nothing else."""

import copy
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from hireconvert import loading
from hireconvert.errors import InputError
from hireconvert.loading import load
from tests.cli import Cli
from tests.tiny import base_of, hire_model, tiny_model
from tests.tiny_files import save_tiny

PREDICTORS = Path("hire") / "predictors.safetensors"
RECIPES = {
    "q, the rest by estimate": ("ffn.unselected.block=16",),
    "lr, groups": (
        "ffn.group_size=4",
        "ffn.common_path=0.25",
        "ffn.predictor.kind=lr",
        "ffn.predictor.rank=8",
        "ffn.predictor.factor_bits=4",
    ),
    "qlr, some inputs, low-rank head": (
        "ffn.predictor.kind=qlr",
        "ffn.predictor.rank=4",
        "ffn.predictor.input_keep=0.5",
        "ffn.predictor.symmetric=false",
        "head.kind=lr",
        "head.rank=8",
        "head.certified=false",
    ),
}
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 7, 10**3, 2**31, 2**63, -(2**63), 1.5, float("nan"), 1e300),
    *("", "x", "32", "../..", "__class__", "mlp", "up_proj:1/2", "self_attn", "weight", "layers"),
    *([], [0], {}, {"layers": []}, [None, None], {"kind": "q"}),
]


@pytest.fixture(scope="module", params=RECIPES)
def finished(
    request: pytest.FixtureRequest, hireconvert: Cli, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    save_tiny(root / "model")
    sets = [part for change in RECIPES[request.param] for part in ("--set", change)]
    flags = ("-r", "tiny-ci", "--set", "evaluate.num_tokens=0", *sets)
    ended = hireconvert("convert", root / "model", root / "out", *flags)
    assert ended.code == 0, ended.err
    return root / "out"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    assert outcome(finished) == "works"
    return Path(shutil.copytree(finished, tmp_path / "out"))


def outcome(folder: Path) -> str:
    """ "refused" with a message, or "works" as far as a decoded token shows."""
    try:
        model: Any = load(folder)
    except InputError as error:
        assert len(str(error)) > 20
        return "refused"
    with torch.no_grad():
        cache = model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
        logits = model(torch.tensor([[6]]), past_key_values=cache, use_cache=True).logits
    assert logits.shape[:2] == (1, 1)
    return "works"


# --------------------------------------------------------------------------- config.hire


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree of objects and lists."""
    keys: Any = ()
    if isinstance(tree, dict):
        keys = tree
    elif isinstance(tree, list):
        keys = range(len(tree))
    for key in keys:
        yield (*above, key)
        yield from places(tree[key], (*above, key))


def mutate_config(config: dict[str, Any], chance: random.Random) -> str:
    """Change one value of `hire` or `auto_map`; the description says which."""
    section = chance.choice(["hire"] * 9 + ["auto_map"])
    path = chance.choice(list(places(config[section])))
    node = config[section]
    for key in path[:-1]:
        node = node[key]
    kind = chance.choice(["set", "set", "set", "set", "remove", "nudge"])
    value = node[path[-1]]
    if kind == "remove":
        del node[path[-1]]
    elif kind == "nudge" and isinstance(value, int) and not isinstance(value, bool):
        node[path[-1]] = value + chance.choice([-2, -1, 1, 2])
    else:
        node[path[-1]] = copy.deepcopy(chance.choice(VALUES))
    return f"{section} {path}: {kind} {value!r} -> {config[section]!r}"


def test_changed_config(folder: Path) -> None:
    path, chance = folder / "config.json", random.Random(0)
    original, seen = json.loads(path.read_text()), Counter[str]()
    for _ in range(150):
        config = copy.deepcopy(original)
        what = mutate_config(config, chance)
        path.write_text(json.dumps(config))
        try:
            seen[outcome(folder)] += 1
        except Exception as error:
            raise AssertionError(what[:300]) from error
    assert seen["refused"] > 75 and seen["works"] > 5, seen


STANDARD: tuple[tuple[str, Any, str], ...] = (
    ("pad_token_id", 10**6, "Padding_idx"),
    ("pad_token_id", 10**30, "pad_token_id is 1000"),
    ("dtype", 8, "dtype is 8"),
    ("dtype", float("inf"), "dtype is inf"),
    ("use_cache", "4", "use_cache"),
    ("hidden_size", 16.0, "hidden_size"),
    ("intermediate_size", -64, "negative dimension"),
    ("num_attention_heads", 12, "not a multiple"),
    ("num_attention_heads", 8, "mismatched keys"),
    ("num_attention_heads", -4, "num_attention_heads is -4"),
    ("model_type", "mamba", "model_type is 'mamba'"),
    ("auto_map", {"AutoModelForCausalLM": "x" * 5000}, "auto_map names"),
    ("num_key_value_heads", 1, "mismatched keys"),
    ("vocab_size", 7, "mismatched keys"),
    ("num_hidden_layers", -2, "num_hidden_layers|ffn.layers"),
    ("attn_implementation", "flash_attention_2", "cannot be loaded"),
    ("base_model_tp_plan", 3, "cannot be loaded|config.json"),
    ("rope_parameters", {"rope_type": 1.0, "rope_theta": 1e4}, "config.json|cannot be loaded"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 10**400}, "cannot be loaded"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2.0},
     "partial_rotary_factor is 2.0"),
    ("return_dict", False, "return_dict is false"),
    ("is_encoder_decoder", True, "is_encoder_decoder is true"),
    ("output_hidden_states", "q", "output_hidden_states is 'q'"),
    ("layer_types", ["linear_attention"] * 2, "which llama has not"),
    ("sliding_window", -16, "sliding_window is -16"),
    ("attention_dropout", 97, "attention_dropout is 97"),
    ("model_type", "x" * 5000, "model type"),
    ("hire", {"format_version": "x" * 5000}, "format_version"),
)  # fmt: skip


def test_changed_standard_fields(folder: Path) -> None:
    """What Transformers raises, and when, is many things; here it is one message."""
    path = folder / "config.json"
    original = json.loads(path.read_text())
    for key, value, said in STANDARD:
        path.write_text(json.dumps({**original, key: value}))
        with pytest.raises(InputError, match=said) as caught:
            load(folder)
        assert len(str(caught.value)) < 1000
        assert caught.value.exit_code == 4


def test_special_tokens_that_are_no_numbers(folder: Path) -> None:
    path = folder / "generation_config.json"
    original = json.loads(path.read_text())
    for name, value in (
        ("eos_token_id", "8"),
        ("eos_token_id", [1, "8"]),
        ("bos_token_id", 0.5),
        ("bos_token_id", 2**63),
    ):
        path.write_text(json.dumps({**original, name: value}))
        with pytest.raises(InputError, match=name):
            load(folder)


@pytest.mark.parametrize("value", ["q", [None], float("-inf"), {}])
def test_outputs_that_are_neither_flags_nor_layers(folder: Path, value: Any) -> None:
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "output_hidden_states": value}))
    with pytest.raises(InputError, match="output_hidden_states"):
        load(folder)


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [("gemma3_text", "query_pre_attn_scalar", -8), ("qwen3", "layer_types", ["mamba"] * 2)],
)
def test_fields_of_one_family(tmp_path: Path, model_type: str, key: str, value: Any) -> None:
    hire_model(tiny_model(model_type), ffn={}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError, match=key):
        load(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "kinds", "fits"),
    [
        ("lfm2", ["conv", "full_attention"], True),
        ("qwen3_next", ["linear_attention", "full_attention"], True),
        ("qwen3", ["linear_attention", "full_attention"], False),
        ("llama", ["conv", "full_attention"], False),
    ],
)
def test_kinds_of_layers_go_by_family(model_type: str, kinds: list[str], fits: bool) -> None:
    config: Any = AutoConfig.for_model(model_type, num_hidden_layers=2)
    config.layer_types = kinds
    if fits:
        loading._check_layer_types(config)
    else:
        with pytest.raises(ValueError, match=f"which {model_type} has not"):
            loading._check_layer_types(config)


def test_windows_without_a_size(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = hire_model(tiny_model("qwen3"), ffn={})
    model.config.layer_types = ["sliding_attention"] * 2
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="sliding_window is None"):
        load(folder)


# --------------------------------------------------------------------------- the dense weights

WEIGHTS = "model.safetensors"


def reheaded(content: bytes, change: Callable[[dict[str, Any]], Any], fill: int = 0) -> bytes:
    """The file with another header, `fill` spaces behind it."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode() + b" " * fill
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def test_headers_that_only_transformers_would_refuse(folder: Path) -> None:
    original = (folder / WEIGHTS).read_bytes()
    first, second = [name for name in json.loads(original[8:].split(b"}}")[0] + b"}}")][1:3]

    def floats(header: dict[str, Any]) -> None:
        header[first]["data_offsets"] = [float(at) for at in header[first]["data_offsets"]]

    def shared(header: dict[str, Any]) -> None:
        header["more"] = header[second]

    def dropped(header: dict[str, Any]) -> None:
        header.pop(second)

    def truths(header: dict[str, Any]) -> None:
        header[first]["shape"] = [True, *header[first]["shape"]]

    for change in (floats, shared, dropped, truths):
        (folder / WEIGHTS).write_bytes(reheaded(original, change))
        assert outcome(folder) == "refused", change.__name__
    for name in (WEIGHTS, "hire_config.py"):
        (folder / name).unlink()
        (folder / name).mkdir()
        assert outcome(folder) == "refused"


def test_weights_at_odd_addresses_are_moved(folder: Path) -> None:
    """A header of any length is allowed, but kernels read weights where they lie."""
    ids = torch.tensor([[3, 4, 5]])
    expected = load(folder).generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for name in (WEIGHTS, str(PREDICTORS)):
        content = (folder / name).read_bytes()
        lengths = [reheaded(content, lambda header: None, fill) for fill in (0, 1)]
        (odd,) = [made for made in lengths if made[0] % 2]  # the lowest byte of the length
        (folder / name).write_bytes(odd)
    model: Any = load(folder)
    assert all(p.data_ptr() % p.element_size() == 0 for p in model.parameters())
    for layer in base_of(model).hire_layers.values():
        assert all(t.data_ptr() % t.element_size() == 0 for t in layer.predictor_tensors.values())
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), expected
    )


# --------------------------------------------------------------------------- the predictor file

Tensors = dict[str, torch.Tensor]


def other_type(tensors: Tensors, name: str, chance: random.Random) -> None:
    types = [torch.float64, torch.float16, torch.int8, torch.uint8, torch.bool, torch.int64]
    tensors[name] = tensors[name].to(chance.choice(types))


def other_shape(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensor = tensors[name]
    shapes: list[Callable[[], torch.Tensor]] = [
        lambda: tensor[:-1],
        lambda: tensor[None],
        lambda: tensor.flatten(),
        lambda: torch.cat([tensor, tensor]),
        lambda: tensor[:0],
        lambda: tensor.transpose(0, -1),
    ]
    tensors[name] = chance.choice(shapes)().contiguous()


def other_values(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensor = tensors[name]
    values = [float("nan"), float("inf"), -1.0, 0.0, 1e30]
    if tensor.is_floating_point():
        flat = tensor.flatten()
        flat[chance.randrange(len(flat))] = chance.choice(values)
    else:
        tensors[name] = torch.full_like(tensor, chance.choice([0, 127]))


def other_name(tensors: Tensors, name: str, chance: random.Random) -> None:
    tensor = tensors.pop(name)
    names = ["", "x", name.upper(), name.replace("0", "7"), name + ".x", "layers.-1.bias"]
    if chance.random() < 0.7:
        tensors[chance.choice(names)] = tensor


def test_changed_tensors(folder: Path) -> None:
    chance, original = random.Random(1), load_file(folder / PREDICTORS)
    seen = Counter[str]()
    for _ in range(80):
        tensors = {name: tensor.clone() for name, tensor in original.items()}
        name = chance.choice(sorted(tensors))
        change = chance.choice([other_type, other_shape, other_values, other_name])
        change(tensors, name, chance)
        save_file(tensors, folder / PREDICTORS)
        try:
            seen[outcome(folder)] += 1
        except Exception as error:
            raise AssertionError((name, change.__name__, tensors.get(name))) from error
    assert seen["refused"] > 40, seen


def test_changed_bytes(folder: Path) -> None:
    """In the header, which says what the bytes mean, and by cutting the file."""
    path, chance = folder / PREDICTORS, random.Random(2)
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    seen = Counter[str]()
    for _ in range(80):
        content = bytearray(original)
        position = chance.choice([chance.randrange(8), chance.randrange(8, header)])
        content[position] = chance.randrange(256)
        if chance.random() < 0.2:
            content = content[: chance.randrange(len(content))]
        path.write_bytes(content)
        try:
            seen[outcome(folder)] += 1
        except Exception as error:
            found = (position, bytes(content[max(0, position - 40) : position + 40]))
            raise AssertionError(found) from error
    assert seen["refused"] > 40, seen


@pytest.mark.parametrize(
    "report",
    [
        {"recipe": "\ud800", "layers": 5},
        {"layers": [3, {}, {"layer": []}, {"layer": 0, "recall": "high", "kept": {"p10": None}}]},
    ],
)
def test_reports_of_any_kind_are_inspected(folder: Path, report: Any, hireconvert: Cli) -> None:
    (folder / "hire_report.json").write_text(json.dumps(report))
    ended = hireconvert("inspect", folder)
    assert ended.code == 0, ended.err
