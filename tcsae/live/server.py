"""The live view's server: on this machine alone, until it is stopped."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tcsae.base.errors import UserError

if TYPE_CHECKING:
    from uvicorn import Server

    from tcsae.live.sides import Sides

HOST = "127.0.0.1"
_NEEDED = ("starlette", "uvicorn")


def check_extra() -> None:
    """Raises UserError where the packages of the extra are not there."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the live view needs {' and '.join(missing)}: in the checkout, "
            'pip install -c requirements.lock -e ".[serve]"'
        )


def serve(folders: Sequence[Path], port: int, tell: Callable[[str], None]) -> None:
    """Open the runs and answer their page until Ctrl-C.

    Args:
        folders: as `open_sides`.
        port: 0: one that is free.
        tell: hears of every step, and the page's address.

    Raises:
        UserError: as `open_sides`; a port that is taken; packages that are not there.
    """
    check_extra()
    with listen(port) as listening:
        # After the port: loading takes seconds.
        from tcsae.live.sides import open_sides

        sides = open_sides(folders, tell)
        token = secrets.token_urlsafe(24)
        server = server_of(sides, token)
        tell(f"open http://{HOST}:{listening.getsockname()[1]}/{token}/   (Ctrl-C ends)")
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def server_of(sides: Sides, token: str) -> Server:
    """Of the page of `sides`, which is in /`token`/."""
    import uvicorn

    from tcsae.live.app import application

    config = uvicorn.Config(
        application(sides, token),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)


def listen(port: int) -> socket.socket:
    """Raises UserError where the port cannot be had."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(
            f"port {port} cannot be had ({error.strerror}): another, or --port 0 for any"
        ) from None
