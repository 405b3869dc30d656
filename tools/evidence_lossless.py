"""Evidence that the `lossless` recipe decodes as the reference head does, and what it costs.

python tools/evidence_lossless.py --models models --out evidence/lossless

For each model and body dtype: 64 greedy tokens for 64 prompts through `generate()` of the
converted checkpoint, every step's hidden states caught at the head. The reference head is then
computed on those states, so that body numerics play no part: products of stored weights and
states summed in float64, rounded once to float32, soft-capped, ties to the lowest id. Each run
leaves a JSON file, is skipped when that exists, and `lossless.md` is drawn from all of them.

Shape suffixes: N positions, D width, V vocabulary, C best rows, B prompts, T new tokens.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hireconvert.distill_head import distill_head
from hireconvert.evaluate import builtin_text
from hireconvert.loading import load
from hireconvert.runtime.hire_head import SparseHead, exact_rows, soft_cap
from hireconvert.runtime.hire_predict import head_copy_bytes, top_k_indices
from hireconvert.schema import HeadRecipe

MODELS = {
    "SmolLM2-135M-Instruct": "smollm2.gguf",
    "Gemma-3-270m": "gemma3-270m.gguf",
    "Qwen2.5-Coder-0.5B": "qwen2.5-coder-0.5b.gguf",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOP = 64
# The reference takes more rows than the certificate covers from a float64 product of another
# summation order, then sums them again in the reference's own.
SPARE = 16
CHUNK_ROWS = 4096
PROMPTS = (
    "The old lighthouse keeper climbed the stairs one last time, and",
    "In the autumn of 1847 a letter arrived that",
    "The committee's report, published on Tuesday, concludes that",
    "She had never liked the sea, but",
    "Photosynthesis is the process by which",
    "The recipe calls for two cups of flour,",
    "During the first half of the match",
    "Dear Sir or Madam, I am writing to",
    "Once upon a time there was a fox who",
    "The theory of plate tectonics explains",
    "Breaking news: the city council has",
    "Abstract. We study the convergence of",
    "The patient was admitted with",
    "To be, or not to be, that is",
    "Rain fell on the tin roof all night while",
    "The stock market opened lower on",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\ndef softmax(x):\n",
    "class Stack:\n    def __init__(self):\n",
    "#include <stdio.h>\n\nint main(void) {\n",
    "SELECT name, COUNT(*) FROM orders\nWHERE",
    "function debounce(fn, wait) {\n",
    "fn main() {\n    let numbers = vec![1, 2, 3];\n",
    "<!DOCTYPE html>\n<html>\n<head>\n",
    "#!/bin/bash\nset -e\nfor file in *.txt; do\n",
    '{"name": "Ada", "born": 1815, "works": [',
    "package main\n\nimport (\n",
    "public static int binarySearch(int[] a, int key) {\n",
    "try:\n    value = int(text)\nexcept",
    "# Makefile\nall: build test\n\nbuild:\n",
    "Shopping list:\n- milk\n- eggs\n-",
    "The planets in order from the sun:\n1. Mercury\n2.",
    "Steps to change a tyre:\n1.",
    "Colours of the rainbow: red, orange,",
    "Monday: swim\nTuesday: run\nWednesday:",
    "Pros:\n- cheap\n- quick\nCons:\n-",
    "A, B, C, D, E, F,",
    "Days until the launch: 5, 4, 3,",
    "What is the capital of Australia?",
    "Why is the sky blue?",
    "How do I undo the last commit in git?",
    "Who wrote the novel Middlemarch?",
    "Can you explain recursion to a child?",
    "Q: What do bees make?\nA:",
    "Q: How many legs does a spider have?\nA:",
    "Is it safe to eat raw potatoes?",
    "What is the difference between TCP and UDP?",
    "Which is heavier, a kilogram of iron or of feathers?",
    "Der schnelle braune Fuchs springt",
    "Il était une fois, dans un petit village,",
    "El clima en Madrid durante el invierno",
    "La ricetta della carbonara prevede",
    "Os navios chegaram ao porto",
    "Het weer in Nederland is",
    "Быстрая коричневая лиса",
    "今日は天気がいいので",
    "北京是中国的首都,",
    "안녕하세요, 제 이름은",
    "2 + 2 = 4\n3 + 5 = 8\n7 + 6 =",
    "Solve for x: 3x + 7 = 22.",
    "The derivative of sin(x) is",
    "Let G be a finite group. Then",
    "1, 1, 2, 3, 5, 8, 13,",
    "The integral of 1/x from 1 to e equals",
)


@dataclass
class Caught:
    """What the head of the converted model received and answered while it generated."""

    hidden_ND: torch.Tensor
    best_NC: torch.Tensor
    rescored_N: torch.Tensor
    tokens_BT: torch.Tensor


# --------------------------------------------------------------------------- generating


def batch_of(tokenizer: Any, num_prompts: int) -> dict[str, torch.Tensor]:
    """Prompts spread over all kinds, left-padded, with their attention mask."""
    step = len(PROMPTS) / num_prompts
    prompts = [PROMPTS[int(i * step)] for i in range(num_prompts)]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def greedy(model: Any, batch: Mapping[str, torch.Tensor], num_tokens: int) -> torch.Tensor:
    """New tokens [B, T]; no end token, so that every prompt gives as many."""
    neutral = dict.fromkeys(("temperature", "top_k", "top_p"))
    settings = {
        "do_sample": False,
        "max_new_tokens": num_tokens,
        "eos_token_id": model.config.vocab_size,
    }
    ids = model.generate(**batch, **settings, **neutral, pad_token_id=0)
    return ids[:, batch["input_ids"].shape[1] :]


def generate_and_catch(model: Any, batch: Mapping[str, torch.Tensor], num_tokens: int) -> Caught:
    """Greedy tokens of the converted model, with every step's head input and best rows."""
    head = model.get_output_embeddings()
    sparse, hidden, best, rescored = head.hire, [], [], []
    forward = sparse.forward

    def spy(x_ND: torch.Tensor, head: Any, certify: bool, top: int | None = None) -> torch.Tensor:
        del top  # greedy decoding needs one row, the evidence is about all that can be certified
        rows = []
        for x_D in x_ND:
            before = int(sparse.counts[2])
            rows.append(forward(x_D[None], head, certify))
            hidden.append(x_D.clone())
            best.append(ordered_top(soft_cap(rows[-1][0], sparse.cap), TOP))
            rescored.append(int(sparse.counts[2]) - before)
            progress(f"row {len(hidden)}")
        return torch.cat(rows)

    sparse.forward = spy
    model.hire_stats(reset=True)
    try:
        tokens_BT = greedy(model, batch, num_tokens)
    finally:
        del sparse.forward
    counts = model.hire_stats()["head"]
    if counts["rows"] != tokens_BT.numel() or counts["dense_rows"]:
        raise RuntimeError(f"the head counted {counts}: its certified path did not serve every row")
    return Caught(torch.stack(hidden), torch.stack(best), torch.tensor(rescored), tokens_BT)


