"""Where a kernel cannot be made ready, the engine's error says why, with a remedy that helps."""

import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from devices import DEVICES

from cupycorr import Geometry
from cupycorr.cuda import plan as cuda_plan
from cupycorr.layer import Layer

ROOT = Path(__file__).resolve().parents[2]
(LAUNCH,) = cuda_plan.plan(
    ("cost",), Layer(Geometry()), (1, 1, 4, 4), "float32", DEVICES["A100"]
).launches
NO_LIBRARY = "libnvrtc.so.12: cannot open shared object file: No such file or directory"
CACHE = "/cache/kernel"
OF_CUPY = {
    "driver": "cuda.driver.CUDADriverError",
    "runtime": "cuda.runtime.CUDARuntimeError",
    "memory": "cuda.memory.OutOfMemoryError",
    "compiler": "cuda.compiler.CompileException",
    "NVRTC": "cuda.nvrtc.NVRTCError",
}


@pytest.fixture
def cp():
    return pytest.importorskip("cupy")


@pytest.fixture
def _nvrtc(cp, monkeypatch):
    monkeypatch.setattr(cp.cuda.nvrtc, "getVersion", lambda: (12, 9))


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


def failure(cp, monkeypatch, error):
    """Return what the engine raises where CuPy raises an error for a kernel."""
    from cupycorr.cuda import engine as cuda_engine

    monkeypatch.setattr(cp, "RawModule", raising(error))
    raised = RuntimeError, MemoryError, cp.cuda.compiler.CompileException
    with pytest.raises(raised) as caught:
        cuda_engine._compile(LAUNCH)
    return caught.value


@pytest.mark.parametrize(
    ("cuda", "wheel"),
    [(12090, "nvidia-cuda-nvrtc-cu12"), (13000, "'nvidia-cuda-nvrtc==13.*'"),
     (13020, "'nvidia-cuda-nvrtc==13.*'")],
)  # fmt: skip
@pytest.mark.parametrize("kind", [ImportError, OSError, RuntimeError])
def test_a_missing_nvrtc_is_to_be_installed(cp, monkeypatch, kind, cuda, wheel):
    from cupycorr.cuda import engine as cuda_engine

    error = kind(NO_LIBRARY)
    monkeypatch.setattr(cp.cuda.nvrtc, "getVersion", raising(error))
    monkeypatch.setattr(cp.cuda.runtime, "runtimeGetVersion", lambda: cuda)
    with pytest.raises(cuda_engine.Unusable, match=r"^NVRTC must be there ") as caught:
        cuda_engine._compile(LAUNCH)
    assert str(caught.value).endswith(f"{NO_LIBRARY}; pip install {wheel}")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("version", "capability", "refused"),
    [((12, 9), "70", False), ((13, 0), "70", True), ((13, 5), "72", True), ((13, 0), "75", False),
     ((13, 0), "120", False)],
)  # fmt: skip
def test_a_gpu_that_cuda_13_does_not_know_needs_cuda_12(
    cp, monkeypatch, version, capability, refused
):
    monkeypatch.setattr(cp.cuda.nvrtc, "getVersion", lambda: version)
    monkeypatch.setattr(cp.cuda.nvrtc, "getSupportedArchs", lambda: [75, 80, 121])
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(cp.cuda, "Device", lambda: device)
    if not refused:
        error = MemoryError()
        assert failure(cp, monkeypatch, error) is error
        return
    said = str(failure(cp, monkeypatch, AssertionError("it was compiled")))
    assert "capability of at least 7.5 by NVRTC 13." in said
    assert f", got {capability[0]}.{capability[1]}; CUDA 12 compiles for this device: " in said
    assert "pip install 'cupycorr[cuda12]'" in said


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.ENOTDIR, errno.EROFS])
@pytest.mark.parametrize("before", [None, "0"])
@pytest.mark.usefixtures("_nvrtc")
def test_a_cache_that_cannot_be_written_costs_a_warning(cp, monkeypatch, tmp_path, number, before):
    from cupycorr.cuda import engine as cuda_engine

    error = OSError(number, os.strerror(number), CACHE)
    kernel = types.SimpleNamespace(compile=lambda: None, max_dynamic_shared_size_bytes=1 << 20)

    def module(**options):
        if os.environ.get(cuda_engine.IN_MEMORY) != "1":
            raise error
        return types.SimpleNamespace(get_function=lambda name: kernel)

    monkeypatch.setattr(cp, "RawModule", module)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(cuda_engine.IN_MEMORY, raising=False)
    if before is not None:
        monkeypatch.setenv(cuda_engine.IN_MEMORY, before)
    with pytest.warns(UserWarning, match="set CUPY_CACHE_DIR to a folder that") as caught:
        assert cuda_engine._compile(LAUNCH) is kernel
    assert f"got: {error}; " in str(caught[0].message)
    assert os.environ.get(cuda_engine.IN_MEMORY) == before


@pytest.mark.usefixtures("_nvrtc")
def test_without_a_cache_folder_there_is_no_lock_and_no_error(cp, monkeypatch, tmp_path):
    from cupycorr.cuda import engine as cuda_engine

    kernel = types.SimpleNamespace(compile=lambda: None, max_dynamic_shared_size_bytes=1 << 20)
    module = types.SimpleNamespace(get_function=lambda name: kernel)
    monkeypatch.setattr(cp, "RawModule", lambda **options: module)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "nowhere"))
    assert cuda_engine._compile(LAUNCH) is kernel


@pytest.mark.parametrize("name", OF_CUPY)
@pytest.mark.usefixtures("_nvrtc")
def test_errors_of_compiler_driver_and_runtime_are_passed_on(cp, monkeypatch, name):
    kind = cp
    for part in OF_CUPY[name].split("."):
        kind = getattr(kind, part)
    error = kind.__new__(kind, "out of order")  # past __init__, which asks the library for words
    assert failure(cp, monkeypatch, error) is error


@pytest.mark.parametrize(
    ("version", "refused"),
    [("9.6.0", True), ("13.6.0", True), ("14.0.0rc1", False), ("14.2.0", False), ("20.0", False)],
)
def test_a_cupy_older_than_14_is_refused_by_its_version(tmp_path, version, refused):
    (tmp_path / "cupy.py").write_text(f"__version__ = {version!r}")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", "import cupycorr.cuda.engine"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert (done.returncode != 0) == refused, done.stderr
    assert (f": cupycorr needs CuPy >= 14, this is {version}; pip" in done.stderr) == refused
    assert "NVRTC" not in done.stderr
