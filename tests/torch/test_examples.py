"""The examples that train and match: they find the motion that is there."""

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import motion  # noqa: E402
import train_pwcnet  # noqa: E402
import train_raft  # noqa: E402

NETWORKS = {"RAFT": train_raft.RAFT, "PWC-Net": train_pwcnet.PWCNet}


def test_the_flow_leads_from_the_first_image_to_the_second():
    image1, image2, truth = motion.batch(4, torch.Generator().manual_seed(1))
    back = train_pwcnet.warp(image2, truth)
    inside = (train_pwcnet.warp(torch.ones_like(image2), truth) > 0.999).float()
    off = ((back - image1).abs() * inside).mean()
    assert off < 0.2 * ((image2 - image1).abs() * inside).mean()
    assert truth.norm(dim=1).mean() > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_training_finds_the_motion(name):
    torch.manual_seed(0)
    errors = dict(motion.train(NETWORKS[name](), goal=1, steps=400))
    assert min(errors.values()) == errors[max(errors)] < 1


@pytest.mark.parametrize("stereo", [False, True])
def test_matching_finds_where_everything_moved(stereo, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    import matching

    rng = np.random.default_rng(0)
    grains = image.fromarray(rng.integers(0, 256, (40, 50), np.uint8))
    first = np.asarray(grains.resize((100, 80), image.Resampling.BICUBIC))
    x, y = (-3, 0) if stereo else (2, -1)
    for name, pixels in (("a", first), ("b", np.roll(first, (y, x), (0, 1)))):
        image.fromarray(pixels).save(tmp_path / f"{name}.png")
    for out in ("out.npy", "out.png"):
        words = [
            *map(str, (tmp_path / "a.png", tmp_path / "b.png", tmp_path / out)),
            "--reach",
            "4",
        ]
        monkeypatch.setattr(sys, "argv", ["matching.py", *words, *["--stereo"] * stereo])
        matching.main()
    flow = np.load(tmp_path / "out.npy")
    assert np.median(np.abs(flow[0] - x)) < 0.1
    assert np.median(np.abs(flow[1] - y)) < 0.1
    with image.open(tmp_path / "out.png") as drawn:
        assert drawn.size == (100, 80)


@pytest.mark.parametrize(
    "path", sorted(Path(motion.__file__).parent.glob("*.py")), ids=lambda p: p.stem
)
def test_an_example_is_short_enough_to_read(path):
    # Comparisons with others, and two whole networks.
    compared = path.stem in ("ptlflow_networks", "torchvision_raft", "networks")
    assert compared or len(path.read_text().splitlines()) < 150