def ordered_top(z_V: torch.Tensor, num: int) -> torch.Tensor:
    """Ids of the largest logits, best first, ties to the lowest id."""
    index_C = top_k_indices(z_V[None], num)[0]
    return index_C[z_V[index_C].sort(descending=True, stable=True).indices]


# --------------------------------------------------------------------------- the reference


@torch.no_grad()
def reference(model: Any, hidden_ND: torch.Tensor) -> dict[str, torch.Tensor]:
    """Best ids of the reference head [N, TOP], and how bfloat16 logits would rank and tie them."""
    weight_VD, cap = model.get_output_embeddings().weight, model.get_output_embeddings().hire.cap
    x_ND, ids, values = hidden_ND.double(), [], []
    narrow_best_N = torch.full((len(x_ND),), -torch.inf)
    narrow_id_N = torch.zeros(len(x_ND), dtype=torch.int64)
    ties_N = torch.zeros(len(x_ND), dtype=torch.int64)
    for start in range(0, weight_VD.shape[0], CHUNK_ROWS):
        z_NV = x_ND @ weight_VD[start : start + CHUNK_ROWS].double().t()
        top = z_NV.topk(min(TOP + SPARE, z_NV.shape[1]), dim=1)
        ids.append(top.indices + start)
        values.append(top.values)
        # The dense head in bfloat16 rounds a wider sum once, then caps in bfloat16.
        narrow_NV = soft_cap(z_NV.bfloat16(), cap).float()
        best_N = narrow_NV.amax(1)
        first_N = (narrow_NV == best_N[:, None]).to(torch.uint8).argmax(1) + start
        count_N = (narrow_NV == best_N[:, None]).sum(1)
        ties_N = torch.where(best_N > narrow_best_N, 0, ties_N)
        ties_N += torch.where(best_N >= narrow_best_N, count_N, 0)
        narrow_id_N = torch.where(best_N > narrow_best_N, first_N, narrow_id_N)
        narrow_best_N = torch.maximum(narrow_best_N, best_N)
        progress(f"reference row {start}")
    best_NC = _exact_top(hidden_ND, weight_VD, cap, torch.cat(values, 1), torch.cat(ids, 1))
    return {"best_NC": best_NC, "narrow_id_N": narrow_id_N, "ties_N": ties_N}


