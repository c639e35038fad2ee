"""
Correspondences from GFTT corners and pyramidal KLT.

Real input for the bundle without the learned matcher.
"""

from __future__ import annotations

import cv2
from imatching_ros.geometry.camera import Camera
from imatching_ros.geometry.correspondences import Correspondences
import numpy as np
import torch

_LK = {
    'winSize': (17, 17), 'maxLevel': 4,
    'criteria': (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 20, 0.02)
}


class KltTracker:
    """``track`` once per image. Every image is matched against the past ``past`` keyframes."""

    def __init__(
        self, camera: Camera, corners: int = 600, past: int = 2, parallax_px: float = 20.0
    ) -> None:
        self.camera, self.corners, self.past, self.parallax_px = camera, corners, past, parallax_px
        # stamp, image, uv, track
        self.keyframes: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
        self.next_track = 0
        self.last: dict[int, np.ndarray] = {}
        self.most: dict[int, int] = {}  # points of a keyframe found in an image that followed

    def track(self, stamp: int, image: np.ndarray) -> Correspondences:
        rows = [self._match(*keyframe, image) for keyframe in self.keyframes]
        message = self._message(stamp, rows)
        found = {
            int(t): uv for rows_of in rows for t, uv in zip(rows_of[1], rows_of[3], strict=True)
        }
        self.last = found or self.last
        for row in rows[-1:]:
            self.most[row[0]] = max(self.most.get(row[0], 0), len(row[1]))
        if not rows or self._due(rows[-1]):
            self._keyframe(stamp, image, found)
        return message

    def _match(self, ref_stamp, ref_image, ref_uv, track, image):
        if len(ref_uv) == 0:
            return ref_stamp, track, ref_uv, ref_uv
        known = [i for i, t in enumerate(track) if int(t) in self.last]
        shift = (
            np.median([self.last[int(track[i])] - ref_uv[i] for i in known], 0)
            if known
            else np.zeros(2)
        )
        guess = ref_uv + shift.astype(np.float32)
        for i in known:
            guess[i] = self.last[int(track[i])]
        guess = np.ascontiguousarray(guess, np.float32)
        flags = cv2.OPTFLOW_USE_INITIAL_FLOW
        uv, ok, _ = cv2.calcOpticalFlowPyrLK(
            ref_image, image, ref_uv, guess.copy(), flags=flags, **_LK
        )
        back, ok_back, _ = cv2.calcOpticalFlowPyrLK(
            image, ref_image, uv, ref_uv.copy(), flags=flags, **_LK
        )
        good = (
            (ok.ravel() == 1)
            & (ok_back.ravel() == 1)
            & (np.linalg.norm(back - ref_uv, axis=1) < 0.7)
        )
        h, w = image.shape
        good &= (uv[:, 0] >= 0) & (uv[:, 1] >= 0) & (uv[:, 0] <= w - 1) & (uv[:, 1] <= h - 1)
        return ref_stamp, track[good], ref_uv[good], uv[good]

    def _due(self, rows) -> bool:
        _, track, ref_uv, uv = rows
        total = len(self.keyframes[-1][3])
        if len(track) <= 0.6 * total:
            return True
        return float(np.median(np.linalg.norm(uv - ref_uv, axis=1))) > self.parallax_px

    def _keyframe(self, stamp: int, image: np.ndarray, found: dict[int, np.ndarray]) -> None:
        track = np.array(sorted(found), np.int64)
        uv = np.array([found[int(t)] for t in track], np.float32).reshape(-1, 2)
        mask = np.full(image.shape, 255, np.uint8)
        for x, y in uv:
            cv2.circle(mask, (round(float(x)), round(float(y))), 10, 0, -1)
        new = cv2.goodFeaturesToTrack(image, max(self.corners - len(uv), 1), 0.005, 10, mask=mask)
        if new is None or image.std() < 3.0:  # in a picture of nothing, corners are noise
            new = np.zeros((0, 2), np.float32)
        new = new.reshape(-1, 2)
        ids = np.arange(self.next_track, self.next_track + len(new))
        self.next_track += len(new)
        self.keyframes.append(
            (stamp, image, np.concatenate((uv, new)), np.concatenate((track, ids)))
        )
        if len(self.keyframes) > self.past:  # as Tracker: images of a covered lens go first
            blind = [k for k in self.keyframes[:-1] if self.most[k[0]] <= 0.2 * len(k[3])]
            gone = (blind or self.keyframes)[0][0]
            self.keyframes = [k for k in self.keyframes if k[0] != gone]

    def _message(self, stamp: int, rows) -> Correspondences:
        ref_stamp = (
            torch.cat([torch.full((len(r[1]),), r[0], dtype=torch.int64) for r in rows])
            if rows
            else (torch.zeros(0, dtype=torch.int64))
        )
        track = np.concatenate([r[1] for r in rows]) if rows else np.zeros(0, np.int64)
        ref_uv = np.concatenate([r[2] for r in rows]) if rows else np.zeros((0, 2), np.float32)
        uv = torch.from_numpy(
            np.concatenate([r[3] for r in rows]) if rows else np.zeros((0, 2), np.float32)
        )
        n = len(track)
        xy, cov = self.camera.normalise(uv.double()).float(), torch.tensor([[1.0, 0.0, 1.0]])
        return Correspondences(
            stamp, uv, xy, ref_stamp, torch.from_numpy(ref_uv), torch.from_numpy(track),
            torch.ones(n), cov.repeat(n, 1), 0,
        )
