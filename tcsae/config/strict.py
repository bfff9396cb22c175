"""The base of every typed configuration of this package (no torch here)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A frozen record that refuses unknown keys, converted types, NaN and infinity.

    Errors: pydantic.ValidationError (a ValueError) naming the field, the value and what is allowed.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, populate_by_name=True
    )
