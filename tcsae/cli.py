"""`python -m tcsae COMMAND ...` and what its commands share: how a mistake leaves, in one line.

Exit codes: 0 done, 1 some jobs of a sweep failed, 2 something the user can mend, 75 interrupted
(everything is saved; the same command goes on), 130 stopped at once by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import NoReturn

from tcsae.base.errors import INTERRUPTED_EXIT_CODE, USER_ERROR_EXIT_CODE, Interrupted, SweepFailed
from tcsae.base.printable import printable

JOB_FAILED_EXIT_CODE = 1
KILLED_EXIT_CODE = 130  # as shells report SIGINT
COMMANDS = {
    "train": "train and measure one SAE, or a sweep of them",
    "evaluate": "measure an SAE from anywhere as a run's is",
    "compare": "lay runs and sweeps side by side",
    "meaning": "what the features mean: probes",
    "look": "the features of a text, as a page of strips",
    "serve": "a local page: text in, features out, steering",
    "status": "what the jobs of sweeps and runs are doing",
    "steer": "continue a text with a feature set",
    "export": "share a finished run's SAE",
    "clean": "free space: checkpoints, unfinished runs, activations",
    "dashboard": "make a W&B workspace that shows runs",
}


def show(text: str) -> None:
    """Print a result: what it quotes of names and texts moves no cursor."""
    print(printable(text))


def agreed(question: str, yes: bool) -> bool:
    """What a person says to a question; `yes`, they have said it already. Nobody there: no."""
    if yes:
        return True
    if not sys.stdin.isatty():
        show("nothing is done: there is nobody to ask here; --yes does it")
        return False
    try:
        return input(f"{printable(question)} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def say(message: str) -> None:
    print(f"tcsae: {printable(message)}", file=sys.stderr)


def refuse(message: str) -> NoReturn:
    """End with `message` for a user who can mend what is wrong."""
    say(message)
    sys.exit(USER_ERROR_EXIT_CODE)


@contextlib.contextmanager
def command() -> Iterator[None]:
    """Turn an error that a user can mend into one line and an exit code. Defects keep their
    traceback."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped at once; the same command goes on from what was saved")
        sys.exit(KILLED_EXIT_CODE)
    except Interrupted as stopped:
        say(f"{stopped}; the same command goes on from here")
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        from tcsae.config.mistakes import for_the_user

        line = for_the_user(error)
        if line is None:
            raise
        say(line)
        sys.exit(JOB_FAILED_EXIT_CODE if isinstance(error, SweepFailed) else USER_ERROR_EXIT_CODE)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return "\n".join(
        (
            "usage: tcsae COMMAND ...   (the same as python -m tcsae.COMMAND ...)",
            "",
            *lines,
            "",
            "tcsae COMMAND --help says more; tcsae --version",
        )
    )


def main() -> None:
    """`tcsae` and `python -m tcsae`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_usage())
    elif name == "--version":
        from tcsae import __version__

        print(f"tcsae {__version__}")
    elif name in COMMANDS:
        del sys.argv[1]
        module = import_module(f"tcsae.{name}")
        # A package that is a command too has it where python -m looks.
        is_package = hasattr(module, "__path__")
        (import_module(f"tcsae.{name}.__main__") if is_package else module).main()
    else:
        say(f"{name}: no such command; one of {', '.join(COMMANDS)}")
        sys.exit(USER_ERROR_EXIT_CODE)
