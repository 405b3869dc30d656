"""The certificate of the LM head against float64, on states that are meant to break it.

python -m tests.fuzz_certificate --count 1000000 --seed 0 [--model FOLDER --text FILE --real 2000]

Heads of odd shapes are drawn from a seed, each gets states of every kind below, and the native head
answers all of them, PyTorch's one in PYTORCH_SHARE. An answer is wrong when its best rows, their
order or their logits are not those of the reference (products in float64, summed by halves, rounded
once to float32, soft-capped, ties to the lowest id), when another row is larger in float64 though
not equal in float32, or when an upper bound of PyTorch's is below the exact logit. States that are
not finite enough for the native head, which leaves them to the dense one, are counted apart. The
real states are those that the head of `--model` receives over `--text`. tests/parity holds heads of
fixed shapes to the same; here shapes, norms and directions vary.

Shape suffixes: N states, D width, V vocabulary, T certified rows, C rows compared.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hireconvert.runtime.hire_head import SparseHead, soft_cap
from tests.native_head import HEAD_LEVELS, Case, _native_head, ranked, weight_of
from tests.tiny import head_spec

KINDS = ("plain", "uneven", "outlier", "ties", "coarse", "zeros", "near")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATES = (
    "random", "loud columns", "near ties", "along errors", "tiny", "huge", "denormal", "one-hot",
    "signs",
)  # fmt: skip
PER_KIND, PYTORCH_SHARE = 64, 8
MOST_SHOWN = 20


@dataclass(frozen=True)
class Head:
    """A head to ask: its weight, how many best rows are certified, and both ways to run it."""

    case: Case
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    top: int
    native: Any
    sparse: SparseHead
    linear: nn.Linear


def make_head(
    case: Case, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, top: int, **spec: Any
) -> Head:
    """Both heads over one weight; `spec` changes PyTorch's, which has more kinds."""
    rows, width = weight_VD.shape
    linear = nn.Linear(width, rows, bias=bias_V is not None, dtype=weight_VD.dtype)
    linear.weight.data = weight_VD
    if bias_V is not None:
        linear.bias.data = bias_V
    sparse = SparseHead(head_spec(**{"certify_top": top, "bits": case.bits} | spec), case.cap)
    if spec.get("kind") == "lr":
        basis_DR = torch.linalg.qr(torch.randn(width, spec["rank"]))[0].contiguous()
        sparse.predictor_tensors = {
            "head.factor_in": basis_DR.t().contiguous(), "head.lift": basis_DR
        }  # fmt: skip
    os.environ["HIRE_NATIVE"] = "off"
    sparse.prepare(linear)
    del os.environ["HIRE_NATIVE"]
    native = _native_head.HeadLayer(weight_VD, bias_V, bits=case.bits)
    return Head(case, weight_VD, bias_V, top, native, sparse, linear)


def draw_head(dice: torch.Generator) -> Head:
    """A head of any shape up to 400 rows of 140."""

    def one_of(choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=dice))]

    rows = int(torch.randint(1, 400, (1,), generator=dice))
    width = int(torch.randint(1, 140, (1,), generator=dice))
    case = Case(
        rows,
        width,
        one_of(DTYPES),
        one_of(KINDS),
        bias=one_of((True, False)),
        cap=one_of((None, None, 0.5, 8.0, 30.0)),
        bits=one_of((8, 8, 4)),
    )
    weight_VD, bias_V = weight_of(case, int(torch.randint(2**31, (1,), generator=dice)))
    size = one_of((1.0, 1.0, 1e-3, 50.0, 1e-12, 1e12))
    if case.dtype != torch.float16:
        weight_VD = weight_VD * size
    rank = int(torch.randint(1, width + 1, (1,), generator=dice))
    spec = one_of(({}, {}, {"block": 16}, {"kind": "lr", "rank": rank}))
    head = make_head(case, weight_VD, bias_V, one_of((1, 1, 2, 5, 64)), **spec)
    head.native.level_number = one_of(HEAD_LEVELS)
    return head


# --------------------------------------------------------------------------- states


def states_of(head: Head, kind: str, num: int, dice: torch.Generator) -> torch.Tensor:
    """float [N, D] in the type of the weight."""
    weight_VD = head.weight_VD.float()
    rows, width = weight_VD.shape
    x_ND = torch.randn(num, width, generator=dice)
    some_N = torch.randint(rows, (num,), generator=dice)
    if kind == "random":
        x_ND = x_ND * torch.logspace(-4, 4, num)[:, None]
    elif kind == "loud columns":  # where scales are largest, and so are errors
        loud_D = weight_VD.norm(dim=0) / weight_VD.norm().clamp(min=1e-30)
        x_ND = x_ND.sign() * loud_D + 1e-3 * x_ND
    elif kind == "near ties":
        x_ND = _between(weight_VD, x_ND, some_N, dice)
    elif kind == "along errors":
        # The logits of one-hot states, by estimate alone, are the copy.
        told = head.native.run(torch.eye(width), 1, certify=False, cap=None, mask=False)
        left_VD = weight_VD - (
            told.logits_NV.t() - (0 if head.bias_V is None else head.bias_V.float()[:, None])
        )
        x_ND = left_VD[some_N] * torch.logspace(-1, 6, num)[:, None] + 1e-4 * x_ND
    elif kind in ("tiny", "huge", "denormal"):
        low, high = {"tiny": (-120, -20), "huge": (10, 90), "denormal": (-148, -127)}[kind]
        exponent_N1 = torch.randint(low, high, (num, 1), generator=dice).float()
        x_ND = x_ND * torch.exp2(exponent_N1)
    elif kind == "one-hot":
        place_N = torch.randint(width, (num,), generator=dice)
        x_ND = F.one_hot(place_N, width) * x_ND.gather(1, place_N[:, None]) * 100
    else:
        x_ND = x_ND.sign() * torch.logspace(-3, 3, num)[:, None]
    most = torch.finfo(head.weight_VD.dtype).max
    return x_ND.clamp(-most, most).to(head.weight_VD.dtype)


