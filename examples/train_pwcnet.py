"""Train a small PWC-Net on synthetic motion, in minutes on a CPU.

    python examples/train_pwcnet.py
    python examples/train_pwcnet.py --goal 0.3

Training ends when flows of new images are wrong by less than ``--goal`` pixels on average, and
fails if ``--steps`` are not enough.
"""

from itertools import pairwise

import torch
from motion import main
from networks import conv, flow, warp
from torch import nn
from torch.nn import functional

from cupycorr import Geometry, correlation


class PWCNet(nn.Module):
    """D. Sun et al., "PWC-Net", CVPR 2018; three levels. Returns flows from coarse to fine."""

    def __init__(self, widths=(1, 16, 32, 48)):
        super().__init__()
        self.pyramid = nn.ModuleList(
            nn.Sequential(conv(inputs, outputs, stride=2), conv(outputs, outputs))
            for inputs, outputs in pairwise(widths)
        )
        self.patch = Geometry(patch_size=5)
        self.estimators = nn.ModuleList(
            nn.Sequential(conv(5 * 5 + channels + 2, 64), conv(64, 48), conv(48, 32), flow(32))
            for channels in widths[1:]
        )

    def forward(self, image1, image2):
        pyramid1, pyramid2 = [image1], [image2]
        for layer in self.pyramid:
            pyramid1.append(layer(pyramid1[-1]))
            pyramid2.append(layer(pyramid2[-1]))
        found, flows = None, []
        for level in (3, 2, 1):
            fmap1, fmap2 = pyramid1[level], pyramid2[level]
            if found is None:
                found = torch.zeros_like(fmap1[:, :2])
            else:
                found = 2 * functional.interpolate(found, scale_factor=2, mode="bilinear")
            cost = correlation(fmap1, warp(fmap2, found), self.patch, normalize="cosine")
            seen = torch.cat([cost.flatten(1, 2), fmap1, found], 1)
            found = found + self.estimators[level - 1](seen)
            scale = 2**level
            flows.append(scale * functional.interpolate(found, scale_factor=scale, mode="bilinear"))
        return flows


if __name__ == "__main__":
    main(PWCNet, __doc__.partition("\n")[0])
