"""A gate's outcome as JUnit XML, the form in which CI systems show tests."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from hireconvert.errors import UsageError
from hireconvert.gate import Check
from hireconvert.workspace import write_atomically

# What XML 1.0 cannot hold, escaped or not.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def check_target(path: Path) -> None:
    """Raise UsageError when `path` can be seen not to be writable, before minutes of measuring."""
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; name a file.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: {path.parent} is no folder that can be written to.")


def write_junit(path: Path, checks: Sequence[Check], *, seconds: float) -> None:
    """Write one test case for each check; `path` appears whole or not at all.

    Raises UsageError when it cannot be written.
    """
    failures = [check for check in checks if not check.passed]
    suite = ElementTree.Element(
        "testsuite",
        name="hireconvert gate",
        tests=str(len(checks)),
        failures=str(len(failures)),
        errors="0",
        skipped="0",
        time=f"{seconds:.3f}",
    )
    for check in checks:
        name = f"{check.limit} [{check.subject}]" if check.subject else check.limit
        case = ElementTree.SubElement(
            suite, "testcase", classname="hireconvert.gate", name=_legal(name), time="0"
        )
        found = f"{check.measured}; {check.wanted} is wanted"
        if check.passed:
            ElementTree.SubElement(case, "system-out").text = _legal(found)
        else:
            ElementTree.SubElement(case, "failure", message=_legal(found), type="breach")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    try:
        write_atomically(path, text + b"\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}.") from error


def _legal(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
