"""Recipes: strict YAML, errors that name the key, overrides, round trips, shipped files."""

import math
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from hireconvert.errors import UsageError
from hireconvert.recipe import (
    DataRecipe,
    DistillRecipe,
    HeadRecipe,
    PredictorRecipe,
    Recipe,
    dump_recipe,
    load_recipe,
    per_layer,
    recipe_schema,
    shipped_recipes,
)
from hireconvert.schema import UnselectedRecipe

SHIPPED = [
    "aggressive",
    "balanced",
    "demo",
    "fast",
    "gemma3-270m",
    "lossless",
    "qwen2.5-coder-0.5b",
    "smollm2-135m",
    "tiny-ci",
]


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def fails(source, *overrides):
    with pytest.raises(UsageError) as caught:
        load_recipe(source, overrides)
    return str(caught.value)


# ---------------------------------------------------------------------------------------- shipped


def test_shipped_names():
    assert list(shipped_recipes()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_states_differences_only(name):
    import yaml

    path = shipped_recipes()[name]
    recipe = load_recipe(name)
    assert recipe.name == name
    assert path.read_text().startswith("# ")
    assert recipe.data.source == "self", "data is never baked in"
    tree = yaml.safe_load(path.read_text())
    assert tree.pop("description")
    # Every value said is one that would otherwise be different, certify_top of `lossless` aside.
    assert tree.get("data", {}).keys() <= {"num_tokens", "num_held_tokens", "window"}
    for key, default in DataRecipe():
        assert tree.get("data", {}).get(key, "absent") != default
    for key, default in HeadRecipe():
        assert tree.get("head", {}).get(key, "absent") != default or name == "lossless"


def test_lossless_is_the_certified_head_alone():
    recipe = load_recipe("lossless")
    assert recipe.ffn is None
    assert recipe.head is not None
    assert (recipe.head.certified, recipe.head.certify_top) == (True, 64)


@pytest.mark.parametrize("name", SHIPPED)
def test_dump_and_load_is_the_identity(name, recipe_file):
    recipe = load_recipe(name)
    text = dump_recipe(recipe)
    again = load_recipe(recipe_file(text))
    assert again == recipe
    assert dump_recipe(again) == text


def test_dump_keeps_text_that_looks_like_a_number_and_small_floats(recipe_file):
    sets = ["name='1e-3'", "description='0x1'", "ffn.predictor.kind=lr"]
    recipe = load_recipe("demo", [*sets, "ffn.predictor.distill.learning_rate=1e-5"])
    assert recipe.name == "1e-3"
    assert load_recipe(recipe_file(dump_recipe(recipe))) == recipe


# ----------------------------------------------------------------------------------------- schema


def sections(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections(field.annotation)
    for inner in get_args(annotation):
        yield from sections(inner)


def test_every_field_is_described_and_every_section_is_strict_and_frozen():
    found = set(sections(Recipe))
    assert len(found) >= 11
    for section in found:
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["frozen"] and section.model_config["strict"]
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_schema_names_limits_and_forbids_unknown_keys():
    schema = recipe_schema()
    ffn = schema["$defs"]["FfnRecipe"]
    assert schema["additionalProperties"] is False and ffn["additionalProperties"] is False
    one, many = ffn["properties"]["keep_fraction"]["oneOf"]
    assert (one["exclusiveMinimum"], one["maximum"]) == (0, 1)
    assert many["items"]["maximum"] == 1


def test_recipe_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe("demo").seed = 3


# ----------------------------------------------------------------------------------- wrong values

WRONG = [
    ("ffn.keep_fraction=1.5", "ffn.keep_fraction: 1.5 is not in (0, 1]"),
    ("ffn.keep_fraction=0", "ffn.keep_fraction: 0 is not in (0, 1]"),
    ("ffn.keep_fraction=.nan", "ffn.keep_fraction: nan is not in (0, 1]"),
    ("ffn.keep_fraction=[0.5, 2]", "ffn.keep_fraction.1: 2 is not in (0, 1]"),
    ("ffn.keep_fraction=[]", "ffn.keep_fraction: [] is empty"),
    ("ffn.keep_fraction=half", "ffn.keep_fraction: 'half' is not a number"),
    ("ffn.keep_fraction=true", "ffn.keep_fraction: true is not a number"),
    ("ffn.over_select=0.9", "ffn.over_select: 0.9 is not a finite number of at least 1"),
    ("ffn.over_select=.inf", "ffn.over_select: inf is not a finite number of at least 1"),
    ("ffn.score=l2", "ffn.score: 'l2' is not one of 'norm', 'plain' or 'error'"),
    ("ffn.group_size=0", "ffn.group_size: 0 is not a finite number of at least 1"),
    ("ffn.group_size=4.0", "ffn.group_size: 4.0 is not a whole number"),
    ("ffn.predictor=q", "ffn.predictor: 'q' is not a section (a mapping of keys)"),
    ("ffn.predictor.bits=5", "ffn.predictor.bits: 5 is not one of 2, 3, 4 or 8"),
    ("ffn.predictor.symmetric=no", "ffn.predictor.symmetric: 'no' is not true or false"),
    ("ffn.predictor.bit=3", "ffn.predictor.bit: unknown key, did you mean bits?"),
    (
        "ffn.predictor.distill.step=3",
        "ffn.predictor.distill.step: unknown key, did you mean steps?",
    ),
    ("head.bitz=3", "head.bitz: unknown key, did you mean bits?"),
    ("fnn.x=1", "fnn: unknown key, did you mean ffn?"),
    ("seed=-1", "seed: -1 is not in [0, "),
    ("seed=true", "seed: true is not a whole number"),
    ("name=3", "name: 3 is not text"),
    ("decode=3", "decode: 3 is not a section (a mapping of keys)"),
    ("output.max_shard_gb=0", "output.max_shard_gb: 0 is not a finite number above 0"),
    # between fields
    ("ffn.common_path=0.5", "ffn.common_path: 0.5 is not below keep_fraction (0.25)"),
    ("ffn.predictor.group_scores=true", "ffn.predictor.group_scores: needs ffn.group_size above 1"),
    ("ffn.predictor.kind=auto", "ffn.predictor.target_recall: kind auto needs the recall to reach"),
    ("ffn.predictor.target_recall=.9", "ffn.predictor.target_recall: kind q aims at no recall"),
    ("ffn.predictor.distill={}", "ffn.predictor.distill: kind q has no factors to train"),
    ("head.bits=4", "head.certified: kind q needs bits 8 and block 0"),
    ("head.block=64", "head.certified: kind q needs bits 8 and block 0"),
    ("data.num_tokens=512", "data.num_tokens: 512 is less than one window of 1024 tokens"),
    ("data.chat_column=chat", "data.chat_column: text sampled from the model"),
    ("data.revision=main", "data.revision: only a hub: source has one"),
    ("data=hub:a/b/c", "data.source: 'hub:a/b/c' is not of the form hub:org/name"),
    # neurons left out
    ("ffn.unselected=true", "ffn.unselected: true is not a section (a mapping of keys)"),
    ("ffn.unselected=4", "ffn.unselected: 4 is not a section (a mapping of keys)"),
    ("ffn.unselected.bits=5", "ffn.unselected.bits: 5 is not one of 2, 3, 4 or 8"),
    ("ffn.unselected.bits=null", "ffn.unselected.bits: null is not one of 2, 3, 4 or 8"),
    ("ffn.unselected.block=0", "ffn.unselected.block: 0 is not in [1, 16777216]"),
    ("ffn.unselected.block=1.5", "ffn.unselected.block: 1.5 is not a whole number"),
    ("ffn.unselected.symmetric=1", "ffn.unselected.symmetric: 1 is not true or false"),
    ("ffn.unselected.bit=3", "ffn.unselected.bit: unknown key, did you mean bits?"),
    ("ffn.unselected.levels=nf4", "ffn.unselected.levels: 'nf4' is not one of 'even' or 'normal'"),
    (
        "ffn.unselected={levels: normal, symmetric: false}",
        "ffn.unselected.levels: normal levels go without offsets",
    ),
    (
        "ffn.predictor={levels: normal, bits: 3}",
        "ffn.predictor.levels: normal levels are those of 4 bits, not of 3",
    ),
    (
        "ffn.predictor={levels: normal, block: 65537}",
        "ffn.predictor.levels: blocks of normal levels have at most 65536 weights, not 65537",
    ),
    (
        "ffn.predictor={kind: auto, target_recall: 0.9, levels: normal}",
        "ffn.predictor.levels: kind auto tries copies of several widths",
    ),
    # the finetune
    ("finetune.num_tokens=256", "finetune.num_tokens: 256 is less than one window of 512 tokens"),
    (
        "finetune.num_tokens=512",
        "finetune.num_tokens: 512 is less than one step of 2 windows of 512 tokens",
    ),
    ("finetune.source=hub:a b", "finetune.source: 'hub:a b' is not of the form hub:org/name"),
    ("finetune.windw=3", "finetune.windw: unknown key, did you mean window?"),
    ("finetune.mask=true", "finetune.mask: true is not one of 'oracle', 'predicted'"),
    ("finetune.anneal_from=0", "finetune.anneal_from: 0 is not in (0, 1]"),
    ("ffn.predictor.block=20000000", "ffn.predictor.block: 20000000 is not in [1, 16777216]"),
    ("head.block=20000000", "head.block: 20000000 is not in [0, 16777216]"),
    ("decode.max_sparse_rows=2000000", "decode.max_sparse_rows: 2000000 is not in [1, 1048576]"),
    (
        "ffn={keep_fraction: 0.5, over_select: 20, keep: candidates}",
        "ffn.over_select: with 20 times keep_fraction and keep: candidates every neuron",
    ),
    (
        "ffn={keep_fraction: 0.5, selection: relative}",
        "ffn.selection: relative goes by estimates alone: it needs ffn.keep candidates, not top_k",
    ),
    (
        "ffn={keep_fraction: 0.5, over_select: 1, selection: threshold}",
        "ffn.over_select: selection threshold needs more than 1: with as many candidates",
    ),
    ("finetune.dense_prefix=1", "finetune.dense_prefix: 1 is not in [0, 1)"),
    ("finetune.learning_rate=0", "finetune.learning_rate: 0 is not a finite number above 0"),
    ("finetune.lora_rank=0", "finetune.lora_rank: 0 is not a finite number of at least 1"),
    ("finetune.loss={kl: 0}", "finetune.loss.kl: every weight is 0"),
]


@pytest.mark.parametrize(("override", "message"), WRONG, ids=[one for one, _ in WRONG])
def test_wrong_value_is_named_with_its_key(override, message):
    assert f"\n  {message}" in fails("demo", override)


def test_all_problems_are_listed_at_once():
    message = fails("demo", "ffn.keep_fraction=7", "head.bitz=1", "decode=3", "data.num_tokens=1")
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        "data.num_tokens",
        "ffn.keep_fraction",
        "head.bitz",
        "decode",
    ]


def test_nothing_to_convert(recipe_file):
    assert "give ffn, head or both" in fails(recipe_file("name: idle\n"))
    assert "give ffn, head or both" in fails("lossless", "head=null")


def test_nothing_to_finetune():
    assert "finetune: trains the selecting FFN" in fails("lossless", "finetune={}")
    assert load_recipe("lossless").finetune is None


def test_missing_key(recipe_file):
    assert "name: missing" in fails(recipe_file("head: {}"))
    assert "ffn.keep_fraction: missing" in fails(recipe_file("name: a\nffn: {}"))


def test_certified_low_rank_head_needs_no_bits():
    head = load_recipe("demo", ["head.kind=lr", "head.bits=4"]).head
    assert head is not None and head.certified


# -------------------------------------------------------------------------------------- YAML rules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("# nothing\n", "it is empty"),
        ("- a\n", "it holds ['a']"),
        ("demo\n", "it holds 'demo'"),
        ("name: a\nseed: 1\nname: b\n", "line 3: not a valid recipe: duplicate key 'name'"),
        ("name: a\nffn: {keep_fraction: 1, keep_fraction: 1}", "line 2: not a valid recipe: dup"),
        ("name: a\nseed: [1\n", "not a valid recipe: expected ',' or ']'"),
        ("name: &x a\ndescription: *x\n", "aliases are not used"),
        ("? [a]\n: b\n", "key is no text"),
        ("name: !!python/object:os.system a\n", "could not determine a constructor"),
        (b"GGUF\x03\x00\xff\xfe", "a recipe is a UTF-8 YAML file; this is none"),
        (b"name: \x00\n", "a recipe is a UTF-8 YAML file; this is none"),
        ("name: a\n---\nname: b\n", "not a valid recipe"),
    ],
)
def test_bad_file(recipe_file, text, message):
    path = recipe_file(text)
    error = fails(path)
    assert message in error
    assert str(path) in error


