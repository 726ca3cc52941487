"""A network with the layer learns motion, and does not if the layer's gradients are wrong."""

import numpy as np
import pytest

from cupycorr.cpu import engine as numpy_engine

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from cupycorr import SpatialCorrelationSampler  # noqa: E402

REACH, STEPS = 2, 80
SIDE = 2 * REACH + 1
INSIDE = slice(4, -4)  # where both images show what moved
# In pixels. The mean length of a movement is 1.8: so far off is who knows nothing.
LEARNT, MISLED = 0.5, 1.0

# What torch warns of while it compiles is not about this package.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: such small maps are computed faster than threads find each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Flow(nn.Module):
    """A small FlowNetC: two towers with the same weights, their correlation, a decoder."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.match = SpatialCorrelationSampler(patch_size=SIDE)
        self.decoder = nn.Conv2d(SIDE**2, SIDE**2, 5, padding=2)

    def forward(self, image1, image2):
        cost = self.match(self.tower(image1), self.tower(image2))
        share = self.decoder(cost.flatten(1, 2)).softmax(1).unflatten(1, (SIDE, SIDE))
        steps = torch.arange(-REACH, REACH + 1.0)[:, None, None]
        return torch.stack([(share.sum(axis) * steps).sum(1) for axis in (2, 1)], 1)


def motion(generator, samples=8, size=20):
    """Return textures, the same textures moved, and the movements (dy, dx).

    Three of four channels are noise, another one in each image. Towers that have not learnt to
    ignore it give costs in which a decoder sees nothing.
    """
    image1, image2 = torch.randn(2, samples, 4, size, size, generator=generator)
    flow = torch.randint(-REACH, REACH + 1, (samples, 2), generator=generator)
    for texture, moved, shift in zip(image1, image2, flow.tolist(), strict=True):
        moved[0] = texture[0].roll(shift, (0, 1))
    return image1, image2, flow.float()[:, :, None, None]


def error_after_training(compiled=False, dtype=torch.float32):
    """Train a network; return by how many pixels it errs in the last steps, on new images."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = Flow()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
    torch._dynamo.reset()
    forward = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    errors = []
    for _ in range(STEPS):
        image1, image2, truth = motion(generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            flow = forward(image1, image2)
        error = (flow - truth)[:, :, INSIDE, INSIDE].norm(dim=1).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    return np.mean(errors[-5:])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_network_learns_motion(compiled, dtype):
    assert error_after_training(compiled, dtype) < LEARNT


WRONG = {
    "opposite displacements": lambda grad: grad[:, ::-1, ::-1],
    "rows and columns of the patch exchanged": lambda grad: grad.swapaxes(1, 2),
    "none": np.zeros_like,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_network_does_not_learn_from_a_wrong_gradient(wrong, monkeypatch):
    def run(what, arrays, layer, **options):
        if what == "grads":
            grad_cost = np.ascontiguousarray(wrong(arrays["grad_cost"]))
            arrays = arrays | {"grad_cost": grad_cost}
        right(what, arrays, layer, **options)

    right = numpy_engine.run
    monkeypatch.setattr(numpy_engine, "run", run)
    assert error_after_training() > MISLED
