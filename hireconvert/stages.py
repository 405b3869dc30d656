"""The stages of a conversion: each reads artifacts, runs one module and leaves an artifact.

source -> tokens -> [rule, budget and finetune, in files of their own] -> activations -> predictors
(one artifact a layer) -> [attention, of 4 bits] -> export -> evaluation
"""

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hireconvert.attention import fit_attention, fitted_names, round_attention
from hireconvert.calibrate import HEAD_FILE, calibrate, layer_file, load_rows
from hireconvert.checkpoint import DenseCheckpoint
from hireconvert.data import (
    EvalWindows,
    TokenData,
    build_tokens,
    load_tokens,
    save_tokens,
)
from hireconvert.distill import distill_layer
from hireconvert.distill_head import distill_head
from hireconvert.evaluate import evaluate_model
from hireconvert.export import Conversion, hire_dict, needs_resharding, write_model
from hireconvert.families import (
    Layout,
    base_model,
    find_layout,
    num_layers,
    permute_ffn,
    read_ffn_weights,
)
from hireconvert.loading import load
from hireconvert.planning import Skeleton
from hireconvert.recipe import Recipe, per_layer
from hireconvert.rounding import round_ffn
from hireconvert.runtime.hire_predict import is_rounded
from hireconvert.sampling import sample_from_model
from hireconvert.workspace import Workspace, write_json

RESULT, TENSORS, PERMUTATION = "result.json", "predictor.safetensors", "permutation.safetensors"
Prints = Mapping[str, Mapping[str, Any]]


class Reporter(Protocol):
    """Where progress goes: cli.py shows bars or lines, tests nothing."""

    def note(self, message: str) -> None:
        """One line for the user."""

    def stage(self, title: str, total: int | None = None) -> AbstractContextManager["Advance"]:
        """A stage of `total` steps; the value is called once a step."""


class Advance(Protocol):
    """Counts one step of a stage."""

    def __call__(self, detail: str = "") -> None:
        """Count it and show the detail, if any: a figure that changes while the stage runs."""


