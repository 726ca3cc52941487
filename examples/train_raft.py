"""Train a small RAFT on synthetic motion, in minutes on a CPU.

    python examples/train_raft.py
    python examples/train_raft.py --goal 0.3

Training ends when flows of new images are wrong by less than ``--goal`` pixels on average, and
fails if ``--steps`` are not enough.
"""

import torch
from motion import main
from networks import conv, flow
from torch import nn
from torch.nn import functional

from cupycorr import CorrelationLookup


class RAFT(nn.Module):
    """Z. Teed and J. Deng, "RAFT: recurrent all-pairs field transforms", ECCV 2020; smaller.

    Maps are a quarter of the images, and flows are upsampled linearly. Returns the flow of each
    iteration.
    """

    def __init__(self, channels=48, iterations=6):
        super().__init__()
        self.encode, self.context = (
            nn.Sequential(conv(1, 32, 5, stride=2), conv(32, 48, stride=2), last)
            for last in (nn.Conv2d(48, channels, 1), nn.Conv2d(48, 2 * channels, 1))
        )
        self.encode.append(nn.InstanceNorm2d(channels))
        self.look = CorrelationLookup(radius=3, levels=2)
        self.motion = nn.Sequential(conv(2 * 7 * 7 + 2, 64, 1), conv(64, channels))
        self.gates = nn.Conv2d(3 * channels, 2 * channels, 3, padding=1)
        self.candidate = nn.Conv2d(3 * channels, channels, 3, padding=1)
        self.head = nn.Sequential(conv(channels, 64), flow(64))
        self.iterations = iterations

    def forward(self, image1, image2):
        fmap1, fmap2 = self.encode(image1), self.encode(image2)
        levels = self.look.pyramid(fmap2)  # once, for all iterations
        hidden, context = self.context(image1).chunk(2, 1)
        hidden, context = hidden.tanh(), context.relu()
        height, width = fmap1.shape[2:]
        grid = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
        start = torch.stack(grid).to(fmap1)[None]
        coords, flows = start.expand(len(fmap1), -1, -1, -1), []
        for _ in range(self.iterations):
            coords = coords.detach()
            cost = self.look(fmap1, levels, coords).flatten(1, 3)
            motion = self.motion(torch.cat([cost, coords - start], 1))
            seen = torch.cat([context, motion], 1)
            update, reset = self.gates(torch.cat([hidden, seen], 1)).sigmoid().chunk(2, 1)
            candidate = self.candidate(torch.cat([reset * hidden, seen], 1)).tanh()
            hidden = (1 - update) * hidden + update * candidate
            coords = coords + self.head(hidden)
            flows.append(
                4 * functional.interpolate(coords - start, scale_factor=4, mode="bilinear")
            )
        return flows


if __name__ == "__main__":
    main(RAFT, __doc__.partition("\n")[0])
