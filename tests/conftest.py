"""Fixtures that several folders of tests share."""

import os
from collections.abc import Iterator

import pytest

# Bits that depend on nothing but the numbers: on AMD's processors MKL's sums otherwise depend on
# where in memory a tensor lies. Read when torch is first used, here or in a process below.
os.environ.setdefault("MKL_CBWR", "AUTO")

from tests.cli import Cli


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread for the tests of a module that ask for it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def hireconvert() -> Iterator[Cli]:
    """The command line, forked from a process that has imported everything."""
    cli = Cli()
    yield cli
    cli.close()
