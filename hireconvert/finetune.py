"""Stage: train the model so that it keeps its quality while selecting.

The student runs the selection it will run when decoding; the dense original, frozen, is the
teacher. Every random choice follows from the seed and the step, so a run continued from a
checkpoint gives the same weights as one that was never stopped.

Shape suffixes: W windows, T tokens of a window, B windows of a step, N rows, D width, F neurons.
"""

import copy
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from hireconvert.errors import InputError
from hireconvert.families import (
    FfnWeights,
    Layout,
    base_model,
    ffn_parts,
    num_layers,
    read_ffn_weights,
)
from hireconvert.lowbit import live_copies
from hireconvert.measures import head_logits, prove_logits
from hireconvert.objectives import LogitsLoss, feature_loss
from hireconvert.recipe import per_layer
from hireconvert.runtime.hire_predict import Predictor
from hireconvert.schema import FfnRecipe, FinetuneRecipe
from hireconvert.scoring import layer_counts
from hireconvert.student import Selection, Student, layer_outputs, selecting, trained_weights
from hireconvert.workspace import fsync_path, rename_durably

Progress = Callable[[int, int, str], None]
# (layer, weights, inputs to fit on, held-out inputs) -> (LAYER, predictor tensors)
Fit = Callable[
    [int, FfnWeights, torch.Tensor, torch.Tensor], tuple[dict[str, Any], dict[str, torch.Tensor]]
]
CHECKPOINT, PREDICTORS = "training.safetensors", "predictors.safetensors"
BETAS = (0.9, 0.95)
FIT_ROWS = 8192  # FFN inputs that predictors of the second half are fitted on
NUM_LOSSES = 100  # points of the loss curve in the report
GPU_WINDOWS = 8  # windows of one forward on an accelerator; a CPU gains nothing from more than one


def finetune(
    model: PreTrainedModel,
    layout: Layout,
    windows_WT: torch.Tensor,
    *,
    recipe: FinetuneRecipe,
    ffn: FfnRecipe,
    seed: int,
    checkpoint: Path | None = None,
    fit: Fit | None = None,
    progress: Progress = lambda step, steps, message: None,
) -> dict[str, Any]:
    """A report, after training `model` (float32) in place to keep its quality while selecting.

    `windows_WT` holds the token windows in the order of training, `step_windows` a step; the last
    ones that fill no step are left out. `checkpoint` is an existing folder that keeps the state of
    training: a run that finds one there continues from it. `fit` makes a layer's predictor and is
    needed where predictors select. `progress` is called with steps done, steps in all and the loss.
    Raises InputError where the loss would be of other logits than the model's, and at the first
    step whose loss is NaN or inf.
    """
    if recipe.loss.kl or recipe.loss.lm:
        with torch.no_grad():
            prove_logits(model, windows_WT)
    trainer = _Trainer(model, layout, windows_WT, recipe, ffn, seed)
    return trainer.run(checkpoint, fit, progress)


# --------------------------------------------------------------------------- what is trained


