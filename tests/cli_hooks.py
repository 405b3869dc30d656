"""What a forked command line may be made to suffer: each runs in the child, before the CLI does.

Events are numbered from 0: every file-system call of Python on something below a folder (audit
events of the interpreter), and every fsync.
"""

import errno
import importlib
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PATHS = {"open": 0, "os.rename": 0, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.fsync": 0}
_FOLDER = {"os.remove": 1, "os.rmdir": 1}  # which argument is a directory handle, or -1
at_end: list[Callable[[], object]] = []  # called when the command line is through


def _watch(below: str, act: Callable[[int, str, str], None]) -> None:
    """Call act(number, event, path) before every event below a folder."""
    seen = 0
    busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, busy
        if busy or event not in _PATHS or not isinstance(arguments[0], str | Path):
            return
        busy = True
        try:
            path = str(arguments[0])
            folder = arguments[_FOLDER[event]] if event in _FOLDER else -1
            if folder != -1:
                path = f"{Path(f'/proc/self/fd/{folder}').readlink()}/{path}"
            if path.startswith(below):
                number, seen = seen, seen + 1
                act(number, event, path)
        finally:
            busy = False

    real = os.fsync

    def fsync(handle: int) -> None:
        sys.audit("os.fsync", str(Path(f"/proc/self/fd/{handle}").readlink()))
        real(handle)

    os.fsync = fsync
    sys.addaudithook(hook)


def log_events(below: str, file: str) -> None:
    """Write [[event, path], ...] into `file` when the child ends."""
    events: list[tuple[str, str]] = []
    _watch(below, lambda number, event, path: events.append((event, path)))
    at_end.append(lambda: Path(file).write_text(json.dumps(events)))


def signal_at(below: str, number: int, name: str) -> None:
    """Send this process the signal `name` right before the event of that number."""

    def act(now: int, event: str, path: str) -> None:
        if now == number:
            os.kill(os.getpid(), getattr(signal, name))

    _watch(below, act)


def _watch_steps(act: Callable[[int], None]) -> None:
    """Call act(step) whenever the finetune reports a step done."""
    module = importlib.import_module("hireconvert.stage_finetune")
    real = module.finetune

    def finetune(*arguments: Any, progress: Callable[[int, int, str], None], **named: Any) -> Any:
        def report(step: int, of: int, detail: str) -> None:
            act(step)
            progress(step, of, detail)

        return real(*arguments, progress=report, **named)

    module.finetune = finetune


def signal_at_step(number: int, name: str) -> None:
    """Send this process the signal `name` when the finetune has done that many steps."""
    _watch_steps(
        lambda step: os.kill(os.getpid(), getattr(signal, name)) if step == number else None
    )


def log_steps(file: str) -> None:
    """Write the steps that the finetune did into `file` when the child ends."""
    steps: list[int] = []
    _watch_steps(steps.append)
    at_end.append(lambda: Path(file).write_text(json.dumps(steps)))


def limit_file_size(num_bytes: int, deadly: bool) -> None:
    """No file may grow beyond `num_bytes`: the write fails, or (deadly) kills the process."""
    if deadly:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def full_disk_at(below: str, number: int) -> None:
    """The event of that number fails as on a full disk."""

    def act(now: int, event: str, path: str) -> None:
        if now == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    _watch(below, act)


def little_space(num_bytes: int) -> None:
    """Every disk says that this much is free."""
    usage = shutil.disk_usage("/")._replace(free=num_bytes)
    replace("shutil.disk_usage", lambda path: usage)


def replace(target: str, value: Any) -> None:
    """Set module.name to a value."""
    module, _, name = target.rpartition(".")
    setattr(importlib.import_module(module), name, value)


def replace_function(target: str, result: Any) -> None:
    """Make module.name a function that returns `result`."""
    replace(target, lambda *arguments, **named: result)