def _between(
    weight_VD: torch.Tensor, x_ND: torch.Tensor, first_N: torch.Tensor, dice: torch.Generator
) -> torch.Tensor:
    """States whose products with two rows agree but for rounding, and are among the largest."""
    second_N = torch.randint(len(weight_VD), first_N.shape, generator=dice)
    gap_ND = weight_VD[first_N] - weight_VD[second_N]
    both_ND = weight_VD[first_N] + weight_VD[second_N]
    x_ND = x_ND + 3 * both_ND / both_ND.norm(dim=1, keepdim=True).clamp(min=1e-30)
    square_N1 = gap_ND.square().sum(1, keepdim=True).clamp(min=1e-30)
    x_ND = x_ND - gap_ND * ((x_ND * gap_ND).sum(1, keepdim=True) / square_N1)
    exponent_N1 = torch.randint(-12, 12, (len(x_ND), 1), generator=dice).float()
    return x_ND * torch.exp2(exponent_N1)


# --------------------------------------------------------------------------- the reference


def by_halves(product: torch.Tensor) -> torch.Tensor:
    """Sums over the last axis: zeros up to a power of two, then halves upon halves."""
    size = 1 << (product.shape[-1] - 1).bit_length()
    product = F.pad(product, (0, size - product.shape[-1]))
    while product.shape[-1] > 1:
        product = product.unflatten(-1, (2, -1)).sum(-2)
    return product[..., 0]


def exact(head: Head, x_ND: torch.Tensor) -> torch.Tensor:
    """float64 [N, V], before it is rounded."""
    z_NV = by_halves(head.weight_VD.double() * x_ND.double()[:, None])
    return z_NV if head.bias_V is None else z_NV + head.bias_V.double()


class Check:
    """Counts by path and kind of state, and what was wrong."""

    def __init__(self) -> None:
        self.states, self.dense, self.wrong = Counter[str](), Counter[str](), Counter[str]()
        self.shown: list[dict[str, Any]] = []
        self.tied = 0
        self.worst_share = 0.0

    def fail(self, path: str, kind: str, head: Head, x_D: torch.Tensor, why: str) -> None:
        """Count it and keep the first ones."""
        self.wrong[f"{path}, {kind}"] += 1
        if len(self.shown) < MOST_SHOWN:
            said = {"path": path, "kind": kind, "why": why, "case": str(head.case), "top": head.top}
            self.shown.append(said | {"x": x_D.float().tolist()[:200]})

    def answers(
        self, path: str, kind: str, head: Head, x_ND: torch.Tensor, z_NV: torch.Tensor,
        exact_NV: torch.Tensor,
    ) -> None:  # fmt: skip
        """Hold logits [N, V] against the exact ones."""
        expected_NV, top = exact_NV.float(), min(head.top, len(head.weight_VD))
        best_NT = ranked(expected_NV, top, head.case.cap)
        same_N = (ranked(z_NV, top, head.case.cap) == best_NT).all(1)
        same_N &= (z_NV.gather(1, best_NT) == expected_NV.gather(1, best_NT)).all(1)
        # In float64 the first of them is the largest, or equal to that when rounded and capped.
        largest_N1 = exact_NV.argmax(1, keepdim=True)
        pair_N2 = soft_cap(
            expected_NV.gather(1, torch.cat([largest_N1, best_NT[:, :1]], 1)), head.case.cap
        )
        first_N = largest_N1[:, 0] == best_NT[:, 0]
        same_N &= first_N | (pair_N2[:, 0] == pair_N2[:, 1])
        self.tied += int((~first_N).sum())
        self.states[f"{path}, {kind}"] += len(x_ND)
        for index in (~same_N).nonzero()[:, 0].tolist():
            self.fail(path, kind, head, x_ND[index], "the best rows")

    def bounds(self, kind: str, head: Head, x_ND: torch.Tensor, exact_NV: torch.Tensor) -> None:
        """Hold PyTorch's upper bounds against exact logits."""
        for x_D, z_V, exact_V in zip(x_ND, head.sparse._estimate(x_ND), exact_NV, strict=True):
            upper_V = head.sparse._upper(x_D, z_V).double()
            slack_V, error_V = upper_V - z_V, exact_V - z_V.double()
            self.worst_share = max(self.worst_share, float((error_V / slack_V).nan_to_num().max()))
            if bool((upper_V < exact_V).any()):
                self.fail("PyTorch", kind, head, x_D, "an upper bound")


