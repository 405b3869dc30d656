"""The models of a measurement: which are loaded, in which ways each is run, what that reads.

Shape suffixes: T tokens of a prompt.
"""

import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hireconvert.accounting import TensorTable, head_entry
from hireconvert.arms import Arm, fastest_threads
from hireconvert.checkpoint import open_checkpoint
from hireconvert.errors import InputError
from hireconvert.inspection import dense_table
from hireconvert.loading import native_config, read_config
from hireconvert.roofline import DTYPES, way_bytes
from hireconvert.subjects import LlamaSubject, Subject, TorchModel, TorchSubject, Way

DENSE, OWN_DENSE, BOTH = "dense", "converted, nothing sparse", "converted"


@dataclass(frozen=True)
class Request:
    """What to measure; the first batch and context make the main table, all of them the growth."""

    baseline: str | None = None  # Hub id, folder or GGUF; None: the folder's own dense view
    rivals: tuple[Path, ...] = ()
    threads: int | None = None
    dtype: str | None = None  # None: as stored
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (64,)
    num_tokens: int = 32
    rounds: int = 5
    kl_tokens: int = 1024  # 0: quality is not measured
    text: Path | None = None
    compiled: bool = True


@dataclass
class Session:
    """The models that are loaded, the ways to run them, and what could not be loaded."""

    folder: Path
    dense: Path
    request: Request
    dtype: str
    threads: int
    hire: Mapping[str, Any]
    tensors: TensorTable
    text_config: Any
    arms: list[Arm] = field(default_factory=list)
    subjects: list[Subject] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def bytes_of(self, way: Way, dtype: str | None = None) -> int:
        """Bytes that a token reads."""
        dtype = dtype or self.dtype
        return way_bytes(self.hire, self.tensors, self.text_config, way, dtype=dtype)

    def add(self, name: str, subject: Subject, way: Way, num_bytes: int) -> Arm:
        """One more arm."""
        arm = Arm(name, subject, way, num_bytes)
        self.arms.append(arm)
        return arm

    def ways(self, step: bool) -> dict[str, Way]:
        """The arms of the converted model, from dense to all that is sparse.

        `step`: whether the kernels run whole decode steps, so that a dense FFN runs by them too.
        """
        ffn, head = self.hire["ffn"] is not None, self.hire["head"] is not None
        dense: dict[str, Any] = {"ffn": True, "keep": 1.0} if step else {}
        found = {OWN_DENSE: Way(**dense)}
        if ffn and head:
            found |= {"converted, head": Way(**dense, head=True), "converted, FFN": Way(ffn=True)}
        return {**found, BOTH: Way(ffn=True, head=head)}


def stored_dtype(tensors: TensorTable) -> str:
    """The dtype of most of the numbers on disk, as torch names it."""
    sizes: dict[str, int] = {}
    for dtype, shape in tensors.values():
        sizes[dtype] = sizes.get(dtype, 0) + torch.Size(shape).numel()
    most = max(sizes, key=lambda dtype: sizes[dtype])
    names = {stored: name for name, stored in DTYPES.items()}
    return names.get(most, "float32")


@contextmanager
def open_session(folder: Path, request: Request) -> Iterator[tuple[Session, ExitStack]]:
    """Nothing is loaded yet; what is loaded ends with the context. Raises InputError, HubError."""
    config, raw = native_config(folder), read_config(folder)
    tensors = dense_table(folder)
    with ExitStack() as stack:
        dense = folder
        if request.baseline is not None:
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix="hireconvert-"))
            dense = open_checkpoint(request.baseline, work=Path(work)).folder
        yield (
            Session(
                folder=folder,
                dense=dense,
                request=request,
                dtype=request.dtype or stored_dtype(tensors),
                threads=request.threads or torch.get_num_threads(),
                hire=raw["hire"],
                tensors=tensors,
                text_config=config.get_text_config(),
            ),
            stack,
        )


def load_dense(session: Session, stack: ExitStack) -> None:
    """The dense arms: as the converted model's dtype, in bfloat16, compiled, by torchao."""
    model = TorchModel(session.dense, session.dtype, session.threads)
    subject = stack.enter_context(TorchSubject(f"{DENSE} {session.dtype}", model))
    session.subjects.append(subject)
    session.add(DENSE, subject, Way(), session.bytes_of(Way()))
    others: dict[str, dict[str, Any]] = {}
    if session.dtype != "bfloat16":
        others[f"{DENSE}, bfloat16"] = {"dtype": "bfloat16"}
    if session.request.compiled:
        others[f"{DENSE}, compiled"] = {"compiled": True}
    for form in ("int8", "int4") if importlib.util.find_spec("torchao") else ():
        others[f"{DENSE}, torchao {form}"] = {"torchao": form, "dtype": "bfloat16"}
    for name, changes in others.items():
        dtype = changes.get("dtype", session.dtype)
        with _optional(session, name):
            load = TorchModel(**{**vars(model), **changes})
            subject = stack.enter_context(TorchSubject(name, load))
            # A compiled or quantized model may fail only when it first decodes.
            subject.decode(Way(), [1, 2, 3], batch=1, num_tokens=3)
            session.subjects.append(subject)
            share = {"int8": 0.5, "int4": 0.25}.get(changes.get("torchao", ""), 1.0)
            session.add(name, subject, Way(), int(share * session.bytes_of(Way(), dtype)))


@contextmanager
def _optional(session: Session, name: str) -> Iterator[None]:
    """What cannot be loaded inside is left out, and the result says why."""
    try:
        yield
    except InputError as error:
        session.skipped[name] = str(error)


def load_converted(session: Session, stack: ExitStack) -> TorchSubject:
    """The converted model's arms, and one through the PyTorch path."""
    model = TorchModel(session.folder, session.dtype, session.threads, kind="hire")
    subject = stack.enter_context(TorchSubject(BOTH, model))
    session.subjects.append(subject)
    ways = session.ways(subject.facts["step"])
    for name, way in ways.items():
        session.add(name, subject, way, session.bytes_of(way))
    if subject.facts["path"] is None:
        return subject
    name, way = "converted, PyTorch path", ways[BOTH]
    slow = TorchModel(**{**vars(model), "native": "off"})
    other = stack.enter_context(TorchSubject(name, slow))
    session.subjects.append(other)
    session.add(name, other, way, session.bytes_of(way))
    return subject


def load_rivals(session: Session, stack: ExitStack, ids_T: Sequence[int]) -> None:
    """One arm for each GGUF file, with the number of threads that suits it best.

    Raises InputError for a file that does not load or is no form of the same model.
    """
    vocabulary = head_entry(session.tensors, session.text_config.vocab_size)[1][0]
    for path in session.request.rivals:
        subject = stack.enter_context(
            LlamaSubject(f"llama.cpp {path.stem}", path, threads=session.threads)
        )
        if session.request.kl_tokens and subject.facts["vocabulary"] != vocabulary:
            raise InputError(
                f"{path} has a vocabulary of {subject.facts['vocabulary']} tokens, the model "
                f"{vocabulary}: it is no form of the same model, so its quality has no measure."
            )
        fastest_threads(subject, ids_T, session.threads)
        session.subjects.append(subject)
        session.add(subject.name, subject, Way(), subject.facts["bytes_per_token"])
