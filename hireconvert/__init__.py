"""Convert pretrained causal language models with HiRE; importing this package has no effects."""

from hireconvert.version import __version__

__all__ = ["__version__"]
