"""Run independent units of work on several threads.

NumPy releases the interpreter lock inside its loops and matrix products, so plain threads use all
cores. BLAS's own threads would only speed up the products, and fight with ours. A limit on them
would hold for the whole process: other threads would meet it, and an interrupt might leave it
there. So nothing is limited. The engine multiplies so little at a time (`plan.PRODUCT`) that
OpenBLAS computes each product on the thread that asks for it.

Workers stay from call to call. A call that an exception ends does not wait for them: its arrays
and its scratch memory are left to them, and nobody takes these again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import cache
from math import prod
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_T = TypeVar("_T")


CACHE_LINE = 64
"""Bytes of a cache line. Buffers start with one: other matrices take 1.4 times as long."""


class Scratch:
    """Named buffers, reused from unit to unit and from call to call; for one thread at a time."""

    def __init__(self) -> None:
        self.nbytes = 0
        """Bytes of all buffers."""
        self._buffers: dict[object, npt.NDArray[np.uint8]] = {}
        self._layout: object = None
        self._zeroed = 0

    def take(self, name: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an uninitialised contiguous array, valid until the name is taken again."""
        size = prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            self.nbytes += size - (0 if buffer is None else buffer.size)
            buffer = np.empty(size + CACHE_LINE, np.uint8)
            first = -buffer.ctypes.data % CACHE_LINE
            self._buffers[name] = buffer = buffer[first : first + size]
            self._layout = None
        return np.ndarray(shape, dtype, buffer)

    def take_zeroed(
        self, name: object, shape: tuple[int, ...], dtype: np.dtype[Any], layout: object
    ) -> Array:
        """Return an array whose cells beside the layout are zero.

        Callers with an equal layout write the same cells, so the array is cleared only when the
        layout changes. The layout is that of the last axes; along the first all cells are alike.
        Only one name can be asked for.
        """
        array = self.take(name, shape, dtype)
        if self._layout != (shape[1:], dtype, layout) or shape[0] > self._zeroed:
            array.fill(0)
            self._layout, self._zeroed = (shape[1:], dtype, layout), shape[0]
        return array


_idle: deque[list[Scratch]] = deque()
RETAINED_BYTES = 32 << 20
"""Scratch memory kept for the next call: fetching pages anew can take longer than small work."""


def release_scratch() -> None:
    """Free the scratch memory that is kept for the next call."""
    _idle.clear()


WORTH_THREADS = 1 << 22
"""Multiply-adds from which on several threads are used."""

Unit = Callable[[Scratch], None]


class Team:
    """The threads and the scratch memory of one call, for a ``with`` statement.

    Parameters
    ----------
    multiply_adds : int
        The work; little of it stays on the calling thread.
    threads : int, optional
        Threads to use at most; by default as many as BLAS would use.
    """

    def __init__(self, multiply_adds: int, threads: int | None) -> None:
        self.size = 1
        """The number of threads."""
        if multiply_adds >= WORTH_THREADS:
            self.size = max(1, thread_count() if threads is None else threads)

    def __enter__(self) -> Team:
        try:
            self._scratches = _idle.pop()
        except IndexError:
            self._scratches = [Scratch(), Scratch()]
        self.arena = self._scratches[0]
        """Memory for the arrays that all units share."""
        self._scratches += [Scratch() for _ in range(self.size + 1 - len(self._scratches))]
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            return
        retained = 0
        for scratches in [self._scratches, *_idle]:
            for scratch in scratches:
                retained += scratch.nbytes
        if retained <= RETAINED_BYTES:
            _idle.append(self._scratches)

    def work(self, units: Sequence[Unit]) -> None:
        """Run units, in any order and at the same time, and return when all are done."""
        queue = deque(units)
        scratches = deque(self._scratches[2 : 1 + min(self.size, len(queue))])
        done: SimpleQueue[BaseException | None] = SimpleQueue()
        helpers = len(scratches)
        # NumPy 2 keeps this setting in the context: no interrupt can leave it in the caller's.
        # NumPy 1.26 keeps it in the thread, where an interrupt at the wrong moment leaves it.
        context, errors = copy_context(), np.geterr()
        try:
            if helpers:
                _hire(helpers)
            for _ in range(helpers):
                _tasks.put((queue, scratches, done))
            context.run(np.seterr, all="ignore")
            while (unit := _take(queue)) is not None:
                context.run(unit, self._scratches[1])
        finally:
            context.run(np.seterr, **errors)
            # After an error here, what is left must not run on.
            queue.clear()
        while helpers and _take(scratches) is not None:
            helpers -= 1
        for _ in range(helpers):
            error = done.get()
            if error is not None:
                raise error


def _take(queue: deque[_T]) -> _T | None:
    try:
        return queue.popleft()
    except IndexError:
        return None


_Task = tuple["deque[Unit]", "deque[Scratch]", "SimpleQueue[BaseException | None]"]
_tasks: SimpleQueue[_Task] = SimpleQueue()
_workers: list[Thread] = []


def _hire(count: int) -> None:
    """Start workers until there are so many; they end with the process."""
    while len(_workers) < count:
        worker = Thread(target=_serve, args=(_tasks,), name="cupycorr", daemon=True)
        worker.start()
        _workers.append(worker)


def _serve(tasks: SimpleQueue[_Task]) -> None:
    _limit_openmp()
    np.seterr(all="ignore")
    while True:
        _carry_out(*tasks.get())


def _carry_out(
    queue: deque[Unit], scratches: deque[Scratch], done: SimpleQueue[BaseException | None]
) -> None:
    """Help with the units of a call, unless it has ended before this worker was free."""
    scratch = _take(scratches)
    if scratch is None:
        return
    try:
        while (unit := _take(queue)) is not None:
            unit(scratch)
    except BaseException as error:
        queue.clear()
        done.put(error)
    else:
        done.put(None)


def _limit_openmp() -> None:
    """Hold a BLAS with OpenMP to one thread: that limit is the calling thread's."""
    from threadpoolctl import ThreadpoolController

    ThreadpoolController().select(user_api="openmp").limit(limits=1)


def _forget_workers() -> None:
    """Hire anew in the child process after a fork, where no other thread exists."""
    global _tasks
    _tasks = SimpleQueue()
    _workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def thread_count() -> int:
    """Return the number of threads that NumPy's BLAS would use."""
    return max((library.get_num_threads() for library in _libraries()), default=1)


@cache
def _libraries() -> list[Any]:
    """Return the BLAS libraries of this process."""
    from threadpoolctl import ThreadpoolController

    libraries: list[Any] = ThreadpoolController().select(user_api="blas").lib_controllers
    return libraries
