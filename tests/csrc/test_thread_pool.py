"""Fork-join: every task once, exceptions travel, more threads than cores, sleeping and waking, many calls."""

import os
import subprocess
import sys
import threading
import time

import pytest
from thread_states import others_sleep, states

from hetero_glm5 import _C

ThreadPool = _C.testing.ThreadPool
NODE = _C.topology()[0]["id"]
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


@pytest.mark.parametrize("nodes", [[], [NODE, NODE]])
@pytest.mark.parametrize("failing", range(4))
def test_an_exception_travels_from_every_worker(nodes, failing):
    pool, everyone_is_here = ThreadPool(4, nodes), threading.Barrier(4)

    def fail(worker, task):
        everyone_is_here.wait(20)
        if worker == failing:
            raise KeyError(f"worker {worker}")

    for _ in range(2):
        with pytest.raises(KeyError, match=f"worker {failing}"):
            pool.for_each(4, fail)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 64])
def test_every_task_runs_once_in_groups(groups, tasks):
    pool, seen = ThreadPool(5, [NODE] * groups), []
    pool.for_each(tasks, lambda worker, task: seen.append(task))
    assert sorted(seen) == list(range(tasks))
    assert pool.sum_tasks(tasks, 500) == 500 * tasks * (tasks - 1) // 2


@pytest.mark.parametrize(
    ("free", "order"),
    [(0, [0, 1, 3, 5, 7]), (1, [2, 3, 1, 7, 5]), (2, [4, 5, 7, 1, 3]), (3, [6, 7, 5, 3, 1])],
)
def test_own_tasks_first_then_the_groups_then_the_others(free, order):
    """Two groups of two workers, two tasks each; all workers but one are held in their first task."""
    everyone_is_here, done, mine = threading.Barrier(4), threading.Event(), []

    def body(worker, task):
        if worker == free:
            mine.append(task)
        if task % 2 == 0:  # the first task of a share
            everyone_is_here.wait(20)
        if worker != free:
            assert done.wait(20)
        elif len(mine) == 5:
            done.set()

    ThreadPool(4, [NODE, NODE]).for_each(8, body)
    assert mine == order


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


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two threads do not spin on one CPU")
def test_the_spin_is_a_parameter():
    ThreadPool(2, spin_us=0).sum_tasks(8, 100)
    patient = ThreadPool(2, spin_us=60_000_000)
    assert patient.sum_tasks(8, 100) == 2800
    time.sleep(0.02)
    assert states().count("R") == 1
    del patient  # does not wait for the spin to end
    assert "R" not in states()


@pytest.mark.parametrize("threads", [4, 8, 16])
def test_more_threads_than_cpus_do_all_the_work(threads):
    """On two CPUs, from several callers, with tasks of every number: who sleeps or lost its CPU holds nobody up."""
    pool, sums = ThreadPool(threads, [NODE, NODE]), {}
    callers = [threading.Thread(target=lambda n=n: sums.update({n: pool.sum_tasks(n, 300)})) for n in (1, 3, 40, 200)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sums == {n: 300 * n * (n - 1) // 2 for n in (1, 3, 40, 200)}


COUNTER = """
#include <stddef.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
static long calls;
long allocations(void) { return __atomic_load_n(&calls, __ATOMIC_SEQ_CST); }
static void count(void) { __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST); }
void *malloc(size_t n) { return count(), __libc_malloc(n); }
void *calloc(size_t n, size_t size) { return count(), __libc_calloc(n, size); }
void *realloc(void *p, size_t n) { return count(), __libc_realloc(p, n); }
void *aligned_alloc(size_t align, size_t n) { return count(), __libc_memalign(align, n); }
void *mmap(void *p, size_t n, int prot, int flags, int file, off_t offset) {
  return count(), (void *)syscall(SYS_mmap, p, n, prot, flags, file, offset);
}
"""


COUNTED = """
import ctypes
import numpy as np
from hetero_glm5 import _C

allocations, node = ctypes.CDLL(None).allocations, _C.topology()[0]["id"]
pool = _C.testing.ThreadPool(4, [node] * 2)
weights = _C.ExpertWeights(_C.ExpertLayout("BF16", 200, 136), 6, list(range(6)), [node] * 2)
layer = _C.MoeLayer(_C.HostPool(4, None, [node] * 2), weights)
call = [np.zeros((8, n), t) for n, t in ((200, np.float32), (4, np.int32), (4, np.float32), (200, np.float32))]

def used(run):  # by Python too, in some calls
    before = allocations()
    run()
    return allocations() - before

print(used(lambda: layer.forward(*call)))  # makes room
print(min(used(lambda: layer.forward(*call)) for _ in range(20)))
print(min(used(lambda: pool.sum_tasks(16, 10000)) for _ in range(5)))
"""


def test_calls_do_not_allocate(tmp_path):
    """Neither of the pool nor of a layer, counted by functions that stand in for the C library's."""
    source, library = tmp_path / "count.c", tmp_path / "count.so"
    source.write_text(COUNTER)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    command = [sys.executable, "-c", COUNTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    first, *later = map(int, done.stdout.split())
    assert first > 0 and later == [0, 0]


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
    assert ThreadPool(0).threads == len(_C.physical_cores())  # as many as cores: pinned
    assert ThreadPool(0).sum_tasks(4, 10) == 60
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("threads", [-1, 5000])
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
