"""Programs that import another system's module and find cupycorr."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cupycorr
from cupycorr import compat, verify

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
LAYER = (2, 1, 2, 1, 1, 1)


def maps(**options):
    rng = np.random.default_rng(0)
    drawn = (rng.integers(-4, 5, (1, 3, 6, 7)).astype(np.float64) for _ in range(2))
    return [torch.tensor(values, **options) for values in drawn]


def difference(got, want):
    return verify.difference(got.detach().numpy(), want.detach().numpy())


def python(*words, cwd=ROOT):
    outcome = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    return outcome.returncode, outcome.stdout.splitlines(), outcome.stderr


@pytest.mark.parametrize(
    ("name", "module", "line"),
    [
        ("corr_a", "nvidia", "from corr_a import Correlation as found"),
        ("corr_a", "nvidia", "import corr_a as module; found = module.Correlation"),
        ("corr_a", "nvidia", "from corr_a import corr_a; found = corr_a.Correlation"),
        ("corr_a", "nvidia", "from corr_a.corr_a import Correlation as found"),
        ("corr_b.deep.corr", "nvidia", "from corr_b.deep.corr import Correlation as found"),
        ("corr_c", "sniklaus", "import corr_c; found = corr_c.ModuleCorrelation"),
    ],
)
def test_every_form_of_import_finds_it(name, module, line):
    found = {}
    with compat.stand_in_for(name, getattr(compat, module)):
        exec(line, found)
        assert importlib.util.find_spec(name) is not None
    assert found["found"].__module__ == f"cupycorr.compat.{module}"
    assert not [left for left in sys.modules if left.startswith("corr_")]


def test_a_package_of_the_program_keeps_what_else_it_has(tmp_path, monkeypatch):
    package = tmp_path / "networks_here" / "correlation_package"
    package.mkdir(parents=True)
    (package.parent / "flow.py").write_text(
        "from .correlation_package.correlation import Correlation\n"
        "from . import other\n"
    )  # fmt: skip
    (package.parent / "other.py").write_text("value = 3\n")
    (package / "correlation.py").write_text("raise ImportError('not compiled')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with compat.stand_in_for("networks_here.correlation_package.correlation", compat.nvidia):
        from networks_here import flow
    assert flow.Correlation is compat.nvidia.Correlation
    assert flow.other.value == 3


def test_withdrawn_it_leaves_import_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "corr_real.py").write_text("mine = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    stand_in = compat.stand_in_for("corr_real", compat.nvidia)
    assert not hasattr(importlib.import_module("corr_real"), "mine")
    stand_in.withdraw()
    stand_in.withdraw()  # a second time does nothing
    assert importlib.import_module("corr_real").mine
    sys.modules.pop("corr_real")


def test_a_second_stand_in_leaves_the_first_one_in_place():
    with compat.stand_in_for("corr_twice", compat.nvidia):
        compat.stand_in_for("corr_twice", compat.nvidia).withdraw()
        assert "corr_twice" in sys.modules
        with pytest.raises(RuntimeError, match="corr_twice must not have been imported"):
            compat.stand_in_for("corr_twice", compat.sniklaus)
    assert "corr_twice" not in sys.modules


def test_what_has_been_imported_is_not_replaced():
    importlib.import_module("statistics")
    with pytest.raises(RuntimeError, match="statistics must not have been imported"):
        compat.stand_in_for("statistics", compat.nvidia)


def test_a_name_without_a_default_needs_a_module():
    with pytest.raises(ValueError, match="name must be one of spatial_correlation_sampler, "):
        compat.stand_in_for("correlation")


def test_a_copy_of_nvidias_module_works_on_the_two_functions_below_it():
    with compat.stand_in_for("correlation_cuda"):
        import correlation_cuda

    class Copied(torch.autograd.Function):
        @staticmethod
        def forward(ctx, one, two):
            ctx.save_for_backward(one, two)
            out = one.new()
            assert correlation_cuda.forward(one, two, one.new(), two.new(), out, *LAYER) == 1
            return out

        @staticmethod
        def backward(ctx, grad):
            one, two = ctx.saved_tensors
            grads = one.new(), two.new()
            correlation_cuda.backward(one, two, one.new(), two.new(), grad, *grads, *LAYER)
            return grads

    results = []
    for correlate in (Copied.apply, compat.nvidia.Correlation(*LAYER)):
        inputs = maps(requires_grad=True)
        volume = correlate(*inputs)
        results.append((volume, *torch.autograd.grad(volume.square().sum(), inputs)))
    assert [difference(got, want) for got, want in zip(*results, strict=True)] == [None] * 3


ORIGINALS = {
    "nvidia": {
        "pad_size": 2,
        "kernel_size": 1,
        "max_displacement": 2,
        "stride1": 1,
        "stride2": 1,
        "corr_multiply": 1,
    },
    "mmcv": {
        "kernel_size": 3,
        "max_displacement": 2,
        "stride": 1,
        "padding": 1,
        "dilation": 1,
        "dilation_patch": 2,
    },
}


@pytest.mark.parametrize("system", ORIGINALS)
def test_a_model_saved_with_the_original_computes_once_loaded(system, tmp_path, monkeypatch):
    # Like theirs, a module that has its arguments as attributes, and no more.
    (tmp_path / "corr_saved.py").write_text(
        "import torch\nclass Correlation(torch.nn.Module):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    original = importlib.import_module("corr_saved").Correlation()
    for argument, value in ORIGINALS[system].items():
        setattr(original, argument, value)
    torch.save(torch.nn.Sequential(original), tmp_path / "model.pt")
    sys.modules.pop("corr_saved")
    ours = importlib.import_module(f"cupycorr.compat.{system}")
    with compat.stand_in_for("corr_saved", ours):
        (loaded,) = torch.load(tmp_path / "model.pt", weights_only=False)
    want = ours.Correlation(**ORIGINALS[system])(*maps())
    assert difference(loaded(*maps()), want) is None


class TestPrograms:
    """Programs of others, run as they are."""

    PROGRAM = """
