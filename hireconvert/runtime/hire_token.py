"""Tokens of one sequence, one native call each, as long as nothing has to see what lies between.

`NativeStep.open` makes `Tokens` where the first step after a prompt showed that nothing else
happens between a token's id and its logits. Shape suffixes: V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .hire_cache import Held
from .hire_native import find_library
from .hire_native import native as library

# Besides PyTorch's own: a row times the buffer `embed_scale`, rounded to the weight's type.
_SCALED = "TextScaledWordEmbedding"

native, _ = find_library("_native_token")


def altered(module: nn.Module) -> bool:
    """Whether calling a module is more than its class's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def embedding_of(module: Any) -> Any:
    """An embedding as the library reads it; None unless it gives the bits that the module gives."""
    if native is None or not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return None
    weight, scale = module.weight.detach(), 1.0
    if type(module) is not nn.Embedding:
        if not type(module).__name__.endswith(_SCALED) or not hasattr(module, "embed_scale"):
            return None
        factor: Any = module.embed_scale
        scale = float(factor.to(weight.dtype))
    if weight.device.type != "cpu" or weight.dtype not in library.TYPES or weight.stride(1) != 1:
        return None
    found = native.Embedding(weight, scale)
    ids = [0, len(weight) // 2, len(weight) - 1]
    rows = torch.stack([found.row(token) for token in ids])
    return found if torch.equal(rows, module(torch.tensor(ids)).float()) else None


def serves(head: Any) -> bool:
    """Whether its logits are all that a head leaves behind."""
    return not hasattr(head, "hire") or head.hire.spec["unselected"] != "-inf"


class Tokens:
    """Decodes one token after the other; the cache holds them once it is `close`d.

    `left`: for how many more there is room. `sparse`: whether the logits of the last token are
    those of the library's head.
    """

    def __init__(
        self,
        token: Any,
        head: nn.Module,
        *,
        sparse: bool,
        cache: Any,
        held: Held,
        listened: Callable[[], bool],
    ) -> None:
        self._token, self._head, self._cache, self._held = token, head, cache, held
        self._sparse, self.sparse = sparse, False
        self.left, self._done = held.room(), 0
        self.listened = listened  # whether somebody began to listen to a module

    def next(self, token: int, *, logits: bool) -> tuple[int, torch.Tensor | None] | None:
        """(the best next token, float32 logits [1, V] where asked for).

        None when a layer met NaN or inf: the token is as if it had not been asked for.
        """
        best = self._token.next(token)
        if best == native.STOPPED:
            return None
        self.left -= 1
        self._done += 1
        self.sparse = self._sparse and best != native.HIDDEN
        if best == native.HIDDEN:
            found_1V = self.again()
            return int(found_1V.argmax(-1)), found_1V
        return best, self._token.logits() if logits else None

    def again(self) -> torch.Tensor:
        """float32 logits [1, V] of the last token by the head's own forward."""
        found_1V: torch.Tensor = self._head(self._token.hidden())[:, -1]
        return found_1V.to(dtype=torch.float32, copy=True)

    def close(self) -> None:
        """Let the cache hold what was decoded since it was opened."""
        if self._done:
            self._held.advance(self._cache, self._done)
            self._done = 0
