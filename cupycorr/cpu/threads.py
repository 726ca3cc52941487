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
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


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
            self._buffers[name] = buffer = np.empty(size, np.uint8)
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


WORTH_LIMITING_BLAS = 1 << 18
"""Multiply-adds from which on BLAS might use several threads for a product."""
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
        self._blas: AbstractContextManager[None] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._count = 1
        if multiply_adds >= WORTH_LIMITING_BLAS:
            self._blas = _blas.one_thread()
        if multiply_adds >= WORTH_THREADS:
            self._count = max(1, thread_count() if threads is None else threads)

    def __enter__(self) -> Team:
        try:
            self._scratches = _idle.pop()
        except IndexError:
            self._scratches = [Scratch(), Scratch()]
        self.arena = self._scratches[0]
        """Memory for the arrays that all units share."""
        self._scratches += [Scratch() for _ in range(self._count + 1 - len(self._scratches))]
        if self._blas is not None:
            self._blas.__enter__()
        if self._count > 1:
            self._pool = ThreadPoolExecutor(self._count - 1, initializer=_limit_blas)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        if self._blas is not None:
            self._blas.__exit__(*error)
        retained = 0
        for scratches in [self._scratches, *_idle]:
            for scratch in scratches:
                retained += scratch.nbytes
        if retained <= RETAINED_BYTES:
            _idle.append(self._scratches)

    def work(self, units: Sequence[Unit]) -> None:
        """Run units, in any order and at the same time, and return when all are done."""
        queue = deque(units)
        helpers = self._scratches[2 : 1 + min(self._count, len(queue))]
        futures = [self._pool.submit(_drain, queue, s) for s in helpers if self._pool]
        try:
            with np.errstate(all="ignore"):
                while queue:
                    try:
                        unit = queue.popleft()
                    except IndexError:
                        break
                    unit(self._scratches[1])
        finally:
            # After an error here, what is left must not run on.
            queue.clear()
            for future in futures:
                future.result()


def _drain(queue: deque[Unit], scratch: Scratch) -> None:
    with np.errstate(all="ignore"):
        while True:
            try:
                unit = queue.popleft()
            except IndexError:
                return
            unit(scratch)


def thread_count() -> int:
    """Return the number of threads that NumPy's BLAS would use."""
    return _blas.thread_count()


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
