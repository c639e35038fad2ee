"""
The robot's own images under random homographies, where the truth is known exactly.

Reprojection error alone can be fooled; a matcher that got worse at plain matching shows it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from .lesson import encode_image
from ..matching.detector import detect
from ..matching.protocol import Matcher, Matches
from ..matching.warps import apply_homography, in_frame, random_homography

QUERIES = 300


@dataclass(frozen=True)
class Probe:
    """One image, the same scene warped, and where its corners went."""

    images: Tensor  #: (2, 1, H, W) uint8
    queries: Tensor  #: (N, 2) px in the first
    truth: Tensor  #: (N, 2) px in the second


def make_probe(image: np.ndarray, others: Sequence[np.ndarray], seed: int) -> Probe:
    """
    Return a probe of an image (H, W) uint8, the same one for the same seed.

    ``others`` are images of the same camera. The scene is warped, the camera's noise is not: it
    stays with the pixels, as it does when a robot moves. (Noise that moved along with the scene
    would be a texture like any other, and a matcher that learned to look through the noise would
    seem to get worse.) What all images have in common is the sensor's fixed pattern, what
    denoising takes away is its noise; both are put back onto the warped scene. The noise is rolled
    to another place, so that what denoising takes of the scene with it is no ghost of the scene.
    """
    rng = np.random.default_rng(seed)
    size = (image.shape[1], image.shape[0])
    pattern = _fixed_pattern(others)
    clean = _denoise(image - pattern)
    noise = np.roll(image - pattern - clean, tuple(rng.integers(0, size[::-1])), (0, 1))
    H = random_homography(rng, size, 0.5)
    warped = cv2.warpPerspective(clean, H, size, flags=cv2.INTER_LINEAR)
    gain, bias = np.exp(rng.normal(0, 0.1)), rng.normal(0, 5)
    moved = np.rint(np.clip(warped * gain + bias + pattern + noise, 0, 255)).astype(np.uint8)
    queries = detect(image, QUERIES)
    truth = apply_homography(H, queries) if len(queries) else queries
    seen = in_frame(truth, size)
    return Probe(
        torch.from_numpy(np.stack((image, moved))[:, None]),
        torch.from_numpy(queries[seen]),
        torch.from_numpy(truth[seen]).float(),
    )


def _fixed_pattern(images: Sequence[np.ndarray]) -> np.ndarray:
    """
    Return what stays in the images' high frequencies while the scene moves (H, W).

    It is shrunk where it is not certain.
    """
    high = np.stack(
        [image - cv2.GaussianBlur(image, (0, 0), 5.0) for image in map(np.float32, images)]
    )
    for band in np.array_split(high, 8, axis=1):  # what is copied of them is large
        median = np.median(band, axis=0)
        error = 1.25 * 1.4826 * np.median(np.abs(band - median), axis=0) / np.sqrt(len(images))
        band[0] = median * np.clip(1 - np.square(error / np.maximum(np.abs(median), 1e-6)), 0, 1)
    return high[0].copy()


def _denoise(image: np.ndarray) -> np.ndarray:
    """Return the image by non-local means, as strong as its high frequencies ask for."""
    high = cv2.filter2D(image, -1, np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32) / 6)
    deviation = float(np.median(np.abs(high))) / 0.6745
    grey = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    return cv2.fastNlMeansDenoising(grey, None, max(deviation, 1.0), 5, 15).astype(np.float32)


@torch.no_grad()
def probe_error(matcher: Matcher, probe: Probe) -> Tensor:
    """Return how far (N,) px matches are from the truth."""
    return (_match(matcher, probe).uv[0].cpu() - probe.truth).norm(dim=-1)


def known_warp_loss(matcher: Matcher, probe: Probe) -> Tensor:
    """Return the mean robust distance from the truth, of both stages together, differentiable."""
    matches = _match(matcher, probe)
    return sum(robust_distance(uv[0].cpu(), probe.truth) for uv in (matches.uv, matches.coarse_uv))


def robust_distance(uv: Tensor, truth: Tensor) -> Tensor:
    """Return the mean pseudo-Huber distance of matches from their truth, both (N, 2), px."""
    return ((uv - truth).square().sum(-1) + 1).sqrt().mean() - 1


def _match(matcher: Matcher, probe: Probe) -> Matches:
    reference, target = (encode_image(matcher, image) for image in probe.images.split(1))
    queries = probe.queries.to(next(matcher.parameters()).device).unsqueeze(0)
    return matcher.match(reference, target, queries)
