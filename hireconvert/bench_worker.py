"""The process of one model of torch: loads it, decodes, times and writes logits when asked.

    python -m hireconvert.bench_worker

The first line on stdin says how to load (`subjects.TorchModel`), each further one what to do; each
is one JSON object and so is each answer. Output of libraries goes to stderr.

Shape suffixes: B sequences, T tokens, N rows, D width, V vocabulary.
"""

import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig

from hireconvert.errors import HireError, InputError
from hireconvert.families import base_model
from hireconvert.loading import load
from hireconvert.measures import head_logits, hire_layers, hire_scope
from hireconvert.roofline import counts_at
from hireconvert.runtime import hire_native
from hireconvert.runtime.hire_head import SparseHead
from hireconvert.runtime.hire_install import install_head
from hireconvert.subjects import STEPS
from hireconvert.timing import trace_decode

_PART_ROUNDS = 5
# Of a layer's spec, set by `counts_at`.
_COUNTED = ("num_kept", "num_candidates", "rows", "selection")
Request = Mapping[str, Any]


# --------------------------------------------------------------------------- loading


def _native(opening: Request) -> Any:
    """The model through Transformers' own class: of a converted folder, its dense view."""
    auto: Any = AutoModelForCausalLM  # its typing knows no other result
    return auto.from_pretrained(
        opening["folder"],
        dtype=getattr(torch, opening["dtype"]),
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
    ).eval()


def _converted(opening: Request) -> Any:
    """The converted model with what it derives from its weights."""
    model: Any = load(Path(opening["folder"]), dtype=getattr(torch, opening["dtype"]))
    model.hire_prepare()
    return model