@dataclass
class Run:
    """One conversion in progress."""

    recipe: Recipe
    space: Workspace
    checkpoint: DenseCheckpoint
    skeleton: Skeleton
    hire: Mapping[str, Any]
    reporter: Reporter
    timings: dict[str, float] = field(default_factory=dict)
    trained: Path | None = None  # a dense folder that took the place of the source's weights

    @property
    def weights(self) -> DenseCheckpoint:
        """What is converted: the source, or the weights trained from it."""
        if self.trained is None:
            return self.checkpoint
        return replace(self.checkpoint, folder=self.trained)

    def use_weights(self, folder: Path) -> None:
        """Go on with the weights in `folder`."""
        self.trained = folder
        self.release()

    def release(self) -> None:
        """Free the model's memory; it is loaded anew when asked for."""
        for name in ("model", "layout"):
            self.__dict__.pop(name, None)
        _return_memory()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The dense model in float32: what statistics are taken on."""
        return self.weights.load_model(dtype=torch.float32)

    @cached_property
    def layout(self) -> Layout:
        """Where the FFN parts lie, proved on the weights."""
        return find_layout(self.model)

    @property
    def low_rank_head(self) -> bool:
        """Whether the head needs hidden states."""
        return self.recipe.head is not None and self.recipe.head.kind == "lr"

    @contextmanager
    def stage(
        self, name: str, fingerprint: Mapping[str, Any], title: str, total: int | None = None
    ) -> Iterator[tuple[Path, Advance]]:
        """The folder of an artifact being built and the callable that counts a step."""
        start = time.perf_counter()
        with (
            self.space.building(name, fingerprint) as folder,
            self.reporter.stage(title, total) as advance,
        ):
            yield folder, advance
        self.timings[name] = round(time.perf_counter() - start, 3)


def _return_memory() -> None:
    """Give back to the system what is free.

    What trained a model refers to itself, and is as large; and glibc keeps a pool for each thread,
    of which weights that other threads will load get nothing.
    """
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def make_tokens(run: Run, fingerprint: Mapping[str, Any]) -> TokenData:
    if run.space.is_done("tokens", fingerprint):
        return load_tokens(run.space.path("tokens"))
    recipe, tokenizer = run.recipe, run.checkpoint.load_tokenizer()
    total = 1000
    with run.stage("tokens", fingerprint, "calibration text", total) as (folder, advance):
        progress = steps(advance, total)

        def sample(count: int, seed: int) -> torch.Tensor:
            return sample_from_model(run.model, tokenizer, count, seed=seed, progress=progress)

        tokens = build_tokens(
            recipe.data, tokenizer, seed=recipe.seed, sample=sample, progress=progress
        )
        save_tokens(tokens, folder)
    return load_tokens(run.space.path("tokens"))


def steps(advance: Advance, total: int) -> Callable[..., None]:
    """A callback for (done, of all, detail) reports: at most `total` steps, never back."""
    shown = 0

    def progress(done: int, of: int, detail: str = "") -> None:
        nonlocal shown
        reached = done * total // max(of, 1)
        while shown < reached:
            shown += 1
            advance(detail if shown == reached else "")

    return progress


def _activations(run: Run, fingerprint: Mapping[str, Any], tokens: TokenData) -> Path:
    if not run.space.is_done("activations", fingerprint):
        total = len(tokens.fit_WT) + len(tokens.held_WT)
        layout = run.layout if run.hire["ffn"] else None
        title = "activations"
        with run.stage("activations", fingerprint, title, total) as (folder, advance):
            calibrate(
                run.model,
                layout,
                tokens.fit_WT,
                tokens.held_WT,
                out=folder,
                head=run.low_rank_head,
                progress=steps(advance, total),
            )
    return run.space.path("activations")


@dataclass(frozen=True)
class Fitted:
    """A finished predictor artifact, read back."""

    spec: dict[str, Any]
    report: dict[str, Any]
    layout: Layout | None  # as proved on the weights; None for the head
    tensors: dict[str, torch.Tensor]
    permutation_F: torch.Tensor | None


def read_fitted(folder: Path) -> Fitted:
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    path = folder / PERMUTATION
    permutation = load_file(path)["permutation_F"] if path.exists() else None
    tensors = load_file(folder / TENSORS)
    return Fitted(result["spec"], result["report"], result["layout"], tensors, permutation)


def fit_predictors(run: Run, prints: Prints, tokens: TokenData) -> list[Fitted]:
    if run.hire["ffn"] is None:
        return []
    count = num_layers(run.skeleton.model)
    names = [f"predictors/layer_{index:03d}" for index in range(count)]
    missing = [i for i, n in enumerate(names) if not run.space.is_done(n, prints["predictors"])]
    if missing:
        activations = _activations(run, prints["activations"], tokens)
        with run.reporter.stage("predictors", count) as advance:
            for index in range(count):
                if index in missing:
                    _fit_layer(run, prints["predictors"], activations, names[index], index)
                advance()
    return [read_fitted(run.space.path(name)) for name in names]


def _fit_layer(
    run: Run, fingerprint: Mapping[str, Any], activations: Path, name: str, index: int
) -> None:
    ffn, count = run.recipe.ffn, num_layers(run.model)
    assert ffn is not None
    start = time.perf_counter()
    fit_ND, held_ND = load_rows(activations, layer_file(index))
    result = distill_layer(
        read_ffn_weights(run.model, run.layout, index),
        fit_ND.float(),
        held_ND.float(),
        ffn,
        per_layer(ffn.predictor, count, "ffn.predictor")[index],
        per_layer(ffn.keep_fraction, count, "ffn.keep_fraction")[index],
        seed=run.recipe.seed + index,
        ordered=run.trained is not None,
    )
    with run.space.building(name, fingerprint) as folder:
        save_file({key: t.contiguous() for key, t in result.tensors.items()}, folder / TENSORS)
        if result.permutation_F is not None:
            save_file({"permutation_F": result.permutation_F.contiguous()}, folder / PERMUTATION)
        facts = {"spec": result.spec, "report": result.report, "layout": run.layout}
        write_json(folder / RESULT, facts)
    run.timings[name] = round(time.perf_counter() - start, 3)


def fit_head(run: Run, prints: Prints, tokens: TokenData) -> Fitted | None:
    """The subspace of a low-rank head; other heads need nothing measured."""
    recipe, name = run.recipe.head, "predictors/head"
    if recipe is None or not run.low_rank_head:
        return None
    fingerprint = {**prints["activations"], "head": recipe.model_dump(mode="json")}
    if not run.space.is_done(name, fingerprint):
        activations = _activations(run, prints["activations"], tokens)
        with run.stage(name, fingerprint, "head") as (folder, _):
            fit_ND, held_ND = load_rows(activations, HEAD_FILE)
            weight_VD = run.model.get_output_embeddings().weight.detach()
            tensors, report = distill_head(weight_VD, fit_ND, held_ND, recipe)
            save_file(tensors, folder / TENSORS)
            facts = {"spec": run.hire["head"], "report": report, "layout": None}
            write_json(folder / RESULT, facts)
    return read_fitted(run.space.path(name))


def fit_attention_codes(run: Run, fingerprint: Mapping[str, Any], tokens: TokenData) -> None:
    """The attention's matrices of 4 bits as an artifact, a file a layer, if there are any."""
    attention, name = run.hire["attention"], "attention"
    if not fitted_names(attention) or run.space.is_done(name, fingerprint):
        return
    total = len(tokens.fit_WT) + num_layers(run.model)
    with run.stage(name, fingerprint, name, total) as (folder, advance):
        progress = steps(advance, total)
        layers = fit_attention(run.model, run.layout, attention, tokens.fit_WT, progress)
        for index, fitted in layers:
            save_file(fitted, folder / layer_file(index))


