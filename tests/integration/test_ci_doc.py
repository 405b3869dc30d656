"""The workflow of docs/ci.md: its steps run as a shell would run them, and fail with the gate."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from hireconvert.gate import Gate
from tests.cli import ENVIRONMENT, ROOT
from tests.tiny_files import save_tiny

PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
LIMITS = "kl_mean: {max: 0.006}\nrecall_mean: {min: 0.95}\nkept: {min: 0.49, max: 0.51}\n"


def workflow() -> dict[str, Any]:
    """The YAML block; PyYAML reads the key `on` as true."""
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (job,) = yaml.safe_load(block)["jobs"].values()
    found: dict[str, Any] = job
    return found


def steps() -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in workflow()["steps"] if "run" in step}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkout with a tiny model, a text and a gate, and commands that need no network."""
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Some words to be scored, one after another. " * 60)
    (tmp_path / "gate.yaml").write_text(LIMITS)
    (tmp_path / "bin").mkdir()
    commands = {
        "hireconvert": f'exec "{sys.executable}" -m hireconvert "$@"',
        # Installing needs an index; what is asked for must be what pyproject.toml offers.
        "pip": 'echo "$@" > installed',
    }
    for name, line in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    return tmp_path


def run_job(place: Path, **changes: str) -> dict[str, int]:
    """Exit codes by step, as the runner would: after a failure only `always()` steps run."""
    environment = {
        **os.environ,
        **ENVIRONMENT,
        **workflow()["env"],
        "MODEL": str(place / "model"),
        "RECIPE": "tiny-ci",
        "TEXT": "text.txt",
        "TOKENS": "1024",
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(place / "cache"),
        **changes,
    }
    codes: dict[str, int] = {}
    for name, step in steps().items():
        if any(codes.values()) and step.get("if") != "always()":
            continue
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        codes[name] = done.returncode
        assert "Traceback" not in done.stderr, done.stderr
    return codes


def test_the_steps_pass_on_a_good_model_and_fail_with_the_gate(place: Path) -> None:
    assert run_job(place) == {"Install": 0, "Convert": 0, "Gate": 0, "Report": 0}
    assert (place / "installed").read_text() == "install hireconvert[report]\n"
    (suite,) = ElementTree.parse(place / "gate.xml").getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("4", "0")
    assert "passed" in (place / "report.html").read_text()
    (place / "gate.yaml").write_text("kept: {min: 0.1, max: 0.2}\n")
    (place / "bin" / "hireconvert").write_text(
        f'#!/bin/sh\n[ "$1" = convert ] && exit 0\nexec "{sys.executable}" -m hireconvert "$@"\n'
    )
    assert run_job(place) == {"Install": 0, "Convert": 0, "Gate": 3, "Report": 0}
    assert "failed" in (place / "report.html").read_text()


def test_what_a_workflow_needs_is_there() -> None:
    job = workflow()
    assert set(job["env"]) == {"MODEL", "RECIPE", "GATE", "TEXT", "TOKENS"}
    assert all(isinstance(value, str) for value in job["env"].values())
    used = {name for step in steps().values() for name in re.findall(r"\$(\w+)", step["run"])}
    assert used == set(job["env"])
    written = set(re.findall(r"[\w.]+\.(?:xml|json|html)", str(steps())))
    uploaded = job["steps"][-1]["with"]["path"].split()
    assert written == set(uploaded)
    extras = (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^report = ", extras, re.MULTILINE)


def test_the_page_names_every_limit() -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(Gate.model_fields)
