"""Compile and run the CUDA kernels on the processor: the same sources, plans and arguments.

`host_engine` is to `verify` what the CUDA engine is on a GPU. A launch's source (`cuda_sources`) is
compiled by g++ together with hostcuda.h, and kept outside the checkout under a hash of all that it
is made of. What runs is what a GPU runs, thread by thread; hostcuda.h lists which mistakes it sees.
"""

import ctypes
import fcntl
import hashlib
import math
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from devices import DEVICES

from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda import sources as cuda_sources
from cupycorr.layer import DTYPES
from cupycorr.verify import Engine

COMPILER = "g++"
HERE = Path(__file__).parent
OPTIONS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
# What the compiler adds to a kernel: "run" finds vectors that are not aligned, "trace" calls a
# function at every access, "sanitize" finds accesses outside of arrays and undefined behaviour.
MODES = {
    "run": ("-O1", "-fsanitize=alignment"),
    "trace": ("-O1", "-fsanitize=thread", "-DHOST_TRACE"),
    "sanitize": ("-O0", "-g1", "-fsanitize=address,undefined"),
}
# The runtime is told about it, too. It must not trace itself; and it leaves the frames of fibers
# that have ended where a sanitizer of stacks would expect them to return.
RUNTIME_MODES = {
    "run": ("-O2",),
    "trace": ("-O2", "-DHOST_TRACE"),
    "sanitize": ("-O1", "-g1", "-fsanitize=address", "--param=asan-stack=0"),
}
ORDERS = ("ascending", "descending", "shuffled")  # of the threads of a block
GUARD_BYTES = 4096  # before and behind every array; a multiple of any alignment
ALIGNED_OFFSET = 16  # bytes from a multiple of 256 to the first element of aligned arrays
POISON = 0xFF  # bytes of NaN in every dtype

# One for each way that copies reach shared memory, and size of shared memory.
SM_75 = DEVICES["2070S"]  # through registers
SM_80 = DEVICES["A100"]  # asynchronously
SM_90 = DEVICES["H100"]
DEVICES = {f"sm_{device.capability}": device for device in (SM_75, SM_80, SM_90)}

ACCESS = np.dtype(
    {
        "names": ("offset", "block", "round", "thread", "array", "bytes", "written"),
        "formats": (np.int64, np.int32, np.int32, np.int16, np.int16, np.int16, np.int16),
    }
)
LOGS = ("none", "arrays", "all")  # of accesses, that a trace keeps
SHARED = -1  # the ``array`` of accesses to shared memory


class HostError(Exception):
    """A kernel did what it must not do."""


class _Bytes(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


class _Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("blocks", "threads", "shared_bytes", "order")),
        ("argument_count", ctypes.c_int),
        ("array_count", ctypes.c_int),
        ("arguments", ctypes.POINTER(_Bytes)),
        ("arrays", ctypes.POINTER(_Bytes)),
        ("guard_bytes", ctypes.c_int),
        ("log", ctypes.c_int),
    )


class Guarded:
    """An array full of NaN, between guards.

    A sanitizer keeps its own guards around an allocation; then there are none here. ``offset`` is
    that of the first element from a multiple of 256 bytes, in bytes.
    """

    def __init__(self, shape, dtype, *, offset=0, guard_bytes=GUARD_BYTES):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        self.bytes = np.full(guard_bytes + offset + size + guard_bytes + 255 * bool(guard_bytes),
                             POISON, np.uint8)  # fmt: skip
        start = guard_bytes + offset
        if guard_bytes:
            start += -(self.bytes.ctypes.data + guard_bytes) % 256
        self.range = slice(start, start + size)
        self.array = self.bytes[self.range].view(dtype).reshape(shape)

    def check(self, name):
        """Raise where a guard was written."""
        for what, guard in (
            ("before", self.bytes[: self.range.start]),
            ("behind", self.bytes[self.range.stop :]),
        ):
            if (guard != POISON).any():
                raise HostError(f"a write {what} {name}")


