"""What a sparse FFN must compute, written here apart from the runtime: the words of docs/format.md.

Shape suffixes: N rows, D width, F neurons, S scored units, M predictor outputs, C common neurons.
"""

from typing import Any

import torch

from hireconvert.families import (
    FfnWeights,
    ffn_parts,
    find_layout,
    num_layers,
    read_ffn_weights,
)
from hireconvert.families import hidden_activations as dense_hidden
from hireconvert.quantize import GridFormat
from tests.decoding import decode_factor, decode_matrix
from tests.tiny import NEURONS, WIDTH

TOLERANCE = 2e-5


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def down_bias(native: Any, index: int) -> torch.Tensor | float:
    bias = ffn_parts(native, find_layout(native), index).down.bias()
    return 0.0 if bias is None else bias.detach().float()


def masked_output(native: Any, index: int, x_ND: torch.Tensor, keep_NF: torch.Tensor) -> Any:
    """The FFN output by plain arithmetic on the native weights, only `keep_NF` neurons active."""
    weights = read_ffn_weights(native, find_layout(native), index)
    hidden_NF = dense_hidden(weights, x_ND) * keep_NF
    return (hidden_NF.double() @ weights.down_FD.double()).float() + down_bias(native, index)


def lowest_first(score_NS: torch.Tensor, num: int) -> torch.Tensor:
    """The mask of the `num` best, by a stable sort: ties to the lowest index."""
    order_NS = torch.sort(score_NS, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(score_NS, dtype=torch.bool).scatter_(-1, order_NS[:, :num], True)


@torch.no_grad()
def gathered_rows(layer: Any, x_ND: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer.gathered(row[None]) for row in x_ND])


# Fields of FfnRecipe: ways to predict and to select.
VARIANTS: dict[str, dict[str, Any]] = {
    "groups": {"group_size": 4},
    "common": {"common_path": 0.125},
    "groups_common": {"group_size": 4, "common_path": 0.125},
    "candidates": {"keep": "candidates"},
    "plain": {"score": "plain"},
    "lr": {"predictor": {"kind": "lr", "rank": 24}},
    "lr_8_bits": {"predictor": {"kind": "lr", "rank": 24, "factor_bits": 8}},
    "lr_4_bits": {"predictor": {"kind": "lr", "rank": 23, "factor_bits": 4}},
    "qlr": {"predictor": {"kind": "qlr", "bits": 2, "rank": 8}},
    "loud_inputs": {"predictor": {"input_keep": 0.5, "bits": 3}},
    "loud_qlr": {"predictor": {"kind": "qlr", "input_keep": 0.6, "rank": 4, "symmetric": False}},
    "offset": {"predictor": {"symmetric": False}},
    "normal": {"predictor": {"levels": "normal", "block": 16}},
    "loud_normal": {"predictor": {"levels": "normal", "input_keep": 0.5}},
    "uncentred": {"predictor": {"centre": False, "column_scale": False}},
    "group_scores": {
        "group_size": 4,
        "common_path": 0.125,
        "predictor": {"kind": "lr", "rank": 16, "group_scores": True},
    },
    "group_scores_q": {"group_size": 4, "predictor": {"group_scores": True}},
    "soften": {"predictor": {"bits": 2, "soften": True}},
    "soften_lr": {"keep": "candidates", "predictor": {"kind": "lr", "rank": 8, "soften": True}},
    "soften_groups": {"group_size": 4, "predictor": {"bits": 2, "soften": True}},
    "threshold": {"selection": "threshold"},
    "threshold_candidates": {"selection": "threshold", "keep": "candidates", "over_select": 1.6},
    "threshold_groups_common": {
        "selection": "threshold",
        "group_size": 4,
        "common_path": 0.125,
        "predictor": {"bits": 3, "soften": True},
    },
    "threshold_groups_candidates": {
        "selection": "threshold",
        "keep": "candidates",
        "group_size": 4,
        "common_path": 0.125,
        "over_select": 1.6,
    },
    "threshold_group_scores": {
        "selection": "threshold",
        "keep": "candidates",
        "group_size": 4,
        "over_select": 1.6,
        "predictor": {"kind": "lr", "rank": 16, "group_scores": True},
    },
    "relative": {"selection": "relative", "keep": "candidates", "over_select": 1.6},
    "relative_all": {
        "selection": "relative",
        "keep": "candidates",
        "over_select": 20.0,
        "score": "plain",
        "predictor": {"bits": 2, "soften": True},
    },
    "relative_groups_common": {
        "selection": "relative",
        "keep": "candidates",
        "group_size": 4,
        "common_path": 0.125,
        "over_select": 1.6,
    },
    "mean_std": {"selection": "mean_std"},
    "mean_std_candidates": {"selection": "mean_std", "keep": "candidates", "over_select": 1.6},
    "mean_std_groups": {"selection": "mean_std", "group_size": 4, "common_path": 0.125},
    "score_mass": {"selection": "score_mass"},
    "score_mass_candidates": {"selection": "score_mass", "keep": "candidates", "over_select": 1.6},
    "score_mass_groups": {"selection": "score_mass", "group_size": 4, "common_path": 0.125},
}


