"""The live view as a web application: the page, its script, the runs' own pages, four questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from tcsae.base.errors import UserError
from tcsae.base.json_numbers import plain
from tcsae.base.run_files import FEATURES_FOLDER, REPORT
from tcsae.live.guard import Guard
from tcsae.live.sides import Sides
from tcsae.report.page import STYLE_SHEET

LONGEST_TEXT = 20_000
"""Characters of a text."""
LONGEST_PROMPT = 4_000
MOST_STEERED = 8
MOST_NEW_TOKENS = 100
_ASSETS = Path(__file__).parent / "assets"
_PAGE_FILES = {
    "": (_ASSETS / "index.html", "text/html"),
    "live.css": (_ASSETS / "live.css", "text/css"),
    "live.js": (_ASSETS / "live.js", "text/javascript"),
    "page.css": (STYLE_SHEET, "text/css"),
}
_REPORT_POLICY = (
    # A report has its script and style in it; a large one has scripts beside it. In its sandbox it
    # is nobody's page: it can read nothing else, of this server or any other.
    "sandbox allow-scripts allow-downloads allow-modals; default-src 'none'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; "
    "font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Number = Annotated[int, Field(ge=0)]


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ReadQuestion(_Question):
    """Of POST api/read, as `Sides.read`."""

    text: str
    lead: Number = 0
    by: Literal["sum", "peak", "longest"] = "sum"
    top: Annotated[int, Field(ge=0, le=50)] = 8
    pins: Annotated[
        list[Annotated[list[Number], Field(min_length=2, max_length=2)]], Field(max_length=50)
    ] = []


class SteerQuestion(_Question):
    """Of POST api/steer, as `Sides.steer`."""

    prompt: str
    run: Number = 0
    strengths: Annotated[
        list[tuple[Number, Annotated[float, Field(ge=-100, le=100)]]],
        Field(max_length=MOST_STEERED),
    ] = []
    tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)] = 30
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


def application(sides: Sides, token: str) -> Guard:
    """The application, behind /`token`/."""
    routes = [
        Route("/", _file),
        Route("/{name:str}", _file),
        Route("/api/runs", _runs),
        Route("/api/map/{run:int}", _map),
        Route("/api/feature/{run:int}/{feature:int}", _feature),
        Route("/api/read", _read, methods=["POST"]),
        Route("/api/steer", _steer, methods=["POST"]),
        Route(f"/run/{{run:int}}/{REPORT}", _report),
        Route(f"/run/{{run:int}}/{FEATURES_FOLDER}/{{own:str}}/{{name:str}}", _report_part),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            UserError: _refused,
            ValidationError: _misformed,
            HTTPException: _http,
        },
    )
    app.state.sides = sides
    app.router.redirect_slashes = False
    return Guard(app, token)


def _sides(request: Request) -> Sides:
    sides: Sides = request.app.state.sides
    return sides


def _file(request: Request) -> Response:
    name = request.path_params.get("name", "")
    if name not in _PAGE_FILES:
        raise HTTPException(404)
    path, kind = _PAGE_FILES[name]
    return FileResponse(path, media_type=kind)


def _report(request: Request) -> Response:
    page = _sides(request).report(request.path_params["run"])
    if page is None:
        raise HTTPException(404)
    headers = {"content-security-policy": _REPORT_POLICY}
    return FileResponse(page, media_type="text/html", headers=headers)


def _report_part(request: Request) -> Response:
    asked = request.path_params
    part = _sides(request).report_part(asked["run"], asked["own"], asked["name"])
    if part is None:
        raise HTTPException(404)
    # The sandbox makes the report's origin another than this one.
    headers = {"cross-origin-resource-policy": "cross-origin"}
    return FileResponse(part, media_type="text/javascript", headers=headers)


def _runs(request: Request) -> Response:
    limits = {
        "text": LONGEST_TEXT,
        "prompt": LONGEST_PROMPT,
        "steered": MOST_STEERED,
        "new_tokens": MOST_NEW_TOKENS,
    }
    return _json({**_sides(request).runs(), "limits": limits})


def _map(request: Request) -> Response:
    return _json(_sides(request).map(request.path_params["run"]))


def _feature(request: Request) -> Response:
    return _json(
        _sides(request).feature(request.path_params["run"], request.path_params["feature"])
    )


async def _read(request: Request) -> Response:
    asked = ReadQuestion.model_validate_json(await request.body())
    _check_length(asked.text, LONGEST_TEXT)
    pins = [(run, feature) for run, feature in asked.pins]
    # The language model takes seconds: other requests are answered meanwhile.
    return _json(
        await run_in_threadpool(
            _sides(request).read, asked.text, asked.lead, asked.by, asked.top, pins
        )
    )


async def _steer(request: Request) -> Response:
    asked = SteerQuestion.model_validate_json(await request.body())
    _check_length(asked.prompt, LONGEST_PROMPT)
    return _json(
        await run_in_threadpool(
            _sides(request).steer,
            asked.prompt,
            asked.run,
            dict(asked.strengths),
            tokens=asked.tokens,
            temperature=asked.temperature,
            seed=asked.seed,
        )
    )


def _check_length(text: str, longest: int) -> None:
    if len(text) > longest:
        raise HTTPException(413, f"the text has {len(text):,} characters: {longest:,} at most")


def _json(content: Any) -> Response:
    return JSONResponse(plain(content))


def _error(status: int, said: str) -> Response:
    return JSONResponse({"error": said}, status_code=status)


def _refused(_: Request, error: Exception) -> Response:
    return _error(422, str(error))


def _misformed(_: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    return _error(422, f"{where}: {first['msg']}" if where else str(first["msg"]))


def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail)
