"""Run independent units of work on several threads, with BLAS held to one thread meanwhile.

NumPy releases the interpreter lock inside its loops and matrix products, so plain threads use all
cores; BLAS's own threads would only speed up the products, and fight with ours.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Scratch:
    """Named buffers of one thread, reused from unit to unit and from call to call."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}
        self._layout: object = None
        self._zeroed = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.size for buffer in self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an uninitialised contiguous array, valid until the name is taken again."""
        size = prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            self._buffers[name] = buffer = np.empty(size, np.uint8)
            self._layout = None
        return np.ndarray(shape, dtype, buffer)

    def take_zeroed(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], layout: object
    ) -> Array:
        """Return an array that is zero, but for the cells that this ``layout`` always writes.

        The layout is that of the last axes; along the first all cells are alike. Only one name
        can be asked for.
        """
        array = self.take(name, shape, dtype)
        if self._layout != (shape[1:], dtype, layout) or shape[0] > self._zeroed:
            array.fill(0)
            self._layout, self._zeroed = (shape[1:], dtype, layout), shape[0]
        return array


class Arena:
    """Memory for the arrays of one chunk of work after the other."""

    def __init__(self) -> None:
        self.scratch = Scratch()
        self._taken = 0

    def reset(self) -> None:
        """Give back all arrays taken so far."""
        self._taken = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an uninitialised contiguous array."""
        self._taken += 1
        return self.scratch.take(str(self._taken), shape, dtype)


class _Memory:
    """The scratch memory of one call."""

    def __init__(self) -> None:
        self.arena = Arena()
        self.scratches = [Scratch()]

    @property
    def nbytes(self) -> int:
        return self.arena.scratch.nbytes + sum(scratch.nbytes for scratch in self.scratches)


_idle: deque[_Memory] = deque()
RETAINED_BYTES = 32 << 20
"""Scratch memory kept for the next call: fetching pages anew can take longer than small work."""


def release_scratch() -> None:
    """Free the scratch memory that is kept for the next call."""
    _idle.clear()


@contextmanager
def _memory() -> Iterator[_Memory]:
    try:
        memory = _idle.pop()
    except IndexError:
        memory = _Memory()
    memory.arena.reset()
    try:
        yield memory
    finally:
        if memory.nbytes + sum(idle.nbytes for idle in list(_idle)) <= RETAINED_BYTES:
            _idle.append(memory)


WORTH_LIMITING_BLAS = 1 << 18
"""Multiply-adds from which on BLAS might use several threads for a product."""
WORTH_THREADS = 1 << 22
"""Multiply-adds from which on several threads are used."""

Unit = Callable[[Scratch], None]
Runner = Callable[[Sequence[Unit]], None]


@contextmanager
def workers(multiply_adds: int, threads: int | None) -> Iterator[tuple[Runner, Arena]]:
    """Provide memory, and a function that runs units and returns when all are done.

    The units of one call may run in any order and at the same time, on at most ``threads``
    threads, by default as many as BLAS would use; small work stays on the calling thread.
    """
    with _memory() as memory:
        scratches = memory.scratches
        if multiply_adds < WORTH_LIMITING_BLAS:
            yield lambda units: _drain(deque(units), scratches[0]), memory.arena
            return
        with _blas.one_thread():
            count = 1
            if multiply_adds >= WORTH_THREADS:
                count = max(1, thread_count() if threads is None else threads)
            scratches += [Scratch() for _ in range(count - len(scratches))]
            with ThreadPoolExecutor(max(1, count - 1), initializer=_limit_blas) as pool:
                yield lambda units: _run(units, scratches[:count], pool), memory.arena


def _run(units: Sequence[Unit], scratches: list[Scratch], pool: ThreadPoolExecutor) -> None:
    queue = deque(units)
    helpers = scratches[1 : len(queue)]
    futures = [pool.submit(_drain, queue, scratch) for scratch in helpers]
    try:
        _drain(queue, scratches[0])
    finally:
        # After an error here, what is left must not run on.
        queue.clear()
        for future in futures:
            future.result()


def thread_count() -> int:
    """Return the number of threads that NumPy's BLAS would use."""
    return _blas.thread_count()


def _drain(queue: deque[Unit], scratch: Scratch) -> None:
    with np.errstate(all="ignore"):
        while True:
            try:
                unit = queue.popleft()
            except IndexError:
                return
            unit(scratch)


class _Blas:
    """Holds BLAS to one thread while at least one caller wants that.

    Some libraries have one limit for the process, which must not be restored before the last
    caller leaves; others have a limit for each calling thread.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.saved: list[int] = []

    def thread_count(self) -> int:
        """Return how many threads the calling thread's products would use without a limit."""
        with self.lock:
            counts = self.saved if self.users else [b.get_num_threads() for b in _libraries(False)]
        return max([*counts, *(b.get_num_threads() for b in _libraries(True))], default=1)

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Limit BLAS for the calling thread."""
        own = [library.get_num_threads() for library in _libraries(True)]
        with self.lock:
            if self.users == 0:
                self.saved = [library.get_num_threads() for library in _libraries(False)]
            self.users += 1
        _limit_blas()
        try:
            yield
        finally:
            _set(_libraries(True), own)
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    _set(_libraries(False), self.saved)

    def reset(self) -> None:
        """Forget the callers of the parent process, whose threads do not exist after a fork."""
        self.lock = threading.Lock()
        if self.users:
            self.users = 0
            _set(_libraries(False), self.saved)


_blas = _Blas()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_blas.reset)


def _limit_blas() -> None:
    """Limit BLAS to one thread, for the calling thread where it can be told apart."""
    for per_thread in (True, False):
        libraries = _libraries(per_thread)
        _set(libraries, [1] * len(libraries))


def _set(libraries: list[Any], counts: list[int]) -> None:
    for library, count in zip(libraries, counts, strict=True):
        # threadpoolctl lets the first thread that limits a library keep that right to itself.
        take = getattr(library, "clear_controlling_thread", None)
        if take is not None:
            take(force=True)
        library.set_num_threads(count)
        if take is not None:
            take(force=True)


@lru_cache(maxsize=2)
def _libraries(per_thread: bool) -> list[Any]:
    """Return the BLAS libraries of this process, by whether each thread has a limit of its own."""
    from threadpoolctl import ThreadpoolController

    return [
        library
        for library in ThreadpoolController().select(user_api="blas").lib_controllers
        if per_thread
        == (library.internal_api == "mkl" or getattr(library, "threading_layer", "") == "openmp")
    ]