import sys
import torch
from spatial_correlation_sampler import SpatialCorrelationSampler, spatial_correlation_sample
import spatial_correlation_sampler.spatial_correlation_sampler as inner
import beside

if __name__ == "__main__":
    fmap = torch.ones(1, 2, 3, 4)
    print(SpatialCorrelationSampler.__module__, beside.value, sys.argv[1:])
    print(SpatialCorrelationSampler(patch_size=3)(fmap, fmap).shape)
    print(inner.SpatialCorrelationSamplerFunction.apply(fmap, fmap, 1, 5).shape)
    print(spatial_correlation_sample(fmap, fmap, patch_size=1).flatten().unique())
"""

    @pytest.fixture
    def program(self, tmp_path):
        (tmp_path / "beside.py").write_text("value = 7\n")
        (tmp_path / "program.py").write_text(self.PROGRAM)
        return tmp_path / "program.py"

    def test_the_launcher_runs_a_program_as_python_does(self, program, tmp_path):
        words = ["spatial_correlation_sampler", "--", program, "--epochs", "3"]
        code, out, err = python("-m", "cupycorr.compat", *words, cwd=tmp_path)
        assert code == 0, err
        assert out == [
            "cupycorr.compat.spatial_correlation_sampler 7 ['--epochs', '3']",
            "torch.Size([1, 3, 3, 3, 4])",
            "torch.Size([1, 5, 5, 3, 4])",
            "tensor([2.])",
        ]

    def test_the_launcher_takes_the_module_to_find(self, tmp_path):
        (tmp_path / "program.py").write_text("import correlation; print(correlation.torch.ones(1))")
        words = ["correlation=sniklaus", "--", tmp_path / "program.py"]
        assert python("-m", "cupycorr.compat", *words)[:2] == (0, ["tensor([1.])"])

    def test_the_launcher_runs_a_module(self, tmp_path):
        package = tmp_path / "package"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "train.py").write_text(
            "import sys, correlation_cuda; from package import __name__ as name\n"
            "print(__name__, name, sys.argv[1:], correlation_cuda.forward.__module__)"
        )
        words = ["correlation_cuda", "--", "-m", "package.train", "--epochs", "3"]
        code, out, err = python("-m", "cupycorr.compat", *words, cwd=tmp_path)
        assert code == 0, err
        module = "cupycorr.compat.correlation_cuda"
        assert out == [f"__main__ package ['--epochs', '3'] {module}"]

    @pytest.mark.parametrize(
        ("words", "what"),
        [
            (
                ["correlation", "--", "program.py"],
                "name must be one of spatial_correlation_sampler",
            ),
            (
                ["correlation=opencv", "--", "program.py"],
                "SYSTEM must be one of alt_cuda_corr, altcorr, ",
            ),
            (["correlation_cuda", "--", "none.py"], "there is no program none.py"),
            (["correlation_cuda", "--", "-m"], "-m must be followed by the name of a module"),
        ],
    )
    def test_what_the_launcher_cannot_run_is_told_in_a_line(self, words, what):
        code, _, err = python("-m", "cupycorr.compat", *words)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert what in err

    @pytest.mark.parametrize("words", [[], ["--"], ["program.py"], ["correlation_cuda", "--"]])
    def test_the_launcher_explains_itself(self, words):
        code, _, err = python("-m", "cupycorr.compat", *words)
        assert code == 1
        assert "python -m cupycorr.compat NAME[=SYSTEM] ... -- program.py" in err


def test_importing_the_package_loads_no_torch():
    code = (
        "import sys; from cupycorr import compat; compat.taichi; compat.stand_in_for;"
        "print('torch' in sys.modules); compat.nvidia; print('torch' in sys.modules)"
    )
    assert python("-c", code)[1] == ["False", "True"]


def test_the_stand_in_offers_what_cupycorr_offers():
    module = importlib.import_module("cupycorr.compat.spatial_correlation_sampler")
    one, two = maps()
    want = cupycorr.spatial_correlation_sample(one, two, 1, 3, 2)
    assert torch.equal(module.spatial_correlation_sample(one, two, 1, 3, stride=2), want)
    assert torch.equal(module.SpatialCorrelationSamplerFunction.apply(one, two, 1, 3, 2), want)
    layer = module.SpatialCorrelationSampler(patch_size=3, stride=2)
    assert isinstance(layer, cupycorr.SpatialCorrelationSampler)
    assert torch.equal(layer(one, two), want)


class CopiedFunction(torch.autograd.Function):
    """Call the extension as copies of spatial-correlation-sampler's Python file do."""

    @staticmethod
    def forward(ctx, input1, input2, *sizes):
        import spatial_correlation_sampler_backend as correlation

        ctx.save_for_backward(input1, input2)
        ctx.sizes = sizes
        return correlation.forward(input1, input2, *sizes)

    @staticmethod
    def backward(ctx, grad_output):
        import spatial_correlation_sampler_backend as correlation

        grads = correlation.backward(*ctx.saved_tensors, grad_output, *ctx.sizes)
        return (*grads, *[None] * len(ctx.sizes))


