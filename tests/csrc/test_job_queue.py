"""One queue thread: order, errors at wait, fixed slots."""

import threading

import pytest

from hetero_glm5 import _C

JOB_SLOTS, JobQueue = _C.testing.JOB_SLOTS, _C.testing.JobQueue


def test_jobs_run_in_order_on_another_thread():
    queue, ran = JobQueue(), []
    tickets = [queue.submit(lambda i=i: ran.append((i, threading.get_ident()))) for i in range(10)]
    for ticket in reversed(tickets):
        queue.wait(ticket)
    assert [i for i, _ in ran] == list(range(10))
    assert len({ident for _, ident in ran} | {threading.get_ident()}) == 2


def test_submit_returns_while_the_job_waits():
    queue, go = JobQueue(), threading.Event()
    ticket = queue.submit(lambda: go.wait(20) or pytest.fail("never released"))
    go.set()
    queue.wait(ticket)


def test_an_error_comes_out_at_its_own_wait():
    queue = JobQueue()
    bad, good = queue.submit(lambda: 1 / 0), queue.submit(lambda: None)
    queue.wait(good)
    with pytest.raises(ZeroDivisionError):
        queue.wait(bad)


def test_slots_are_reused_and_running_out_is_an_error():
    queue = JobQueue()
    for _ in range(3):
        tickets = [queue.submit(lambda: None) for _ in range(JOB_SLOTS)]
        with pytest.raises(ValueError, match=f"{JOB_SLOTS} submitted jobs"):
            queue.submit(lambda: None)
        for ticket in tickets:
            queue.wait(ticket)
    with pytest.raises(ValueError, match="has been waited for"):
        queue.wait(tickets[0])


def test_dropping_the_queue_runs_what_was_submitted():
    ran, queue, go = [], JobQueue(), threading.Event()
    queue.submit(lambda: go.wait(20))
    for i in range(5):
        queue.submit(lambda i=i: ran.append(i))
    threading.Timer(0.05, go.set).start()
    assert not ran
    del queue
    assert ran == list(range(5))
