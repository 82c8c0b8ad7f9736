"""Fork-join: every task once, exceptions travel, more threads than cores, sleeping and waking, many calls."""

import os
import subprocess
import sys
import threading
import time

import pytest
from thread_states import others_sleep

from hetero_glm5 import _C

ThreadPool = _C.testing.ThreadPool
CROWD = 4 * len(os.sched_getaffinity(0)) + 1  # more threads than CPUs


@pytest.mark.parametrize("threads", [1, 2, 3, CROWD])
@pytest.mark.parametrize("tasks", [0, 1, 2, 7, 100])
def test_every_task_runs_once(threads, tasks):
    pool, seen = ThreadPool(threads), []
    pool.for_each(tasks, lambda worker, task: seen.append((worker, task)))
    assert sorted(task for _, task in seen) == list(range(tasks))
    assert all(0 <= worker < threads for worker, _ in seen)


@pytest.mark.parametrize("threads", [2, CROWD])
@pytest.mark.parametrize("tasks", [2, 64])
def test_many_calls(threads, tasks):
    assert ThreadPool(threads).sum_tasks(tasks, 5000) == 5000 * tasks * (tasks - 1) // 2


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_an_exception_reaches_the_caller_and_the_pool_goes_on(threads):
    pool = ThreadPool(threads)

    def fail(worker, task):
        if task in (3, 8):
            raise KeyError(f"task {task}")

    for _ in range(3):
        with pytest.raises(KeyError, match="task [38]"):
            pool.for_each(10, fail)
        assert pool.sum_tasks(10, 5) == 5 * 45


def test_a_free_worker_takes_the_tasks_of_a_busy_one():
    released, done = threading.Event(), []

    def body(worker, task):
        if task == 0:  # holds its worker until every other task, its own share's included, is done
            assert released.wait(20)
        else:
            done.append(task)
            if len(done) == 9:
                released.set()

    ThreadPool(2).for_each(10, body)
    assert sorted(done) == list(range(1, 10))


def test_workers_sleep_and_wake():
    pool = ThreadPool(2)
    for _ in range(5):
        assert pool.sum_tasks(8, 3) == 3 * 28
        time.sleep(0.02)  # far beyond the spin
    assert others_sleep()


def test_callers_take_turns():
    pool, sums = ThreadPool(2), []
    callers = [threading.Thread(target=lambda: sums.append(pool.sum_tasks(16, 500))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sums == [500 * 120] * 4


def test_pinning_leaves_the_caller_alone():
    before = os.sched_getaffinity(0)
    cores = _C.physical_cores()
    assert ThreadPool(len(cores), cores).sum_tasks(4, 10) == 60
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_absurd_thread_counts_are_refused(threads):
    with pytest.raises(ValueError, match=f"not {threads}"):
        ThreadPool(threads)


def test_threads_that_cannot_be_started_are_a_sentence():
    """Under a limit on address space, where the stacks of 2000 threads do not fit."""
    script = (
        "import resource; from hetero_glm5 import _C\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "try: _C.testing.ThreadPool(2000)\n"
        "except ValueError as error: print(error)\n"
        "print(_C.testing.ThreadPool(2).sum_tasks(8, 1))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "of 2000 threads could be started" in done.stdout and done.stdout.endswith("28\n"), done
