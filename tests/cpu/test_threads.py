"""Calls end well: interrupted anywhere, beside other threads, and with BLAS's threads asleep."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

from cupycorr import Geometry, correlation, correlation_vjp
from cupycorr.cpu import engine
from cupycorr.cpu import threads as threads_of_engine
from cupycorr.layer import Layer

SHAPE, LAYER = (2, 64, 32, 48), Layer(Geometry(3, 9, padding=1))


RNG = np.random.default_rng(0)
FMAP1, FMAP2 = (RNG.integers(-2, 3, SHAPE).astype(np.float32) for _ in range(2))


def run(threads=3):
    """Compute the cost volume of maps of integers, which is exact."""
    cost = np.full(LAYER.geometry.cost_shape(SHAPE), np.nan, np.float32)
    engine.run("cost", {"fmap1": FMAP1, "fmap2": FMAP2, "cost": cost}, LAYER, threads=threads)
    return cost


def state():
    """Return what a call might leave changed in its thread and in the process."""
    limits = [(p["filepath"], p["num_threads"]) for p in threadpoolctl.threadpool_info()]
    # Older NumPy keeps how errors are handled for a whole thread, as `np.errstate` leaves it.
    return limits, np.geterr() if np.__version__ >= "2" else None


# Files in which an interrupt at a line might leave something behind.
WATCHED = ("threads.py", "engine.py", "_ufunc_config.py", "threading.py")


def interrupted_at(line, threads):
    """Interrupt a call at its so-manyth line in the watched files; tell whether it got there."""
    left = line

    def trace(frame, event, argument):
        nonlocal left
        if Path(frame.f_code.co_filename).name not in WATCHED:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        run(threads)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return left <= 0


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupt_at_any_line_leaves_nothing_behind(threads):
    want, before = run(threads), state()
    line = 1
    while interrupted_at(line, threads):
        assert state() == before, line
        assert np.array_equal(run(threads), want), line
        line += 1 if line < 400 else 7
    assert line > 100


INTERRUPTED = """
import random, signal, sys
import numpy as np
import threadpoolctl
from test_threads import run, state

def interrupt(*args):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
want, before, caught, armed = run(), state(), 0, False
for number in range(int(sys.argv[1])):
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, random.Random(number).uniform(1e-5, 4e-3))
        run()
        armed = False
    except KeyboardInterrupt:
        caught += 1
    if number % 20 == 0:
        assert np.array_equal(run(), want), number
        assert state() == before, number
print(caught)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers")
@pytest.mark.parametrize("calls", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_interrupts_at_random_moments_leave_nothing_behind(calls):
    here = Path(__file__).parent
    # The time limit only turns a deadlock into a failure.
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(calls)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=here.parents[1],
        env=os.environ | {"PYTHONPATH": str(here)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > calls / 4


def test_an_error_in_a_worker_reaches_the_caller():
    def fail(scratch):
        raise MemoryError("planted")

    with (
        pytest.raises(MemoryError, match="planted"),
        threads_of_engine.Team(1 << 30, 3) as team,
    ):
        team.work([lambda scratch: time.sleep(0.01), fail, *[lambda scratch: None] * 5])
    run()


def test_a_limit_of_another_thread_is_left_alone():
    inside, calls = threading.Event(), []

    def compute():
        while not inside.is_set() or len(calls) < 3:
            calls.append(run())

    before = state()
    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for count in (1, 3, 2) * 5:
            with threadpoolctl.threadpool_limits(count, user_api="blas"):
                for _ in range(20):
                    limits = threadpoolctl.threadpool_info()
                    assert {p["num_threads"] for p in limits if p["user_api"] == "blas"} == {count}
                    time.sleep(0.001)
            assert state() == before
    finally:
        inside.set()
        thread.join()
    assert all(np.array_equal(cost, calls[0]) for cost in calls)


def time_of_other_threads():
    """Return how long the threads that Python does not know have run, in nanoseconds."""
    known = {thread.native_id for thread in threading.enumerate()}
    tasks = Path("/proc/self/task").iterdir()
    return sum(
        int((task / "schedstat").read_text().split()[0])
        for task in tasks
        if int(task.name) not in known
    )


@pytest.fixture
def two_threads_of_blas():
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        yield


def ran_beside(function):
    """Tell whether threads that Python does not know ran while a function did."""
    for _ in range(100):  # BLAS's threads wait a moment before they sleep
        before = time_of_other_threads()
        time.sleep(0.02)
        if time_of_other_threads() == before:
            break
    function()
    time.sleep(0.02)  # Linux adds up times when threads change
    return time_of_other_threads() > before


LAYERS = {
    "tiles": ((2, 256, 32, 32), Layer(Geometry(patch_size=21, dilation_patch=2))),
    "a long row": ((1, 128, 4, 160), Layer(Geometry(patch_size=(1, 41)))),
    "all pairs": ((2, 196, 8, 14), Layer(Geometry(patch_size=9))),
    "many channels": ((1, 5000, 8, 9), Layer(Geometry(patch_size=9))),
    "a row and a column left over": ((2, 256, 5, 13), Layer(Geometry(patch_size=9))),
    "one column": ((1, 4000, 64, 1), Layer(Geometry(patch_size=(21, 1)))),
    "one channel": ((1, 1, 96, 96), Layer(Geometry(patch_size=41))),
    "shifts": ((4, 8, 64, 64), Layer(Geometry(patch_size=3))),
    "taps": ((2, 64, 32, 32), Layer(Geometry(3, 9, padding=1))),
    "differences": ((2, 64, 32, 32), Layer(Geometry(patch_size=9), "l1")),
    "differences of many channels": ((1, 10_000, 8, 9), Layer(Geometry(patch_size=3), "l1")),
}


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's clocks")
@pytest.mark.usefixtures("two_threads_of_blas")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blas_needs_no_threads_of_its_own(name, dtype):
    shape, layer = LAYERS[name]
    fmap = np.ones(shape, dtype)

    def both():
        cost = correlation(fmap, fmap, layer.geometry, similarity=layer.similarity)
        correlation_vjp(cost, fmap, fmap, layer.geometry, similarity=layer.similarity)

    large = np.ones((600, 600), dtype)
    assert ran_beside(lambda: large @ large), "BLAS has no threads here"
    both()
    # On a busy machine, threads that are about to sleep may still run in one of the attempts.
    assert not all(ran_beside(both) for _ in range(5))