def form_of(spec: dict[str, Any], *, channel_major: bool = False) -> GridFormat:
    levels = spec.get("levels", "even")
    return GridFormat(spec["bits"], spec["block"], spec["symmetric"], channel_major, levels)


def predicted(spec: dict[str, Any], tensors: dict[str, torch.Tensor], x_ND: torch.Tensor) -> Any:
    """z [N, M] of docs/design.md, from the tensors by another decoder."""
    own, outputs = spec["predictor"], tensors["bias"].shape[0]
    centred_ND = x_ND - tensors["mean"]
    z_NM = tensors["bias"].expand(x_ND.shape[0], -1)
    if own["kind"] in ("q", "qlr"):
        loud = own["num_inputs"] < WIDTH
        form = form_of(own, channel_major=loud)
        copy_MD = decode_matrix(tensors, form, (outputs, WIDTH))
        scaled_ND = centred_ND / tensors["column_scale"]
        if loud:
            mask_ND = lowest_first((scaled_ND * copy_MD.norm(dim=0)).abs(), own["num_inputs"])
            scaled_ND = scaled_ND * mask_ND
        z_NM = z_NM + scaled_ND @ copy_MD.T
    if own["kind"] in ("lr", "qlr"):
        into = decode_factor(tensors, own["factor_bits"], "factor_in", width=WIDTH)
        out = decode_factor(tensors, own["factor_bits"], "factor_out", width=own["rank"])
        z_NM = z_NM + (centred_ND @ into.T) @ out.T
    return z_NM


def reaches_level(
    selection: dict[str, Any], own_NS: torch.Tensor, estimate_NS: Any, adds_NF: Any
) -> Any:
    """The rules of docs/format.md, row by row; `adds_NF` is what neurons are estimated to add."""
    level, rows = selection["level"], []
    for row, (own_S, estimate_S) in enumerate(
        zip(own_NS.double(), estimate_NS.double(), strict=True)
    ):
        if selection["rule"] == "threshold":
            rows.append(own_S >= level)
        elif selection["rule"] == "relative":
            rows.append(own_S >= level * adds_NF[row].double().norm())
        elif selection["rule"] == "mean_std":
            rows.append(own_S >= estimate_S.mean() + level * estimate_S.std(correction=0))
        else:
            weaker_S = (own_S.square() * (own_S <= own_S[:, None])).sum(-1)
            rows.append(weaker_S >= level * own_S.square().sum())
    return torch.stack(rows)


def combined(weights: FfnWeights, z_NM: torch.Tensor) -> torch.Tensor:
    """The hidden values that go with estimates of the first matrices."""
    if weights.gate_FD is None:
        return weights.act(z_NM)
    gate_NF, up_NF = z_NM.chunk(2, dim=-1)
    return weights.act(gate_NF) * up_NF


