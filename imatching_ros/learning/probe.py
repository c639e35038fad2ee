"""The known-warp probe: the robot's own images under random homographies, where the truth is exact.

Reprojection error alone can be fooled; a matcher that got worse at plain matching shows it here.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from ..matching.detector import detect
from ..matching.protocol import Matcher
from ..matching.warps import apply_homography, in_frame, photometric, random_homography

QUERIES = 300


@dataclass(frozen=True)
class Probe:
    """One image, the same image warped, and where its corners went."""

    images: Tensor  #: (2, 1, H, W) float32 in [0, 1]
    queries: Tensor  #: (N, 2) px in the first
    truth: Tensor  #: (N, 2) px in the second


def make_probe(image: np.ndarray, seed: int) -> Probe:
    """A probe of an image (H, W) uint8. The same seed makes the same probe."""
    rng = np.random.default_rng(seed)
    size = (image.shape[1], image.shape[0])
    H = random_homography(rng, size, 0.5)
    queries = detect(image, QUERIES)
    warped = cv2.warpPerspective(image, H, size, flags=cv2.INTER_LINEAR)
    truth = apply_homography(H, queries) if len(queries) else queries
    seen = in_frame(truth, size)
    images = np.stack((image, photometric(rng, warped, 0.5)))[:, None]
    return Probe(
        torch.from_numpy(images).float() / 255, torch.from_numpy(queries[seen]), torch.from_numpy(truth[seen]).float()
    )


@torch.no_grad()
def probe_error(matcher: Matcher, probe: Probe) -> Tensor:
    """Distances from the truth (N,) px."""
    device = next(matcher.parameters()).device
    features = matcher.encode(probe.images.to(device))
    uv = matcher.match(features[:1], features[1:], probe.queries.to(device).unsqueeze(0)).uv[0]
    return (uv.cpu() - probe.truth).norm(dim=-1)
