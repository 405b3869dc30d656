"""What each share of kept neurons costs, through the runtime that ships: perplexity, KL, agreement.

    hireconvert convert MODEL OUT --recipe RECIPE --set data.source=TEXT
    python tools/evidence_quality.py --model MODEL --converted OUT --data DIR --out TABLE.md \\
        [--keep 0.5 0.4] [--arms oracle dropped estimated] [--tokens 12288] [--label TEXT]
        [--texts wiki c4 stdlib chat]

Texts: DIR/heldout_wiki.txt, DIR/heldout_c4.txt, sources of Python's standard library, and `chat`,
answers that the dense model samples to prompts in its chat template. Selection is forced at every
position. `oracle`: the best neurons by exact score, others zero; `dropped`: the predictor's choice,
others zero; `estimated`: the predictor's choice, others by estimate, which is what a checkpoint
with `ffn.unselected` runs. A predictor does not depend on the share kept, so one checkpoint serves
every row; its numbers of neurons are set in memory. Where the number kept varies from row to row, a
checkpoint serves the share it was converted at (`kept` then has the mean of each text beside it);
at others it keeps a fixed number. All figures are paired against the dense model
on the same windows; intervals are 95 %, bootstrapped over windows. Rows already in TABLE.jsonl are
not measured again. Shape suffixes: N rows (scored positions), D width, W windows, T tokens.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from evidence_finetune import figures, selected_states, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import hireconvert
from hireconvert.data import evaluation_windows
from hireconvert.evaluate import hidden_states
from hireconvert.measures import hire_layers, hire_scope
from hireconvert.runtime.hire_predict import FFN_PARTS, layer_bytes, varies
from hireconvert.scoring import round_half_up

WEIGHT_BYTES = 2  # bytes are told as a share of a bfloat16 FFN
ARMS = ("oracle", "dropped", "estimated")
TEXTS = ("wiki", "c4", "stdlib", "chat")
ANSWER_TOKENS, ANSWERS = 200, 2  # at most, and how many to each prompt
PROMPTS = (
    "Explain how a refrigerator keeps food cold.",
    "Write a Python function that returns the second largest number of a list.",
    "Give me a packing list for three days in the mountains.",
    "What is the difference between a virus and a bacterium?",
    "Write a polite e-mail asking to move a meeting to Thursday.",
    "A train covers 150 km in 2.5 hours. What is its average speed? Show the steps.",
    "Tell a short story about a lighthouse keeper who finds a letter.",
    "Summarize the causes of the First World War in five sentences.",
    "How do I undo the last commit in git without losing my changes?",
    "Suggest three healthy breakfasts and say why they are healthy.",
    "Translate into French: The library opens at nine and closes at six.",
    "What should I look at before I buy a used bicycle?",
    "Write a haiku about rain and explain its form.",
    "Sort these words alphabetically: pear, apple, fig, cherry, banana.",
    "Explain recursion to a ten-year-old with an example.",
    "List the planets of the solar system from the largest to the smallest.",
)


@torch.no_grad()
def chat_windows(model: Any, tokenizer: Any, num_tokens: int, window: int) -> torch.Tensor:
    """int64 [W, T]: conversations one after the other, special tokens included; same for a seed."""
    torch.manual_seed(0)
    ids: list[int] = []
    for prompt in PROMPTS:
        message = [{"role": "user", "content": prompt}]
        prompt_1T = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        rows = model.generate(
            **prompt_1T,
            do_sample=True,
            temperature=1.0,
            top_k=50,
            max_new_tokens=ANSWER_TOKENS,
            num_return_sequences=ANSWERS,
            pad_token_id=tokenizer.eos_token_id,
        )
        ids += rows.flatten().tolist()
        if len(ids) >= num_tokens:
            break
    count = min(len(ids), num_tokens) // window
    return torch.tensor(ids[: count * window]).view(count, window)


def keep_share(model: Any, keep: float, *, estimated: bool) -> float:
    """Set every layer to keep this share; the FFN bytes of a token over those of a dense one."""
    read, dense = 0, 0
    for layer in hire_layers(model).values():
        layer.prepare()
        if not hasattr(layer, "full_estimate"):
            layer.full_estimate = layer.widened().estimate_FD
        rest = layer.full_estimate if estimated else None
        layer.prepared.widened = replace(layer.widened(), estimate_FD=rest)
        if not hasattr(layer, "own_spec"):
            layer.own_spec = dict(layer.spec)
        own, num_kept = layer.own_spec, round_half_up(keep * layer.spec["num_neurons"])
        if varies(own) and own["num_kept"] == num_kept:
            layer.spec |= own
        else:
            layer.spec |= {"num_kept": num_kept, "num_candidates": num_kept, "selection": None}
        spec = layer.spec if estimated else {**layer.spec, "unselected": None}
        matrices = 2 if layer.prepared.gate_FD is None else 3
        parts = layer_bytes(spec, layer.prepared.up_FD.shape[1], matrices, WEIGHT_BYTES)
        read += sum(parts[name] for name in FFN_PARTS)
        dense += parts["dense"]
    return read / dense


@torch.no_grad()
def sparse_states(model: Any, ids_WT: torch.Tensor, keep: float) -> tuple[torch.Tensor, float]:
    """(what the head receives with selection at every position, [N, D]; the mean share kept).

    Asserts that it ran.
    """
    model.hire_stats(reset=True)
    with hire_scope(model, "all"):
        states_ND = hidden_states(model, ids_WT)
    shares = []
    for index, counts in model.hire_stats()["layers"].items():
        spec = hire_layers(model)[index].spec
        shares.append(counts["kept"] / (counts["rows"] * spec["num_neurons"]))
        close = 0.5 * keep if varies(spec) else 0.01
        assert counts["dense_rows"] == 0 and abs(shares[-1] - keep) < close, counts
    return states_ND, sum(shares) / len(shares)


def table(rows: list[dict[str, Any]], tokens: int) -> str:
    """The rows as Markdown."""
    names = list(rows[0]["texts"])
    heads = " | ".join(f"{name}: perplexity % (95 %) | KL | same top 1 %" for name in names)
    lines = [
        f"Tokens a text: {tokens}. Against the dense original. Bytes of a bfloat16 FFN.",
        "",
        f"| weights | neurons | kept | FFN bytes % | {heads} |",
        "|---|---|--:|--:|" + "--:|" * (3 * len(names)),
    ]
    for row in rows:
        cells = []
        for found in row["texts"].values():
            cells.append("{:+.2f} ({:+.2f}, {:+.2f})".format(*found["percent"]))
            cells += [f"{found['kl']:.4f}", f"{100 * found['same']:.1f}"]
        share = "" if row["bytes"] is None else f"{100 * row['bytes']:.1f}"
        means = [found.get("kept", row["keep"]) for found in row["texts"].values()]
        kept = f"{row['keep']:g}"
        if any(abs(mean - row["keep"]) > 0.001 for mean in means):
            kept += f" ({', '.join(f'{mean:.3f}' for mean in means)})"
        lines.append(
            f"| {row['label']} | {row['arm']} | {kept} | {share} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--model", "--converted", "--data", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.4, 0.35, 0.3, 0.25, 0.2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS[:3]))
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--label", default="original")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    native = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model = hireconvert.load(arguments.converted, dtype=torch.float32).eval()
    windows = {
        name: evaluation_windows(
            text, tokenizer, num_tokens=arguments.tokens, window=arguments.window
        ).ids_WT
        for name, text in texts(arguments.data).items()
        if name in arguments.texts
    }
    if "chat" in arguments.texts:
        windows["chat"] = chat_windows(native, tokenizer, arguments.tokens, arguments.window)
    with torch.no_grad():
        dense = {name: hidden_states(native, ids_WT) for name, ids_WT in windows.items()}
    store = arguments.out.with_suffix(".jsonl")
    rows = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    for keep in arguments.keep:
        for arm in arguments.arms:
            if any((r["label"], r["arm"], r["keep"]) == (arguments.label, arm, keep) for r in rows):
                continue
            share, found = None, {}
            if arm != "oracle":
                share = keep_share(model, keep, estimated=arm == "estimated")
            for name, ids_WT in windows.items():
                if arm == "oracle":
                    states_ND, mean = selected_states(native, ids_WT, keep), keep
                else:
                    states_ND, mean = sparse_states(model, ids_WT, keep)
                each = figures(native, dense[name], states_ND, ids_WT)
                ratio = each.pop("ratio")
                percent = [100 * (value - 1) for value in (ratio.point, ratio.low, ratio.high)]
                found[name] = {"percent": percent, "kept": mean, **each}
            row = {"label": arguments.label, "arm": arm, "keep": keep, "bytes": share}
            rows.append({**row, "texts": found})
            with store.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
            arguments.out.write_text(table(rows, arguments.tokens))
            print(table(rows[-1:], arguments.tokens).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
