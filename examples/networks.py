"""FlowNetC and PWC-Net, written from their papers: examples of networks around a cost volume.

Both take two images (N, 3, H, W), of heights and widths that 64 divides, and return flows from
coarse to fine, as training compares all of them with the truth: (N, 2, H/64, W/64) first,
(N, 2, H/4, W/4) last. A flow is (x, y): what is at a position in the first image is at the position
plus the flow in the second one.

Layers and widths are the papers'. What these leave open is as in the networks that their authors
released, whose numbers of parameters the second paper gives: 39.17 and 8.75 million.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from cupycorr import Geometry, SpatialCorrelationSampler, correlation


def conv(inputs, outputs, kernel_size=3, stride=1, dilation=1):
    """Return a convolution that keeps the size, up to its stride, and its non-linearity."""
    padding = dilation * (kernel_size // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size, stride, padding, dilation), nn.LeakyReLU(0.1)
    )


def upconv(inputs, outputs):
    """Return a convolution that doubles the size."""
    return nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1)


def flow(inputs):
    """Return the convolution that predicts a flow."""
    return nn.Conv2d(inputs, 2, kernel_size=3, padding=1)


class FlowNetC(nn.Module):
    """A. Dosovitskiy et al., "FlowNet: learning optical flow with convolutional networks".

    ICCV 2015, figures 2 and 3; flows are in pixels. As in the released network, non-linearities
    leak, a second convolution follows conv6, flow is predicted there too, and upsampling it learnt.
    """

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(conv(3, 64, 7, stride=2), conv(64, 128, 5, stride=2))
        self.conv3 = conv(128, 256, 5, stride=2)
        self.match = SpatialCorrelationSampler(patch_size=21, dilation_patch=2)
        self.redirect = conv(256, 32, 1)
        self.contract = nn.ModuleList([
            conv(32 + 21 * 21, 256),
            nn.Sequential(conv(256, 512, stride=2), conv(512, 512)),
            nn.Sequential(conv(512, 512, stride=2), conv(512, 512)),
            nn.Sequential(conv(512, 1024, stride=2), conv(1024, 1024)),
        ])  # fmt: skip
        # Channels at 1/64 to 1/4 of the size: those skipped to, upconvolved, and of a coarser flow.
        widths = [1024, 512 + 512 + 2, 512 + 256 + 2, 256 + 128 + 2, 128 + 64 + 2]
        self.flows = nn.ModuleList(map(flow, widths))
        self.expand = nn.ModuleList(
            nn.Sequential(upconv(inputs, outputs), nn.LeakyReLU(0.1))
            for inputs, outputs in zip(widths, (512, 256, 128, 64), strict=False)
        )
        self.upsample = nn.ModuleList(upconv(2, 2) for _ in self.expand)

    def forward(self, image1, image2):
        low1, low2 = self.tower(image1), self.tower(image2)
        fmap1, fmap2 = self.conv3(low1), self.conv3(low2)
        cost = self.match(fmap1, fmap2).flatten(1, 2)
        x = torch.cat([self.redirect(fmap1), cost], 1)
        skips = [low1]
        for layer in self.contract:
            x = layer(x)
            skips.append(x)
        x = skips.pop()
        flows = [self.flows[0](x)]
        for expand, upsample, predict in zip(
            self.expand, self.upsample, self.flows[1:], strict=True
        ):
            x = torch.cat([skips.pop(), expand(x), upsample(flows[-1])], 1)
            flows.append(predict(x))
        return flows


class PWCNet(nn.Module):
    """D. Sun et al., "PWC-Net: CNNs for optical flow using pyramid, warping, and cost volume".

    CVPR 2018, section 3, with estimators that are densely connected; flows are in units of 20
    pixels, as in section 4. As in the released network an estimator also sees features of the
    coarser one, upsampled to two channels, and the context network sees all of the finest one's.
    """

    def __init__(self):
        super().__init__()
        widths = (3, 16, 32, 64, 96, 128, 196)
        self.pyramid = nn.ModuleList(
            nn.Sequential(conv(inputs, outputs, stride=2), conv(outputs, outputs))
            for inputs, outputs in pairwise(widths)
        )
        self.estimators = nn.ModuleList(
            Estimator(9 * 9 + extra) for extra in (0, 128 + 4, 96 + 4, 64 + 4, 32 + 4)
        )
        self.patch = Geometry(patch_size=9)
        self.upsample = nn.ModuleList(upconv(e.outputs, 2) for e in self.estimators[:-1])
        self.context = nn.Sequential(
            conv(self.estimators[-1].outputs, 128),
            conv(128, 128, dilation=2),
            conv(128, 128, dilation=4),
            conv(128, 96, dilation=8),
            conv(96, 64, dilation=16),
            conv(64, 32),
            flow(32),
        )

    def forward(self, image1, image2):
        pyramid1, pyramid2 = [image1], [image2]
        for layer in self.pyramid:
            pyramid1.append(layer(pyramid1[-1]))
            pyramid2.append(layer(pyramid2[-1]))
        features, coarsest = self.estimators[0](self.cost(pyramid1[6], pyramid2[6]))
        flows = [coarsest]
        for level, upsample, estimate in zip(
            (5, 4, 3, 2), self.upsample, self.estimators[1:], strict=True
        ):
            coarse = functional.interpolate(flows[-1], scale_factor=2, mode="bilinear")
            warped = warp(pyramid2[level], coarse * (20 / 2**level))
            cost = self.cost(pyramid1[level], warped)
            features, finer = estimate(
                torch.cat([cost, pyramid1[level], coarse, upsample(features)], 1)
            )
            flows.append(finer)
        flows[-1] = flows[-1] + self.context(features)
        return flows

    def cost(self, fmap1, fmap2):
        """Return the mean products of features as channels, after their non-linearity."""
        cost = correlation(fmap1, fmap2, self.patch, normalize=True).flatten(1, 2)
        return functional.leaky_relu(cost, 0.1)


class Estimator(nn.Module):
    """Predict a flow by layers of which each sees the inputs of all before it."""

    def __init__(self, inputs):
        super().__init__()
        self.layers = nn.ModuleList()
        for outputs in (128, 128, 96, 64, 32):
            self.layers.append(conv(inputs, outputs))
            inputs += outputs
        self.outputs = inputs
        self.flow = flow(inputs)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x, self.flow(x)


def warp(fmap, flow):
    """Fetch each position's features from where its flow, in pixels, points to; 0 from outside."""
    height, width = fmap.shape[2:]
    y = flow[:, 1] + torch.arange(height, device=flow.device)[:, None]
    x = flow[:, 0] + torch.arange(width, device=flow.device)
    # The sampler has -1 and 1 at the borders, half a pixel beyond the first and the last one.
    where = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return functional.grid_sample(fmap, where, align_corners=False)
