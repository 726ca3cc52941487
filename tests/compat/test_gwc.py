"""The group-wise volumes of stereo networks against their formulas, written out."""

import pytest

torch = pytest.importorskip("torch")

from cupycorr.compat import gwc  # noqa: E402

SHAPE, GROUPS = (2, 12, 3, 7), 4


def maps(shape=SHAPE, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for _ in range(2)
    ]


def volume(one, two, disparities, scale, reduce):
    """Compute what the systems do: scale groups, and reduce the products of each disparity."""
    one, two = (scale(fmap.unflatten(1, (GROUPS, -1))) for fmap in (one, two))
    planes = []
    for d in range(disparities):
        width = max(0, one.shape[-1] - d)
        products = one[..., one.shape[-1] - width :] * two[..., :width]
        planes.append(torch.nn.functional.pad(reduce(products), (one.shape[-1] - width, 0)))
    return torch.stack(planes, 2)


def mean(products):
    return products.mean(2)


def added(apart):
    return apart / (torch.linalg.vector_norm(apart, dim=2, keepdim=True) + 1e-5)


def normal(apart):
    return torch.nn.functional.normalize(apart, dim=2)


SYSTEMS = {
    "GwcNet": (gwc.build_gwc_volume, lambda apart: apart, mean),
    "IGEV's norm": (gwc.build_gwc_volume_norm, added, mean),
    "FoundationStereo": (
        lambda *arguments: gwc.build_gwc_volume(*arguments, normalize="cosine"),
        normal,
        lambda products: products.sum(2),
    ),
}


@pytest.mark.parametrize("disparities", [1, 5, 9])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_volume_and_its_gradients_are_the_systems(system, disparities):
    build, scale, reduce = SYSTEMS[system]
    tensors = maps()
    got = build(*tensors, disparities, GROUPS)
    want = volume(*tensors, disparities, scale, reduce)
    assert got.shape == (2, GROUPS, disparities, 3, 7)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    grad = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(want, tensors, grad)
    for one, other in zip(torch.autograd.grad(got, tensors, grad), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("correlate", "scale"),
    [(gwc.groupwise_correlation, lambda apart: apart), (gwc.groupwise_correlation_norm, added)],
)
def test_one_displacement_is_a_plane(correlate, scale):
    tensors = maps()
    want = volume(*tensors, 1, scale, mean)[:, :, 0]
    torch.testing.assert_close(correlate(*tensors, GROUPS), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosines_of_16_bits_are_computed_in_float32_and_rounded_once(dtype):
    tensors = maps(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = gwc.build_gwc_volume(*tensors, 5, GROUPS, normalize="cosine")
    wide = [fmap.float() for fmap in tensors]
    want = gwc.build_gwc_volume(*wide, 5, GROUPS, normalize="cosine").to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_no_disparity_is_refused():
    with pytest.raises(ValueError, match="maxdisp must be at least 1, got 0"):
        gwc.build_gwc_volume(*maps(), 0, GROUPS)


class Network(torch.nn.Module):
    def forward(self, left, right):
        return gwc.build_gwc_volume(left, right, 5, GROUPS)


def test_an_exported_volume_computes_the_same_in_onnxruntime():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from cupycorr.onnx import translation_table

    tensors = [fmap.detach() for fmap in maps(dtype=torch.float32)]
    program = torch.onnx.export(
        Network().eval(), tuple(tensors), dynamo=True, verbose=False,
        custom_translation_table=translation_table(),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [one.name for one in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, (t.numpy() for t in tensors), strict=True)))
    torch.testing.assert_close(torch.from_numpy(got), Network()(*tensors), rtol=0, atol=1e-5)
