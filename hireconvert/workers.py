"""A process that answers lines with lines of JSON; what it logs is kept for when it fails."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from hireconvert.errors import InputError

_SECONDS_TO_END = 10


class Worker:
    """Starts the process and reads its first line, `facts`; use it as a context.

    Raises InputError, here and in `ask`, with the process's own words when it reports an error,
    dies or answers something else than a JSON object.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        opening: str | None = None,
    ) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        try:
            self._process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            self._log.close()
            raise InputError(f"{command[0]} cannot be run: {error.strerror}.") from error
        try:
            self.facts = self._read() if opening is None else self.ask(opening)
        except BaseException:
            self.close()
            raise

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to one line."""
        assert self._process.stdin
        with contextlib.suppress(OSError):  # it died: reading tells why
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise InputError(f"{self.name}: its process ended, {self._last_words()}")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise InputError(f"{self.name}: its process said {line.strip()[:200]!r}, not JSON.")
        if "error" in answer:
            raise InputError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        try:
            code = self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return "or closed its output without ending"
        how = f"exit status {code}" if code >= 0 else f"killed by signal {-code}"
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f"{how}: {lines[-1][:500]}" if lines else f"{how}, without a word"

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(OSError):  # it died with a line unread
            self._process.stdin.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
