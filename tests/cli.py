"""The command line as tests run it: forked from a process that has imported everything."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONPATH": str(ROOT),
}


@dataclass(frozen=True)
class Ended:
    """How a command line ended: an exit code, or the signal that killed it."""

    code: int | None
    signal: int | None
    out: str
    err: str


class Cli:
    """Runs command lines, one forked child each. Use it as a context."""

    def __init__(self) -> None:
        self._files = Path(tempfile.mkdtemp(prefix="hireconvert-cli-"))
        self._count = 0
        self._driver = subprocess.Popen(
            [sys.executable, "-m", "tests.cli_driver"],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def close(self) -> None:
        """End the driver and remove its files."""
        assert self._driver.stdin and self._driver.stdout
        self._driver.stdin.close()
        self._driver.stdout.close()
        self._driver.wait()
        shutil.rmtree(self._files)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._driver.stdin and self._driver.stdout
        self._driver.stdin.write(json.dumps(request) + "\n")
        self._driver.stdin.flush()
        line = self._driver.stdout.readline()
        assert line, "the driver died; run `python -m tests.cli_driver` to see why"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(
        self,
        *arguments: str | Path,
        hooks: list[list[Any]] | None = None,
        text: str = "",
        environment: dict[str, str] | None = None,
    ) -> "Running":
        """A child that runs `hireconvert ARGUMENTS` in an empty folder, under hooks."""
        self._count += 1
        folder = self._files / str(self._count)
        (folder / "cwd").mkdir(parents=True)
        for name, content in (("stdin", text), ("stdout", ""), ("stderr", "")):
            (folder / name).write_text(content)
        answer = self._ask(
            start=[str(argument) for argument in arguments],
            hooks=hooks or [],
            cwd=str(folder / "cwd"),
            environment=environment or {},
            **{name: str(folder / name) for name in ("stdin", "stdout", "stderr")},
        )
        return Running(self, answer["pid"], folder)

    def __call__(
        self, *arguments: str | Path, kill_after: float | None = None, **options: Any
    ) -> Ended:
        """Run `hireconvert ARGUMENTS` to its end, or SIGKILL it after `kill_after` seconds."""
        return self.start(*arguments, **options).wait(kill_after=kill_after)


@dataclass(frozen=True)
class Running:
    """A command line that may still run."""

    cli: Cli
    pid: int
    folder: Path

    def wait(self, *, kill_after: float | None = None) -> Ended:
        """Wait until it ends, or stops itself (then code and signal are both None)."""
        answer = self.cli._ask(wait=self.pid, kill_after=kill_after)
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return Ended(answer.get("code"), answer.get("signal"), out, err)

    def send(self, signal_name: str) -> None:
        """Send it a signal."""
        self.cli._ask(send=signal_name, pid=self.pid)


# --------------------------------------------------------------------------- what lies on disk


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path within."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def is_complete(folder: Path) -> bool:
    """Whether SHA256SUMS lists exactly the files of the folder with their digests."""
    found = digests(folder)
    if "SHA256SUMS" not in found:
        return False
    del found["SHA256SUMS"]
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)} == found


def contents(folder: Path) -> dict[str, Any]:
    """What two runs of one conversion must agree on: all files, but the report's timings."""
    found: dict[str, Any] = digests(folder)
    del found["hire_report.json"]
    report = json.loads((folder / "hire_report.json").read_text())
    del report["timings"]
    found["report"] = report
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    found["SHA256SUMS"] = sorted(line for line in lines if not line.endswith("hire_report.json"))
    return found