# Kernel, patch, padding, dilation (newer copies only), dilation_patch and stride.
@pytest.mark.parametrize("dilation", [(2, 1), ()])
def test_copies_of_the_python_file_find_the_extension(dilation):
    sizes = (2, 3, 4, 5, 1, 2, *dilation, 1, 2, 2, 1)
    want_maps, got_maps = (maps(requires_grad=True) for _ in range(2))
    want = cupycorr.spatial_correlation_sample(
        *want_maps, (2, 3), (4, 5), (2, 1), (1, 2), dilation or 1, (1, 2)
    )
    with compat.stand_in_for("spatial_correlation_sampler_backend"):
        got = CopiedFunction.apply(*got_maps, *sizes)
        upstream = torch.arange(got.numel(), dtype=got.dtype).reshape(got.shape) % 5
        got.backward(upstream)
    want.backward(upstream)
    assert not difference(got, want)
    for one, other in zip(got_maps, want_maps, strict=True):
        assert not difference(one.grad, other.grad)


# 256 products of two values of 30 N(0, 1): 64 of the sums are beyond float16.
LARGE = [30 * torch.randn(1, 256, 8, 8, generator=torch.Generator().manual_seed(0))] * 2


@pytest.mark.parametrize("what", ["function", "module", "extension"])
def test_under_autocast_the_stand_in_stays_in_the_dtype_of_the_maps(what):
    module = importlib.import_module("cupycorr.compat.spatial_correlation_sampler")
    call = {
        "function": module.spatial_correlation_sample,
        "module": module.SpatialCorrelationSampler(),
        "extension": lambda *pair: CopiedFunction.apply(*pair, *[1] * 4, 0, 0, *[1] * 6),
    }[what]
    pair = [fmap.clone().requires_grad_() for fmap in LARGE]
    with (
        compat.stand_in_for("spatial_correlation_sampler_backend"),
        torch.autocast("cpu", torch.float16),
    ):
        assert not cupycorr.spatial_correlation_sample(*LARGE).isfinite().all()
        cost = call(*pair)
        cost.sum().backward()
    assert cost.dtype is pair[0].grad.dtype is torch.float32
    assert torch.equal(cost, cupycorr.spatial_correlation_sample(*LARGE))
    assert torch.equal(pair[0].grad, LARGE[1])
