"""The shell of a page: one HTML file that opens offline, with plotly.js, style and data in it.

Texts come from corpora and may contain anything: templates escape by default, the data block has
no `<` in it, and the page's script writes text nodes only.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tcsae.base.files import write_text
from tcsae.base.json_numbers import plain
from tcsae.base.labels import interval_text, label, number

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_TEMPLATES = Path(__file__).parent / "templates"
STYLE_SHEET = _TEMPLATES / "page.css"


def packed(values: np.ndarray, dtype: str | None = None) -> dict[str, Any]:
    """An array for the page's script: {dtype, shape, data}, little-endian bytes in base64.

    Args:
        dtype: int8, uint8, int16, uint16, int32, float32; float24: the upper three bytes of
            float32 (four characters a number, true to 1.5e-5 of itself). None: the array's own.
    """
    array = np.ascontiguousarray(values, None if dtype == "float24" else dtype)
    if dtype == "float24":
        little = _upper_bytes(array.astype("<f4"))
    else:
        little = array.astype(array.dtype.newbyteorder("<"))
    data = base64.b64encode(little.tobytes()).decode("ascii")
    return {"dtype": dtype or array.dtype.name, "shape": list(array.shape), "data": data}


def _upper_bytes(values: np.ndarray) -> np.ndarray:
    """Of little-endian float32, rounded; NaN stays NaN."""
    bits = np.where(np.isnan(values), np.float32(np.nan), values).view("<u4")
    # Half of what is cut off carries over, where that makes no infinity of a number.
    finite = np.isfinite(values) & (bits % 2**31 < 0x7F7FFF80)
    rounded = np.where(finite, bits + 0x80, bits).astype("<u4")
    return rounded[..., None].view(np.uint8)[..., 1:]


def script_json(content: Any) -> str:
    """JSON that may stand in a script element."""
    text = json.dumps(plain(content), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def render(
    template: str,
    title: str,
    context: Mapping[str, Any],
    figures: Mapping[str, Figure],
    data: Mapping[str, Any],
) -> str:
    """The page as text.

    Args:
        template: file in templates/, extending base.html.j2.
        title: of the page.
        context: what the template names.
        figures: by the name that the template's `figure(name)` asks for.
        data: what the page's script reads (`page.data`), JSON values. With neither figures nor
            data the page needs no plotly.js, and has none.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "interval": interval_text, "label": label}
    drawn = {name: figure.to_dict() for name, figure in figures.items()}
    content = {"figures": drawn, "data": dict(data)}
    return environment.get_template(template).render(
        **context,
        title=title,
        drawn=frozenset(figures),
        plotly_js=Markup(get_plotlyjs()) if figures or data else "",
        style=Markup(STYLE_SHEET.read_text(encoding="utf-8")),
        script=Markup((_TEMPLATES / "page.js").read_text(encoding="utf-8")),
        page_content=Markup(script_json(content)),
    )


def write_page(path: Path, *parts: Any) -> Path:
    """`render(*parts)` into a file, whole or not at all."""
    write_text(path, render(*parts))
    return path