def test_numbers_follow_yaml_1_2(recipe_file):
    text = "name: on\nseed: 010\nffn: {keep_fraction: 5e-1, over_select: 2}\ndescription: 1:30\n"
    recipe = load_recipe(recipe_file(text))
    assert recipe.ffn is not None
    assert (recipe.name, recipe.seed, recipe.description) == ("on", 10, "1:30")
    assert (recipe.ffn.keep_fraction, recipe.ffn.over_select) == (0.5, 2)


def test_files_that_are_not_there(tmp_path):
    assert "no such recipe file" in fails(tmp_path / "none.yaml")
    assert "this is a folder" in fails(tmp_path)
    message = fails("demoo")
    assert "did you mean demo?" in message
    assert all(name in message for name in SHIPPED)


# -------------------------------------------------------------------------------------- overrides


def test_overrides_set_scalars_lists_and_new_sections():
    sets = ["ffn.keep_fraction=[0.5, .25]", "seed=7", "ffn.predictor.kind=qlr", "head=null"]
    recipe = load_recipe("lossless", [*sets, "ffn.predictor.distill.steps=9"])
    assert recipe.ffn is not None
    assert recipe.ffn.keep_fraction == [0.5, 0.25]
    assert recipe.seed == 7
    assert recipe.head is None
    predictor = recipe.ffn.predictor
    assert predictor == PredictorRecipe(kind="qlr", distill=DistillRecipe(steps=9))


