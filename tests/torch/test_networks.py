"""The networks of networks.py: sizes as published, gradients everywhere, one graph each."""

import pytest

torch = pytest.importorskip("torch")

import networks  # noqa: E402

# What torch warns of while it compiles is not about this package.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

NETWORKS = {"FlowNetC": networks.FlowNetC, "PWC-Net": networks.PWCNet}
# Millions, as D. Sun et al. count them.
PUBLISHED = {"FlowNetC": 39.17, "PWC-Net": 8.75}
COST_VOLUMES = {"FlowNetC": 1, "PWC-Net": 5}


@pytest.fixture(scope="module", params=NETWORKS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def net(name):
    torch.manual_seed(0)
    return NETWORKS[name]().double()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 2, 3, 64, 128, generator=generator, dtype=torch.float64))


@pytest.fixture(scope="module")
def flows(net, images):
    with torch.no_grad():
        return net(*images)


def image_gradients(net, images):
    """Return the flows and how far the finest one moves with either image."""
    inputs = [image.clone().requires_grad_() for image in images]
    flows = net(*inputs)
    return flows, torch.autograd.grad(flows[-1].sum(), inputs)


def test_a_network_has_as_many_parameters_as_published(name, net):
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    # One unit of the last digit: 39.175 was cut, not rounded.
    assert abs(millions - PUBLISHED[name]) < 0.01


def test_flows_double_in_size_up_to_a_quarter_of_the_image(flows):
    sizes = [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32)]
    assert [tuple(flow.shape) for flow in flows] == [(2, 2, *size) for size in sizes]


def test_every_parameter_and_image_has_a_gradient(net, images):
    inputs = [image.clone().requires_grad_() for image in images]
    wanted = [*inputs, *net.parameters()]
    grads = torch.autograd.grad(sum(flow.square().sum() for flow in net(*inputs)), wanted)
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


@pytest.mark.slow
def test_a_network_compiles_to_one_graph(net, images):
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(image_gradients(compiled, images), image_gradients(net, images))


def test_an_exported_network_holds_its_cost_volumes(name, net, images, flows):
    program = torch.export.export(net, images)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.cupycorr.cost.default) == COST_VOLUMES[name]
    torch.testing.assert_close(program.module()(*images), flows)


def test_warping_by_whole_pixels_moves_features_and_fills_with_zeros():
    # Positions in maps of such sizes are exact in binary.
    fmap = torch.arange(1.0, 2 * 4 * 8 + 1).view(1, 2, 4, 8)
    right, down = 3, 1
    flow = torch.tensor([right, down]).view(1, 2, 1, 1).expand(1, 2, 4, 8)
    moved = torch.zeros_like(fmap)
    moved[..., :-down, :-right] = fmap[..., down:, right:]
    assert torch.equal(networks.warp(fmap, flow), moved)
