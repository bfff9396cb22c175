"""Which setting of a comparison is the control of another: the same loss on shuffled positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_CONTROL = "shuffled"


def is_control(group: Mapping[str, Any]) -> bool:
    return str(group["settings"].get("consistency", "")).startswith(_CONTROL)


def control_of(
    group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """The one of the same form where there is one, else any with all other settings the same."""
    wanted, form = _without_form(group), str(group["settings"].get("consistency"))
    controls = [g for g in groups if is_control(g) and _without_form(g) == wanted]
    same_form = [g for g in controls if str(g["settings"]["consistency"]).endswith(form)]
    return next(iter(same_form or controls), None)


def _without_form(group: Mapping[str, Any]) -> dict[str, Any]:
    ours = ("consistency", "consistency.form", "consistency.shuffle_positions")
    settings = {**group["settings"], **group["differs"], "stream": group["stream"]}
    return {key: value for key, value in settings.items() if key not in ours}