def export_model(
    run: Run, fingerprint: Mapping[str, Any], results: list[Fitted], head: Fitted | None
) -> Path:
    """The folder that loads, without its documents yet."""
    if not run.space.is_done("export", fingerprint):
        with run.stage("export", fingerprint, "writing the model") as (folder, _):
            tensors = {
                f"layers.{index}.{name}": tensor
                for index, result in enumerate(results)
                for name, tensor in result.tensors.items()
            }
            hire = hire_dict(
                run.recipe,
                layout=results[0].layout if results else None,
                layers=[result.spec for result in results] or None,
                head=run.hire["head"],
                attention=run.hire["attention"],
            )
            model: Any = run.skeleton.model
            conversion = Conversion(
                source=run.weights.folder,
                model_class=type(model),
                base_class=type(base_model(model)),
                hire=hire,
                tensors={**tensors, **(head.tensors if head else {})},
                rewritten=_rewritten(run, results),
            )
            (folder / "model").mkdir()
            shard_gb = run.recipe.output.max_shard_gb
            write_model(conversion, folder / "model", max_shard_gb=shard_gb)
    return run.space.path("export") / "model"


def _rewritten(run: Run, results: list[Fitted]) -> PreTrainedModel | None:
    """The model in its stored dtype, reordered and rounded; None when files can be copied."""
    moved = [index for index, result in enumerate(results) if result.permutation_F is not None]
    rounded = [index for index, result in enumerate(results) if is_rounded(result.spec)]
    attention = run.hire["attention"]
    large = needs_resharding(run.weights.folder, run.recipe.output.max_shard_gb)
    if not (moved or rounded or attention or large):
        return None
    model = run.weights.load_model()
    for index in sorted({*moved, *rounded}):
        result = results[index]
        assert result.layout is not None
        if result.permutation_F is not None:
            permute_ffn(model, result.layout, index, result.permutation_F)
        if is_rounded(result.spec):
            round_ffn(model, result.layout, index, result.spec, result.tensors)
    if attention:
        assert results[0].layout is not None
        round_attention(model, results[0].layout, attention, _fitted_attention(run))
    return model


def _fitted_attention(run: Run) -> Callable[[int], dict[str, torch.Tensor]]:
    """What `fit_attention_codes` left of a layer."""
    if not fitted_names(run.hire["attention"]):
        return lambda index: {}
    folder = run.space.path("attention")
    return lambda index: load_file(folder / layer_file(index))


def evaluate_export(
    run: Run, fingerprint: Mapping[str, Any], folder: Path, tokens: TokenData | None
) -> dict[str, Any] | None:
    """Figures on held-out windows, in float32; None without any, or when the recipe skips it.

    They are against the dense view, or against the source where the weights are others.
    """
    wanted = run.recipe.evaluate.num_tokens
    if tokens is None or wanted == 0:
        return None
    if not run.space.is_done("evaluation", fingerprint):
        total = 100
        with run.stage("evaluation", fingerprint, "evaluation", total) as (artifact, advance):
            ids_WT = tokens.held_WT[: max(1, wanted // tokens.held_WT.shape[1])]
            scored = ids_WT.shape[0] * (ids_WT.shape[1] - 1)
            windows = EvalWindows(ids_WT, scored, tokens.text_sha256)
            run.release()
            baseline = None
            if run.trained is not None or run.recipe.rounds_weights:
                baseline = run.checkpoint.load_model(dtype=torch.float32)
            model = load(folder, dtype=torch.float32)
            report = evaluate_model(model, baseline, windows, progress=steps(advance, total))
            write_json(artifact / RESULT, {**report.to_dict(), "dtype": "float32"})
    result: dict[str, Any] = json.loads(
        (run.space.path("evaluation") / RESULT).read_text(encoding="utf-8")
    )
    return result