def _by_torchao(model: Any, form: str) -> None:
    """Weights in a format of torchao, in place. Raises InputError where it is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise InputError("torchao is not installed")
    quantization: Any = importlib.import_module("torchao.quantization")
    configs = {"int8": "Int8WeightOnlyConfig", "int4": "Int4WeightOnlyConfig"}
    quantization.quantize_(model, getattr(quantization, configs[form])())


def memory_bytes() -> dict[str, int | None]:
    """`resident` and `peak` of this process; None where the system does not tell."""
    found: dict[str, int | None] = {"resident": None, "peak": None}
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        for name, key in (("resident", "VmRSS:"), ("peak", "VmHWM:")):
            if line.startswith(key):
                found[name] = 1024 * int(line.split()[1])
    return found


class Served:
    """A loaded model and what can be asked of it; each request names the method in `do`."""

    def __init__(self, opening: Request) -> None:
        torch.set_num_threads(opening["threads"])
        self.before = memory_bytes()["resident"]
        start = time.perf_counter()
        self.hire = opening["kind"] == "hire"
        if self.hire:
            self.model = _converted(opening)
        else:
            self.model = _native(opening)
        if opening["torchao"] is not None:
            _by_torchao(self.model, opening["torchao"])
        self.load_ms = 1000 * (time.perf_counter() - start)
        self.options = _compiled() if opening["compiled"] else {}
        self.ways = Ways(self.model) if self.hire else None

    @property
    def facts(self) -> dict[str, Any]:
        """What the parent hears first."""
        return {
            "load_ms": self.load_ms,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            **self._native_path(),
        }

    def _native_path(self) -> dict[str, Any]:
        """`path`: what of the library decodes, None for nothing; `step`: whether whole steps do."""
        found: dict[str, Any] = {"path": None, "step": False}
        if not self.hire:
            return found
        ffns = hire_native.path(hire_layers(self.model).values())
        if ffns.startswith("native"):
            found["path"] = ffns
        step: Any = base_model(self.model).hire_step
        if step.reason is None:
            found = {"path": step.path(base_model(self.model)), "step": True}
        return found

    def decode(self, request: Request) -> dict[str, Any]:
        """Times of a decode, greedy where nothing is said of `sampling`."""
        ids_T, batch, num_tokens = request["ids"], request["batch"], request["num_tokens"]
        way, sampling = request["way"], request["sampling"]
        if self.ways is not None:
            self.ways.use(way)
        prompt_BT, options = torch.tensor([ids_T] * batch), dict(self.options)
        if sampling is not None:
            torch.manual_seed(0)
            options |= {"do_sample": True, **sampling}
        trace = trace_decode(self.model, prompt_BT, num_tokens, **options)
        if self.ways is not None:
            # Settings may ask for more rows than the head certifies.
            checked = way if sampling is None else {**way, "head": False}
            self.ways.require_sparse(checked, batch * (num_tokens - 1))
        return {"first_ms": trace.first_ms, "token_ms": trace.token_ms}

    @torch.no_grad()
    def logits(self, request: Request) -> dict[str, Any]:
        """Writes float32 [T, V]; a converted model selects at every position."""
        way, ids_1T = request["way"], torch.tensor([request["ids"]])
        if self.ways is not None:
            self.ways.use(way)
            with hire_scope(self.model, "all" if way["ffn"] else "off"):
                hidden_1TD = base_model(self.model)(input_ids=ids_1T, use_cache=False)[0]
            with hire_scope(self.model, "all" if way["head"] else "off", head=True):
                logits_TV = head_logits(self.model, hidden_1TD[0])
        else:
            logits_TV = self.model(input_ids=ids_1T, use_cache=False).logits[0].float()
        logits_TV.numpy().tofile(request["path"])
        return {"rows": logits_TV.shape[0], "vocabulary": logits_TV.shape[1]}

    @torch.no_grad()
    def parts(self, request: Request) -> dict[str, Any]:
        """Milliseconds of all FFNs and of the head, each alone, for the prompt's last row."""
        way, ids_1T = request["way"], torch.tensor([request["ids"]])
        assert self.ways is not None
        self.ways.use(way)
        with hire_scope(self.model, "off"):
            hidden_1TD = base_model(self.model)(input_ids=ids_1T, use_cache=False)[0]
        x_1D = hidden_1TD[0, -1:]
        layers, head = hire_layers(self.model).values(), self.model.get_output_embeddings()
        with hire_scope(self.model, "all" if way["head"] else "off", head=True):
            head_ms = _fastest_ms(lambda: head(x_1D))
        if not layers:
            return {"ffn_ms": None, "head_ms": head_ms}

        def ffns() -> None:
            for layer in layers:
                layer(x_1D, None) if way["ffn"] else layer.dense(x_1D)

        return {"ffn_ms": _fastest_ms(ffns), "head_ms": head_ms}

    @torch.no_grad()
    def step(self, request: Request) -> dict[str, Any]:
        """Median milliseconds of steps of some rows, whatever number the model would select for."""
        rows, ids_1T = request["rows"], torch.tensor([request["ids"]])
        alike = (1, rows) if request["kind"] == "positions" else (rows, 1)
        ids = ids_1T[:, -1:].expand(alike).contiguous()
        if self.ways is not None:
            self.ways.use(request["way"])
        with _selecting(self.model, rows) if self.ways is not None else nullcontext():
            cache = self.model(input_ids=ids_1T, use_cache=True, logits_to_keep=1).past_key_values
            if request["kind"] == "sequences":
                cache.batch_repeat_interleave(rows)
            spent = []
            for _ in range(STEPS):
                start = time.perf_counter()
                self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                spent.append(1000 * (time.perf_counter() - start))
        return {"ms": statistics.median(spent[1:])}

    def memory(self, _: Request) -> dict[str, Any]:
        """Bytes of this process."""
        return {"before": self.before, **memory_bytes()}


def _fastest_ms(run: Callable[[], Any]) -> float:
    """The least of several runs, after one that is not counted."""
    run()
    spent = []
    for _ in range(_PART_ROUNDS):
        start = time.perf_counter()
        run()
        spent.append(1000 * (time.perf_counter() - start))
    return min(spent)