def unavailable():
    """Return why kernels cannot be compiled here, or None."""
    return None if shutil.which(COMPILER) else f"needs {COMPILER}"


def host_engine(
    device,
    *,
    order="ascending",
    plain=False,
    aligned=True,
    mode="run",
    patch=None,
    planned=None,
    channels_last=False,
    tf32=False,
):
    """Return the CUDA kernels, run on the processor, as an engine of `verify`.

    Parameters
    ----------
    device : Device
        What it is planned for.
    order : {"ascending", "descending", "shuffled"}
        The order of the threads of a block, between any two barriers.
    plain, aligned
        As for `cuda.plan.plan`; without ``aligned`` arrays begin one element behind a multiple of
        256 bytes.
    mode : {"run", "trace", "sanitize"}
        What is watched, beside the results.
    patch : (old, new, ...), optional
        Texts of the sources, each followed by what is put in its place where it occurs.
    planned : function, optional
        From a plan to the one that is run.
    channels_last : bool
        Whether the maps lie in memory as (N, H, W, C).
    tf32 : bool
        As for `cuda.plan.plan`.
    """
    how = {"plain": plain, "aligned": aligned, "order": order, "mode": mode, "patch": patch,
           "planned": planned, "channels_last": channels_last, "tf32": tf32}  # fmt: skip

    def cost(fmap1, fmap2, layer, dtype):
        inputs = {"fmap1": fmap1, "fmap2": fmap2}
        outputs = {"cost": layer.geometry.cost_shape(fmap1.shape)}
        return compute(device, inputs, outputs, layer, dtype, **how)["cost"]

    def grads(grad, fmap1, fmap2, layer, dtype):
        inputs = {"grad_cost": grad, "fmap1": fmap1, "fmap2": fmap2}
        outputs = {"grad_fmap1": fmap1.shape, "grad_fmap2": fmap2.shape}
        return tuple(compute(device, inputs, outputs, layer, dtype, **how).values())

    return Engine(f"host {device.capability}", cost, grads)


def tangent(device, fmap1, fmap2, tangent1, tangent2, layer, dtype, **how):
    """Return the derivative of absolute differences along tangents; ``how`` as for `compute`."""
    inputs = {"fmap1": fmap1, "fmap2": fmap2, "tangent1": tangent1, "tangent2": tangent2}
    outputs = {"cost": layer.geometry.cost_shape(fmap1.shape)}
    return compute(device, inputs, outputs, layer, dtype, **how)["cost"]


@np.errstate(invalid="ignore")  # NaN may be rounded to a narrower NaN
def compute(
    device,
    inputs,
    outputs,
    layer,
    dtype,
    *,
    plain=False,
    aligned=True,
    order="ascending",
    mode="run",
    patch=None,
    planned=None,
    channels_last=False,
    tf32=False,
):
    """Plan for arrays of some names, and for results of some names and shapes, and run that.

    Arrays are float64, of whatever dtype is computed in; so are the results, by name. Options are
    those of `host_engine`.
    """
    arrays = {}
    shape = inputs["fmap1"].shape
    if channels_last:
        maps = cuda_plan.MAPS & inputs.keys()
        inputs = inputs | {name: inputs[name].transpose(0, 2, 3, 1) for name in maps}
        lies = inputs["fmap1"].shape
        outputs = {name: size if name == "cost" else lies for name, size in outputs.items()}
    for name, size in {**{n: a.shape for n, a in inputs.items()}, **outputs}.items():
        arrays[name] = _guarded(size, dtype, aligned, mode)
        if name in inputs:
            arrays[name].array[...] = inputs[name]
        elif 0 in shape:
            arrays[name].array[...] = 0
    divisor, results = layer.divisor(shape[1]), tuple(outputs)
    at_once = cuda_plan.samples_at_once(layer.geometry, shape, dtype)
    for start in range(0, 0 if 0 in shape else shape[0], max(1, at_once)):
        part = {name: whole.array[start : start + at_once] for name, whole in arrays.items()}
        plan = cuda_plan.plan(
            results, layer, (len(part["fmap1"]), *shape[1:]), dtype, device,
            tangent="tangent1" in inputs, aligned=aligned, plain=plain, channels_last=channels_last,
            tf32=tf32,
        )  # fmt: skip
        plan = plan if planned is None else planned(plan)
        run_plan(plan, part, dtype, 1 / divisor, order=order, mode=mode, patch=patch)
    for name, whole in arrays.items():
        whole.check(name)
        if name in inputs and not _same(whole.array, inputs[name].astype(whole.array.dtype)):
            raise HostError(f"a write to {name}, which is only read")
    wide = {name: arrays[name].array.astype(np.float64) for name in outputs}
    turned = cuda_plan.GRADIENTS & wide.keys() if channels_last else ()
    return wide | {name: wide[name].transpose(0, 3, 1, 2) for name in turned}


