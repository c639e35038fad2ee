"""Random warps of photographs: image pairs whose correspondence is known exactly."""

from __future__ import annotations

import cv2
import numpy as np


def random_homography(
    rng: np.random.Generator, size: tuple[int, int], strength: float = 1.0
) -> np.ndarray:
    """Return a homography (3, 3) that keeps most of an image of ``size`` (W, H) px in view."""
    width, height = size
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    centre = corners.mean(0)
    angle = np.deg2rad(rng.normal(0, 12) * strength)
    scale = np.exp(rng.normal(0, 0.15) * strength)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    tilt = rng.uniform(-0.10, 0.10, (4, 2)) * strength * size
    shift = rng.uniform(-0.15, 0.15, 2) * strength * size
    moved = (corners - centre) @ turn.T + centre + tilt + shift
    return cv2.getPerspectiveTransform(corners, moved.astype(np.float32))


def apply_homography(H: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Return the pixels (N, 2) that H (3, 3) takes pixels (N, 2) to."""
    return cv2.perspectiveTransform(uv.reshape(-1, 1, 2).astype(np.float64), H).reshape(-1, 2)


def photometric(rng: np.random.Generator, image: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Return the image (H, W) uint8 as another exposure would see it: gain, gamma, blur, noise."""
    x = image.astype(np.float32) / 255
    x = np.clip(x * np.exp(rng.normal(0, 0.25) * strength) + rng.normal(0, 0.04) * strength, 0, 1)
    x = x ** np.exp(rng.normal(0, 0.25) * strength)
    if rng.random() < 0.4:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.3, 0.3 + 1.0 * strength))
    x = x + rng.normal(0, rng.uniform(0, 0.02) * strength + 1e-6, x.shape)
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def in_frame(uv: np.ndarray, size: tuple[int, int], border: float = 4.0) -> np.ndarray:
    """
    Return which of the pixels (N, 2) lie in an image of ``size`` (W, H), as (N,) bool.

    They do where they are ``border`` px or more from its edge.
    """
    return ((uv >= border) & (uv <= np.array(size) - 1 - border)).all(-1)
