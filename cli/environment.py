"""A description of this machine: processor, libraries, and what a CUDA engine would need."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

import click

MEMORY = Path("/proc/meminfo")
LIBRARIES = (
    "numpy", "torch", "spatial-correlation-sampler", "taichi", "torchvision", "localcorr",
    "fused-local-corr", "threadpoolctl", "cupy-cuda12x", "cupy-cuda13x", "ml_dtypes", "onnxscript",
    "pillow",
)  # fmt: skip


class Finding(NamedTuple):
    """One thing that an engine needs: whether it works, what was found, and a remedy if not."""

    name: str
    found: bool
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return a line, and one with the remedy."""
        verdict, colour = ("ok    ", "green") if self.found else ("not ok", "red")
        line = f"  {click.style(verdict, fg=colour)}  {self.name}: {self.detail}"
        return line if self.found or not self.remedy else f"{line}\n          {self.remedy}"


class Unavailable(click.ClickException):
    """Something that the command needs is not there."""

    exit_code = 2


def require_cuda() -> None:
    """Say what this machine lacks for CUDA, if it lacks anything.

    Raises
    ------
    Unavailable
        If the driver, CuPy, NVRTC or a device cannot be used, with all that was found and a
        remedy for what was not.
    """
    findings = cuda_findings()
    if all(finding.found for finding in findings):
        return
    listing = "\n".join(map(str, findings))
    raise Unavailable(f"CUDA cannot be used here. What it needs:\n{listing}")


def cuda_findings() -> list[Finding]:
    """Look for driver, CuPy, NVRTC and a device, in this order."""
    driver = _driver()
    cupy = _cupy()
    return [driver, cupy, _nvrtc(cupy.found), _device(driver.found, cupy.found)]


def _driver() -> Finding:
    name = "NVIDIA driver"
    remedy = "Install NVIDIA's driver, 525 or newer; a container must be started with the GPU."
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Finding(name, False, f"{library} cannot be loaded", remedy)
    version, count = ctypes.c_int(), ctypes.c_int()
    status = cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version))
    status = status or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return Finding(name, False, f"{library} is there, but answers with error {status}", remedy)
    cuda_version = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Finding(name, True, f"for CUDA up to {cuda_version}, {count.value} device(s)")


def _cupy() -> Finding:
    if not has("cupy"):
        remedy = "pip install 'cupycorr[cuda12]' (cuda13 if the driver is for CUDA 13)"
        return Finding("CuPy", False, "not installed", remedy)
    try:
        import cupy

        import cupycorr.cuda.engine  # noqa: F401 - refuses an old CuPy
    except Exception as error:  # CuPy raises whatever a broken CUDA installation gives it
        # CuPy makes the folder of its cache when it is imported.
        folder = isinstance(error, OSError)
        remedy = "Set CUPY_CACHE_DIR to a folder that can be written." if folder else ""
        return Finding("CuPy", False, f"installed, but cannot be used: {error}", remedy)
    return Finding("CuPy", True, str(cupy.__version__))


def _nvrtc(cupy_found: bool) -> Finding:
    name = "NVRTC"
    if not cupy_found:
        return Finding(name, False, "not looked for without CuPy")
    from cupycorr.cuda import engine as cuda_engine

    remedy = f"pip install {cuda_engine.nvrtc_wheel()}"
    try:
        from cupy.cuda import nvrtc

        major, minor = nvrtc.getVersion()
    except Exception as error:  # each release of CuPy has another for a library that is not there
        text = " ".join(str(error).split())
        return Finding(name, False, f"CuPy cannot load the run-time compiler: {text}", remedy)
    return Finding(name, True, f"{major}.{minor}")


def _device(driver: bool, cupy_found: bool) -> Finding:
    name = "GPU"
    if not (driver and cupy_found):
        return Finding(name, False, "not looked for without the driver and CuPy")
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
        properties = [cupy.cuda.runtime.getDeviceProperties(i) for i in range(count)]
    except Exception as error:  # CUDARuntimeError, whose import needs a working CuPy
        return Finding(name, False, str(error), "Check what nvidia-smi says.")
    names = ", ".join(f"{p['name'].decode()} (sm_{p['major']}{p['minor']})" for p in properties)
    return Finding(name, count > 0, names or "no device", "Check CUDA_VISIBLE_DEVICES.")


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Return the bytes of memory that are free now; 2 GiB where the system does not tell."""
    with contextlib.suppress(OSError):
        # With what Linux would give up of its caches.
        found = re.search(r"^MemAvailable: +(\d+) kB$", MEMORY.read_text("ascii"), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2 << 30


def require_memory(what: str, needed: int) -> None:
    """Refuse what does not fit into memory before it takes the machine down.

    Raises
    ------
    Unavailable
        If less than ``needed`` bytes are free.
    """
    available = available_memory()
    if needed > available:
        raise Unavailable(
            f"{what} needs about {needed / 1e9:.1f} GB, got {available / 1e9:.1f} GB of free memory"
        )


def require_pillow() -> None:
    """Refuse to go on without what reads and writes images."""
    if not has("PIL"):
        raise Unavailable("images need Pillow: pip install 'cupycorr[images]'")


def has(module: str) -> bool:
    """Return whether a module is installed, without importing it."""
    return util.find_spec(module) is not None


def torch_finds_cuda() -> bool:
    """Return whether torch is installed and finds a GPU."""
    if not has("torch"):
        return False
    import torch

    return bool(torch.cuda.is_available())


def machine() -> dict[str, Any]:
    """Describe processor and libraries, for a report."""
    import threadpoolctl

    libraries = {}
    for name in LIBRARIES:
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    blas = [
        f"{pool.get('internal_api')} {pool.get('version')} {pool.get('architecture', '')}".strip()
        for pool in threadpoolctl.threadpool_info()
        if pool.get("user_api") == "blas"
    ]
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        # Others' work on the same cores costs threads that wait for one another far more than
        # its share: a reader of the times must know of it.
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": libraries,
        "blas": blas,
    }


def versions(found: dict[str, Any]) -> str:
    """Return one line about the libraries that `machine` found."""
    return ", ".join(f"{name} {version}" for name, version in found["libraries"].items())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
