"""Checkpoints made to do harm: every mutation is refused with ValueError or works, never else."""

import copy
import json
import random
import re
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from hireconvert.runtime import modeling_hire
from hireconvert.runtime.hire_config import (
    check_hire_config,
    check_predictor_tensors,
    describe,
    layer_tensor_shapes,
)
from hireconvert.runtime.hire_predict import Predictor, decode_down
from tests.tiny import base_of, hire_model, tiny_model, tokens

NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 5, 31, 33, 95, 97, 2**31, 2**63, -(2**63), 0.5, 4.0,
    float("nan"), float("inf"), "", "q", "lr", "8", "mlp", "up_proj", "down_proj", "__class__",
    "layers.0", "gate_proj:7/2", "up_proj:0/0", "..", "a.b", [], {}, [1], {"a": 1}, [None] * 3,
)  # fmt: skip


def mutated(hire: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """One to three changes: a value replaced, a key dropped, a key added, two values swapped."""
    hire = copy.deepcopy(hire)
    for _ in range(dice.randint(1, 3)):
        *path, last = dice.choice(places(hire))
        owner: Any = hire
        for key in path:
            owner = owner[key]
        action = dice.random()
        if action < 0.75:
            owner[last] = dice.choice(NASTY)
        elif action < 0.9:
            owner.pop(last)
        elif isinstance(owner, dict):
            owner["unknown"] = dice.choice(NASTY)
        else:
            owner.append(dice.choice(NASTY))
    return hire


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything below the root."""
    found: list[tuple[Any, ...]] = []
    if isinstance(tree, dict):
        items: Any = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return []
    for key, value in items:
        found.append((*path, key))
        found += places(value, (*path, key))
    return found


ATTENTION = {"block": 32, "matrices": {"self_attn.q_proj": 8, "self_attn.o_proj": 4}}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        "llama": hire_model(tiny_model("llama"), ffn={"group_size": 4, "unselected": {}}, head={}),
        "refined": hire_model(
            tiny_model("llama"), ffn={"predictor": {}, "unselected": {}, "rows": "refined"}
        ),
        "copies": hire_model(
            tiny_model("llama"),
            ffn={"keep_fraction": 1.0, "predictor": {}, "unselected": {}, "rows": "copies"},
        ),
        "llama_bias": hire_model(
            tiny_model("llama_bias"), ffn={"selection": "threshold", "unselected": {"bits": 3}}
        ),
        "phi3": hire_model(
            tiny_model("phi3"),
            ffn={
                "selection": "threshold",
                "predictor": {
                    "kind": "qlr",
                    "input_keep": 0.5,
                    "factor_bits": 4,
                    "soften": True,
                },
            },
            head={"block": 16, "bits": 4},
        ),
        "opt": hire_model(
            tiny_model("opt"),
            ffn={"selection": "mean_std", "keep": "candidates", "predictor": {"kind": "lr"}},
            head={},
        ),
    }


@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3", "opt", "refined", "copies"])
def test_random_mutations_of_the_config(models, family):
    model, dice = models[family], random.Random(len(family))
    native_config = copy.deepcopy(model.config)
    refused = accepted = 0
    for _ in range(400):
        config = copy.deepcopy(native_config)
        config.hire = mutated(native_config.hire, dice)
        try:
            check_hire_config(config)
        except ValueError as error:
            assert "config.hire" in str(error)
            refused += 1
            continue
        if accepted >= 40:  # building takes longer than checking
            continue
        accepted += 1
        try:
            with torch.device("meta"):
                built = modeling_hire.hire_class(type(tiny_class(model)))(config)
            for index, layer in base_of(built).hire_layers.items():
                tensors = base_of(model).hire_layers[index].predictor_tensors
                check_predictor_tensors(tensors, layer_tensor_shapes(layer), f"layers.{index}.")
        except ValueError:
            continue
    assert refused > 200 and accepted > 5


def tiny_class(model: Any) -> Any:
    """An object of the native class of a HiRE model."""
    native = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers.models"))
    return native.__new__(native)


def test_what_passes_the_checks_also_runs(models):
    """Mutated counts that the checks allow: the model decodes or says ValueError."""
    model, dice = models["llama"], random.Random(7)
    native = tiny_model("llama")
    ran = 0
    for _ in range(300):
        config = copy.deepcopy(model.config)
        layer = dice.choice(config.hire["ffn"]["layers"])
        for name in dice.sample(["num_kept", "num_candidates", "num_common", "group_size"], 2):
            layer[name] = dice.choice([0, 1, 2, 3, 4, 8, 24, 48, 60, 92, 95, 96, 97])
        layer["keep"] = dice.choice(["top_k", "candidates"])
        level = dice.choice([-3.0e38, -1, 0, 1e-45, 0.5, 1, 2**70, 3.0e38])
        rule = dice.choice(["threshold", "relative", "mean_std", "score_mass"])
        varying = {"rule": rule, "level": level, "mean_kept": dice.choice([0, 48, 47.5])}
        layer["selection"] = dice.choice([None, varying, varying, varying])
        config.hire["head"]["num_candidates"] = dice.choice([1, 95, 96, 5000])
        config.hire["head"]["certify_top"] = dice.choice([1, 95, 96, 5000])
        try:
            check_hire_config(config)
        except ValueError:
            continue
        if ran >= 15:
            continue
        built = modeling_hire.HireLlamaForCausalLM(config).eval()
        built.load_state_dict(native.state_dict())
        for index, sparse in base_of(built).hire_layers.items():
            sparse.predictor_tensors = base_of(model).hire_layers[index].predictor_tensors
        out = built.generate(tokens(1, 4), max_new_tokens=3, do_sample=False)
        assert out.shape[1] > 4
        ran += 1
    assert ran == 15


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("format_version",), 2, "format_version"),
        (("format_version",), True, "format_version"),
        (("max_sparse_rows",), 0, "max_sparse_rows"),
        (("ffn", "layers"), [], "ffn.layers"),
        (("ffn", "layers", 0, "num_kept"), 97, "num_kept"),
        (("ffn", "layers", 0, "num_candidates"), 4, "num_candidates"),
        (("ffn", "layers", 0, "group_size"), 7, "group_size"),
        (("ffn", "layers", 0, "num_common"), 96, "num_common"),
        (("ffn", "layers", 1, "predictor", "bits"), 4.0, "bits"),
        (("ffn", "layers", 1, "predictor", "kind"), "oracle", "kind"),
        (("ffn", "layers", 1, "predictor"), None, "predictor"),
        (("layout", "up"), "up_proj:1/0", "layout.up"),
        (("layout", "gate"), "../gate", "layout.gate"),
        (("layout", "layers"), "", "layout.layers"),
        (("layout",), None, "layout"),
        (("head", "certified"), 1, "certified"),
        (("head", "bits"), 3, "bits"),
        (("head",), [], "head"),
        (("ffn", "layers", 0, "rows"), "coarse", "rows"),
        (("attention",), [], "attention"),
        (("attention",), {**ATTENTION, "matrices": {"a.b": 5}}, "attention.matrices.a.b"),
        (("attention",), {**ATTENTION, "block": 0}, "attention.block"),
        (("attention",), {**ATTENTION, "matrices": []}, "attention.matrices"),
        (("attention",), {**ATTENTION, "matrices": {}}, "attention.matrices"),
        (("attention",), {**ATTENTION, "matrices": ["a.b"]}, "attention.matrices"),
        (("attention",), {**ATTENTION, "matrices": {"../q_proj": 8}}, "attention.matrices"),
    ],
)
def test_a_bad_field_is_named(models, path, value, named):
    config = copy.deepcopy(models["llama"].config)
    owner = config.hire
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    with pytest.raises(ValueError, match=named):
        check_hire_config(config)


@pytest.mark.parametrize("rows", ["refined", "copies"])
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("predictor", "bits"), 3),
        (("predictor", "kind"), "lr"),
        (("unselected", "bits"), 8),
        (("unselected",), None),
    ],
)
def test_rounded_rows_without_their_copies_are_refused(models, path, value, rows):
    config = copy.deepcopy(models[rows].config)
    check_hire_config(config)
    owner = config.hire["ffn"]["layers"][1]
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    with pytest.raises(ValueError, match=rf"rows is '{rows}' without|rank"):
        check_hire_config(config)


@pytest.mark.parametrize(
    "change",
    [
        {"num_kept": 95},
        {"num_kept": 90, "num_candidates": 95},
        {"selection": {"rule": "threshold", "level": 0.0, "mean_kept": 96}},
    ],
)
def test_rows_of_copies_leave_no_neuron_out(models, change):
    config = copy.deepcopy(models["copies"].config)
    check_hire_config(config)
    config.hire["ffn"]["layers"][1] |= change
    with pytest.raises(ValueError, match="by which all 96 neurons count"):
        check_hire_config(config)
    config.hire["ffn"]["layers"][1]["rows"] = "stored"
    check_hire_config(config)


def test_a_relative_level_is_one_of_estimates(models):
    config = copy.deepcopy(models["llama_bias"].config)
    layer = config.hire["ffn"]["layers"][1]
    layer["selection"] = layer["selection"] | {"rule": "relative"}
    with pytest.raises(ValueError, match="rule is 'relative', but keep is 'top_k'"):
        check_hire_config(config)
    layer["keep"] = "candidates"
    check_hire_config(config)


def test_rows_of_copies_read_every_input(models):
    model = copy.deepcopy(models["copies"])
    layer = base_of(model).hire_layers[0]
    layer.spec["predictor"] = layer.spec["predictor"] | {"num_inputs": 16}
    with pytest.raises(ValueError, match="rows are 'copies', but the predictor copies some"):
        layer_tensor_shapes(layer)


@pytest.mark.parametrize("missing", ["ffn", "head", "layout", "max_decode_queries"])
def test_a_missing_field_is_named(models, missing):
    config = copy.deepcopy(models["llama"].config)
    del config.hire[missing]
    with pytest.raises(ValueError, match=missing):
        check_hire_config(config)
    with pytest.raises(ValueError, match=r"config\.hire is missing"):
        check_hire_config(PretrainedConfig())


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ("layers", "embed_tokens"),
        ("layers", "norm.weight"),
        ("ffn", "nothing"),
        ("ffn", "self_attn"),
        ("up", "act_fn"),
        ("up", "down_proj"),
        ("gate", "gate_proj:0/2"),
        ("act", "up_proj"),
        ("act", "weights"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(models, part, path):
    config = copy.deepcopy(models["llama"].config)
    config.hire["layout"][part] = path
    with pytest.raises(ValueError, match=r"config\.hire"):
        modeling_hire.HireLlamaForCausalLM(config)


def test_more_neurons_or_inputs_than_the_layer_has_are_refused(models):
    for name, value in (("num_neurons", 192), ("num_inputs", 33)):
        config = copy.deepcopy(models["llama"].config)
        spec = config.hire["ffn"]["layers"][0]
        (spec if name in spec else spec["predictor"])[name] = value
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            modeling_hire.HireLlamaForCausalLM(config)


UNSELECTED = "ffn.layers[1].unselected"


@pytest.mark.parametrize(
    ("value", "named"),
    [
        *((value, f"{UNSELECTED} is {type(value).__name__}") for value in (True, 4, 0.5, "q", [])),
        ({}, f"{UNSELECTED}.bits is None"),
        *(({"bits": bits}, f"{UNSELECTED}.bits is {bits!r}") for bits in (1, 5, 4.0, True, "4")),
        *(
            ({"bits": 4, "block": block}, f"{UNSELECTED}.block is {block!r}")
            for block in (None, 0, -1, 2**24 + 1, 32.0, True, "32")
        ),
        *(
            ({"bits": 4, "block": 32, "symmetric": symmetric}, f"{UNSELECTED}.symmetric is")
            for symmetric in (None, 0, 1, "no")
        ),
        *(
            (
                {"bits": 4, "block": 32, "symmetric": True, "levels": levels},
                f"{UNSELECTED}.levels is",
            )
            for levels in (None, True, "nf4", 4)
        ),
        *(
            ({"bits": 4, "block": 32, "symmetric": True, "levels": "normal"} | change, named)
            for change, named in (
                ({"bits": 3}, f"{UNSELECTED}.bits is 3, expected one of [4]"),
                ({"symmetric": False}, f"{UNSELECTED}.symmetric is False, expected one of [True]"),
                ({"block": 2**16 + 1}, f"{UNSELECTED}.block is 65537"),
            )
        ),
    ],
)
def test_a_bad_field_of_what_is_left_out_is_named(models, value, named):
    config = copy.deepcopy(models["llama_bias"].config)
    check_hire_config(config)
    config.hire["ffn"]["layers"][1]["unselected"] = value
    with pytest.raises(ValueError, match=re.escape(named)):
        check_hire_config(config)


def test_estimates_of_groups_cannot_stand_for_neurons_left_out():
    ffn = {"group_size": 4, "predictor": {"group_scores": True}}
    config = hire_model(tiny_model("llama"), ffn=ffn).config
    config.hire["ffn"]["layers"][0]["unselected"] = {"bits": 4, "block": 32, "symmetric": False}
    with pytest.raises(ValueError, match=r"layers\[0\]\.unselected needs estimates of neurons"):
        check_hire_config(config)


@pytest.mark.parametrize("absent", ["null", "no key"])
def test_a_copy_that_the_config_does_not_name_is_refused(models, absent):
    config = copy.deepcopy(models["llama_bias"].config)
    if absent == "null":
        config.hire["ffn"]["layers"][0]["unselected"] = None
    else:
        del config.hire["ffn"]["layers"][0]["unselected"]
    check_hire_config(config)
    with torch.device("meta"):
        built = modeling_hire.HireLlamaForCausalLM(config)
    tensors = base_of(models["llama_bias"]).hire_layers[0].predictor_tensors
    shapes = layer_tensor_shapes(base_of(built).hire_layers[0])
    with pytest.raises(ValueError, match="down_planes is not called for"):
        check_predictor_tensors(tensors, shapes, "")


@pytest.mark.parametrize("name", ["down_planes", "down_scale", "down_offset"])
def test_a_bad_tensor_of_the_copy_is_named(models, name):
    layer = base_of(models["llama_bias"]).hire_layers[0]
    good, shapes = layer.predictor_tensors, layer_tensor_shapes(layer)
    check_predictor_tensors(good, shapes, "")
    tensor = good[name]
    bad = [tensor[..., :-1], tensor[:-1], tensor[None], tensor.to(torch.int64), None]
    if tensor.is_floating_point():
        bad += [tensor.clone(), tensor.clone()]
        bad[-1].view(-1)[3], bad[-2].view(-1)[3] = float("nan"), float("-inf")
    for value in bad:
        tensors = {**good, name: value} if value is not None else dict(good)
        if value is None:
            del tensors[name]
        with pytest.raises(ValueError, match=rf"x\.{name} (is|has|holds)"):
            check_predictor_tensors(tensors, shapes, "x.")


def broken_tensors(dice: random.Random, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name = dice.choice(sorted(tensors))
    tensor = tensors[name]
    action = dice.randrange(7)
    if action == 0:
        del tensors[name]
    elif action == 1:
        tensors[name] = tensor[..., :-1]
    elif action == 2:
        tensors[name] = tensor[None]
    elif action == 3:
        tensors[name] = torch.zeros(0)
    elif action == 4:
        tensors["extra." + name] = tensor
    elif action == 5 and tensor.is_floating_point():
        tensor.view(-1)[dice.randrange(tensor.numel())] = dice.choice([float("nan"), float("inf")])
    elif action == 5:
        tensors[name] = tensor.float()
    else:
        tensors[name] = tensor.to(torch.int64)
    return tensors


@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3", "opt"])
def test_random_mutations_of_the_predictor_tensors(models, family):
    dice = random.Random(3)
    layer = base_of(models[family]).hire_layers[0]
    shapes = layer_tensor_shapes(layer)
    check_predictor_tensors(layer.predictor_tensors, shapes, "")
    for _ in range(150):
        with pytest.raises(ValueError, match=r"hire/predictors\.safetensors"):
            check_predictor_tensors(broken_tensors(dice, layer.predictor_tensors), shapes, "")


def test_any_codes_decode_to_finite_numbers(models):
    """Codes and finite scales of a stranger may predict badly, but nothing worse."""
    layer = base_of(models["phi3"]).hire_layers[0]
    tensors = {
        name: torch.randint(-128, 127, t.shape).to(t.dtype) if not t.is_floating_point() else t
        for name, t in layer.predictor_tensors.items()
    }
    predictor = Predictor(layer.spec["predictor"], tensors, 32)
    assert predictor.estimate(torch.randn(2, 32)).isfinite().all()
    layer = base_of(models["llama_bias"]).hire_layers[0]
    planes = torch.full_like(layer.predictor_tensors["down_planes"], 255)
    tensors = {**layer.predictor_tensors, "down_planes": planes}
    assert decode_down(tensors, layer.spec["unselected"], 32).isfinite().all()


def test_a_huge_block_costs_no_memory(models):
    copied = base_of(models["llama_bias"]).hire_layers[0]
    narrow = {**copied.predictor_tensors}
    narrow |= {name: narrow[name][:, :1] for name in ("down_scale", "down_offset")}
    assert decode_down(narrow, {**copied.spec["unselected"], "block": 2**24}, 32).shape == (96, 32)
    config = copy.deepcopy(models["opt"].config)
    config.hire["head"]["block"] = 2**24
    built = modeling_hire.HireOPTForCausalLM(config).eval()
    built.load_state_dict(tiny_model("opt").state_dict())
    head = built.get_output_embeddings()
    head.hire.prepare(head)
    head.hire._prepare_copy()
    assert json.dumps(config.hire)  # still plain data
    assert head.hire.prepared.copy_VD.shape == head.weight.shape


@pytest.mark.parametrize(("keep", "share"), [("top_k", "0.50"), ("candidates", "0.62")])
def test_the_line_at_load_counts_what_is_kept(keep: str, share: str) -> None:
    layer = {"num_neurons": 96, "num_kept": 48, "num_candidates": 60, "keep": keep}
    hire = {"ffn": {"layers": [{**layer, "predictor": {"kind": "q"}}, None]}, "head": None}
    assert f"1 sparse FFN layers keep {share} of their neurons" in describe(hire)
