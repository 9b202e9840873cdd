"""What every section of a recipe is: unknown keys are refused, numbers are numbers, and a setting is documented by the
text below it."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST_WHOLE = 10**9
"""Largest whole number of a setting that has no limit of its own."""
LOWEST_TEMPERATURE = 1e-3
"""Logits are divided by a temperature, and below this one they leave float32."""
SMALLEST, LARGEST = 1e-30, 1e39
"""Sizes of a number that is not 0: below, float32 loses it; above, it is infinite there, and nothing survives it."""


class CheckedNumbers(BaseModel):
    """Settings whose numbers are neither truth values nor beyond what computing with them bears."""

    @field_validator("*", mode="before")
    @classmethod
    def _number_in_reach(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        kinds = _kinds(field.annotation)
        limited = any(hasattr(rule, "le") or hasattr(rule, "lt") for rule in field.metadata)
        if not kinds & {int, float}:
            return value
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, bool) and bool not in kinds:
                raise ValueError(f"{info.field_name} must be a number; got {str(number).lower()}; write 1 or 0")
            if not limited:
                check_size(str(info.field_name), number, whole=float not in kinds)
        return value


class Section(CheckedNumbers):
    """Settings that belong together."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def check_size(name: str, value: Any, *, whole: bool = False) -> None:
    """Refuse a number that is too large or too small to compute with.

    Raises:
        ValueError: it is one; a value that is no number passes.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if whole and abs(value) > LARGEST_WHOLE:
        raise ValueError(f"{name} must be at most {LARGEST_WHOLE} in size; got {value!r:.40}")
    if value and not SMALLEST <= abs(value) <= LARGEST:
        raise ValueError(f"{name} must be 0, or within {SMALLEST:g} and {LARGEST:g} in size; got {value!r:.40}")


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that a setting may have, through lists and alternatives."""
    inner = get_args(annotation)
    return set().union(*map(_kinds, inner)) if inner else {annotation}
