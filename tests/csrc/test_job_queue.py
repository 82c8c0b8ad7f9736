"""One queue thread: order, errors in their own job, jobs that are submitted again, sleep when idle."""

import threading
import time

import pytest
from thread_states import others_sleep

from hetero_glm5 import _C

JobQueue = _C.testing.JobQueue


def test_jobs_run_in_order_on_another_thread():
    queue, ran = JobQueue(), []
    jobs = [queue.submit(lambda i=i: ran.append((i, threading.get_ident()))) for i in range(500)]
    for job in reversed(jobs):
        queue.wait(job)
    assert [i for i, _ in ran] == list(range(500))
    assert len({ident for _, ident in ran} | {threading.get_ident()}) == 2


def test_submit_returns_while_the_job_waits():
    queue, go = JobQueue(), threading.Event()
    job = queue.submit(lambda: go.wait(20) or pytest.fail("never released"))
    go.set()
    queue.wait(job)


def test_an_error_stays_with_its_job():
    queue = JobQueue()
    bad, good = queue.submit(lambda: 1 / 0), queue.submit(lambda: None)
    queue.wait(good)
    with pytest.raises(ZeroDivisionError):
        queue.wait(bad)
    queue.wait(bad)


def test_a_job_can_be_submitted_again():
    queue, ran = JobQueue(), []
    jobs = [queue.submit(lambda i=i: ran.append(i)) for i in range(3)]
    for _ in range(100):
        for job in jobs:
            queue.wait(job)
            queue.again(job)
    for job in jobs:
        queue.wait(job)
    assert ran == [0, 1, 2] * 101


def test_several_submitters():
    """Each one's jobs keep their order, and none is lost."""
    queue, ran = JobQueue(), []

    def submit(name):
        jobs = [queue.submit(lambda i=i: ran.append((name, i))) for i in range(200)]
        queue.wait(jobs[-1])

    submitters = [threading.Thread(target=submit, args=(name,)) for name in range(4)]
    for submitter in submitters:
        submitter.start()
    for submitter in submitters:
        submitter.join()
    assert len(ran) == 800
    for name in range(4):
        assert [i for n, i in ran if n == name] == list(range(200))


def test_it_sleeps_and_wakes():
    queue, ran = JobQueue(), []
    for i in range(5):
        queue.wait(queue.submit(lambda i=i: ran.append(i)))
        time.sleep(0.02)  # far beyond the spin
        assert others_sleep()
    assert ran == list(range(5))


def test_dropping_the_queue_runs_what_was_submitted():
    ran, queue, go = [], JobQueue(), threading.Event()
    queue.submit(lambda: go.wait(20))
    for i in range(5):
        queue.submit(lambda i=i: ran.append(i))
    threading.Timer(0.05, go.set).start()
    assert not ran
    del queue
    assert ran == list(range(5))
