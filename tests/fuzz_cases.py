"""Tiny converted checkpoints on disk, one for each corner of the format: where fuzzing starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hireconvert.attention import round_attention
from tests.tiny import WIDTH, hire_model, tiny_model

_LOW_RANK = {"kind": "lr", "rank": 8, "bits": None, "block": None, "certified": False}


@dataclass(frozen=True)
class Case:
    """One checkpoint: a family of tests/tiny.py, and what `hire_model` takes."""

    family: str
    ffn: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    attention: dict[str, Any] | None = None
    dtype: torch.dtype = torch.float32
    shard: str = "1GB"


def _predictor(**changes: Any) -> dict[str, Any]:
    return {"predictor": changes}


CASES = {
    "q, the rest by estimate": Case("qwen2", {"unselected": {}}, {}),
    "refined rows, attention in 4 and 8 bits": Case(
        "mistral",
        {
            "predictor": {"levels": "normal", "block": 32},
            "unselected": {"levels": "normal", "symmetric": True},
            "rows": "refined",
        },
        {"bits": 4},
        attention={
            "block": 32,
            "matrices": {
                f"self_attn.{name}_proj": bits
                for name, bits in zip("qkvo", (4, 8, 8, 4), strict=True)
            },
        },
        dtype=torch.bfloat16,
    ),
    "rows of copies": Case(
        "qwen2",
        {
            "keep_fraction": 1.0,
            "predictor": {"levels": "normal", "block": 32},
            "unselected": {"levels": "normal", "symmetric": True},
            "rows": "copies",
        },
        {},
        dtype=torch.bfloat16,
    ),
    "q of 3 bits, ranges": Case(
        "llama_bias",
        {"unselected": {"bits": 3, "block": 16}, **_predictor(bits=3, block=12, symmetric=False)},
        {"certified": False, "unselected": "-inf"},
        shard="60KB",
    ),
    "relative": Case(
        "llama",
        {
            "selection": "relative",
            "keep": "candidates",
            "over_select": 20.0,
            "score": "error",
            "unselected": {"bits": 4, "block": 16},
        },
        {},
    ),
    "threshold": Case("llama_bias", {"selection": "threshold", "unselected": {"bits": 2}}, {}),
    "qlr, some inputs": Case(
        "phi3",
        {
            "selection": "score_mass",
            **_predictor(kind="qlr", rank=6, input_keep=0.5, factor_bits=4, soften=True),
        },
        {"block": 16, "bits": 4},
    ),
    "lr, ungated": Case(
        "opt", {"selection": "mean_std", "keep": "candidates", **_predictor(kind="lr", rank=8)}, {}
    ),
    "groups, low-rank head": Case(
        "llama_relu",
        {"group_size": 4, "common_path": 0.25, **_predictor(kind="lr", rank=8, factor_bits=8)},
        _LOW_RANK,
    ),
    "group scores": Case(
        "qwen3",
        {"group_size": 4, **_predictor(group_scores=True, bits=2)},
        {**_LOW_RANK, "certified": True},
    ),
    "ungated q, Conv1D": Case("gpt2", {"unselected": {"bits": 8}, **_predictor(bits=8)}, {}),
    "soft caps, softened": Case(
        "gemma2",
        {"unselected": {"block": 16}, **_predictor(bits=2, soften=True)},
        {"certify_top": 50},
    ),
    "bfloat16, head alone": Case("gemma3_text", None, {}, dtype=torch.bfloat16),
    "float16, ungated": Case(
        "opt",
        {"unselected": {}, "keep": "candidates", **_predictor(block=32)},
        {"certified": False},
        dtype=torch.float16,
    ),
}


def _make(case: Case) -> Any:
    ffn = None if case.ffn is None else dict(case.ffn)
    model = hire_model(tiny_model(case.family), ffn=ffn, head=case.head)
    if case.attention is not None:
        model.config.hire["attention"] = case.attention
        round_attention(model, model.config.hire["layout"], case.attention)
    head = model.get_output_embeddings()
    if case.head is not None and case.head.get("kind") == "lr":
        basis_DR = torch.linalg.qr(torch.randn(WIDTH, case.head["rank"]))[0]
        head.hire.predictor_tensors = {
            "head.factor_in": basis_DR.t().contiguous(),
            "head.lift": basis_DR.contiguous(),
        }
    return model.to(case.dtype)


def build(root: Path) -> None:
    """One folder for each of CASES below `root`, named by its place among them."""
    torch.manual_seed(0)
    for index, case in enumerate(CASES.values()):
        _make(case).save_pretrained(root / str(index), max_shard_size=case.shard)