def _exact_top(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    cap: float | None,
    values_NC: torch.Tensor,
    ids_NC: torch.Tensor,
) -> torch.Tensor:
    best = []
    for x_D, value_C, id_C in zip(hidden_ND, values_NC, ids_NC, strict=True):
        near = value_C.topk(TOP + SPARE)
        gap = float(near.values[TOP - 1] - near.values[-1])
        if gap <= 1e-9 * float(near.values.abs().max()):
            raise RuntimeError("too many equal logits: raise SPARE")
        near_C = id_C[near.indices].sort().values
        z_C = soft_cap(exact_rows(x_D, weight_VD[near_C], None), cap)
        best.append(near_C[z_C.sort(descending=True, stable=True).indices[:TOP]])
    return torch.stack(best)


# --------------------------------------------------------------------------- certificates


def text_states(model: Any, tokenizer: Any, num_tokens: int) -> torch.Tensor:
    """What the head receives on the built-in text, [N, D]: what a low-rank basis is fitted on."""
    ids = tokenizer(builtin_text()[: 8 * num_tokens], return_tensors="pt")["input_ids"]
    model.set_hire_scope("off")
    rows = [
        getattr(model, model.base_model_prefix)(input_ids=window, use_cache=False)
        .last_hidden_state[0]
        .float()
        for window in ids[:, :num_tokens].split(512, dim=1)
    ]
    model.set_hire_scope("decode")
    return torch.cat(rows)


@torch.no_grad()
def certificates(model: Any, hidden_ND: torch.Tensor, text_ND: torch.Tensor) -> list[Any]:
    """Rows that each kind of bound cannot exclude, and the bytes read with them."""
    head, spec = model.get_output_embeddings(), model.config.hire["head"]
    held_ND = text_ND[:32]  # only for a figure of the fit that is not used here
    rows, width = head.weight.shape
    kinds: list[tuple[str, dict[str, Any], int]] = [("int8 per row", {}, rows * (width + 8))]
    for share in (0.25, 0.5, 0.75):
        rank = int(width * share)
        read = rows * (2 * rank + 8) + 4 * rank * width
        kinds.append((f"low rank {rank}", {"kind": "lr", "rank": rank}, read))
    found = []
    for name, changes, read in kinds:
        for top in (TOP, 1):
            sparse = SparseHead({**spec, **changes, "certify_top": top}, head.hire.cap)
            if "rank" in changes:
                recipe = HeadRecipe(certified=True, **changes)
                sparse.predictor_tensors = distill_head(head.weight, text_ND, held_ND, recipe)[0]
            sparse.prepare(head)
            if "rank" not in changes and sparse.prepared.native is not None:
                found.append(native_certificate(sparse, head, hidden_ND, top))
                sparse._prepare_copy()  # what the PyTorch path reads
            # Low-rank bounds exclude next to nothing, so a quarter of the states shows as much.
            some_ND, counts = hidden_ND[:: 4 if "rank" in changes else 1], []
            for x_ND in some_ND.split(32):
                pairs = zip(x_ND, sparse._estimate(x_ND), strict=True)
                counts += [int(sparse._needed(x_D, z_V, top).sum()) for x_D, z_V in pairs]
                progress(f"{name}, top {top}: {len(counts)}")
            total = read + sum(counts) / len(counts) * 2 * width
            found.append(
                {"bound": name, "top": top, "positions": len(counts), **spread(counts)}
                | {"read_share": total / (2 * rows * width)}
            )
    return found


def native_certificate(sparse: Any, head: Any, hidden_ND: torch.Tensor, top: int) -> dict[str, Any]:
    """Stored rows that the native kernels read, and the bytes of all that they read."""
    (rows, width), refined = head.weight.shape, 0
    counts: list[int] = []
    for x_D in hidden_ND:
        call = sparse.prepared.native.run(x_D[None], top, certify=True, cap=sparse.cap, mask=False)
        counts.append(call.num_rescored)
        refined += call.num_refined
        progress(f"native, top {top}: {len(counts)}")
    every, low = head_copy_bytes((rows, width), 8)
    total = every + (refined * low + sum(counts) * 2 * width) / len(counts)
    return {
        "bound": "native, 4 + 4 bits",
        "top": top,
        "positions": len(counts),
        **spread(counts),
    } | {"read_share": total / (2 * rows * width)}