@torch.no_grad()
def ask(check: Check, head: Head, kind: str, x_ND: torch.Tensor, exact_NV: torch.Tensor) -> None:
    """Both paths over the states of one kind."""
    call = head.native.run(x_ND, head.top, certify=True, cap=head.case.cap, mask=True)
    fine_N = torch.ones(len(x_ND), dtype=torch.bool) if call.finite_N is None else call.finite_N
    check.dense[f"native, {kind}"] += int((~fine_N).sum())
    check.answers("native", kind, head, x_ND[fine_N], call.logits_NV[fine_N], exact_NV[fine_N])
    some = fine_N.nonzero()[:, 0][::PYTORCH_SHARE]
    if len(some):
        told_NV = head.sparse(x_ND[some], head.linear, True)
        check.answers("PyTorch", kind, head, x_ND[some], told_NV, exact_NV[some])
        check.bounds(kind, head, x_ND[some], exact_NV[some])


# --------------------------------------------------------------------------- real states


@torch.no_grad()
def real_states(folder: Path, text: Path, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight of the head [V, D], what it receives over the text [N, D]), as stored."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    words = text.read_text(encoding="utf-8")[: 8 * num]
    ids = AutoTokenizer.from_pretrained(folder)(words, return_tensors="pt").input_ids[:, :num]
    rows = [
        model.get_decoder()(input_ids=window, use_cache=False).last_hidden_state[0]
        for window in ids.split(256, dim=1)
    ]
    return model.get_output_embeddings().weight.detach(), torch.cat(rows)


@torch.no_grad()
def ask_real(check: Check, weight_VD: torch.Tensor, x_ND: torch.Tensor, bits: int) -> None:
    """The best row of real states; only rows near the best are summed by halves."""
    case = Case(*weight_VD.shape, dtype=weight_VD.dtype, bits=bits)
    head, kind = make_head(case, weight_VD, None, 1), f"real, {bits} bits"
    for part_ND in x_ND.split(32):
        product_NV = part_ND.double() @ weight_VD.double().t()
        call = head.native.run(part_ND, 1, certify=True, cap=None, mask=False)
        told_NV = head.sparse(part_ND[::PYTORCH_SHARE], head.linear, True)
        pieces = [("native", 1, call.logits_NV), ("PyTorch", PYTORCH_SHARE, told_NV)]
        for path, step, z_NV in pieces:
            for x_D, product_V, z_V in zip(part_ND[::step], product_NV[::step], z_NV, strict=True):
                least = product_V.max() - 1e-6 * product_V.abs().max()
                near_C = (product_V >= least).nonzero()[:, 0]
                few = replace(head, weight_VD=weight_VD[near_C])
                best = near_C[exact(few, x_D[None])[0].float().argmax()]
                check.states[f"{path}, {kind}"] += 1
                if int(z_V.argmax()) != int(best):
                    check.fail(path, kind, head, x_D, "the best row")


def summary(check: Check, asked: Any, num_heads: int, started: float) -> dict[str, Any]:
    """What stdout gets."""
    return {
        "seed": asked.seed,
        "heads": num_heads,
        "seconds": round(time.monotonic() - started, 1),
        "native": sum(n for key, n in check.states.items() if key.startswith("native")),
        "pytorch": sum(n for key, n in check.states.items() if key.startswith("PyTorch")),
        "by_kind": dict(sorted(check.states.items())),
        "left_to_dense": {key: n for key, n in sorted(check.dense.items()) if n},
        "equal_in_float32_alone": check.tied,
        "largest_error_over_bound": round(check.worst_share, 4),
        "wrong": dict(check.wrong),
        "num_findings": sum(check.wrong.values()),
        "findings": check.shown,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000, help="states of the native head")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--model", type=Path, help="a folder, for real states")
    parser.add_argument("--text", type=Path, help="what the model reads")
    parser.add_argument("--real", type=int, default=2000, help="how many real states")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    started = last = time.monotonic()
    check, dice, num_heads = Check(), torch.Generator().manual_seed(asked.seed), 0
    if asked.model is not None:
        weight_VD, x_ND = real_states(asked.model, asked.text, asked.real)
        for bits in (8, 4):
            ask_real(check, weight_VD, x_ND, bits)
    while (
        sum(check.states.values()) < asked.count and time.monotonic() - started < 60 * asked.minutes
    ):
        head = draw_head(dice)
        num_heads += 1
        for kind in STATES:
            x_ND = states_of(head, kind, PER_KIND, dice)
            ask(check, head, kind, x_ND, exact(head, x_ND))
        if time.monotonic() - last > 20:
            last = time.monotonic()
            print(
                json.dumps(summary(check, asked, num_heads, started)), file=sys.stderr, flush=True
            )
    found = summary(check, asked, num_heads, started)
    print(json.dumps(found))
    return 1 if found["num_findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
