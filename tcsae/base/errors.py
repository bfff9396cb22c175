"""Errors that a user can mend, and the exception that stops a job on purpose."""

from __future__ import annotations

INTERRUPTED_EXIT_CODE = 75  # EX_TEMPFAIL: saved; the same command goes on from here
USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """A mistake or a condition the user can mend; its text is the whole message."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, or its type where it says nothing.

    Where the first line only announces the next, both.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; everything that can be resumed has been saved."""


class RankLost(Interrupted):
    """Another rank of the same work is gone in the midst of a step; the last checkpoint is kept."""


class SweepFailed(UserError):
    """Some jobs of a sweep failed; the table has said which, and why."""