def spread(counts: list[int]) -> dict[str, float]:
    """Median, 99th percentile, maximum and mean."""
    ordered = sorted(counts)
    at = {"median": len(ordered) // 2, "p99": int(0.99 * (len(ordered) - 1)), "max": -1}
    return {k: ordered[i] for k, i in at.items()} | {"mean": sum(ordered) / len(ordered)}


# --------------------------------------------------------------------------- one run


def progress(text: str) -> None:
    """One rewritten line on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)


def converted(source: Path, folder: Path) -> Path:
    """The lossless checkpoint of a GGUF file, with room for a batch of prompts."""
    command = [sys.executable, "-m", "hireconvert", "convert", str(source), str(folder)]
    options = ["--recipe", "lossless", "--overwrite", "--set", "evaluate.num_tokens=0"]
    rows = ["--set", f"decode.max_sparse_rows={len(PROMPTS)}"]
    subprocess.run(command + options + rows, check=True, stdout=subprocess.DEVNULL)
    return folder


@torch.no_grad()
def measure(folder: Path, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model with one body dtype."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = load(folder, dtype=dtype)
    batch = batch_of(tokenizer, arguments.prompts)
    caught = generate_and_catch(model, batch, arguments.new_tokens)
    truth = reference(model, caught.hidden_ND)
    first_N, best_NC = truth["best_NC"][:, 0], truth["best_NC"]
    step_major_N = caught.tokens_BT.t().flatten()
    pieces = caught.hidden_ND[:: max(1, len(caught.hidden_ND) // arguments.positions)]
    bounds = certificates(model, pieces, text_states(model, tokenizer, 4096))
    del model
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    same_BT = greedy(native.eval(), batch, arguments.new_tokens) == caught.tokens_BT
    return {
        "prompts": arguments.prompts,
        "new_tokens": arguments.new_tokens,
        "tokens_equal_reference": int((step_major_N == first_N).sum()),
        "tokens": len(first_N),
        "top64_equal_reference": int((caught.best_NC == best_NC).all(1).sum()),
        "stock_prompts_equal": int(same_BT.all(1).sum()),
        "stock_tokens_before_divergence": int(same_BT.long().cumprod(1).sum()),
        "bfloat16_head_ties_maximum": int((truth["ties_N"] > 1).sum()),
        "bfloat16_head_agrees": int((truth["narrow_id_N"] == first_N).sum()),
        "rescored": spread(caught.rescored_N.tolist()),
        "bounds": bounds,
    }


# --------------------------------------------------------------------------- the tables


def tables(results: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Markdown of every run found."""
    agreement = [
        "| model | body | prompts x tokens | greedy tokens = reference | best 64, in order "
        "| equal to stock generate(): prompts | tokens before the first difference "
        "| a bfloat16 head ties its maximum | and picks the reference's token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    bounds = [
        "| model | body | bound | certified | positions | rows: median | p99 | max | mean "
        "| bytes read / dense bfloat16 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, dtype), r in results.items():
        n = r["tokens"]
        agreement.append(
            f"| {name} | {dtype} | {r['prompts']} x {r['new_tokens']} "
            f"| {r['tokens_equal_reference']} / {n} | {r['top64_equal_reference']} / {n} "
            f"| {r['stock_prompts_equal']} / {r['prompts']} "
            f"| {r['stock_tokens_before_divergence']} / {n} "
            f"| {r['bfloat16_head_ties_maximum'] / n:.1%} | {r['bfloat16_head_agrees'] / n:.2%} |"
        )
        runs = [{"bound": "int8 per row, as decoded", "top": TOP, "positions": n, **r["rescored"]}]
        for b in runs + r["bounds"]:
            share = f"{b['read_share']:.1%}" if "read_share" in b else "-"
            bounds.append(
                f"| {name} | {dtype} | {b['bound']} | top {b['top']} | {b['positions']} "
                f"| {b['median']:,} | {b['p99']:,} | {b['max']:,} | {b['mean']:,.0f} | {share} |"
            )
    return "\n".join([*agreement, "", *bounds, ""])


def main() -> None:
    """Run what is missing and draw the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=Path, required=True, help="folder of GGUF files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--positions", type=int, default=512, help="for the table of bounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[tuple[str, str], Mapping[str, Any]] = {}
    for dtype in DTYPES:
        for name, file in MODELS.items():
            path = arguments.out / f"{name}.{dtype}.json"
            wanted = name in (arguments.only or MODELS) and dtype in (arguments.dtype or DTYPES)
            if wanted and not path.exists():
                folder = converted(arguments.models / file, arguments.out / name)
                print(f"{name}, {dtype}", file=sys.stderr)
                found = measure(folder, DTYPES[dtype], arguments)
                path.write_text(json.dumps(found, indent=1), encoding="utf-8")
            if path.exists():
                results[name, dtype] = json.loads(path.read_text(encoding="utf-8"))
            (arguments.out / "lossless.md").write_text(tables(results), encoding="utf-8")
    print(tables(results))


if __name__ == "__main__":
    main()
