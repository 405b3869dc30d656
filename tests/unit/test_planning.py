"""Bytes, plans and known runtimes, from shapes alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from hireconvert.accounting import dense_bytes, head_bytes, head_entry, hire_tensors, table_bytes
from hireconvert.errors import InputError, UsageError
from hireconvert.loading import KNOWN_HASHES, RUNTIME_FOLDER, runtime_versions
from hireconvert.memory import Shapes, fitted_attention, fitted_shapes
from hireconvert.planning import (
    Skeleton,
    _attention_operations,
    make_skeleton,
    plan,
    planned_hire,
)
from hireconvert.runtime import RUNTIME_FILES
from hireconvert.schema import (
    AttentionRecipe,
    DataRecipe,
    EvaluateRecipe,
    FfnRecipe,
    FinetuneRecipe,
    HeadRecipe,
    PredictorRecipe,
    Recipe,
    UnselectedRecipe,
)
from hireconvert.schema_budget import BudgetRecipe
from hireconvert.scoring import copy_spec
from hireconvert.version import __version__
from hireconvert.workspace import file_sha256

LLAMA = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIZES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "phi3": {**LLAMA, "pad_token_id": 0},
    "opt": {
        "vocab_size": 100,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
    },
    "gpt2": {"vocab_size": 100, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4},
    "mixtral": {**LLAMA, "num_local_experts": 4},
    "bloom": {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def skeleton(family: str, **changes: Any) -> Skeleton:
    config: PreTrainedConfig = CONFIG_MAPPING[family](**(SIZES[family] | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = getattr(config, "tie_word_embeddings", False)
    tensors = {
        name: ("BF16", tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    return make_skeleton(config.to_dict(), tensors)


def recipe(**predictor: Any) -> Recipe:
    ffn = FfnRecipe(keep_fraction=0.5, predictor=PredictorRecipe(block=16, **predictor))
    return Recipe(name="test", ffn=ffn, head=HeadRecipe(certified=True, certify_top=4))


@pytest.mark.parametrize(
    ("family", "gate", "matrices"),
    [
        ("llama", "gate_proj", 3),
        ("phi3", "gate_up_proj:0/2", 3),
        ("opt", None, 2),
        ("gpt2", None, 2),
    ],
)
def test_families_are_planned_from_headers(family: str, gate: str | None, matrices: int) -> None:
    result = plan(skeleton(family), recipe())
    bare = skeleton(family)
    assert bare.layout is not None and bare.layout["gate"] == gate
    assert [row["neurons"] for row in result["layers"]] == [64, 64]
    assert [row["kept"] for row in result["layers"]] == [32, 32]
    assert [row["candidates"] for row in result["layers"]] == [40, 40]
    assert result["layers"][0]["dense_bytes"] == matrices * 64 * 32 * 2
    tokens = result["bytes_per_token"]
    assert tokens["ffn"]["dense"] == 2 * matrices * 64 * 32 * 2
    assert tokens["head"]["dense"] == 100 * (16 if family == "opt" else 32) * 2
    assert tokens["converted"] < tokens["dense"]


def test_unknown_ffn_is_refused_and_its_head_still_planned() -> None:
    with pytest.raises(InputError, match=r"bloom.*head only"):
        plan(skeleton("bloom"), recipe())
    lossless = Recipe(name="head", head=HeadRecipe(certified=True))
    result = plan(skeleton("bloom"), lossless)
    assert result["layers"] == [] and result["head"]["certify_top"] == 64
    assert result["disk_bytes"] > table_bytes(skeleton("bloom").tensors)


def test_unknown_model_type_is_refused() -> None:
    with pytest.raises(InputError, match="model_type 'mine'"):
        make_skeleton({"model_type": "mine"}, {})


def test_experts_stay_dense_and_count_as_far_as_routed() -> None:
    mixture = skeleton("mixtral", num_experts_per_tok=2)
    result = plan(mixture, recipe())
    assert result["layers"] == [] and "only the head" in result["notes"][0]
    more = skeleton("mixtral", num_experts_per_tok=4)
    expert = 3 * 64 * 32 * 2
    difference = dense_bytes(more.tensors, more.config) - dense_bytes(
        mixture.tensors, mixture.config
    )
    assert difference == 2 * 2 * expert  # two more experts in each of two layers


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 128 outputs: a row is 3 planes of 4 bytes, 2 scales; vectors of 4 * (32 + 32 + 128)
        ({"kind": "q", "bits": 3}, 128 * (3 * 4 + 2 * 2) + 768),
        # channel-major: 16 of 32 channels, each 3 planes of 16 bytes and 8 scales
        ({"kind": "q", "bits": 3, "input_keep": 0.5}, 16 * (3 * 16 + 8 * 2) + 768),
        ({"kind": "lr", "rank": 8}, 2 * 8 * (32 + 128) + 4 * (32 + 128)),
        ({"kind": "lr", "rank": 8, "factor_bits": 4}, 8 * 160 // 2 + 4 * 136 + 4 * (32 + 128)),
    ],
)
def test_predictor_bytes_by_hand(changes: dict[str, Any], expected: int) -> None:
    result = plan(skeleton("llama"), recipe(**changes))
    row = result["layers"][0]
    assert row["predictor_bytes"] == expected
    assert row["read_bytes"] == expected + (2 * 40 + 32) * 32 * 2


@pytest.mark.parametrize(
    ("changes", "row_bytes"),
    [
        ({}, 4 * 4 + 2 + 2),  # 4 planes of 4 bytes, one block of 32 with scale and offset
        ({"bits": 3, "block": 12, "symmetric": True}, 3 * 4 + 3 * 2),
        ({"bits": 8, "block": 1000}, 8 * 4 + 2 + 2),
        # Normal levels: a byte for each block's scale and the row's unit.
        ({"symmetric": True, "levels": "normal", "block": 16}, 4 * 4 + 2 * 1 + 4),
    ],
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bytes_of_neurons_left_out_by_hand(
    family: str, changes: dict[str, Any], row_bytes: int
) -> None:
    plain = recipe()
    assert plain.ffn is not None
    ffn = plain.ffn.model_copy(update={"unselected": UnselectedRecipe(**changes)})
    without, model = plan(skeleton(family), plain), skeleton(family)
    result = plan(model, plain.model_copy(update={"ffn": ffn}))
    rows = 64 if ffn.unselected.bits == 4 else 32  # of 4 bits the kernels read all as they lie
    for row, bare in zip(result["layers"], without["layers"], strict=True):
        assert (row["kept"], row["neurons"], bare["unselected"]) == (32, 64, None)
        assert row["unselected"] == copy_spec(ffn.unselected)
        assert bare["unselected_bytes"] == 0 and row["unselected_bytes"] == rows * row_bytes
        assert row["read_bytes"] == bare["read_bytes"] + rows * row_bytes
    read, bare = result["bytes_per_token"], without["bytes_per_token"]
    assert read["ffn"]["unselected"] == 2 * rows * row_bytes and bare["ffn"]["unselected"] == 0
    assert read["converted"] == bare["converted"] + 2 * rows * row_bytes
    stored = result["predictor_bytes"] - without["predictor_bytes"]
    assert stored == 2 * 64 * row_bytes
    assert result["disk_bytes"] == without["disk_bytes"] + 2 * stored
    table = hire_tensors(planned_hire(model, plain.model_copy(update={"ffn": ffn})), 32, 32)
    added = {name: entry for name, entry in table.items() if "down_" in name}
    assert table_bytes(added) == stored


@pytest.mark.parametrize(("keep", "over", "rest"), [("candidates", 1.5, 16), ("top_k", 1.5, 32)])
def test_candidates_that_are_all_kept_are_not_left_out(keep: Any, over: float, rest: int) -> None:
    copy = UnselectedRecipe(bits=3)
    ffn = FfnRecipe(keep_fraction=0.5, over_select=over, keep=keep, unselected=copy)
    rows = plan(skeleton("llama"), Recipe(name="test", ffn=ffn))["layers"]
    assert [row["unselected_bytes"] for row in rows] == [rest * 16] * 2


def test_tables_name_what_each_kind_stores() -> None:
    hire = planned_hire(skeleton("llama"), recipe(kind="qlr", rank=8, symmetric=False))
    names = {name.removeprefix("layers.1.") for name in hire_tensors(hire, 32, 32)}
    both = {"planes", "scale", "offset", "column_scale", "factor_in", "factor_out", "mean", "bias"}
    assert both <= names


def test_head_bytes_by_hand() -> None:
    head = HeadRecipe(certified=False, num_candidates=10).model_dump()
    assert head_bytes(None, (100, 32), 2) == 6400
    # 4 columns of 8 bits, 28 of 4 in eights, three numbers; the low nibbles of 20 rows and a bound.
    assert head_bytes(head, (100, 32), 2) == 100 * (4 + 16 + 6) + 20 * (32 + 2) + 10 * 64
    certified = {**head, "certified": True, "certify_top": 4}
    assert head_bytes(certified, (100, 32), 2) == 100 * 26 + 8 * 34 + 4 * 64
    assert head_bytes({**certified, "bits": 4}, (100, 32), 2) == 100 * 26 + 4 * 64
    assert head_bytes({**certified, "certify_top": 99}, (9, 32), 2) == 9 * (26 + 34 + 64)
    low_rank = {**head, "kind": "lr", "rank": 8}
    assert head_bytes(low_rank, (100, 32), 2) == 2 * 8 * 132 + 10 * 64
    assert head_bytes({**low_rank, "certified": True}, (100, 32), 2) == 2 * 8 * 132 + 800 + 64 * 64


def test_untied_embedding_is_not_read() -> None:
    tied, untied = (skeleton("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert dense_bytes(tied.tensors, tied.config) == dense_bytes(untied.tensors, untied.config)
    assert head_entry(untied.tensors, 100) == ("BF16", (100, 32))
    with pytest.raises(InputError, match="no matrix of 100 rows"):
        head_entry({"norm": ("BF16", (32,))}, 100)


def test_recipe_lists_must_fit_the_layers() -> None:
    three = Recipe(name="test", ffn=FfnRecipe(keep_fraction=[0.5, 0.5, 0.5]))
    with pytest.raises(UsageError, match=r"ffn\.keep_fraction: 3 values for 2 layers"):
        plan(skeleton("llama"), three)


def test_kept_are_all_candidates_where_every_candidate_is_used() -> None:
    ffn = FfnRecipe(keep_fraction=0.5, over_select=1.25, keep="candidates")
    rows = plan(skeleton("llama"), Recipe(name="test", ffn=ffn))["layers"]
    assert [(row["kept"], row["candidates"]) for row in rows] == [(40, 40)] * 2


def test_rank_of_the_head_must_fit_its_width() -> None:
    recipe = Recipe(name="x", head=HeadRecipe(kind="lr", rank=33))
    with pytest.raises(UsageError, match=r"head\.rank: 33 is more than the head's width, 32"):
        planned_hire(skeleton("llama"), recipe)


def test_released_runtimes_are_known() -> None:
    log = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\d+\.\d+\.\d+)(.*)$", log, flags=re.MULTILINE)
    released = {version for version, rest in headings if "unreleased" not in rest}
    entries = json.loads(KNOWN_HASHES.read_text(encoding="utf-8"))
    assert {entry["version"] for entry in entries} == released
    assert all(set(entry) == {"version", "file", "sha256"} for entry in entries)


def test_installed_runtime_is_known() -> None:
    known = runtime_versions()
    for name in RUNTIME_FILES:
        assert __version__ in known[name, file_sha256(RUNTIME_FOLDER / name)]
    on_disk = {path.name for path in RUNTIME_FOLDER.glob("*.py")} - {"__init__.py"}
    assert on_disk == set(RUNTIME_FILES)


# --------------------------------------------------------------------------- the finetune


def tuned(**finetune: Any) -> Recipe:
    """With a finetune and no evaluation, which would need more memory than a model this small."""
    changes = {"finetune": FinetuneRecipe(**finetune), "evaluate": EvaluateRecipe(num_tokens=0)}
    return recipe().model_copy(update=changes)


def test_training_adds_disk_and_memory_by_what_is_trained() -> None:
    bare, plain = skeleton("llama"), plan(skeleton("llama"), recipe())
    ffn = plan(bare, tuned(parameters="ffn"))
    state = 3 * 4 * (2 * 3 * 64 * 32)  # weights and two moments of both layers' three matrices
    weights = table_bytes(bare.tensors)
    assert ffn["disk_bytes"] - plain["disk_bytes"] == weights + 2 * state
    norms = plan(bare, tuned(parameters="ffn_and_norms"))
    assert norms["disk_bytes"] - ffn["disk_bytes"] == 2 * 3 * 4 * 5 * 32
    low_rank = plan(bare, tuned(parameters="ffn", lora_rank=2))
    factors = 3 * 4 * 2 * 3 * 2 * (64 + 32)
    assert low_rank["disk_bytes"] - plain["disk_bytes"] == weights + 2 * factors
    memory = [each["peak_memory_bytes"] for each in (low_rank, ffn, norms)]
    assert memory == sorted(memory) and len(set(memory)) == 3
    short, long = (plan(bare, tuned(window=window))["peak_memory_bytes"] for window in (1024, 2048))
    kept = 4 * 2 * (24 * 32 + 8 * 64)  # float32, layers, widths and neurons
    assert long - short == (kept + 4 * 10 * 100) * 1024


def test_attention_in_four_bits_adds_disk_memory_and_time() -> None:
    model, plain = skeleton("llama"), recipe()
    short = plain.model_copy(update={"attention": AttentionRecipe(weights="int4")})
    before, after = plan(model, plain), plan(model, short)
    names = ("q", "o")
    sizes = [
        shape
        for key, (_, shape) in model.tensors.items()
        if key.endswith(tuple(f"self_attn.{name}_proj.weight" for name in names))
    ]
    assert len(sizes) == 2 * model.config.num_hidden_layers
    assert after["disk_bytes"] - before["disk_bytes"] == 4 * sum(m * d for m, d in sizes)
    shapes = Shapes(model.model, model.layout, model.tensors, planned_hire(model, short))
    assert (
        fitted_shapes(shapes.hire["attention"], model.tensors) == sizes
        and fitted_attention(shapes)[1] > 0
    )
    work = [_attention_operations(model, found, short) for found in (before, after)]
    assert work[0] == 0 < work[1]
    odd = AttentionRecipe(weights="int4", block=48)
    notes = plan(model, plain.model_copy(update={"attention": odd}))["notes"]
    assert any("attention.block 48" in note for note in notes)


def test_fused_queries_keep_eight_bits() -> None:
    model = skeleton("phi3")
    short = recipe().model_copy(update={"attention": AttentionRecipe(weights="int4")})
    attention = planned_hire(model, short)["attention"]
    assert attention["matrices"] == {"self_attn.o_proj": 4, "self_attn.qkv_proj": 8}


def test_training_of_experts_plans_nothing() -> None:
    mixture = skeleton("mixtral", num_experts_per_tok=2)
    with_text, without = plan(mixture, tuned()), plan(mixture, recipe())
    assert "nothing is trained" in " ".join(with_text["notes"])
    assert with_text["disk_bytes"] == without["disk_bytes"]


@pytest.mark.parametrize("method", ["greedy", "evolution", "second_order"])
def test_a_budget_search_adds_memory_and_says_what_is_shown(method: str) -> None:
    sizes = {"vocab_size": 4000, "num_hidden_layers": 12, "hidden_size": 64}
    changes = {"data": DataRecipe(num_tokens=4096), "evaluate": EvaluateRecipe(num_tokens=0)}
    plain = recipe().model_copy(update=changes)
    assert plain.ffn is not None
    plans = []
    for num_tokens in (4096, 16384):
        budget = BudgetRecipe(method=method, num_tokens=num_tokens)
        ffn = plain.ffn.model_copy(update={"budget": budget})
        plans.append(plan(skeleton("llama", **sizes), plain.model_copy(update={"ffn": ffn})))
    first = plan(skeleton("llama", **sizes), plain)
    memory = [one["peak_memory_bytes"] for one in (first, *plans)]
    assert memory[0] < memory[1] < memory[2]
    assert memory[1] - memory[0] > 1e8  # dense probabilities of two texts, logits at once
    assert "budget search: shown with the shares it starts from" in plans[0]["notes"]
    assert plans[0]["layers"] == first["layers"]


def test_a_budget_search_of_experts_plans_nothing() -> None:
    mixture, plain = skeleton("mixtral", num_experts_per_tok=2), recipe()
    assert plain.ffn is not None
    ffn = plain.ffn.model_copy(update={"budget": BudgetRecipe(mode="search")})
    head = HeadRecipe(kind="lr", rank=8)  # takes statistics, as a search would
    plain = plain.model_copy(update={"head": head})
    searched = plan(mixture, plain.model_copy(update={"ffn": ffn}))
    assert searched["peak_memory_bytes"] == plan(mixture, plain)["peak_memory_bytes"]
    assert [note for note in searched["notes"] if "search" in note] == [
        "mixture of experts: nothing is searched (ffn.budget)"
    ]


# --------------------------------------------------------------------------- length of windows


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_windows_must_fit_learned_positions(family: str) -> None:
    positions = {"gpt2": "n_positions", "opt": "max_position_embeddings"}[family]
    model = skeleton(family, **{positions: 1024})
    plan(model, tuned(window=1024))
    for wanted in (tuned(window=1025), recipe().model_copy(update={"data": LONG})):
        with pytest.raises(UsageError, match="1025 tokens, but the model has learned only 1024"):
            plan(model, wanted)
    headless = Recipe(name="test", head=HeadRecipe(), data=LONG)
    plan(model, headless)  # reads no text
    plan(skeleton("llama", max_position_embeddings=1024), tuned(window=1025))


LONG = DataRecipe(num_tokens=4096, num_held_tokens=4096, window=1025)
