"""Stage: dense forward over the calibration tokens, keeping what each FFN and the head receive.

Shape suffixes: W windows, T tokens of a window, N kept rows, D width.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from hireconvert.families import Layout, base_model, ffn_parts, layer_owner, num_layers

HEAD_FILE = "head.safetensors"


def layer_file(index: int) -> str:
    """The name of one layer's file in the activations artifact."""
    return f"layer_{index:03d}.safetensors"


def load_rows(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The fit and held-out rows [N, D] of one layer file or of the head file."""
    with safe_open(folder / name, "pt") as file:
        return file.get_tensor("fit_ND"), file.get_tensor("held_ND")


class _Recorder:
    """Forward pre-hooks that append each caught input, removed when the block ends."""

    def __init__(self, targets: dict[str, nn.Module]) -> None:
        self.rows: dict[str, list[torch.Tensor]] = {name: [] for name in targets}
        self._targets = targets
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "_Recorder":
        for name, module in self._targets.items():
            self._hooks.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def catch(
            _module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
        ) -> None:
            x = (args or tuple(kwargs.values()))[0]
            self.rows[name].append(x.detach().reshape(-1, x.shape[-1]).cpu().clone())

        return catch

    def take(self) -> dict[str, torch.Tensor]:
        """Everything caught since the last call, as [N, D] by name."""
        taken = {name: torch.cat(rows) for name, rows in self.rows.items()}
        for rows in self.rows.values():
            rows.clear()
        return taken


def _targets(model: PreTrainedModel, layout: Layout | None, head: bool) -> dict[str, nn.Module]:
    targets: dict[str, nn.Module] = {}
    if layout is not None:
        for index in range(num_layers(model)):
            inline = not layout["ffn"]
            owner = layer_owner(model, layout, index)
            targets[layer_file(index)] = (
                ffn_parts(model, layout, index).up.module if inline else owner
            )
    if head:
        targets[HEAD_FILE] = model.get_output_embeddings()
    return targets


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    layout: Layout | None,
    fit_WT: torch.Tensor,
    held_WT: torch.Tensor,
    *,
    out: Path,
    head: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the inputs of every FFN (and of the head) to `out`, one safetensors file each.

    Each file holds `fit_ND` and `held_ND` in the model's dtype, one row a token, in order. A
    window runs at a time, so memory grows with the rows kept and not with the batch. `progress`
    is called with windows done and windows in all.
    """
    runner = model if head else base_model(model)
    total = fit_WT.shape[0] + held_WT.shape[0]
    with _Recorder(_targets(model, layout, head)) as recorder:
        parts: list[dict[str, torch.Tensor]] = []
        done = 0
        for windows_WT in (fit_WT, held_WT):
            for ids_T in windows_WT:
                runner(input_ids=ids_T[None].to(model.device), use_cache=False)
                done += 1
                progress(done, total)
            parts.append(recorder.take())
    fit, held = parts
    for name in fit:
        save_file(
            {"fit_ND": fit[name].contiguous(), "held_ND": held[name].contiguous()}, out / name
        )
