"""Calls in processes apart: the same results and errors, and none lost with a process."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from operator import truediv

import pytest

from tcsae.base.apart import Apart, here
from tcsae.base.errors import Interrupted


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    with Apart(threads=1) as made:
        yield made


def test_a_call_is_made_elsewhere_with_the_same_result(apart: Apart) -> None:
    assert apart(math.hypot, 3, 4) == here(math.hypot, 3, 4) == 5
    other = apart(os.getpid)
    assert other != os.getpid() and apart(os.getpid) == other  # one process, call after call
    assert apart(os.getenv, "OMP_NUM_THREADS") == "1"
    assert apart(print, "stdout is for answers") is None
    assert apart(sorted, ["b", "a"], reverse=True) == ["b", "a"]


def test_an_error_comes_back_with_where_it_was(apart: Apart) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        apart(truediv, 1, 0)
    assert "in a process apart" in raised.value.__notes__[0]
    assert "truediv" not in str(raised.value) and apart(truediv, 1, 2) == 0.5


def ends_the_helper(me: int) -> str:
    if os.getpid() != me:
        os._exit(9)
    return "done all the same"


def test_the_work_of_a_process_that_is_killed_is_done_here(
    apart: Apart, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert apart(ends_the_helper, os.getpid()) == "done all the same"
    assert "(9): its work is done here" in caplog.text
    assert apart(truediv, 1, 2) == 0.5  # by a new one


def test_closing_ends_what_is_being_done() -> None:
    apart, found = Apart(threads=1), []
    assert apart(abs, -1) == 1

    def call() -> None:
        try:
            apart(time.sleep, 600)
        except Interrupted as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    apart.close()
    thread.join(60)
    assert not thread.is_alive() and len(found) == 1
