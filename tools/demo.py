"""What `make demo` runs: convert a small real model as a user would, measure it, print one table.

python tools/demo.py --model models/smollm2.gguf --out out/demo

Everything goes through the command line, but for the milliseconds, which need both models loaded
side by side. The table goes to stdout, progress to stderr.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hireconvert.loading import load
from hireconvert.timing import DecodeTime, Timed, time_decode

EVAL_TOKENS = 4096
PROMPT = "Explain in two sentences why the sky is blue."
SAMPLE_TOKENS = 64
TIMED_TOKENS, TIMED_ROUNDS = 32, 5
REPORT = """
{model}, recipe demo: converted in {seconds:.0f} s, measured on {num_scored:,} tokens of \
pydoc_data.topics

{table}

The bytes bound the speed-up at {bound:.2f}; decoding in float32 reached {measured:.2f} here.

> {prompt}
{sample}

The result is {out}. It loads with

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("{out}")"""


def hireconvert(*arguments: str) -> str:
    """Standard output of one command; its progress passes through."""
    print(f"$ hireconvert {' '.join(arguments)}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "hireconvert", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def decode_times(folder: Path) -> dict[str, DecodeTime]:
    """Milliseconds per token in float32: stock dense, the same checkpoint dense, and decoding."""
    print("$ timing dense and converted in turns", file=sys.stderr, flush=True)
    logging.disable_progress_bar()
    native = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    model = load(folder, dtype=torch.float32)
    prompt_1T = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    models = {
        "native": Timed(native.eval()),
        "dense": Timed(model, "off"),
        "converted": Timed(model, "decode"),
    }
    return time_decode(models, prompt_1T, num_tokens=TIMED_TOKENS, rounds=TIMED_ROUNDS)


def megabytes(count: float) -> str:
    """Bytes in MB (10^6)."""
    return f"{count / 1e6:.1f} MB"


def milliseconds(figure: DecodeTime) -> str:
    """Median and range."""
    return f"{figure.median_ms:.1f} ({figure.low_ms:.1f} to {figure.high_ms:.1f})"


def quality_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Perplexity, divergence, selection and head, with what they refer to."""
    dense, every, prefix = report["dense"], report["all"], report["all_prefix"]
    chosen, head = report["selection"], report["head"]
    selecting = f"all but the first {report['dense_prefix']} positions select"
    rows = [("perplexity, every position selects", dense, every)]
    rows += [(f"perplexity, {selecting}", dense, prefix)]
    table = [(name, f"{a['perplexity']:.3f}", f"{b['perplexity']:.3f}") for name, a, b in rows]
    return [
        *table,
        ("KL from dense, nats: mean, p99", "0", f"{every['kl_mean']:.4f}, {every['kl_p99']:.3f}"),
        ("same most likely token as dense", "100 %", f"{every['top1_agreement']:.1%}"),
        ("recall of the true top k: mean", "", f"{chosen['recall_mean']:.1%}"),
        (
            "recall in the worst layer",
            "",
            f"{chosen['recall_worst']:.1%} (layer {chosen['recall_worst_layer']})",
        ),
        ("neurons kept: mean", "100 %", f"{chosen['kept_mean']:.1%}"),
        (
            "neurons kept in the worst layer",
            "100 %",
            f"{chosen['kept_worst']:.1%} (layer {chosen['kept_worst_layer']})",
        ),
        ("head: best token is the reference's", "", f"{head['top1_agreement_reference']:.1%}"),
        (
            "head: rows computed, median, p99, max",
            "all",
            f"{head['rescored_median']:.0f}, {head['rescored_p99']:.0f}, {head['rescored_max']}",
        ),
    ]


def cost_rows(read: dict[str, Any], times: dict[str, DecodeTime]) -> list[tuple[str, str, str]]:
    """Bytes read and milliseconds taken for each decoded token."""
    parts = {"all weights": read, "FFN": read["ffn"], "head": read["head"]}
    rows = [
        (
            f"bytes read per token: {name}",
            megabytes(part["dense"]),
            f"{megabytes(part['converted'])} ({part['converted'] / part['dense']:.0%})",
        )
        for name, part in parts.items()
    ]
    native, dense, converted = times["native"], times["dense"], times["converted"]
    return [
        *rows,
        ("ms per token, float32", milliseconds(native), milliseconds(converted)),
        ("  the converted model run dense", "", milliseconds(dense)),
    ]


def table(rows: list[tuple[str, str, str]]) -> str:
    """Three aligned columns."""
    head = ("", "dense", "converted")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(3)]
    rule = "  ".join("-" * width for width in widths)
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join([lines[0], rule, *lines[1:]])


def main() -> None:
    """Convert, evaluate, sample, time, print."""
    parser = argparse.ArgumentParser(description="Convert a small real model and measure it.")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    arguments = parser.parse_args()
    out, start = arguments.out, time.perf_counter()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    convert = ("convert", str(arguments.model), str(out), "--recipe", "demo", "--overwrite")
    made = json.loads(hireconvert(*convert, "--json"))
    seconds = time.perf_counter() - start
    found = json.loads(hireconvert("eval", str(out), "--tokens", str(EVAL_TOKENS), "--json"))
    (report,) = found["texts"].values()
    sample = hireconvert("generate", str(out), "-p", PROMPT, "--max-new-tokens", str(SAMPLE_TOKENS))
    times = decode_times(out)
    rows = quality_rows(report) + cost_rows(made["bytes_per_token"], times)
    print(
        REPORT.format(
            model=arguments.model.stem,
            seconds=seconds,
            num_scored=report["num_scored"],
            table=table(rows),
            bound=made["bytes_per_token"]["speedup_bound"],
            measured=times["native"].median_ms / times["converted"].median_ms,
            prompt=PROMPT,
            sample=sample.strip(),
            out=out,
        )
    )


if __name__ == "__main__":
    main()
