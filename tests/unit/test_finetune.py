"""The losses against their plain forms, the student's mask against the runtime's, and training."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from transformers import NemotronConfig, NemotronForCausalLM

from hireconvert.distill import distill_layer
from hireconvert.errors import InputError
from hireconvert.families import ffn_parts, find_layout, layer_owner, num_layers
from hireconvert.finetune import CHECKPOINT, PREDICTORS, Fit, finetune
from hireconvert.lowbit import LiveCopies, live_copies
from hireconvert.masked import MaskedModel
from hireconvert.measures import hire_layers, hire_scope
from hireconvert.objectives import LogitsLoss, feature_loss
from hireconvert.schema import (
    FfnRecipe,
    FinetuneLossRecipe,
    FinetuneRecipe,
    PredictorRecipe,
    UnselectedRecipe,
)
from hireconvert.scoring import layer_counts
from hireconvert.student import Selection, selecting, trained_weights
from tests.tiny import FAMILIES, NEURONS, hire_model, tiny_model, tokens

FFN = FfnRecipe(keep_fraction=0.25, over_select=1.5)
FORMS: dict[str, Any] = {
    "unselected": UnselectedRecipe(bits=4, block=16),
    "predictor": PredictorRecipe(bits=3, block=16),
}
BY_ESTIMATE = FFN.model_copy(update=FORMS)


def recipe(**changes: Any) -> FinetuneRecipe:
    settings: dict[str, Any] = {"window": 16, "step_windows": 2, "learning_rate": 3e-3}
    return FinetuneRecipe(**{**settings, "checkpoint_steps": 2, "anneal": 0.0, **changes})


def train(
    folder: Path | None = None, *, steps: int = 6, ffn: FfnRecipe = FFN, **changes: Any
) -> tuple[Any, Any]:
    """(model, report) of a short run on random tokens, the same ones every time."""
    model = tiny_model("llama")
    layout = find_layout(model)

    report = finetune(
        model,
        layout,
        tokens(2 * steps, 16),
        recipe=recipe(**changes),
        ffn=ffn,
        seed=3,
        checkpoint=folder,
        fit=fitting(ffn),
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


# --------------------------------------------------------------------------- the rest by estimate

GROUPS = {"group_size": 4, "common_path": 0.125}
KEPT = 0.25


def twin_ffn(
    parts: Any, copies: LiveCopies, counts: dict[str, Any], x: torch.Tensor, prefix: int
) -> torch.Tensor:
    """One FFN in plain arithmetic: neurons left out count by copies, with the dense gradients."""
    up, gate = parts.up, parts.gate
    h = linear(x, up.weight_out_in(), up.bias())
    h = (
        parts.act(h)
        if gate is None
        else parts.act(linear(x, gate.weight_out_in(), gate.bias())) * h
    )
    common, group, live_FD = counts["num_common"], counts["group_size"], parts.down_FD()
    size = (h.detach() * live_FD.detach().norm(dim=1)).abs()[..., common:]
    unit = size.unflatten(-1, (-1, group)).square().sum(-1)

    def best(num: int) -> torch.Tensor:
        place = unit.topk((num - common) // group, dim=-1).indices
        chosen = torch.zeros_like(unit).scatter(-1, place, 1.0).repeat_interleave(group, -1)
        chosen = torch.cat([torch.ones_like(h[..., :common]), chosen], dim=-1)
        chosen[:, :prefix] = 1.0
        return chosen

    kept, named = best(counts["num_kept"]), best(counts["num_candidates"])
    value = torch.where(named > 0, h, copies.estimated(x.detach())[0])
    value = h + (value - h).detach()
    assert copies.down_FD is not None
    copy_FD = live_FD + (copies.down_FD - live_FD).detach()
    y = (h * kept) @ live_FD + (value * (1 - kept)) @ copy_FD
    bias = parts.down.bias()
    return y if bias is None else y + bias


@pytest.mark.parametrize("changes", [{}, GROUPS], ids=["neurons", "groups"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "llama_bias"])
def test_the_rest_counts_by_copies_with_the_gradients_of_the_dense_model(
    family: str, changes: dict[str, Any]
) -> None:
    ids, found, layout = tokens(2, 12), {}, find_layout(tiny_model(family))
    ffn = BY_ESTIMATE.model_copy(update=changes)
    counts = layer_counts(NEURONS, ffn, KEPT)
    weight_LV = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    for name in ("student", "twin"):
        model = tiny_model(family)
        copies = live_copies(model, layout, ffn)
        specs = [counts] * num_layers(model)
        with contextlib.ExitStack() as stack:
            if name == "student":
                selection = Selection(KEPT, 12, dense_prefix=3)
                stack.enter_context(selecting(model, layout, specs, selection, copies=copies))
            else:
                for index, own in enumerate(copies):
                    parts = ffn_parts(model, layout, index)
                    forward = functools.partial(twin_ffn, parts, own, counts, prefix=3)
                    stack.enter_context(replaced(layer_owner(model, layout, index), forward))
            logits = model(input_ids=ids, use_cache=False).logits
            (logits.flatten(0, 1) * weight_LV).sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found[name] = logits.detach(), gradients
    torch.testing.assert_close(*(found[name][0] for name in found), rtol=1e-4, atol=1e-4)
    student, twin = (gradients for _, gradients in found.values())
    assert student.keys() == twin.keys() and len(student) > 10
    for key, gradient in student.items():
        largest = float(twin[key].abs().max())
        torch.testing.assert_close(gradient, twin[key], rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("over", [1.0, 1.5])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_before_its_predictors_the_student_names_those_expected_to_be_off(
    family: str, over: float
) -> None:
    """As the simulation of a search does, with the same copies."""
    model, ids, layout = tiny_model(family), tokens(1, 24), find_layout(tiny_model(family))
    ffn = BY_ESTIMATE.model_copy(update={"score": "error", "over_select": over})
    counts, copies = layer_counts(NEURONS, ffn, KEPT), live_copies(model, layout, ffn)
    active = (counts["num_kept"],) * num_layers(model)
    specs = [counts] * num_layers(model)
    with (
        torch.no_grad(),
        selecting(model, layout, specs, Selection(KEPT, 24), copies=copies) as student,
    ):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    assert student.kept_share() == pytest.approx(counts["num_kept"] / NEURONS)
    kl = {}
    for score in ("error", "norm"):
        by_size = live_copies(model, layout, ffn.model_copy(update={"score": "norm"}))
        own = copies if score == "error" else by_size
        with MaskedModel(model, layout, ids, score=score, copies=own) as masked:
            kl[score] = masked.measure(active)[0].kl
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    found = float((dense.exp() * (dense - logits)).sum(-1).mean())
    assert found == pytest.approx(kl["error"], rel=1e-3)
    assert found != pytest.approx(kl["norm"], rel=1e-2)


@pytest.mark.parametrize("rule", ["threshold", "relative"])
@pytest.mark.parametrize("by", ["copies", "scores"])
def test_before_its_predictors_the_student_goes_by_a_level_of_the_rows_at_hand(
    rule: str, by: str
) -> None:
    model, ids = tiny_model("gemma3_text"), tokens(3, 24)
    layout, last = find_layout(model), num_layers(model) - 1
    changes: dict[str, Any] = {"score": "error" if by == "copies" else "norm", "selection": rule}
    if by == "scores":
        changes["unselected"] = None
    ffn = BY_ESTIMATE.model_copy(update={**changes, "keep": "candidates", "over_select": 20.0})
    counts = layer_counts(NEURONS, ffn, KEPT)
    copies = live_copies(model, layout, ffn) if by == "copies" else ()
    part, found = ffn_parts(model, layout, last), {}

    def note(name: str) -> Any:
        return lambda _module, args: found.update({name: args[0].detach().flatten(0, -2).float()})

    hooks = [
        part.up.module.register_forward_pre_hook(note("x_ND")),
        part.down.module.register_forward_pre_hook(note("h_NF")),
    ]
    with (
        torch.no_grad(),
        selecting(model, layout, [counts] * (last + 1), Selection(KEPT, 24), copies=copies) as own,
    ):
        # The hook noted before the student's own sees the dense hidden values.
        model(input_ids=ids, use_cache=False)
        share, norm_F = own.kept_share(), part.down_FD().norm(dim=1)
        size_NF = score_NF = found["h_NF"].abs() * norm_F
        if copies:
            value_NF, error_NF = copies[last].estimated(found["x_ND"])
            assert error_NF is not None
            size_NF, score_NF = value_NF.abs() * norm_F, error_NF * norm_F
        if rule == "relative":
            score_NF = score_NF / size_NF.norm(dim=1, keepdim=True)
        student = own.layers[last]
        named_NF = student._estimated()[0] if copies else student._named(*2 * [found["h_NF"]])
        assert named_NF is not None
        mask_NF, candidate_NF = student._masks(found["h_NF"].abs() * norm_F, named_NF)
    for hook in hooks:
        hook.remove()
    number = counts["num_kept"] * len(score_NF)
    level = score_NF.flatten().sort(descending=True).values[number - 1]
    assert torch.equal(mask_NF, score_NF >= level) and mask_NF is candidate_NF
    assert len(set(mask_NF.sum(1).tolist())) > 3
    assert share == pytest.approx(counts["num_kept"] / NEURONS)


@contextlib.contextmanager
def replaced(module: Any, forward: Any) -> Iterator[None]:
    module.forward = forward
    yield
    del module.forward


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_rest_brings_the_student_back_to_the_dense_model(family: str) -> None:
    """And follows weights that move: the copies at `refresh`, the exact part at once."""
    model, ids = tiny_model(family), tokens(2, 12)
    layout, counts, far = find_layout(model), layer_counts(NEURONS, BY_ESTIMATE, KEPT), []
    specs = [counts] * num_layers(model)
    fine = {"unselected": UnselectedRecipe(bits=8, block=16), "predictor": PredictorRecipe(bits=8)}
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        for changes in ({}, fine):
            copies = live_copies(model, layout, FFN.model_copy(update={**FORMS, **changes}))
            with selecting(model, layout, specs, Selection(KEPT, 12), copies=copies):
                far.append(_distance(model(input_ids=ids, use_cache=False).logits, dense))
        with selecting(model, layout, specs, Selection(KEPT, 12), copies=copies) as student:
            for index in range(num_layers(model)):
                for part in ffn_parts(model, layout, index).matrices():
                    part.weight_out_in().mul_(0.8)
            stale = model(input_ids=ids, use_cache=False).logits
            for layer in student.layers:
                layer.refresh()
            fresh = model(input_ids=ids, use_cache=False).logits
        moved = model(input_ids=ids, use_cache=False).logits
        without = {key: value for key, value in counts.items() if key != "unselected"}
        with selecting(model, layout, [without] * len(specs), Selection(KEPT, 12)):
            far.append(_distance(model(input_ids=ids, use_cache=False).logits, moved))
    assert far[1] < 0.1 * far[0] < 0.1 * far[2]
    assert _distance(fresh, moved) < 0.2 * _distance(stale, moved)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm())


@pytest.mark.parametrize("keep", ["top_k", "candidates"])
@pytest.mark.parametrize(
    "changes", [{}, GROUPS, {"selection": "threshold"}], ids=["fixed", "groups", "threshold"]
)
def test_predictors_estimate_the_rest_as_the_runtime_does(
    keep: str, changes: dict[str, Any]
) -> None:
    settings = {"keep_fraction": 0.375, "over_select": 1.25, "keep": keep, **FORMS, **changes}
    settings["predictor"] = {"bits": 3, "block": 16}
    model, plain, ids = hire_model(tiny_model("llama"), ffn=settings), tiny_model("llama"), None
    plain.load_state_dict(model.state_dict())  # neurons in the converted order
    ids = tokens(1, 24)
    with hire_scope(model, "all"), torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    layers, layout = hire_layers(model), find_layout(plain)
    counts = [layer.spec for layer in layers.values()]
    copies = live_copies(plain, layout, BY_ESTIMATE)
    with selecting(plain, layout, counts, Selection(0.1, 24), copies=copies) as student:
        for mine, theirs in zip(student.layers, layers.values(), strict=True):
            mine.predict_by(theirs.widened().predictor, theirs.spec)
            mine.refresh()
        with torch.no_grad():
            found = plain(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
            mine.predictor = theirs.widened().predictor
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
    ("loss", "ffn"),
    [
        ({"kl": 1.0}, FFN),
        ({"kl": 0.0, "features": 1.0}, FFN),
        ({"kl": 0.0, "lm": 1.0}, FFN),
        ({"features": 0.5}, FFN),
        ({"kl": 1.0}, BY_ESTIMATE),
    ],
    ids=["kl", "features", "lm", "kl+features", "kl, the rest by estimate"],
)
def test_training_lowers_the_loss_it_minimises(loss: dict[str, float], ffn: FfnRecipe) -> None:
    """The same windows come again, so that a falling loss means what it says."""
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    report = finetune(
        model,
        find_layout(model),
        tokens(2, 16).repeat(20, 1),
        recipe=recipe(loss=FinetuneLossRecipe(**loss), learning_rate=1e-3),
        ffn=ffn,
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_that_diverges_stops(precision: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    diverging = recipe(learning_rate=1e30, checkpoint_steps=100, precision=precision)
    with pytest.raises(InputError, match=r"diverged: .* step 2 of 20 and was .* \(now 1e\+30\)"):
        finetune(
            model,
            find_layout(model),
            tokens(2, 16).repeat(20, 1),
            recipe=diverging,
            ffn=FFN,
            seed=0,
            checkpoint=tmp_path,
        )
    assert not list(tmp_path.iterdir())


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
        {"ffn": BY_ESTIMATE},
        {"ffn": BY_ESTIMATE, "lora_rank": 4, "precision": "bfloat16", "dense_prefix": 0.5},
        {"ffn": BY_ESTIMATE, "mask": "oracle_then_predicted"},
    ],
    ids=lambda changes: str({**changes, "ffn": "by estimate"} if "ffn" in changes else changes),
)
def test_a_continued_run_gives_the_weights_of_one_that_was_never_stopped(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    whole, report = train(**changes)
    ffn = changes.get("ffn", FFN)
    settings = recipe(**{key: value for key, value in changes.items() if key != "ffn"})
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
                recipe=settings,
                ffn=ffn,
                seed=3,
                checkpoint=tmp_path,
                fit=fitting(ffn),
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

    def kill(*_args: Any, **_options: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setitem(globals(), "distill_layer", kill)
        train(tmp_path, **changes)
    assert (tmp_path / CHECKPOINT).exists() and not (tmp_path / PREDICTORS).exists()
    assert equal(whole, train(tmp_path, **changes)[0])


def fitting(ffn: FfnRecipe) -> Fit:
    def fit(index: int, weights: Any, fit_ND: Any, held_ND: Any) -> tuple[Any, Any]:
        predictor = PredictorRecipe(bits=4, block=16)
        result = distill_layer(weights, fit_ND, held_ND, ffn, predictor, 0.25, seed=index)
        return result.spec, result.tensors

    return fit


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
