"""torch's tools: counting operations, tracing by torch.fx, quantization, loading programs."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import cupycorr  # noqa: E402
import cupycorr.torch  # noqa: E402
from cupycorr import Geometry, SpatialCorrelationSampler  # noqa: E402

GEOMETRY = Geometry(3, (3, 5), padding=1, dilation_patch=2)
SHAPE = (2, 4, 7, 9)


def maps(shape=SHAPE, **options):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator).requires_grad_(**options) for _ in range(2)]


@pytest.mark.parametrize("similarity", ["product", "l1"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_operations_are_counted_forward_and_backward(similarity, needs):
    pair = maps()
    for fmap, need in zip(pair, needs, strict=True):
        fmap.requires_grad_(need)
    counts = []
    for step in ("forward", "backward"):
        with FlopCounterMode(display=False) as counter:
            if step == "forward":
                cost = cupycorr.correlation(*pair, GEOMETRY, similarity=similarity)
            else:
                cost.backward(torch.ones_like(cost))
        counts.append(counter.get_total_flops())
    each = 2 * GEOMETRY.multiply_adds(SHAPE)
    assert counts == [each, sum(needs) * each]


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.match = SpatialCorrelationSampler(1, 5)

    def forward(self, one, two):
        cost = self.match(self.features(one), two)
        other = cupycorr.correlation(one, two, GEOMETRY, normalize=True, similarity="l1")
        third = cupycorr.spatial_correlation_sample(one, two, stride=2)
        return cost.relu(), other, third


def test_fx_traces_one_node_per_layer_for_maps_of_any_size():
    network = Network()
    traced = torch.fx.symbolic_trace(network)
    calls = [str(node.target) for node in traced.graph.nodes if "cupycorr" in str(node.target)]
    assert calls == ["cupycorr.cost.default", "cupycorr.l1_cost.default", "cupycorr.cost.default"]
    for shape in (SHAPE, (1, 4, 5, 12)):
        pair = maps(shape)
        for got, want in zip(traced(*pair), network(*pair), strict=True):
            assert torch.equal(got, want)
    sum(cost.sum() for cost in traced(*pair)).backward()
    assert all(fmap.grad is not None for fmap in pair)


def test_fx_traces_a_layer_with_a_map_that_is_known():
    one, two = maps()
    traced = torch.fx.symbolic_trace(lambda fmap: cupycorr.correlation(fmap, two, GEOMETRY))
    assert torch.equal(traced(one), cupycorr.correlation(one, two, GEOMETRY))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_network_with_the_layer_is_prepared_for_quantization():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    network, pair = Network().eval(), maps()
    prepared = quantize_fx.prepare_fx(network, get_default_qconfig_mapping(), tuple(pair))
    for got, want in zip(prepared(*pair), network(*pair), strict=True):
        assert torch.equal(got, want)


LOADED = """
import sys, warnings
import torch
import cupycorr
if sys.argv[2] == "registered":
    import cupycorr.torch
load = torch.jit.load if sys.argv[1].endswith(".pt") else torch.export.load
program = load(sys.argv[1])
program = program if sys.argv[1].endswith(".pt") else program.module()
print(float(program(*torch.ones(2, 2, 4, 7, 9)).sum()))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["traced.pt", "exported.pt2"])
def test_a_saved_program_needs_the_operators_when_it_is_loaded(kind, tmp_path):
    layer, pair = SpatialCorrelationSampler(patch_size=3), maps(requires_grad=False)
    if kind == "traced.pt":
        torch.jit.trace(layer, pair).save(tmp_path / kind)
    else:
        torch.export.save(torch.export.export(layer, tuple(pair)), tmp_path / kind)
    words = [sys.executable, "-W", "ignore", "-c", LOADED, str(tmp_path / kind)]
    done = subprocess.run([*words, "registered"], capture_output=True, text=True, check=False)
    assert float(done.stdout) == float(layer(*torch.ones(2, *SHAPE)).sum()), done.stderr
    bare = subprocess.run([*words, ""], capture_output=True, text=True, check=False)
    assert bare.returncode == 1
    assert "cupycorr" in bare.stderr.splitlines()[-1] or "cupycorr" in bare.stderr


def test_a_region_of_autocast_can_be_left():
    # Sums of squares of 30 N(0, 1) over 256 channels, of which many are beyond float16.
    fmap = 30 * torch.randn(1, 256, 8, 8, generator=torch.Generator().manual_seed(0))
    one, two = (fmap.clone().requires_grad_() for _ in range(2))
    layer = SpatialCorrelationSampler()
    with torch.autocast("cpu", torch.float16):
        assert not layer(one, two).isfinite().all()
        with torch.autocast("cpu", enabled=False):
            cost = layer(one.float(), two.float())
        cost.sum().backward()
    assert cost.dtype is torch.float32
    assert torch.equal(cost, layer(fmap, fmap))
    assert torch.equal(one.grad, fmap)