class _LowRankUpdate(nn.Module):
    """A frozen weight plus the product of two trained factors (LoRA, arXiv 2106.09685)."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        start = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        self.factor_in = nn.Parameter(start)
        self.factor_out = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.factor_out @ self.factor_in


@dataclass(frozen=True)
class _Plan:
    """Which windows a step takes and how it differs from the others."""

    steps: int
    recipe: FinetuneRecipe

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        warmup = max(1, round(self.recipe.warmup * self.steps))
        if step < warmup:
            return self.recipe.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def anneal(self, step: int) -> float:
        """How far the kept share has come from its start to the recipe's own, in [0, 1]."""
        length = round(self.recipe.anneal * self.steps)
        return 1.0 if step >= length else step / length

    @property
    def predicted_from(self) -> int:
        """The first step in which predictors select."""
        switch = {"oracle": self.steps, "predicted": 0, "oracle_then_predicted": self.steps // 2}
        return switch[self.recipe.mask]


# --------------------------------------------------------------------------- the run


class _Trainer:
    """One training run; its state is the trained weights, the moments and the step."""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        windows_WT: torch.Tensor,
        recipe: FinetuneRecipe,
        ffn: FfnRecipe,
        seed: int,
    ) -> None:
        self.layout, self.recipe, self.ffn, self.seed = layout, recipe, ffn, seed
        self.windows_WT = windows_WT
        self.plan = _Plan(len(windows_WT) // recipe.step_windows, recipe)
        self.accelerator = Accelerator()
        self.device = self.accelerator.device
        self.home = model.device
        self.model = model.to(self.device)
        count = num_layers(model)
        keeps = per_layer(ffn.keep_fraction, count, "ffn.keep_fraction")
        self.counts = [
            layer_counts(len(ffn_parts(model, layout, index).down_FD()), ffn, keep)
            for index, keep in enumerate(keeps)
        ]
        self.targets = trained_weights(model, layout, recipe.parameters)
        self.teacher = self._frozen_copy()
        self.parameters = self._make_trainable()
        decay = recipe.weight_decay
        optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=BETAS, weight_decay=decay, fused=True
        )
        self.optimizer: Any = self.accelerator.prepare(optimizer)
        self.losses: list[float] = []
        self.kept: list[float] = []  # mean share of neurons of each step
        self.step = 0

    def _frozen_copy(self) -> PreTrainedModel:
        """The original; weights that stay as they are are shared with the student."""
        weights = [getattr(module, name) for module, name in self.targets]
        trained = {id(weight) for weight in weights if not self._updated(weight)}
        shared = {id(p): p for p in self.model.parameters() if id(p) not in trained}
        teacher = copy.deepcopy(self.model, shared)
        return teacher.requires_grad_(False).eval()

    def _updated(self, weight: torch.Tensor) -> bool:
        """Whether a low-rank update is trained in the weight's place."""
        return self.recipe.lora_rank is not None and weight.dim() == 2

    def _make_trainable(self) -> list[nn.Parameter]:
        self.model.eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(self.seed)
        found: list[nn.Parameter] = []
        for module, name in self.targets:
            weight = getattr(module, name)
            if self._updated(weight):
                assert self.recipe.lora_rank is not None
                update = _LowRankUpdate(weight, self.recipe.lora_rank, generator).to(self.device)
                parametrize.register_parametrization(module, name, update, unsafe=True)
                found += list(update.parameters())
            else:
                found.append(weight.requires_grad_(True))
        return found

    def run(self, folder: Path | None, fit: Fit | None, progress: Progress) -> dict[str, Any]:
        recipe, plan = self.recipe, self.plan
        selection = Selection(recipe.anneal_from, self.windows_WT.shape[1])
        copies = live_copies(self.model, self.layout, self.ffn) if self.ffn.unselected else ()
        with selecting(self.model, self.layout, self.counts, selection, copies=copies) as student:
            if folder is not None and (folder / CHECKPOINT).exists():
                self._restore(folder, student)
            while self.step < plan.steps:
                if self.step >= plan.predicted_from and student.layers[0].predictor is None:
                    assert fit is not None, "predictors select, but nothing fits them"
                    self._fit_predictors(student, fit, folder)
                self._train_step(student)
                self.step += 1
                if folder is not None and self.step % recipe.checkpoint_steps == 0:
                    self._save(folder)
                progress(self.step, plan.steps, f"loss {self._recent_loss():.4f}")
        self._finish()
        return {
            "steps": plan.steps,
            "num_tokens": plan.steps * recipe.step_windows * self.windows_WT.shape[1],
            "num_trained": sum(parameter.numel() for parameter in self.parameters),
            "kept_share_mean": sum(self.kept) / len(self.kept) if self.kept else None,
            "loss_first": self.losses[0] if self.losses else None,
            "loss_last": self._recent_loss() if self.losses else None,
            "losses": _thinned(self.losses),
            "device": self.device.type,
        }

    def _recent_loss(self) -> float:
        recent = self.losses[-20:]
        return sum(recent) / len(recent)

    # ------------------------------------------------------------------- one step

    def _train_step(self, student: Student) -> None:
        recipe = self.recipe
        first = self.step * recipe.step_windows
        batch_BT = self.windows_WT[first : first + recipe.step_windows]
        selection = student.selection
        selection.progress = self.plan.anneal(self.step)
        chance = random.Random(f"{self.seed} {self.step}")
        selection.dense_prefix = int(
            chance.random() * recipe.dense_prefix * self.windows_WT.shape[1]
        )
        for layer in student.layers:
            layer.refresh()
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.learning_rate(self.step)
        total = 0.0
        size = 1 if self.device.type == "cpu" else GPU_WINDOWS
        for ids_BT in batch_BT.split(size):
            loss = self._loss(student, ids_BT.to(self.device)) * (len(ids_BT) / len(batch_BT))
            self.accelerator.backward(loss)
            total += float(loss.detach())
        if not math.isfinite(total):
            raise InputError(self._diverged(total))
        self.accelerator.clip_grad_norm_(self.parameters, recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(total)
        self.kept.append(student.kept_share())

    def _diverged(self, loss: float) -> str:
        last = f"was {self.losses[-1]:.4g} a step before" if self.losses else "came at once"
        return (
            f"the finetune diverged: its loss is {loss} at step {self.step + 1} of "
            f"{self.plan.steps} and {last}. Set a lower finetune.learning_rate (now "
            f"{self.recipe.learning_rate:g})"
            + (" or finetune.precision=float32." if self.recipe.precision != "float32" else ".")
        )

    def _autocast(self) -> Any:
        narrow = self.recipe.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=narrow)

    def _loss(self, student: Student, ids_BT: torch.Tensor) -> torch.Tensor:
        weights = self.recipe.loss
        theirs: list[torch.Tensor] = []
        student.outputs.clear()
        with self._autocast():
            with torch.no_grad(), layer_outputs(self.teacher, self.layout, theirs):
                teacher_ND = _hidden(self.teacher, ids_BT)
            student_ND = _hidden(self.model, ids_BT)
        total = student_ND.new_zeros((), dtype=torch.float32)
        if weights.kl or weights.lm:
            total = total + LogitsLoss(
                lambda x: head_logits(self.model, x),
                lambda x: head_logits(self.teacher, x),
                teacher_ND,
                ids_BT[:, 1:].flatten(),
                kl=weights.kl,
                lm=weights.lm,
                vocabulary=self.model.get_output_embeddings().weight.shape[0],
            ).mean(student_ND)
        if weights.features:
            total = total + weights.features * feature_loss(student.outputs, theirs)
        student.outputs.clear()
        return total

    # ------------------------------------------------------------------- predictors that select

    @torch.no_grad()
    def _fit_predictors(self, student: Student, fit: Fit, folder: Path | None) -> None:
        """Fit every layer's predictor on what the student's layers receive now; they stay so.

        They receive it while the recipe's own share is kept, whatever the step before it kept: a
        run that continues here has made no such step.
        """
        student.selection.progress, student.selection.dense_prefix = 1.0, 0
        rows: list[list[torch.Tensor]] = [[] for _ in student.layers]
        wanted = math.ceil(FIT_ROWS / self.windows_WT.shape[1])
        for layer in student.layers:
            layer.refresh()
            layer.wants_input = True
        for ids_T in self.windows_WT[:wanted]:
            student.outputs.clear()
            _hidden(self.model, ids_T[None].to(self.device))
            for found, layer in zip(rows, student.layers, strict=True):
                assert layer.input_ND is not None
                found.append(layer.input_ND.cpu())
        for layer in student.layers:
            layer.wants_input, layer.input_ND = False, None
        student.kept_share()  # these rows belong to no step
        tensors: dict[str, torch.Tensor] = {}
        specs = []
        for index, found in enumerate(rows):
            weights = read_ffn_weights(self.model, self.layout, index)
            x_ND = torch.cat(found)
            held = max(1, len(x_ND) // 8)
            spec, parts = fit(index, weights, x_ND[:-held], x_ND[-held:])
            specs.append(spec)
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in parts.items()}
        if folder is not None:
            _write(folder / PREDICTORS, tensors, {"specs": json.dumps(specs)})
            self._save(folder)
        self._use_predictors(student, specs, tensors)

    def _use_predictors(
        self, student: Student, specs: list[dict[str, Any]], tensors: dict[str, torch.Tensor]
    ) -> None:
        for index, (layer, spec) in enumerate(zip(student.layers, specs, strict=True)):
            prefix = f"layers.{index}."
            own = {
                name.removeprefix(prefix): tensor.to(self.device)
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            width = layer.parts.down_FD().shape[1]
            layer.predict_by(Predictor(spec["predictor"], own, width), spec)

    # ------------------------------------------------------------------- state on disk

    def _save(self, folder: Path) -> None:
        tensors = {}
        for index, parameter in enumerate(self.parameters):
            tensors[f"weight.{index}"] = parameter.detach()
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{index}"] = value
        facts = {"step": str(self.step)}
        facts |= {"losses": json.dumps(self.losses), "kept": json.dumps(self.kept)}
        _write(folder / CHECKPOINT, tensors, facts)

    def _restore(self, folder: Path, student: Student) -> None:
        tensors = load_file(folder / CHECKPOINT)
        with safe_open(folder / CHECKPOINT, "pt") as file:
            facts = file.metadata()
        self.step = int(facts["step"])
        self.losses, self.kept = json.loads(facts["losses"]), json.loads(facts["kept"])
        with torch.no_grad():
            for place, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"weight.{place}"])
        # A weight that the loss does not reach, such as the last norm's under features, has none.
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, index = key.partition(".")
            if name != "weight":
                state.setdefault(int(index), {})[name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.step >= self.plan.predicted_from and (folder / PREDICTORS).exists():
            with safe_open(folder / PREDICTORS, "pt") as file:
                specs = json.loads(file.metadata()["specs"])
            self._use_predictors(student, specs, load_file(folder / PREDICTORS))

    def _finish(self) -> None:
        """Merge low-rank updates and leave the model as a plain one where it was."""
        for module, name in self.targets:
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        self.model.requires_grad_(False)
        self.model.to(self.home)


def _hidden(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """What the head receives at every position that predicts a token, [N, D]."""
    output = base_model(model)(input_ids=ids_BT, use_cache=False)
    return output.last_hidden_state[:, :-1].flatten(0, 1)


def _write(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, str]) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, partial, facts)
    fsync_path(partial)
    rename_durably(partial, path)


def _thinned(losses: list[float]) -> list[float]:
    """At most NUM_LOSSES means over stretches of equal length."""
    length = max(1, math.ceil(len(losses) / NUM_LOSSES))
    parts = [losses[start : start + length] for start in range(0, len(losses), length)]
    return [round(sum(part) / len(part), 6) for part in parts]
