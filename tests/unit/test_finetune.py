"""The losses against their plain forms, the student's mask against the runtime's, and training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import NemotronConfig, NemotronForCausalLM

from hireconvert.distill import distill_layer
from hireconvert.errors import InputError
from hireconvert.families import find_layout, num_layers
from hireconvert.finetune import CHECKPOINT, PREDICTORS, finetune
from hireconvert.measures import hire_layers, hire_scope
from hireconvert.objectives import LogitsLoss, feature_loss
from hireconvert.schema import FfnRecipe, FinetuneLossRecipe, FinetuneRecipe, PredictorRecipe
from hireconvert.student import Selection, selecting, trained_weights
from tests.tiny import FAMILIES, hire_model, tiny_model, tokens

FFN = FfnRecipe(keep_fraction=0.25, over_select=1.5)


def recipe(**changes: Any) -> FinetuneRecipe:
    settings: dict[str, Any] = {"window": 16, "step_windows": 2, "learning_rate": 3e-3}
    return FinetuneRecipe(**{**settings, "checkpoint_steps": 2, "anneal": 0.0, **changes})


def train(folder: Path | None = None, *, steps: int = 6, **changes: Any) -> tuple[Any, Any]:
    """(model, report) of a short run on random tokens, the same ones every time."""
    model = tiny_model("llama")
    layout = find_layout(model)

    report = finetune(
        model,
        layout,
        tokens(2 * steps, 16),
        recipe=recipe(**changes),
        ffn=FFN,
        seed=3,
        checkpoint=folder,
        fit=_fit,
    )
    return model, report


def equal(one: Any, other: Any) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# --------------------------------------------------------------------------- losses


def test_the_chunked_loss_is_the_plain_one_and_so_is_its_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hireconvert.objectives.LOGITS_AT_ONCE", 20 * 3)  # three rows at a time
    torch.manual_seed(0)
    head_VD, teacher_ND = torch.randn(20, 8), torch.randn(11, 8)
    hidden_ND, target_N = torch.randn(11, 8, requires_grad=True), torch.arange(11)

    def head(x_ND: torch.Tensor) -> torch.Tensor:
        return x_ND @ head_VD.T

    loss = LogitsLoss(head, head, teacher_ND, target_N, kl=0.7, lm=0.2, vocabulary=20)
    assert len(loss.chunks) == 4
    found = loss.mean(hidden_ND)
    (2.5 * found).backward()
    got, hidden_ND.grad = hidden_ND.grad, None
    student, teacher = head(hidden_ND).log_softmax(-1), head(teacher_ND).log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    plain = 0.7 * kl - 0.2 * student.gather(1, target_N[:, None]).mean()
    (2.5 * plain).backward()
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(got, hidden_ND.grad)


def test_feature_loss_is_relative_and_leaves_attention_sinks_out() -> None:
    torch.manual_seed(0)
    theirs = torch.randn(8, 4)
    assert float(feature_loss([theirs * 1.1], [theirs])) == pytest.approx(0.01, rel=1e-4)
    assert float(feature_loss([theirs * 110], [theirs * 100])) == pytest.approx(0.01, rel=1e-4)
    sink, wrong = theirs.clone(), theirs.clone() * 1.1
    sink[0], wrong[0] = 1e4, -1e4
    found = float(feature_loss([wrong], [sink]))
    assert found == pytest.approx(0.01, rel=1e-3)


# --------------------------------------------------------------------------- the student


@pytest.mark.parametrize("family", FAMILIES)
def test_the_students_mask_is_that_of_the_runtime_where_all_are_candidates(family: str) -> None:
    native = tiny_model(family)
    settings: dict[str, Any] = {"keep_fraction": 0.25, "over_select": 4.0}
    model = hire_model(native, ffn=settings)
    ids = tokens(1, 24)
    with hire_scope(model, "all"), torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    counts = [layer.spec for layer in hire_layers(model).values()]
    with (
        selecting(native, find_layout(native), counts, Selection(0.25, 24)) as student,
        torch.no_grad(),
    ):
        found = native(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert student.kept_share() == pytest.approx(0.25)
    with torch.no_grad():
        dense = native(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(dense, found, atol=1e-2)  # and selection did change something


GROUPED = {"group_size": 4, "common_path": 0.125}


@pytest.mark.parametrize("keep", ["top_k", "candidates"])
@pytest.mark.parametrize(
    "changes",
    [GROUPED, {"predictor": {"soften": True}}, {"selection": "threshold"}],
    ids=["grouped", "softened", "threshold"],
)
def test_predictors_select_as_the_runtime_does(keep: str, changes: dict[str, Any]) -> None:
    settings = {"keep_fraction": 0.5, "over_select": 1.25, "keep": keep, **changes}
    model = hire_model(tiny_model("llama"), ffn=settings)
    plain = tiny_model("llama")
    plain.load_state_dict(model.state_dict())  # neurons in the converted order
    ids = tokens(1, 24)
    with hire_scope(model, "all"), torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    layers = hire_layers(model)
    counts = [layer.spec for layer in layers.values()]
    with (
        selecting(plain, find_layout(plain), counts, Selection(0.1, 24)) as student,
        torch.no_grad(),
    ):
        for mine, theirs in zip(student.layers, layers.values(), strict=True):
            mine.predictor = theirs.prepared.predictor
        found = plain(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_dense_prefix_of_every_window_runs_dense_and_the_share_is_annealed() -> None:
    model = tiny_model("llama")
    ids = tokens(2, 16)
    counts = [{**FFN_COUNTS}] * num_layers(model)
    selection = Selection(0.75, 16, progress=0.0, dense_prefix=5)
    with torch.no_grad(), selecting(model, find_layout(model), counts, selection) as student:
        selected = model(input_ids=ids, use_cache=False).logits
        assert student.kept_share() == pytest.approx((5 + 11 * 0.75) / 16)
        selection.progress, selection.dense_prefix = 0.5, 0
        model(input_ids=ids, use_cache=False)
        assert student.kept_share() == pytest.approx(0.5)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(selected[:, :5], dense[:, :5])
    assert not torch.allclose(selected[:, 5:], dense[:, 5:], atol=1e-2)


FFN_COUNTS: dict[str, Any] = {
    "num_neurons": 96,
    "num_kept": 24,
    "num_candidates": 36,
    "group_size": 1,
    "num_common": 0,
    "score": "norm",
    "keep": "top_k",
}


# --------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "loss",
    [{"kl": 1.0}, {"kl": 0.0, "features": 1.0}, {"kl": 0.0, "lm": 1.0}, {"features": 0.5}],
)
def test_training_lowers_the_loss_it_minimises(loss: dict[str, float]) -> None:
    """The same windows come again, so that a falling loss means what it says."""
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    report = finetune(
        model,
        find_layout(model),
        tokens(2, 16).repeat(20, 1),
        recipe=recipe(loss=FinetuneLossRecipe(**loss), learning_rate=1e-3),
        ffn=FFN,
        seed=0,
    )
    assert report["steps"] == 20
    assert report["kept_share_mean"] == pytest.approx(0.25)
    assert report["losses"][-1] < 0.9 * report["losses"][0]
    assert torch.equal(before.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(
        before.model.layers[0].self_attn.q_proj.weight,
        model.model.layers[0].self_attn.q_proj.weight,
    )
    assert not torch.equal(
        before.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask": "oracle_then_predicted"},
        {"mask": "predicted", "dense_prefix": 0.5},
        {"lora_rank": 4, "anneal": 0.5},
        {"parameters": "all_but_embeddings"},
        {"precision": "bfloat16"},
        {"loss": FinetuneLossRecipe(kl=0.0, features=1.0)},  # reaches no last norm
    ],
    ids=str,
)
def test_a_continued_run_gives_the_weights_of_one_that_was_never_stopped(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    whole, report = train(**changes)
    for stop in (3, 5):  # the last checkpoints then hold steps 2 and 4

        class Killed(Exception):
            pass

        def kill(step: int, _steps: int, _message: str, stop: int = stop) -> None:
            if step == stop:
                raise Killed

        model = tiny_model("llama")
        with pytest.raises(Killed):
            finetune(
                model,
                find_layout(model),
                tokens(12, 16),
                recipe=recipe(**changes),
                ffn=FFN,
                seed=3,
                checkpoint=tmp_path,
                fit=_fit,
                progress=kill,
            )
        assert (tmp_path / CHECKPOINT).exists()
    again, resumed = train(tmp_path, **changes)
    assert equal(whole, again)
    assert report["losses"] == resumed["losses"]
    assert (tmp_path / PREDICTORS).exists() == ("predicted" in changes.get("mask", ""))
    assert {name for name, _ in again.named_parameters()} == {
        name for name, _ in tiny_model("llama").named_parameters()
    }


@pytest.mark.parametrize("changes", [{"dense_prefix": 0.9}, {"anneal": 1.0}], ids=str)
def test_a_run_killed_while_predictors_are_fitted_continues_to_the_same_weights(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint holds the very step from which predictors select."""
    changes |= {"mask": "oracle_then_predicted", "checkpoint_steps": 3}
    whole, _ = train(**changes)

    class Killed(Exception):
        pass

    def kill(*_args: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setitem(globals(), "_fit", kill)
        train(tmp_path, **changes)
    assert (tmp_path / CHECKPOINT).exists() and not (tmp_path / PREDICTORS).exists()
    assert equal(whole, train(tmp_path, **changes)[0])


def _fit(index: int, weights: Any, fit_ND: Any, held_ND: Any) -> tuple[Any, Any]:
    predictor = PredictorRecipe(bits=4, block=16)
    result = distill_layer(weights, fit_ND, held_ND, FFN, predictor, 0.25, seed=index)
    return result.spec, result.tensors


def test_what_is_trained_follows_the_recipe() -> None:
    ffn, _ = train(parameters="ffn")
    norms, _ = train(parameters="ffn_and_norms")
    native = tiny_model("llama")
    assert torch.equal(ffn.model.norm.weight, native.model.norm.weight)
    assert not torch.equal(norms.model.norm.weight, native.model.norm.weight)
    both, report = train(parameters="all_but_embeddings")
    q_proj = both.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(q_proj, native.model.layers[0].self_attn.q_proj.weight)
    assert torch.equal(both.model.embed_tokens.weight, native.model.embed_tokens.weight)
    embedding = native.model.embed_tokens.weight.numel()
    assert report["num_trained"] == sum(p.numel() for p in native.parameters()) - embedding


@pytest.mark.parametrize("family", ["llama_bias", "opt", "gpt2"])
def test_all_but_embeddings_leaves_out_the_head_and_learned_positions(family: str) -> None:
    model = tiny_model(family)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = trained_weights(model, find_layout(model), "all_but_embeddings")
    trained = {names[id(getattr(module, name))] for module, name in weights}
    left = {name for name in names.values() if name not in trained}
    assert left == {
        name
        for name in names.values()
        if any(part in name for part in ("embed_", "wte", "wpe", "lm_head"))
    }


def test_every_kind_of_norm_is_found() -> None:
    config = NemotronConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = NemotronForCausalLM(config).eval()
    weights = trained_weights(model, find_layout(model), "ffn_and_norms")
    kinds = {type(module).__name__ for module, _ in weights}
    assert kinds == {"Linear", "NemotronLayerNorm1P"}


def test_logits_that_are_not_the_heads_are_refused_before_training() -> None:
    model = tiny_model("llama")
    forward = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    with pytest.raises(InputError, match="its logits are not its head's output"):
        finetune(model, find_layout(model), tokens(4, 16), recipe=recipe(), ffn=FFN, seed=0)


def test_the_seed_of_a_run_decides_its_weights() -> None:
    assert equal(train(dense_prefix=0.5)[0], train(dense_prefix=0.5)[0])
