"""Limits of the process that runs generated programs."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from hireconvert.errors import InputError
from hireconvert.sandbox import Limits, require_programs, run_python

SHORT = Limits(cpu_seconds=1, clock_seconds=3.0, memory=256 * 2**20, file_size=2**16)


def test_a_program_runs_to_its_end() -> None:
    outcome = run_python("print(2 + 2)", SHORT)
    assert outcome.status == "finished" and outcome.stdout == "4\n" and not outcome.stderr


@pytest.mark.parametrize(
    ("source", "limits"),
    [
        ("while True: pass", Limits(cpu_seconds=1, clock_seconds=600.0)),
        ("import time; time.sleep(60)", Limits(cpu_seconds=600, clock_seconds=1.0)),
    ],
    ids=["of CPU", "by the clock"],
)
def test_endless_programs_are_stopped(source: str, limits: Limits) -> None:
    started = time.monotonic()
    assert run_python(source, limits).status == "timeout"
    assert time.monotonic() - started < 50


def test_memory_is_limited() -> None:
    assert run_python("x = [0] * 10**9", SHORT).status == "memory"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("x = (", "SyntaxError"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("open('x', 'wb').write(b'0' * 10**6)", "File too large"),
        ("import socket", "socket halted"),
        ("import subprocess", "subprocess halted"),
        ("import os; os.system('true')", "AttributeError"),
        ("import os; os.fork()", "AttributeError"),
        ("input()", "EOFError"),
    ],
)
def test_errors_and_what_is_withheld_end_a_program(source: str, error: str) -> None:
    outcome = run_python(source, SHORT)
    assert outcome.status == "raised" and error in outcome.stderr


@pytest.mark.parametrize("source", ["import os; os._exit(0)", "raise SystemExit(0)"])
def test_leaving_early_is_not_finishing(source: str) -> None:
    assert run_python(source + "\nassert False", SHORT).status == "exited"


def test_a_program_that_kills_itself() -> None:
    assert run_python("import signal; signal.raise_signal(9)", SHORT).status == "killed"


def test_floods_of_output_are_cut() -> None:
    outcome = run_python("while True: print('x' * 1000)", SHORT)
    assert outcome.status != "finished" and len(outcome.stdout) <= 65_536


def test_a_program_sees_an_empty_folder_and_no_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "1")
    outcome = run_python("import os; print(os.getcwd(), os.listdir('.'), *os.environ)", SHORT)
    folder, rest = outcome.stdout.split(" ", 1)
    assert folder != str(Path.cwd()) and not Path(folder).exists()  # and it is gone afterwards
    assert rest.startswith("[]") and "SECRET" not in rest


def test_the_parent_is_untouched() -> None:
    before = Path.cwd(), dict(os.environ)
    run_python("import os; os.chdir('/'); os.environ['X'] = '1'", SHORT)
    assert (Path.cwd(), dict(os.environ)) == before


def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hireconvert.sandbox.os.name", "nt")
    with pytest.raises(InputError, match="Linux or macOS"):
        run_python("1")


def test_sets_have_the_same_order_every_time() -> None:
    orders = {run_python("print(set('abcdefgh'))", SHORT).stdout for _ in range(3)}
    assert len(orders) == 1


def test_folders_nested_too_deep_to_remove_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = "import os\nfor _ in range(3000):\n    os.mkdir('a')\n    os.chdir('a')"
    assert run_python(source, SHORT).status == "finished"
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_no_program_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    children = []

    class Interrupted(subprocess.Popen[bytes]):
        def communicate(self, *args: Any, **kwargs: Any) -> Any:
            if self in children:
                return super().communicate(*args, **kwargs)
            children.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_python("import time; time.sleep(60)", SHORT)
    assert children[0].returncode == -signal.SIGKILL


def test_machines_without_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_programs()
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(InputError, match="an empty one ended as exited"):
        require_programs()