@contextmanager
def _selecting(model: Any, rows: int) -> Iterator[None]:
    """Inside, steps of so many rows select."""
    state = model.hire_state
    before = state.max_decode_queries, state.max_sparse_rows
    state.max_decode_queries, state.max_sparse_rows = (max(each, rows) for each in before)
    try:
        yield
    finally:
        state.max_decode_queries, state.max_sparse_rows = before


def _compiled() -> dict[str, Any]:
    """Options of `generate` that decode through torch.compile on any device."""
    config: Any = CompileConfig(mode="default")
    config._compile_all_devices = True  # else only accelerators compile
    return {"cache_implementation": "static", "compile_config": config}


# --------------------------------------------------------------------------- ways to run


class Ways:
    """Switches a converted model between ways to run it (`subjects.Way`)."""

    def __init__(self, model: Any) -> None:
        self.model, self.state = model, model.hire_state
        self.most_queries = self.state.max_decode_queries
        self.counts = {
            index: {name: layer.spec[name] for name in _COUNTED if name in layer.spec}
            for index, layer in hire_layers(model).items()
        }
        own = getattr(model.get_output_embeddings(), "hire", None)
        self.heads: dict[str, Any] = {"null": own}

    def use(self, way: Request) -> None:
        """Run so from here on."""
        if way["ffn"]:
            self._keep(way["keep"])
        if way["head"]:
            self._use_head(way["head_spec"])
        scope = "decode" if way["ffn"] or way["head"] else "off"
        # A step of more queries than this runs its FFNs dense, whatever the head does.
        self.state.max_decode_queries = self.most_queries if way["ffn"] else 0
        self.model.set_hire_scope(scope, head=way["head"])
        self.model.hire_stats(reset=True)

    def _keep(self, keep: float | None) -> None:
        """Let every FFN compute this share of its neurons."""
        for index, layer in hire_layers(self.model).items():
            counts = dict(self.counts[index])
            if keep is not None:
                counts = counts_at({**layer.spec, **counts}, keep)
            layer.spec |= counts
        self.model.hire_prepare()

    def _use_head(self, spec: Mapping[str, Any] | None) -> None:
        head, key = self.model.get_output_embeddings(), json.dumps(spec, sort_keys=True)
        if key not in self.heads:
            cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
            if hasattr(head, "hire"):
                self.heads[key] = SparseHead(spec or {}, cap)
            else:
                install_head(head, spec or {}, cap, self.state)
                self.heads[key] = head.hire
        head.hire = self.heads[key]
        # generate() asks the configuration whether the certificate covers its settings.
        self.model.config.hire["head"] = dict(head.hire.spec)
        self.model.hire_prepare()

    def require_sparse(self, way: Request, rows: int) -> None:
        """Raise InputError unless the counters show that what should select did."""
        stats = self.model.hire_stats()
        counts = {f"FFN layer {index}": each for index, each in stats["layers"].items()}
        counts = counts if way["ffn"] else {}
        if way["head"]:
            counts["the head"] = stats["head"]
        for name, each in counts.items():
            if rows <= self.most_rows and each["rows"] - each["dense_rows"] < rows:
                raise InputError(
                    f"{name} selected in {each['rows'] - each['dense_rows']} of {rows} rows, so "
                    "its speed was not measured. Run `hireconvert verify` on the folder."
                )

    @property
    def most_rows(self) -> int:
        """Rows at once of which the model still selects."""
        return int(self.state.max_sparse_rows)


# --------------------------------------------------------------------------- the process


def main() -> None:
    """Answer lines until there are no more; an error of the user's ends the process."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not get among the answers

    def answer(found: Mapping[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    try:
        served = Served(json.loads(sys.stdin.readline()))
        answer(served.facts)
        for line in sys.stdin:
            request = json.loads(line)
            answer(getattr(served, request["do"])(request))
    except HireError as error:
        answer({"error": str(error)})
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
