"""Convert pretrained causal language models with HiRE; importing this package has no effects."""

from typing import TYPE_CHECKING, Any

from hireconvert.version import __version__

if TYPE_CHECKING:
    from hireconvert.loading import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Torch and Transformers take seconds to import, so only a use of `load` imports them.
    if name == "load":
        from hireconvert.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