def test_neurons_left_out_count_by_estimate_when_asked_for(recipe_file):
    assert load_recipe("tiny-ci", ["ffn.unselected=null"]).ffn.unselected is None
    assert load_recipe("tiny-ci").ffn.unselected is None
    assert load_recipe("tiny-ci", ["ffn.unselected={}"]).ffn.unselected == UnselectedRecipe()
    text = "name: a\nffn: {keep_fraction: 0.5, unselected: {bits: 3, symmetric: true}}\n"
    for recipe in (
        load_recipe(recipe_file(text)),
        load_recipe("tiny-ci", ["ffn.unselected.bits=3", "ffn.unselected.symmetric=true"]),
    ):
        assert recipe.ffn.unselected == UnselectedRecipe(bits=3, block=32, symmetric=True)
        assert load_recipe(recipe_file(dump_recipe(recipe))) == recipe
    assert load_recipe(recipe_file(text), ["ffn.unselected=null"]).ffn.unselected is None


def test_predicted_groups_give_no_estimates_of_neurons():
    grouped = "{kind: lr, group_scores: true}"
    sets = ["ffn.group_size=4", "ffn.unselected={}", f"ffn.predictor={grouped}"]
    error = fails("tiny-ci", *sets)
    assert "ffn.unselected: needs estimates of neurons, not predictor.group_scores" in error
    error = fails("tiny-ci", *sets[:2], f"ffn.predictor=[{{}}, {grouped}]")
    assert "ffn.unselected: needs estimates of neurons, not predictor.1.group_scores" in error
    load_recipe("tiny-ci", [sets[0], sets[2], "ffn.unselected=null"])


