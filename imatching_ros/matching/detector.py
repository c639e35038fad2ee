"""The frozen detector says where to ask; no gradient passes through it (paper 3.2.1)."""

from __future__ import annotations

import cv2
import numpy as np

SPACING = 8  # px between any two points: one coarse cell of the matcher
BORDER = 8  # px to the image's edge, where a window would be cut


def detect(image: np.ndarray, count: int, occupied: np.ndarray | None = None) -> np.ndarray:
    """
    Return the ``count`` strongest Shi-Tomasi corners of an image (H, W) uint8, (N, 2) float32 px.

    Corners keep ``SPACING`` from one another and from the ``occupied`` points (M, 2) px. Contrast
    is equalised first, so that dim parts of the image give points too.
    """
    mask = np.full(image.shape, 255, np.uint8)
    mask[:BORDER] = mask[-BORDER:] = 0
    mask[:, :BORDER] = mask[:, -BORDER:] = 0
    if occupied is not None:
        for u, v in np.rint(occupied).astype(int):
            cv2.circle(mask, (int(u), int(v)), SPACING, 0, -1)
    equalised = cv2.createCLAHE(3.0, (8, 8)).apply(image)
    corners = cv2.goodFeaturesToTrack(equalised, count, 1e-3, SPACING, mask=mask, blockSize=5)
    return np.empty((0, 2), np.float32) if corners is None else corners.reshape(-1, 2)
