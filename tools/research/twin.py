"""What the research scripts share: the off-grid twin of a model, windows of text, masked runs.

Shape suffixes as in docs/design.md: N rows, D width, F neurons, M predictor outputs.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hireconvert.runtime.hire_predict import top_k_mask
from hireconvert.scoring import round_half_up

WINDOW = 1024
LOGIT_CHUNK = 256

Mask = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def load_twin(folder: Path) -> tuple[Any, Any]:
    """(model float32, tokenizer): the norm before each FFN folded into gate and up, set to one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval().requires_grad_(False)
    for layer in model.model.layers:
        gemma = hasattr(layer, "pre_feedforward_layernorm")
        norm = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
        factor = norm.weight + 1.0 if gemma else norm.weight.clone()
        layer.mlp.gate_proj.weight.mul_(factor)
        layer.mlp.up_proj.weight.mul_(factor)
        norm.weight.fill_(0.0 if gemma else 1.0)
    return model, AutoTokenizer.from_pretrained(folder)


def text_windows(tokenizer: Any, documents: list[str], count: int) -> torch.Tensor:
    """int64 [count, 1024 (+1 for BOS)]: documents joined by a blank line, cut without overlap."""
    prefix = tokenizer("a")["input_ids"][:1]
    starts = prefix if prefix == [tokenizer.bos_token_id] else []
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document + "\n\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= count * WINDOW:
            break
    if len(ids) < count * WINDOW:
        raise SystemExit(f"{len(ids)} tokens of text, {count * WINDOW} needed")
    rows = [starts + ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]
    return torch.tensor(rows)


def heldout_documents(path: Path) -> list[str]:
    """Documents of a plain text file that separates them by two blank lines."""
    return path.read_text(encoding="utf-8").split("\n\n\n")


def pool_documents(path: Path, seed: int = 0) -> list[str]:
    """The documents of one file of the finetune pool, shuffled."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    random.Random(seed).shuffle(documents)
    return documents


@contextmanager
def patched_ffn(model: Any, forward: Callable[[int, nn.Module, torch.Tensor], torch.Tensor]):
    """Every FFN of the model calls `forward(layer index, module, x)` inside the block."""
    modules = [layer.mlp for layer in model.model.layers]
    for index, module in enumerate(modules):
        module.forward = lambda x, i=index, m=module: forward(i, m, x)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def masked_ffn(mask: Mask) -> Callable[[int, nn.Module, torch.Tensor], torch.Tensor]:
    """A FFN that keeps the neurons `mask(layer, x_ND, scores_NF)` names (bool [N, F])."""

    def forward(index: int, module: Any, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        hidden = module.act_fn(module.gate_proj(rows)) * module.up_proj(rows)
        if not hasattr(module, "hire_norms"):
            module.hire_norms = module.down_proj.weight.norm(dim=0)
        keep = mask(index, rows, hidden.abs() * module.hire_norms)
        return module.down_proj(hidden * keep).view(x.shape)

    return forward


def oracle(keep: float) -> Mask:
    """The mask of the true top share of neurons."""
    return lambda _i, _x, scores: top_k_mask(scores, round_half_up(keep * scores.shape[1]))


def captured_inputs(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """The FFN inputs of the dense model, float32 [N, D] for each layer (BOS rows left out)."""
    inputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    skip = windows.shape[1] - WINDOW

    def forward(index: int, module: Any, x: torch.Tensor) -> torch.Tensor:
        inputs[index].append(x[:, skip:].reshape(-1, x.shape[-1]).clone())
        return type(module).forward(module, x)

    with patched_ffn(model, forward):
        for row in windows:
            model.model(input_ids=row[None], use_cache=False)
    return [torch.cat(parts) for parts in inputs]


def negative_log_likelihood(model: Any, windows: torch.Tensor) -> tuple[float, int]:
    """(mean negative log-likelihood, number of tokens predicted)."""
    total, count = 0.0, 0
    for row in windows:
        hidden = model.model(input_ids=row[None], use_cache=False).last_hidden_state[0]
        for start in range(0, len(row) - 1, LOGIT_CHUNK):
            stop = min(start + LOGIT_CHUNK, len(row) - 1)
            logits = model.lm_head(hidden[start:stop]).float()
            cap = getattr(model.config, "final_logit_softcapping", None)
            if cap:
                logits = torch.tanh(logits / cap) * cap
            target = row[start + 1 : stop + 1]
            total += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
            count += stop - start
    return total / count, count


def masked_likelihood(model: Any, windows: torch.Tensor, mask: Mask) -> tuple[float, int]:
    """As `negative_log_likelihood`, every FFN masked at every position."""
    with patched_ffn(model, masked_ffn(mask)):
        return negative_log_likelihood(model, windows)


def append_result(path: Path, record: dict[str, Any]) -> None:
    """Adds one JSON line to a file of results."""
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of results."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def save_plain(model: Any, tokenizer: Any, out: Path) -> None:
    """Write a dense model, even where it was read from a converted folder, which none converts."""
    for name in ("hire", "auto_map"):
        vars(model.config).pop(name, None)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Write the twin of a folder as a folder: `python tools/research/twin.py MODEL OUT`."""
    source, out = (Path(name) for name in sys.argv[1:])
    model, tokenizer = load_twin(source)
    save_plain(model, tokenizer, out)


if __name__ == "__main__":
    main()
