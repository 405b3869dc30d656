"""Evaluation on tiny models: figures checked by hand, and figures that must get worse."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hireconvert import evaluate, families, measures
from hireconvert.data import EvalWindows
from hireconvert.errors import InputError
from hireconvert.evaluate import evaluate_model
from hireconvert.runtime import modeling_hire
from tests.tiny import head_spec

WIDTH, NEURONS, VOCABULARY, LENGTH = 32, 96, 160, 40
HEAD = head_spec()


def layer_spec(**changes: Any) -> dict[str, Any]:
    predictor = {
        "kind": "lr",
        "rank": WIDTH,
        "factor_bits": 16,
        "num_inputs": WIDTH,
        "groups": False,
        "bits": None,
        "block": None,
        "symmetric": True,
    }
    spec = {
        "num_neurons": NEURONS,
        "num_kept": 48,
        "num_candidates": 60,
        "group_size": 1,
        "num_common": 0,
        "score": "norm",
        "keep": "top_k",
        "predictor": predictor,
    }
    return {**spec, **changes}


def dense_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:  # loud enough that the FFN decides the prediction
                weight.mul_(1.0 if "embed" in name else 12.0)
    return model


def hire_model(
    dense: LlamaForCausalLM, layer: dict[str, Any] | None, head: dict[str, Any] | None
) -> Any:
    """A HiRE twin whose rank is full, so that its predictor is exact up to float16."""
    layout = families.find_layout(dense)
    config = copy.deepcopy(dense.config)
    config.hire = {
        "format_version": 1,
        "layout": layout,
        "ffn": None if layer is None else {"layers": [copy.deepcopy(layer) for _ in range(2)]},
        "head": head,
        "max_decode_queries": 32,
        "max_sparse_rows": 8,
    }
    model = modeling_hire.HireLlamaForCausalLM(config).eval()
    model.load_state_dict(dense.state_dict())
    model.tie_weights()
    for index, sparse in model.model.hire_layers.items():
        weights = families.read_ffn_weights(dense, layout, index)
        assert weights.gate_FD is not None
        sparse.predictor_tensors = {
            "mean": torch.zeros(WIDTH),
            "bias": torch.zeros(2 * NEURONS),
            "factor_in": torch.eye(WIDTH).half(),
            "factor_out": torch.cat([weights.gate_FD, weights.up_FD]).half(),
        }
    return model


def windows(num: int = 3) -> EvalWindows:
    generator = torch.Generator().manual_seed(1)
    ids_WT = torch.randint(0, VOCABULARY, (num, LENGTH), generator=generator)
    return EvalWindows(ids_WT, num * (LENGTH - 1), "0" * 64)


def shuffle_predictor(model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    for layer in model.model.hire_layers.values():
        order = torch.randperm(NEURONS, generator=generator)
        factor = layer.predictor_tensors["factor_out"]
        layer.predictor_tensors["factor_out"] = factor[torch.cat([order, order + NEURONS])]


def perplexity(model: PreTrainedModel, ids_WT: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=ids_WT).logits[:, :-1].flatten(0, 1).double()
    return math.exp(F.cross_entropy(logits, ids_WT[:, 1:].flatten()))


def test_dense_view_is_the_dense_model() -> None:
    dense = dense_model()
    report = evaluate_model(hire_model(dense, layer_spec(), None), dense, windows())
    expected = perplexity(dense, windows().ids_WT)
    assert report.dense.perplexity == pytest.approx(expected, rel=1e-5)
    assert report.baseline_perplexity == pytest.approx(expected, rel=1e-5)
    assert report.dense.top1_agreement == 1.0
    assert report.dense.kl_mean < 1e-8
    assert report.num_scored == len(report.dense.nll_N) == 3 * (LENGTH - 1)


def test_all_view_equals_the_model_in_scope_all() -> None:
    model = hire_model(dense_model(), layer_spec(), None)
    report = evaluate_model(model, None, windows(), dense_prefix=8)
    assert report.all is not None and report.all_prefix is not None
    for view, prefix in ((report.all, 0), (report.all_prefix, 8)):
        model.set_hire_scope("all", dense_prefix=prefix)
        assert view.perplexity == pytest.approx(perplexity(model, windows().ids_WT), rel=1e-5)
    assert report.all.perplexity != report.all_prefix.perplexity != report.dense.perplexity
    assert report.worst.perplexity == max(report.all.perplexity, report.all_prefix.perplexity)


def test_kl_and_agreement_against_another_baseline() -> None:
    dense, other = dense_model(), dense_model(seed=5)
    report = evaluate_model(hire_model(dense, layer_spec(), None), other, windows())
    ids_WT = windows().ids_WT
    with torch.no_grad():
        p, q = (
            m(input_ids=ids_WT).logits[:, :-1].flatten(0, 1).log_softmax(-1) for m in (other, dense)
        )
    kl_N = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert report.dense.kl_mean == pytest.approx(float(kl_N.mean()), rel=1e-4)
    assert report.dense.kl_p99 == pytest.approx(float(kl_N.max()), rel=0.3)
    agreement = float((p.argmax(-1) == q.argmax(-1)).float().mean())
    assert report.dense.top1_agreement == pytest.approx(agreement)


def test_recall_and_kept_fraction() -> None:
    model = hire_model(dense_model(), layer_spec(), None)
    exact = evaluate_model(model, None, windows()).selection
    assert exact is not None
    assert exact.recall_mean > 0.999 and exact.recall_worst > 0.998
    assert exact.kept_mean == exact.kept_worst == 0.5
    shuffle_predictor(model)
    for layer in model.model.hire_layers.values():
        layer.prepared = None
    shuffled = evaluate_model(model, None, windows()).selection
    assert shuffled is not None
    # A random 60 of 96 hold 62 % of any top k.
    assert shuffled.recall_mean == pytest.approx(60 / 96, abs=0.1)


def test_layers_and_the_recall_curve_agree_with_the_means() -> None:
    model = hire_model(dense_model(), layer_spec(), None)
    shuffle_predictor(model)
    found = evaluate_model(model, None, windows()).selection
    assert found is not None and [each.layer for each in found.layers] == [0, 1]
    assert found.recall_mean == pytest.approx(sum(each.recall for each in found.layers) / 2)
    assert {each.kept for each in found.layers} == {0.5}
    curve = {point.over_select: point for point in found.recall_curve}
    # At twice as many candidates as are kept every neuron is one.
    assert curve[2.0].recall_mean == curve[2.0].recall_worst == 1.0
    means = [point.recall_mean for point in found.recall_curve]
    assert means == sorted(means) and means[0] == pytest.approx(0.5, abs=0.1)


def test_a_layer_that_was_left_dense_counts_in_full() -> None:
    model = hire_model(dense_model(), layer_spec(), None)
    whole = evaluate_model(model, None, windows()).selection
    dense = dense_model()
    half = hire_model(dense, layer_spec(), None)
    half.config.hire["ffn"]["layers"][0] = None
    half = type(half)(half.config).eval()
    half.load_state_dict(dense.state_dict())
    half.tie_weights()
    half.model.hire_layers[1].predictor_tensors = model.model.hire_layers[1].predictor_tensors
    part = evaluate_model(half, None, windows()).selection
    assert whole is not None and part is not None
    assert (whole.kept_overall, part.kept_overall) == (0.5, 0.75)
    assert part.kept_mean == 0.5


def test_known_hidden_states_of_a_baseline_change_no_figure() -> None:
    model, other = hire_model(dense_model(), layer_spec(), None), dense_model(seed=5)
    with torch.no_grad():
        hidden_ND = evaluate.hidden_states(other, windows().ids_WT)
    seen: list[tuple[int, int]] = []
    known = evaluate_model(
        model,
        other,
        windows(),
        baseline_hidden_ND=hidden_ND,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert known == evaluate_model(model, other, windows())
    assert seen[-1][0] == seen[-1][1]


def test_recall_counts_groups_and_not_their_members() -> None:
    spec = layer_spec(group_size=4, num_common=8, num_kept=48, num_candidates=60)
    report = evaluate_model(hire_model(dense_model(), spec, None), None, windows())
    assert report.selection is not None
    assert report.selection.recall_mean > 0.999


def test_a_shuffled_predictor_is_visibly_worse() -> None:
    model = hire_model(dense_model(), layer_spec(), None)
    good = evaluate_model(model, None, windows())
    shuffle_predictor(model)
    for layer in model.model.hire_layers.values():
        layer.prepared = None
    bad = evaluate_model(model, None, windows())
    assert good.all is not None and bad.all is not None
    assert bad.all.kl_mean > 2 * good.all.kl_mean
    assert bad.all.top1_agreement < good.all.top1_agreement
    assert bad.dense.nll_N.equal(good.dense.nll_N)


def test_a_sparse_path_that_does_not_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hire_model(dense_model(), layer_spec(), None)
    monkeypatch.setattr(type(model.model), "_hire_decide", lambda self, shape, cache: None)
    with pytest.raises(RuntimeError, match="sparse path did not run"):
        evaluate_model(model, None, windows())


def test_a_sparse_head_that_does_not_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hire_model(dense_model(), None, HEAD)
    monkeypatch.setattr(model.hire_state, "head_mode", "dense")
    with pytest.raises(RuntimeError, match="sparse path did not run"):
        evaluate_model(model, None, windows())


def test_head_figures() -> None:
    report = evaluate_model(hire_model(dense_model(), None, HEAD), None, windows())
    assert report.all is None and report.all_prefix is None and report.selection is None
    assert report.worst is report.dense
    head = report.head
    assert head is not None and head.certified and head.num_positions == 3 * (LENGTH - 1)
    assert head.top1_agreement_reference == 1.0
    assert head.kl_mean is not None and head.kl_mean < 1e-2
    assert 4 <= head.rescored_median <= head.rescored_p99 <= head.rescored_max < VOCABULARY


def test_a_head_that_estimates_badly_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIRE_NATIVE", "off")
    model = hire_model(dense_model(), None, {**HEAD, "certified": False, "num_candidates": 2})
    good = evaluate_model(model, None, windows()).head
    sparse = model.lm_head.hire
    assert sparse.prepared is not None
    sparse.prepared.scale_V = sparse.prepared.scale_V.roll(1) * -1
    bad = evaluate_model(model, None, windows()).head
    assert good is not None and bad is not None
    assert good.top1_agreement > 0.95 > 0.5 > bad.top1_agreement
    assert bad.top1_agreement_reference < 0.5
    assert good.rescored_max == 2


def test_infinite_logits_have_no_divergence() -> None:
    model = hire_model(dense_model(), None, {**HEAD, "certified": False, "unselected": "-inf"})
    head = evaluate_model(model, None, windows()).head
    assert head is not None and head.kl_mean is None


def test_soft_capping_is_part_of_the_logits() -> None:
    dense = dense_model()
    dense.config.final_logit_softcapping = 3.0
    x = torch.tensor([[-10.0, 1.0, 10.0]])
    capped = measures.scale_and_cap(dense, x)
    assert torch.allclose(capped, torch.tanh(x / 3) * 3)


def test_unknown_treatment_of_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hire_model(dense_model(), layer_spec(), None)
    model.config.logit_scale = 0.5  # stands for a model whose forward does something else
    with pytest.raises(InputError, match="cannot be evaluated"):
        evaluate_model(model, None, windows())


def test_a_row_with_nan_is_counted() -> None:
    model = hire_model(dense_model(), layer_spec(), None)
    model.hire_prepare()
    layer = model.model.hire_layers[1]
    forward = layer.estimated
    layer.estimated = lambda x: (forward(x)[0].index_fill(0, torch.tensor([0]), math.nan), None)
    report = evaluate_model(model, None, windows(), dense_prefix=8)
    assert report.all is not None and report.all_prefix is not None
    assert report.all.nonfinite_rows == 3
    assert report.all_prefix.nonfinite_rows == 0  # the row runs dense anyway


def test_a_layer_that_is_nan_in_every_row_is_the_models_fault() -> None:
    model = hire_model(dense_model(), layer_spec(), None)
    model.model.hire_layers[1].predictor_tensors["bias"].fill_(3e38)
    with pytest.raises(InputError, match="layer 1 selected in no row"):
        evaluate_model(model, None, windows())


def test_report_is_json_and_scope_and_progress_are_kept() -> None:
    model = hire_model(dense_model(), layer_spec(), HEAD)
    model.set_hire_scope("decode", head=False)
    seen: list[tuple[int, int]] = []
    report = evaluate_model(
        model, None, windows(), progress=lambda done, total: seen.append((done, total))
    )
    state = model.hire_state
    assert (state.scope, state.dense_prefix, state.sparse_head) == ("decode", 0, False)
    done = [step[0] for step in seen]
    assert done == sorted(set(done)) and seen[-1][0] == seen[-1][1]
    assert len({step[1] for step in seen}) == 1
    # A window that selects counts as two that do not.
    assert done[3] - done[2] == 2 * done[0]  # three windows
    tree = json.loads(json.dumps(report.to_dict()))
    assert tree["all"]["perplexity"] == report.all.perplexity if report.all else False
    assert "nll_N" not in tree["dense"] and "baseline_nll_N" not in tree
    assert report.dense_prefix == LENGTH // 2


def test_logits_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hire_model(dense_model(), layer_spec(), None)
    whole = evaluate_model(model, None, windows())
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, args, _o: sizes.append(args[0][..., 0].numel()))
    parts = evaluate_model(model, None, windows())
    assert max(sizes[2:]) == 7
    assert whole.all is not None and parts.all is not None
    assert torch.allclose(whole.all.nll_N, parts.all.nll_N, atol=1e-5)