def launches(shape, layer, dtype, device, *, plain=False, aligned=True, channels_last=False):
    """Return the launches of the cost volume and its gradients, as `host_engine` runs them."""
    if 0 in shape:
        return []
    shape = (cuda_plan.samples_at_once(layer.geometry, shape, dtype), *shape[1:])
    return [
        launch
        for results in (("cost",), ("grad_fmap1", "grad_fmap2"))
        for launch in cuda_plan.plan(
            results,
            layer,
            shape,
            dtype,
            device,
            plain=plain,
            aligned=aligned,
            channels_last=channels_last,
        ).launches
    ]


def run_plan(plan, arrays, dtype, scale=1.0, *, order="ascending", mode="run", patch=None):
    """Run a plan's launches as the CUDA engine does."""
    wide = np.dtype(DTYPES[dtype].accumulator)
    workspaces = {name: _guarded(shape, kind, True, mode) for name, shape, kind in plan.workspaces}
    arrays = {**arrays, **{name: whole.array for name, whole in workspaces.items()}}
    arrays |= {name: [arrays[one] for one in names] for name, names in plan.structs}
    for launch in plan.launches:
        own = wide.type(scale if launch.scaled else 1)
        run(build(launch, mode, patch), launch, arrays, own, order=order)
    for name, whole in workspaces.items():
        whole.check(name)


def check_arrays(arrays, kept):
    """Raise HostError if something beside guarded arrays was written, or one of those kept."""
    for name, whole in arrays.items():
        whole.check(name)
    for name, value in kept.items():
        if value.tobytes() != arrays[name].array.tobytes():
            raise HostError(f"a write to {name}, which is only read")


def run(library, launch, arrays, scale, *, order="ascending", log="none"):
    """Run one launch; raises HostError with what went wrong.

    A list of arrays is a struct of their addresses, None an address of nothing.

    With a library of mode "trace", ``log`` "arrays" returns all accesses to the arrays (numbered as
    in ``launch.arrays``), and "all" those to shared memory, too: an array of ACCESS.
    """
    given = [arrays[name] for name in launch.arrays]
    used = [one for value in given for one in _listed(value)]
    if not all(array.flags.c_contiguous for array in used):
        raise ValueError("arrays must be contiguous")
    values = [
        *(
            np.array([one.ctypes.data for one in _listed(value)] or [0], np.uintp)
            for value in given
        ),
        np.array([value for _, value in launch.sizes], np.int32),
        np.array(scale),
    ]
    arguments = (_Bytes * len(values))(*((v.ctypes.data, v.nbytes) for v in values))
    ranges = (_Bytes * len(used))(*((a.ctypes.data, a.nbytes) for a in used))
    how = _Launch(
        *(launch.blocks, launch.threads, launch.shared_bytes, ORDERS.index(order)),
        *(len(values), len(used), arguments, ranges, GUARD_BYTES // 2, LOGS.index(log)),
    )
    function = getattr(library, f"launch_{launch.kernel}")
    function.restype = ctypes.c_char_p
    error = function(ctypes.byref(how))
    if error is not None:
        raise HostError(f"{launch.kernel}: {error.decode()}")
    if log == "none":
        return None
    count = ctypes.c_int64()
    library.traced_accesses.restype = ctypes.c_void_p
    first = library.traced_accesses(ctypes.byref(count))
    size = count.value * ACCESS.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(first), ACCESS).copy()