def test_override_of_a_list_element():
    sets = ["ffn.predictor=[{bits: 3}, {bits: 4}]", "ffn.predictor.1.bits=8"]
    recipe = load_recipe("demo", sets)
    assert recipe.ffn is not None
    assert recipe.ffn.predictor == [PredictorRecipe(bits=3), PredictorRecipe(bits=8)]
    error = fails("demo", *sets, "ffn.predictor.0.bits=9")
    assert "ffn.predictor.0.bits: 9 is not one of" in error


@pytest.mark.parametrize("key", ["data", "data.source"])
def test_data_is_shorthand_and_taken_as_typed(key):
    for path in ("texts/[a]: b #1.txt", "007.txt", "hub:org/name", "1e-3"):
        assert load_recipe("demo", [f"{key}={path}"]).data.source == path
        finetune = load_recipe("demo", [f"finetune.source={path}"]).finetune
        assert finetune is not None and finetune.source == path
    assert load_recipe("demo", ["data=x.txt"]).data.num_tokens == 8192


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("seed=", "expected KEY=VALUE"),
        ("a..b=3", "expected KEY=VALUE"),
        ("name.x=3", "name is 'demo', which has no keys"),
        ("ffn.keep_fraction.0.x=3", "ffn.keep_fraction is 0.25, which has no keys"),
        ("ffn.keep_fraction=[1", "not a valid recipe"),
        ("head={bits: 8, bits: 8}", "duplicate key 'bits'"),
    ],
)
def test_bad_override(override, message):
    error = fails("demo", override)
    assert message in error
    assert f"--set {override!r}" in error


def test_bad_list_index():
    sets = ["ffn.predictor=[{bits: 3}]"]
    assert "is a list of 1; '1' is no index" in fails("demo", *sets, "ffn.predictor.1.bits=8")
    assert "is a list of 1; 'x' is no index" in fails("demo", *sets, "ffn.predictor.x=8")


# -------------------------------------------------------------------------------------- per layer


def test_per_layer():
    assert per_layer(0.5, 3, "ffn.keep_fraction") == [0.5, 0.5, 0.5]
    assert per_layer([1, 2], 2, "k") == [1, 2]
    with pytest.raises(UsageError, match=r"ffn\.keep_fraction: 2 values for 3 layers"):
        per_layer([0.5, 0.5], 3, "ffn.keep_fraction")


def test_defaults_are_those_of_the_contract():
    recipe = Recipe(name="x", head=HeadRecipe())
    assert recipe.data == DataRecipe(num_tokens=16384, num_held_tokens=4096, window=1024)
    assert recipe.decode.max_decode_queries == 32 and recipe.decode.max_sparse_rows == 32
    assert math.isclose(DistillRecipe().learning_rate, 1e-3)


def test_source_tree_and_package_agree():
    folder = Path(__file__).resolve().parents[2] / "recipes"
    assert {path.stem for path in folder.glob("*.yaml")} == set(shipped_recipes())
