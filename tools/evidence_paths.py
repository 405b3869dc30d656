"""One converted model by every path, teacher-forced: how often the best token differs, and the KL.

    python tools/evidence_paths.py CONVERTED --dense MODEL --text TEXT [--tokens 1024]

Paths: the native step, FFN and head kernels under PyTorch (`step=False`), PyTorch alone, and all
positions at once (scope `all`), in bfloat16 and float32; beside them the dense model token by token
and at once, which shows what the same change of arithmetic does where nothing is selected. A path
is compared with the same model at once in the same type, and with that in float32. Shape suffixes:
T tokens, V vocabulary.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hireconvert.loading import load

DTYPES = (torch.float32, torch.bfloat16)


@torch.no_grad()
def stepwise(model: Any, ids_T: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 [T - 1, V], each token decoded behind a prompt of one."""
    cache, rows = None, []
    for place in range(len(ids_T) - 1):
        out = model(ids_T[None, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1].float())
    return torch.stack(rows).log_softmax(-1)


@torch.no_grad()
def at_once(model: Any, ids_T: torch.Tensor) -> torch.Tensor:
    """The same from one call."""
    return model(ids_T[None, :-1], use_cache=False).logits[0].float().log_softmax(-1)


def path(model: Any, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """How a converted model runs a path."""

    def run(ids_T: torch.Tensor) -> torch.Tensor:
        os.environ["HIRE_NATIVE"] = "off" if name == "PyTorch" else ""
        model.set_hire_scope("all" if name == "at once" else "decode", step=name == "native step")
        model.hire_prepare()
        model.hire_stats(reset=True)
        found = (at_once if name == "at once" else stepwise)(model, ids_T)
        rows = model.hire_stats()["ffn"]["rows"]
        # The prompt of one token is a prefill, which runs densely.
        assert rows == model.config.num_hidden_layers * (len(ids_T) - 1 - (name != "at once"))
        return found

    return run


def compared(found_TV: torch.Tensor, other_TV: torch.Tensor) -> str:
    """`differing of all (KL)`, the first token of all left out."""
    found_TV, other_TV = found_TV[1:], other_TV[1:]
    differ = int((found_TV.argmax(-1) != other_TV.argmax(-1)).sum())
    kl = F.kl_div(found_TV, other_TV, log_target=True, reduction="batchmean")
    return f"{differ} of {len(found_TV):,} ({float(kl):.1e})"


def main(argv: Sequence[str] | None = None) -> None:
    """Run every path; the table goes to stdout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("converted", type=Path)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.converted)
    text = options.text.read_text(encoding="utf-8")[: 16 * options.tokens]
    ids_T = torch.tensor(tokenizer(text)["input_ids"])[: options.tokens + 1]
    print("| model, path | type | other best token than at once (KL) | than at once in float32 |")
    print("|---|---|--:|--:|")
    truth: dict[str, torch.Tensor] = {}
    for dtype in DTYPES:
        dense: Any = AutoModelForCausalLM.from_pretrained(options.dense, dtype=dtype).eval()
        ways: dict[tuple[str, str], Callable[[torch.Tensor], torch.Tensor]] = {
            ("dense", "at once"): lambda ids_T, model=dense: at_once(model, ids_T),
            ("dense", "PyTorch"): lambda ids_T, model=dense: stepwise(model, ids_T),
        }
        model = load(options.converted, dtype=dtype)
        for name in ("at once", "PyTorch", "kernels", "native step"):
            ways["converted", name] = path(model, name)
        base: dict[str, torch.Tensor] = {}
        for (kind, name), run in ways.items():
            found_TV = run(ids_T)
            base.setdefault(kind, found_TV)
            truth.setdefault(kind, found_TV)
            cells = [compared(found_TV, base[kind]), compared(found_TV, truth[kind])]
            print(f"| {kind}, {name} | {str(dtype)[6:]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
