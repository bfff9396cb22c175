"""pandas, for those who have it: this package needs it nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tcsae.base.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame


def data_frame(content: Any, otherwise: str) -> DataFrame:
    """`pandas.DataFrame(content)`. Raises UserError without pandas; `otherwise`: what to take."""
    try:
        from pandas import DataFrame
    except ImportError:
        raise UserError(f"table() needs pandas (pip install pandas); {otherwise}") from None
    return DataFrame(content)
