"""train.log of every job of a bank: the lines about that job, and those about the whole bank."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from tcsae.base.printable import PrintableFormatter
from tcsae.base.progress import ConsoleHandler
from tcsae.base.run_files import RunFiles

_subject: contextvars.ContextVar[Path | None] = contextvars.ContextVar("subject", default=None)

FORMAT = PrintableFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")


@contextlib.contextmanager
def speaking_of(folder: Path) -> Iterator[None]:
    """Lines that are logged in the block are about the run in `folder` alone."""
    token = _subject.set(folder)
    try:
        yield
    finally:
        _subject.reset(token)


def _is_about(folder: Path, record: logging.LogRecord) -> bool:
    return _subject.get() in (None, folder)


@contextlib.contextmanager
def run_logs(folders: Sequence[Path]) -> Iterator[None]:
    """Appends to train.log in every folder what is logged about its run, or about no run alone."""
    handlers = []
    for folder in folders:
        handler = logging.FileHandler(RunFiles(folder).log, delay=True, encoding="utf-8")
        handler.setFormatter(FORMAT)
        handler.addFilter(partial(_is_about, folder))
        handlers.append(handler)
        logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()


def _console_handler() -> ConsoleHandler:
    handler = ConsoleHandler()
    handler.setFormatter(FORMAT)
    return handler


def console() -> None:
    """Log lines on stderr, where Hydra has not set up a job's logging."""
    root = logging.getLogger()
    for old in list(root.handlers):
        if type(old).__module__ != "_pytest.logging":
            root.removeHandler(old)
    root.addHandler(_console_handler())
    root.setLevel(logging.INFO)


@contextlib.contextmanager
def tcsae_console() -> Iterator[None]:
    """The log lines of this package on stderr, for as long as the block lasts."""
    handler = _console_handler()
    own = logging.getLogger("tcsae")
    level = own.level
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    try:
        yield
    finally:
        own.removeHandler(handler)
        own.setLevel(level)