def _listed(value):
    """Return the arrays of an argument: one, those of a list, or none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# ---- compiling


def build(launch, mode="run", patch=None):
    """Compile a launch's source, unless that was done before, and load it."""
    return _load(compiled(launch, mode, patch))


def compiled(launch, mode="run", patch=None):
    """Return the path of a launch's library; wait for it if it is being compiled."""
    future = _ahead.get((launch, mode, patch))
    if future is None or future.cancel():
        return _compiled(launch, mode, patch)
    return future.result()


@contextmanager
def compiling_ahead(requests):
    """Compile (launch, mode, patch) one after another, while the caller compiles and runs.

    Of two processes that run the same tests, one begins at the front, the other at the back.
    """
    requests = list(dict.fromkeys(requests))
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0")[-1] in "13579":
        requests.reverse()
    with ThreadPoolExecutor(1) as pool:
        futures = {request: pool.submit(_compiled, *request) for request in requests}
        _ahead.update(futures)
        try:
            yield
        finally:
            pool.shutdown(cancel_futures=True)
            for request in futures:
                _ahead.pop(request, None)


_ahead = {}


def translation_unit(launch, patch=None):
    """Return the C++ source of a launch: that of its kernel, and how each kernel is called."""
    text = cuda_sources.source(launch)
    for old, new in zip(*[iter(patch or ())] * 2, strict=True):
        text = text.replace(old, new)
    kernels = re.findall(r"__launch_bounds__\((\w+)[^)]*\)\s+(\w+)\(", text)
    exports = [f"HOST_KERNEL({kernel}, {most})" for most, kernel in kernels]
    return "\n".join(['#include "hostcuda.h"', text, '#line 1 "exports"', *exports, ""])


def _compiled(launch, mode, patch):
    source = translation_unit(launch, patch)
    # Without the sanitizers' own libraries: what they would call is in the runtime.
    libraries = ["-nodefaultlibs", "-lstdc++", "-lc"]
    options = [*OPTIONS, *MODES[mode], "-shared", "-x", "c++", "-", "-x", "none"]
    return _compile(source, [*options, str(_runtime(mode)), *libraries], ".so")


@cache
def _runtime(mode):
    source = (HERE / "hostcuda.cpp").read_text()
    return _compile(source, [*OPTIONS, *RUNTIME_MODES[mode], "-c", "-x", "c++", "-"], ".o")


def _compile(source, options, suffix):
    header = (HERE / "hostcuda.h").read_text()
    parts = (_compiler_version(), *options, header, source)
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32] + suffix
    path = _folder() / name
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be compiling the same
        if path.exists():
            return path
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=suffix, delete=False) as new:
            pass
        command = [COMPILER, "-pipe", f"-I{HERE}", *options, "-o", new.name]
        done = subprocess.run(command, input=source, capture_output=True, text=True)
        if done.returncode:
            Path(new.name).unlink()
            raise RuntimeError(f"{COMPILER} must compile the kernel, got:\n{done.stderr}")
        os.replace(new.name, path)
    return path


@cache
def _compiler_version():
    command = [COMPILER, "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache
def _folder():
    """Return the folder of compiled kernels: the user's own, and of this machine's uptime."""
    folder = Path(tempfile.gettempdir(), f"cupycorr-host-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        folder = Path(tempfile.mkdtemp(prefix="cupycorr-host-"))
    return folder


@cache
def _load(path):
    return ctypes.CDLL(str(path))


def storage(dtype):
    """Return the NumPy dtype of a dtype's name."""
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def _guarded(shape, dtype, aligned, mode):
    kind = storage(dtype)
    offset = ALIGNED_OFFSET if aligned else kind.itemsize
    if mode == "sanitize":
        return Guarded(shape, kind, offset=0 if aligned else offset, guard_bytes=0)
    return Guarded(shape, kind, offset=offset)


def _same(one, other):
    return one.tobytes() == other.tobytes()
