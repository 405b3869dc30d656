"""What a finetune bought: exact selection on the original's weights and on trained ones.

    python tools/evidence_finetune.py --model FOLDER --trained FOLDER --data DIR --out OUT.md \\
        [--keep 0.5 0.4] [--windows 4]

Texts: DIR/heldout_wiki.txt, DIR/heldout_c4.txt and sources of Python's standard library. Every
position selects by exact scores (the oracle); a row is a share of active neurons. All figures are
paired against the original dense model on the same windows; intervals are 95 %, bootstrapped over
windows. Shape suffixes: N rows (scored positions), D width, W windows, T tokens.
"""

import argparse
import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hireconvert.data import evaluation_windows
from hireconvert.evaluate import hidden_states
from hireconvert.families import find_layout, num_layers
from hireconvert.measures import PairedFigures, head_logits
from hireconvert.paired import perplexity_ratio
from hireconvert.schema import FfnRecipe
from hireconvert.scoring import layer_counts
from hireconvert.student import Selection, selecting

CHUNK = 128  # positions whose logits are held at once


def texts(data: Path) -> dict[str, str]:
    """Held-out text by name; the standard library is code that no training text here holds."""
    found = {name: (data / f"heldout_{name}.txt").read_text("utf-8") for name in ("wiki", "c4")}
    sources = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    found["stdlib"] = "\n\n".join(path.read_text("utf-8") for path in sources)
    return {name: text.replace("\n\n\n", "\n\n") for name, text in found.items()}


@contextlib.contextmanager
def oracle(model: Any, keep: float) -> Iterator[None]:
    """Every layer keeps the best `keep` of its neurons by exact score; 1 leaves the model dense."""
    if keep == 1:
        yield
        return
    layout = find_layout(model)
    neurons = model.config.intermediate_size
    counts = layer_counts(neurons, FfnRecipe(keep_fraction=keep), keep)
    with selecting(model, layout, [counts] * num_layers(model), Selection(keep, 1)):
        yield


@torch.no_grad()
def selected_states(model: Any, ids_WT: torch.Tensor, keep: float) -> torch.Tensor:
    """What the head receives, [N, D]."""
    with oracle(model, keep):
        return hidden_states(model, ids_WT)


@torch.no_grad()
def figures(
    model: Any, dense_ND: torch.Tensor, arm_ND: torch.Tensor, ids_WT: torch.Tensor
) -> dict[str, Any]:
    """Perplexity over the original's with its interval, mean KL, and agreement of arg-maxes."""
    target_N, own, arm = ids_WT[:, 1:].flatten(), PairedFigures(), PairedFigures()
    for start in range(0, len(target_N), CHUNK):
        rows = slice(start, start + CHUNK)
        dense_NV = head_logits(model, dense_ND[rows]).log_softmax(-1)
        arm_NV = head_logits(model, arm_ND[rows]).log_softmax(-1)
        own.add(dense_NV, dense_NV, target_N[rows])
        arm.add(dense_NV, arm_NV, target_N[rows])
    lengths = [ids_WT.shape[1] - 1] * len(ids_WT)
    report = arm.report(0)
    ratio = perplexity_ratio(report.nll_N.numpy(), own.report(0).nll_N.numpy(), lengths)
    return {"ratio": ratio, "kl": report.kl_mean, "same": report.top1_agreement}


def row(label: str, keep: float, found: dict[str, dict[str, Any]]) -> str:
    """One line of the table."""
    cells = []
    for each in found.values():
        ratio = each["ratio"]
        low, high = 100 * (ratio.low - 1), 100 * (ratio.high - 1)
        cells.append(f"{100 * (ratio.point - 1):+.2f} ({low:+.2f}, {high:+.2f})")
        cells.append(f"{each['kl']:.4f}")
        cells.append(f"{100 * each['same']:.1f}")
    return f"| {label} | {keep:g} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--model", "--trained", "--data", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.4])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (arguments.model, arguments.trained)
    ]
    windows = {
        name: evaluation_windows(text, tokenizer, num_tokens=1024 * arguments.windows).ids_WT
        for name, text in texts(arguments.data).items()
    }
    dense = {name: selected_states(models[0], ids_WT, 1.0) for name, ids_WT in windows.items()}
    tokens = {name: ids_WT.numel() for name, ids_WT in windows.items()}
    heads = [f"{name}: perplexity % (95 %) | KL | same top 1 %" for name in windows]
    lines = [
        f"Tokens: {tokens}. Against the original dense model.",
        "",
        "| weights | active | " + " | ".join(heads) + " |",
        "|---|--:|" + "--:|" * (3 * len(windows)),
    ]
    arms = [("trained", models[1], 1.0)]
    for keep in arguments.keep:
        arms += [("original", models[0], keep), ("trained", models[1], keep)]
    for label, model, keep in arms:
        found = {
            name: figures(models[0], dense[name], selected_states(model, ids_WT, keep), ids_WT)
            for name, ids_WT in windows.items()
        }
        lines.append(row(label, keep, found))
        print(lines[-1], flush=True)
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
