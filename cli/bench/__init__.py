"""``cupycorr bench``: how long the cost volume and its gradients take."""

from .command import bench as bench
