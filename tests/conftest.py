"""Fixtures that several folders of tests share."""

from collections.abc import Iterator

import pytest

from tests.cli import Cli


@pytest.fixture(scope="session")
def hireconvert() -> Iterator[Cli]:
    """The command line, forked from a process that has imported everything."""
    cli = Cli()
    yield cli
    cli.close()
