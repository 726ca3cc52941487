"""What this machine has: processor, libraries, and what a CUDA engine would need."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

import click


class Finding(NamedTuple):
    """One thing that CUDA needs: what was found, and how to get it if it is missing."""

    name: str
    found: bool
    detail: str
    remedy: str = ""


class Unavailable(click.ClickException):
    """Something that the command needs is not there."""

    exit_code = 2


def refuse_cuda() -> None:
    """Say what this machine lacks for CUDA and that this version does not compute there.

    Raises
    ------
    Unavailable
        Always.
    """
    lines = []
    for finding in cuda_findings():
        lines.append(f"  {'found  ' if finding.found else 'missing'}  {finding.name}: "
                     f"{finding.detail}")  # fmt: skip
        if not finding.found and finding.remedy:
            lines.append(f"           {finding.remedy}")
    listing = "\n".join(lines)
    raise Unavailable(
        "this version of cupycorr computes on the CPU only: use 'cpu'.\n"
        f"What CUDA needs, on this machine:\n{listing}"
    )


def cuda_findings() -> list[Finding]:
    """Look for driver, CuPy, NVRTC and a device, in this order."""
    driver = _driver()
    cupy = _cupy()
    return [driver, cupy, _nvrtc(), _device(driver.found, cupy.found)]


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
    remedy = "pip install cupy-cuda12x (or cupy-cuda13x for a driver of CUDA 13)"
    if util.find_spec("cupy") is None:
        return Finding("CuPy", False, "not installed", remedy)
    try:
        import cupy
    except Exception as error:  # CuPy raises whatever a broken CUDA installation gives it
        return Finding("CuPy", False, f"installed, but not importable: {error}", remedy)
    return Finding("CuPy", True, str(cupy.__version__))


def _nvrtc() -> Finding:
    name, remedy = "NVRTC", "pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
    wheels = [
        str(path)
        for distribution in ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")
        for path in _files_of(distribution)
        if "nvrtc" in path.name and "builtins" not in path.name and _is_library(path.name)
    ]
    system = ["nvrtc64_120_0.dll"] if sys.platform == "win32" else ["libnvrtc.so.12"]
    for candidate in [*wheels, *system, "libnvrtc.so.13", "libnvrtc.so"]:
        try:
            nvrtc = ctypes.CDLL(candidate)
            major, minor = ctypes.c_int(), ctypes.c_int()
            if nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
                return Finding(name, True, f"{major.value}.{minor.value} ({candidate})")
        except (OSError, AttributeError):
            continue
    return Finding(name, False, "the run-time compiler's library is not found", remedy)


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


def _files_of(distribution: str) -> list[Path]:
    try:
        files = metadata.files(distribution)
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files or ()]


def _is_library(name: str) -> bool:
    return ".so" in name or name.endswith(".dll")


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Return the bytes of memory that are free now; 2 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2 << 30


def has(module: str) -> bool:
    """Return whether a module is installed, without importing it."""
    return util.find_spec(module) is not None


def machine() -> dict[str, Any]:
    """Describe processor and libraries, for a report."""
    import threadpoolctl

    libraries = {}
    for name in ("numpy", "torch", "spatial-correlation-sampler", "threadpoolctl"):
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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
