"""Tracks by OpenCV's SIFT, made by the rules of the package's own tracker."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
from imatching_ros.geometry.camera import Camera
from imatching_ros.geometry.correspondences import Correspondences
from imatching_ros.matching.tracker import TrackerOptions
import numpy as np
import torch


@dataclass
class _Keyframe:
    stamp: int
    uv: np.ndarray  # (N, 2) float32 px
    descriptors: np.ndarray  # (N, 128) float32, of length 1
    track: np.ndarray  # (N,) int64
    found: int = 0  # points found again in the image that followed


class SiftTracker:
    """
    As ``Tracker``, with OpenCV's SIFT.

    A keypoint matched with two keyframes has the newer one's track.
    """

    RATIO = 0.8
    #: Standard deviation of a keypoint's position as a part of the radius of the blob it marks.
    SIGMA = 0.3

    def __init__(self, camera: Camera, features: int = 1500) -> None:
        self.camera, self.options = camera, TrackerOptions()
        self.sift = cv2.SIFT_create(nfeatures=features)
        self.keyframes: list[_Keyframe] = []  # oldest first
        self.next_track = 0

    def track(self, stamp: int, image: np.ndarray) -> Correspondences:
        """
        Return the rows of an image (H, W) uint8 with the past keyframes.

        None for the first image.
        """
        uv, sigma, descriptors = self._detect(image)
        track = np.full(len(uv), -1)
        rows = []  # newest keyframe first: (keyframe, index there, index here)
        for keyframe in reversed(self.keyframes):
            there, here = _mutual(keyframe.descriptors, descriptors, self.RATIO)
            name = keyframe.track[there]
            # One track, one keypoint; and what a newer keyframe said is not contradicted.
            agree = (track[here] == name) | ((track[here] < 0) & ~np.isin(name, track))
            there, here, name = there[agree], here[agree], name[agree]
            track[here] = name
            rows.append((keyframe, there, here))
        message = self._message(stamp, rows, uv, sigma)
        if self._is_keyframe_due(rows, uv):
            fresh = track < 0
            track[fresh] = self.next_track + np.arange(fresh.sum())
            self.next_track += int(fresh.sum())
            self.keyframes.append(_Keyframe(stamp, uv, descriptors, track))
            del self.keyframes[:-self.options.references]
        return message

    def _detect(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Pixels (N, 2), their standard deviations (N,) px and descriptors (N, 128).

        One per place.
        """
        keypoints, descriptors = self.sift.detectAndCompute(image, None)
        if not keypoints:
            return np.zeros((0, 2), np.float32), np.zeros(0), np.zeros((0, 128), np.float32)
        uv = np.array([point.pt for point in keypoints], np.float32)
        sigma = self.SIGMA * np.array([point.size / 2 for point in keypoints])
        # SIFT repeats a place for each of its orientations
        _, first = np.unique(uv, axis=0, return_index=True)
        descriptors = descriptors[first] / np.linalg.norm(
            descriptors[first], axis=1, keepdims=True
        ).clip(1e-6)
        return uv[first], sigma[first], descriptors

    def _message(
        self, stamp: int, rows: list, uv: np.ndarray, sigma: np.ndarray
    ) -> Correspondences:
        here = np.concatenate([row[2] for row in rows]) if rows else np.zeros(0, np.int64)
        # The rows of one keypoint are one observation said several times: each counts for its
        # share.
        variance = sigma[here] ** 2 * np.bincount(here, minlength=len(uv))[here]

        def column(of, shape, dtype):
            parts = [of(keyframe, there) for keyframe, there, _ in rows] or [np.zeros(shape)]
            return torch.from_numpy(np.concatenate(parts).astype(dtype))

        pixels = torch.from_numpy(uv[here])
        cov = np.stack((variance, 0 * variance, variance), -1)
        return Correspondences(
            stamp, pixels, self.camera.normalise(pixels.double()).float(),
            column(lambda keyframe, there: np.full(len(there), keyframe.stamp), 0, np.int64),
            column(lambda keyframe, there: keyframe.uv[there], (0, 2), np.float32),
            column(lambda keyframe, there: keyframe.track[there], 0, np.int64),
            torch.ones(len(here)), torch.from_numpy(cov).float(), 0,
        )

    def _is_keyframe_due(self, rows: list, uv: np.ndarray) -> bool:
        """Apply the rule of ``Tracker``."""
        if not rows:
            return True
        newest, there, here = rows[0]
        newest.found = max(newest.found, len(there))
        if len(there) == 0 or len(there) < self.options.survivors * newest.found:
            return True
        moved = np.median(np.linalg.norm(uv[here] - newest.uv[there], axis=1))
        return bool(moved > self.options.parallax * self.camera.width)


def _mutual(a: np.ndarray, b: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """
    Return indices of rows of a and b, unit vectors, that are each other's nearest.

    Clearly nearer than the second.
    """
    if min(len(a), len(b)) < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    cosine = a @ b.T
    nearest = cosine.argmax(1)
    mutual = cosine.argmax(0)[nearest] == np.arange(len(a))
    second, first = np.sqrt((2 - 2 * np.partition(cosine, -2, axis=1)[:, -2:]).clip(0)).T
    i = np.flatnonzero(mutual & (first < ratio * second))
    return i, nearest[i]
