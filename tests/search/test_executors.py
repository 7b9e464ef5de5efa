"""The thread that evaluates: order, errors, and that an interrupt reaches it."""

from __future__ import annotations

import threading
import time

import pytest

from lpsearch.search.executors import WorkerThread


def test_runs_in_one_other_thread_and_in_order():
    with WorkerThread() as executor:
        futures = [executor.submit(lambda i: (i, threading.get_ident()), i) for i in range(5)]
    results = [future.result() for future in futures]
    assert [index for index, _ in results] == list(range(5))
    assert len({ident for _, ident in results}) == 1
    assert threading.get_ident() not in {ident for _, ident in results}


def test_errors_come_back_with_the_result():
    def fail():
        raise KeyError("missing")

    with WorkerThread() as executor, pytest.raises(KeyError, match="missing"):
        executor.submit(fail).result()


def test_leaving_by_an_error_interrupts_what_runs_and_drops_what_waits():
    began, unwound, second = threading.Event(), threading.Event(), threading.Event()

    def work_for_minutes():
        began.set()
        try:
            for _ in range(60_000):
                time.sleep(0.005)
        finally:
            unwound.set()

    def enter_and_fail():
        with WorkerThread() as executor:
            executor.submit(work_for_minutes)
            executor.submit(second.set)
            assert began.wait(60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        enter_and_fail()
    assert unwound.is_set()
    assert not second.is_set()


def test_interrupt_between_two_pieces_of_work_hits_neither():
    with WorkerThread() as executor:
        assert executor.submit(lambda: 1).result() == 1
        executor.interrupt()
        assert executor.submit(lambda: sum(range(10_000))).result() == 49_995_000
