"""``cupycorr doctor``: what it says, and how it ends."""

import sys

import numpy as np
import pytest
from command import invoke
from cupycorr.cli import environment

import cupycorr
from cupycorr.cpu import engine as numpy_engine
from cupycorr.cpu import lookup as numpy_lookup

MISSING = environment.Finding("NVIDIA driver", False, "no library", "Install it.")


@pytest.fixture
def _no_cuda(monkeypatch):
    monkeypatch.setattr(environment, "cuda_findings", lambda: [MISSING])


@pytest.mark.usefixtures("_no_cuda")
def test_it_names_versions_engines_and_what_is_missing(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    outcome = invoke("doctor")
    assert outcome.exit_code == 2
    for text in (
        f"cupycorr {cupycorr.__version__} in ",
        f"numpy {np.__version__}",
        "OPENBLAS_NUM_THREADS=1",
        "  ok      numpy: right, in ",
        "  not ok  NVIDIA driver: no library\n          Install it.",
        "The CPU can be used, CUDA cannot.",
    ):
        assert text in outcome.stdout
    if environment.has("torch"):
        assert "  ok      torch: right, in " in outcome.stdout


@pytest.mark.usefixtures("_no_cuda")
@pytest.mark.parametrize(
    ("engine", "result", "problem"),
    [(numpy_engine, "cost", "cost volume"), (numpy_lookup, "grad_coords", "lookup")],
)
def test_an_engine_that_computes_wrong_is_named(monkeypatch, engine, result, problem):
    right = engine.run

    def wrong(what, arrays, *args, **kwargs):
        right(what, arrays, *args, **kwargs)
        if arrays.get(result) is not None:
            arrays[result].reshape(-1)[0] += 1

    monkeypatch.setattr(engine, "run", wrong)
    outcome = invoke("doctor")
    assert outcome.exit_code == 1
    assert f"  not ok  numpy: {problem}, float32, {result} " in outcome.stdout
    assert "Something does not compute what it should." in outcome.stdout


@pytest.mark.usefixtures("_no_cuda")
def test_a_broken_library_is_no_crash(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(environment, "has", lambda module: True)
    outcome = invoke("doctor")
    assert outcome.exit_code == 1
    assert "  ok      numpy: " in outcome.stdout
    assert "  not ok  torch: cost volume, float32: ModuleNotFoundError: " in outcome.stdout


@pytest.mark.usefixtures("_no_cuda")
def test_torch_may_be_missing(monkeypatch):
    monkeypatch.setattr(environment, "has", lambda module: module != "torch")
    outcome = invoke("doctor")
    assert outcome.exit_code == 2
    assert "  none    torch: not installed" in outcome.stdout


@pytest.mark.gpu
def test_on_a_gpu_all_can_be_used():
    outcome = invoke("doctor")
    assert outcome.exit_code == 0, outcome.stdout
    for text in ("device 0: sm_", "  ok      cupy: ", "  ok      plain: ", "compiled kernels: "):
        assert text in outcome.stdout
    assert outcome.stdout.endswith("The CPU can be used, CUDA too.\n")