def reference_masks(
    native: Any, index: int, x_ND: torch.Tensor, layer: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(active neurons, neurons computed exactly) by the words of docs/design.md."""
    spec, tensors = layer.spec, layer.predictor_tensors
    weights = read_ffn_weights(native, find_layout(native), index)
    group, common = spec["group_size"], spec["num_common"]
    norm_F = torch.ones(NEURONS) if spec["score"] == "plain" else weights.down_FD.norm(dim=1)

    def units(hidden_NF: torch.Tensor) -> torch.Tensor:
        score_NF = (hidden_NF.abs() * norm_F)[:, common:]
        return score_NF if group == 1 else score_NF.unflatten(-1, (-1, group)).norm(dim=-1)

    z_NM, adds_NF = predicted(spec, tensors, x_ND), None
    if spec["predictor"]["groups"]:
        estimate_NS = z_NM[:, common // group :]
    else:
        size_NF = combined(weights, z_NM).abs()
        adds_NF = size_NF * norm_F
        if spec["predictor"].get("soften"):
            gate_NF, up_NF = z_NM.chunk(2, dim=-1)
            soft_gate_F, soft_up_F = tensors["soft"].float().view(2, -1)
            above_NF, below_NF = (weights.act(gate_NF + s * soft_gate_F) for s in (1, -1))
            size_NF = torch.hypot(above_NF, below_NF) * 0.5**0.5 * torch.hypot(up_NF, soft_up_F)
            if spec["score"] == "error":
                active_NF = weights.act(gate_NF)
                by_gate_NF = (above_NF - active_NF) * up_NF
                by_up_NF = active_NF * soft_up_F
                by_down_NF = combined(weights, z_NM) * spec["unselected"]["error"]
                size_NF = torch.hypot(torch.hypot(by_gate_NF, by_up_NF), by_down_NF)
        estimate_NS = units(size_NF)
    chosen_NS = exact_NS = lowest_first(estimate_NS, (spec["num_candidates"] - common) // group)
    own_NS = estimate_NS
    if spec["keep"] == "top_k":
        own_NS = units(dense_hidden(weights, x_ND)).masked_fill(~chosen_NS, 0.0)
    if "selection" in spec:
        chosen_NS = chosen_NS & reaches_level(spec["selection"], own_NS, estimate_NS, adds_NF)
    elif spec["keep"] == "top_k":
        chosen_NS = lowest_first(own_NS, (spec["num_kept"] - common) // group)
    exact_NS = chosen_NS if spec["keep"] == "candidates" else exact_NS
    always_NC = torch.ones(x_ND.shape[0], common, dtype=torch.bool)
    keep_NF, exact_NF = (
        torch.cat([always_NC, mask_NS.repeat_interleave(group, dim=-1)], dim=-1)
        for mask_NS in (chosen_NS, exact_NS)
    )
    return keep_NF, exact_NF


def low_bit_down(layer: Any) -> torch.Tensor:
    """float32 [F, D]: the copy for neurons that are not kept, by another decoder."""
    spec, prefix = layer.spec["unselected"], "down_"
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in layer.predictor_tensors.items()
        if name.startswith(prefix)
    }
    return decode_matrix(own, form_of(spec), (NEURONS, WIDTH))


def output_with_rest(native: Any, index: int, x_ND: torch.Tensor, layer: Any) -> torch.Tensor:
    """The FFN output by the words of docs/format.md, the neurons left out counted by estimate."""
    keep_NF, exact_NF = reference_masks(native, index, x_ND, layer)
    weights = read_ffn_weights(native, find_layout(native), index)
    value_NF = combined(weights, predicted(layer.spec, layer.predictor_tensors, x_ND))
    value_NF = torch.where(exact_NF, dense_hidden(weights, x_ND), value_NF) * ~keep_NF
    rest_ND = (value_NF.double() @ low_bit_down(layer).double()).float()
    return masked_output(native, index, x_ND, keep_NF) + rest_ND


def check_graph(layer: Any, x_ND: torch.Tensor) -> None:
    """One graph does for all rows what the eager row does, counters included."""
    expected, counts = gathered_rows(layer, x_ND), layer.counts.clone()
    layer.counts.zero_()
    graphs = []

    def count_graphs(module: Any, _inputs: Any) -> Any:
        graphs.append(module)
        return module

    torch._dynamo.reset()
    run = torch.compile(layer.gathered, fullgraph=True, dynamic=False, backend=count_graphs)
    with torch.no_grad():
        compiled = torch.cat([run(row[None]) for row in x_ND])
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert relative(compiled, expected) < TOLERANCE
    assert torch.equal(layer.counts, counts)


def gradients(model: Any, ids_T: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """The gradient, by what is added to the output of every FFN, of -log p of tokens drawn."""
    layout, added, hooks = find_layout(model), [], []
    for index in range(num_layers(model)):

        def add(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
            added.append(torch.zeros_like(out, requires_grad=True))
            return out + added[-1]

        down = ffn_parts(model, layout, index).down.module
        hooks.append(down.register_forward_hook(add))
    logs = model(ids_T[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
    loss = -logs.gather(1, drawn).sum()
    return [g.flatten(0, -2) for g in torch.autograd.grad(loss, added)]
