"""What strict YAML sections are made of: intervals, and a base that refuses what it does not know.

The sections of a recipe are in `schema.py`, `schema_budget.py` and `schema_finetune.py`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

Problem: TypeAlias = tuple[str, str]  # key relative to the section, what is wrong with it


@dataclass(frozen=True)
class In:
    """A numeric interval for `Annotated`; neither NaN nor infinity lies in one."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def _check(self, value: float) -> float:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high or self.high == math.inf else value <= self.high
        if above and below:
            return value
        if self.high == math.inf:
            least = _plain(self.low)
            wanted = f"a finite number {'above' if self.open_low else 'of at least'} {least}"
            raise PydanticCustomError("interval", f"{_plain(value)} is not {wanted}")
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        wanted = f"{left}{_plain(self.low)}, {_plain(self.high)}{right}"
        raise PydanticCustomError("interval", f"{_plain(value)} is not in {wanted}")

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        limits: dict[str, Any] = {
            "exclusiveMinimum" if self.open_low else "minimum": self.low,
        }
        if self.high != math.inf:
            limits["exclusiveMaximum" if self.open_high else "maximum"] = self.high
        return {**handler(schema), **limits}


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


Count: TypeAlias = Annotated[int, In(1)]
CountOrZero: TypeAlias = Annotated[int, In(0)]
Share: TypeAlias = Annotated[float, In(0, 1, open_low=True)]
Positive: TypeAlias = Annotated[float, In(0, open_low=True)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every section of a strict YAML file: frozen, no unknown keys, no coerced types."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", validate_default=True, protected_namespaces=()
    )

    def _problems(self) -> Iterator[Problem]:
        """Yield what is wrong between fields that are each right on their own."""
        yield from ()

    @model_validator(mode="after")
    def _check_together(self) -> "Section":
        if problems := list(self._problems()):
            text = "; ".join(message for _, message in problems)
            raise PydanticCustomError("together", "{text}", {"text": text, "problems": problems})
        return self


def source_problems(source: str) -> Iterator[Problem]:
    """What is wrong with the name of a text, for the key `source` of a section."""
    if source.startswith("hub:") and not re.fullmatch(r"hub:[\w.-]+(/[\w.-]+)?", source):
        yield "source", f"{source!r} is not of the form hub:org/name"
