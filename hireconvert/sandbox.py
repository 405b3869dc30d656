"""Generated Python, run in a process of its own under limits, never in ours.

The limits hold off what small models write by accident: endless loops, huge lists, files, servers.
They are no wall against an adversary.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from hireconvert.errors import InputError

Status = Literal["finished", "raised", "exited", "memory", "timeout", "killed"]

_RAISED, _MEMORY = 81, 82
_OUTPUT_BYTES = 65_536

# Runs in the child, which knows nothing of hireconvert. A user and network namespace of its own
# leaves no network where the kernel grants one; modules and functions that reach the network or
# start processes are withheld in any case, because the limit on processes does not bind root.
_CHILD = """
import json, os, resource, sys, traceback
job = json.loads(sys.stdin.read())
try:
    import ctypes
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)
except (ImportError, OSError, AttributeError):
    pass
for name in ("_socket", "socket", "_ctypes", "ctypes", "_posixsubprocess", "subprocess"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "system", "popen", "posix_spawn", "posix_spawnp", "kill", "killpg"):
    for module in ("os", "posix"):
        if hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)
for name, soft_and_hard in job["limits"].items():
    try:
        resource.setrlimit(getattr(resource, name), soft_and_hard)
    except (AttributeError, ValueError, OSError):
        pass
try:
    exec(compile(job["source"], "<generated>", "exec"), {"__name__": "__main__"})
except MemoryError:
    os._exit(job["memory"])
except SystemExit:
    raise
except BaseException:
    traceback.print_exc(limit=-4)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(job["raised"])
print("\\n" + job["end"], end="")
"""


@dataclass(frozen=True)
class Limits:
    """What one run may use: seconds of CPU and by the clock, and bytes of memory and of a file.

    The clock's is for programs that wait: on a busy machine one that computes must not fail by it.
    """

    cpu_seconds: int = 5
    clock_seconds: float = 30.0
    memory: int = 512 * 2**20
    file_size: int = 2**20


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and at most 64 KiB of what it wrote.

    `finished`: the source ran to its end; `raised`: an exception left it; `exited`: it ended the
    process; `memory`, `timeout`: over that limit; `killed`: by a signal.
    """

    status: Status
    stdout: str
    stderr: str
    seconds: float


def run_python(source: str, limits: Limits | None = None) -> Outcome:
    """The outcome of running `source` as a script in an empty folder, without input or network.

    Raises InputError on systems without process limits (Windows).
    """
    if os.name != "posix":
        raise InputError("generated programs run under POSIX process limits; use Linux or macOS.")
    limits = limits or Limits()
    end = secrets.token_hex(16)
    job = {
        "source": source,
        "end": end,
        "raised": _RAISED,
        "memory": _MEMORY,
        "limits": _resource_limits(limits),
    }
    with (
        _scratch_folder() as folder,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        started = time.monotonic()
        code = _run_child(json.dumps(job), folder, (out, err), limits.clock_seconds)
        seconds = time.monotonic() - started
        stdout, stderr = _text(out), _text(err)
    finished = code == 0 and stdout.endswith("\n" + end)
    status = "finished" if finished else _status(code, stderr)
    return Outcome(status, stdout.removesuffix("\n" + end), stderr, seconds)


def require_programs() -> None:
    """Raise InputError unless programs run here: else all would fail, those of two models alike."""
    outcome = run_python("pass")
    if outcome.status != "finished":
        raise InputError(
            f"generated programs cannot run on this machine: an empty one ended as "
            f"{outcome.status} ({outcome.stderr[-200:].strip()}). Leave the task `python` out."
        )


@contextmanager
def _scratch_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="hire-sandbox-")
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: str) -> None:
    with suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if Path(folder).exists():  # folders nested deeper than Python follows
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL, check=False)


def _resource_limits(limits: Limits) -> dict[str, tuple[int, int]]:
    """Soft and hard limit of each resource."""
    cpu = limits.cpu_seconds
    return {
        # Apart: at the soft limit Linux sends SIGXCPU, which tells a timeout, at the hard one
        # SIGKILL, which tells nothing; where both are one it sends the latter.
        "RLIMIT_CPU": (cpu, cpu + 1),
        "RLIMIT_AS": (limits.memory, limits.memory),
        "RLIMIT_FSIZE": (limits.file_size, limits.file_size),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_NOFILE": (32, 32),
        "RLIMIT_NPROC": (0, 0),  # no further processes; the one that runs stays
    }


def _run_child(
    job: str, folder: str, files: tuple[IO[bytes], IO[bytes]], limit: float
) -> int | None:
    """The child's return code, or None after it was killed at the clock's limit."""
    child = subprocess.Popen(
        # Not -I, which ignores the hash seed: sets would be ordered by chance.
        [sys.executable, "-s", "-S", "-P", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=files[0],
        stderr=files[1],
        cwd=folder,
        env={"PYTHONHASHSEED": "0"},
        start_new_session=True,  # so that the whole group can be killed
    )
    try:
        child.communicate(job.encode(), timeout=limit)
        return child.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:  # an interrupt leaves no program behind either
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def _status(code: int | None, stderr: str) -> Status:
    if code is None or code == -signal.SIGXCPU:
        return "timeout"
    if code == _MEMORY:
        return "memory"
    if code == _RAISED:
        return "raised"
    return "killed" if code < 0 else "exited"


def _text(file: IO[bytes]) -> str:
    """The file's end, where the marker of a finished run stands."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _OUTPUT_BYTES))
    return file.read().decode("utf-8", errors="replace")
