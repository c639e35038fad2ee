"""
Where training's pairs come from: warped pictures and rendered scenes, both with exact truth.

A pair follows from its seed, its step and its place in the batch alone, whichever worker draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
from imatching_ros.evaluation.matching import Pair as Motion
from imatching_ros.evaluation.matching import true_matches
from imatching_ros.geometry import lie
from imatching_ros.matching.detector import detect
from imatching_ros.matching.warps import apply_homography, in_frame, photometric, random_homography
import numpy as np
from sources import Scene
import torch
from torch.utils.data import DataLoader, Dataset

QUERIES = 256  # per pair
FEWEST = 50  # of them must be seen in both views
RENDERED = 0.35  # of the pairs
STRENGTHS = (0.4, 1.0, 1.0, 1.5)  # of the warps
PATCHES = 3  # at most, moving in front
STEPS = (1, 2, 3, 5, 8, 12, 16, 20)  # frames apart
JITTER_PX = 6.0  # at most, of where the fine stage is told to look


class Pair(NamedTuple):
    """Two views and where queries of the first lie in the second; a batch of them has rows (B)."""

    reference: np.ndarray  #: (H, W) uint8
    target: np.ndarray  #: (H, W) uint8
    queries: np.ndarray  #: (N, 2) float32 px in the reference
    truth: np.ndarray  #: (N, 2) float32 px in the target, NaN where not seen in it
    jitter: np.ndarray  #: (N, 2) float32 px, from the truth to where the fine stage looks


class Pairs(Dataset):
    """
    Batches of pairs, by step.

    pictures: .npy files; scenes: folders that ``Scene.load`` reads; seed: numbers that the pairs
    follow from, with step and place; size: W, H px of the views; corners: share of the queries
    that is asked at corners, the others anywhere; rendered: share of the pairs that is.
    """

    def __init__(
        self, pictures: Sequence[Path], scenes: Sequence[Path], seed: Sequence[int], batch: int,
        size: tuple[int, int] = (320, 240), corners: float = 0.5, rendered: float = RENDERED,
    ) -> None:
        self.pictures, self.scenes, self.seed, self.batch = pictures, scenes, seed, batch
        self.size, self.corners = size, corners
        self.rendered = rendered if scenes else 0.0

    def __getitem__(self, step: int) -> Pair:
        pairs = (
            self.draw(np.random.default_rng((*self.seed, step, place)))
            for place in range(self.batch)
        )
        return Pair(*map(np.stack, zip(*pairs, strict=True)))

    def draw(self, rng: np.random.Generator) -> Pair:
        """Return one pair as two exposures see it."""
        pair = None
        if rng.random() < self.rendered:
            for _ in range(20):  # scenes whose frames share too little are left
                scene = Scene.load(self.scenes[rng.integers(len(self.scenes))])
                if pair := rendered(rng, scene, self.size, self.corners):
                    return exposed(rng, pair, rng.uniform(0, 0.8))  # it has its camera's faults
        return exposed(rng, warped(rng, self.pictures, self.size, self.corners), 1.0)


def warped(
    rng: np.random.Generator, pictures: Sequence[Path], size: tuple[int, int], corners: float
) -> Pair:
    """
    Return a picture under two homographies.

    Patches of other pictures move on their own in front of it, so that edges of occlusion are
    seen. Beyond its border a picture goes on as its mirror image, which moves with it.
    """
    strength = rng.choice(STRENGTHS)
    views = np.zeros((2, *size[::-1]), np.uint8)
    owners = np.zeros((2, *size[::-1]), np.uint8)
    planes = []
    for plane in range(1 + (rng.integers(1, PATCHES + 1) if rng.random() < 0.6 else 0)):
        picture = np.load(pictures[rng.integers(len(pictures))], mmap_mode='r')
        left, top = rng.uniform(0, np.maximum(np.array(picture.shape[::-1]) - size, 1))
        window = np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1.0]])
        outline = _polygon(rng, size)
        planes.append([random_homography(rng, size, k * strength) for k in (0.3, 1.0)])
        for view, owner, H in zip(views, owners, planes[-1], strict=True):
            seen = np.ones_like(owner)
            if plane:
                seen[:] = 0
                cv2.fillPoly(seen, [np.rint(apply_homography(H, outline)).astype(np.int32)], 1)
            image = cv2.warpPerspective(
                picture, H @ window, size, borderMode=cv2.BORDER_REFLECT_101
            )
            np.copyto(view, image, where=seen > 0)
            np.copyto(owner, plane, where=seen > 0)
    queries = _queries(rng, views[0], corners)
    truth = np.full_like(queries, np.nan)
    owner = _at(owners[0], queries)
    for plane, (first, second) in enumerate(planes):
        moved = apply_homography(second @ np.linalg.inv(first), queries)
        inside = in_frame(moved, size)
        seen = inside & (_at(owners[1], np.where(inside[:, None], moved, 0)) == plane)
        mine = (owner == plane) & seen
        truth[mine] = moved[mine]
    return Pair(*views, queries, truth, _jitter(rng))


def rendered(
    rng: np.random.Generator, scene: Scene, size: tuple[int, int], corners: float
) -> Pair | None:
    """Return windows of two frames of a scene; None where they see too little in common."""
    frames, height, width = scene.images.shape
    step = int(rng.choice([step for step in STEPS if step < frames]))
    i = int(rng.integers(frames - step))
    i, j = (i, i + step) if rng.random() < 0.5 else (i + step, i)
    frame = np.array([width, height])
    # Now and then a frame at half its size: other fields of view
    shrink = 2 if (2 * np.array(size) <= frame).all() and rng.random() < 0.25 else 1
    room = frame - shrink * np.array(size)

    def view(index: int, origin: np.ndarray) -> np.ndarray:
        (x, y), (w, h) = origin, shrink * np.array(size)
        return cv2.resize(
            scene.images[index, y:y + h, x:x + w], size, interpolation=cv2.INTER_AREA
        )

    first = rng.integers(room + 1)
    reference = view(i, first)
    queries = _queries(rng, reference, corners)
    T = scene.T_world_camera
    motion = Motion(i, j, lie.compose(lie.inverse(T[j]), T[i]), True)
    uv, seen = true_matches(
        scene.camera, motion, torch.from_numpy((queries + 0.5) * shrink - 0.5 + first),
        scene.depths[i], scene.depths[j],
    )
    if int(seen.sum()) < FEWEST:
        return None
    # The second window follows what the first one saw
    middle = uv[seen].median(0).values.numpy() + rng.uniform(-60, 60, 2)
    second = np.clip(middle - shrink * np.array(size) / 2, 0, room).astype(int)
    truth = (uv.numpy() - second + 0.5) / shrink - 0.5
    truth[~(seen.numpy() & in_frame(truth, size))] = np.nan
    if np.isfinite(truth[:, 0]).sum() < FEWEST:
        return None
    return Pair(reference, view(j, second), queries, truth.astype(np.float32), _jitter(rng))


def exposed(rng: np.random.Generator, pair: Pair, strength: float) -> Pair:
    """
    Return a pair as two exposures of one camera see it.

    Gain, gamma and blur are each view's own (``photometric``). Then, in seven pairs of ten, the
    camera's: noise, a fixed pattern that both views share, and too little light.
    """
    views = np.stack([photometric(rng, view, strength) for view in pair[:2]]).astype(np.float32)
    if rng.random() < 0.7:
        views += rng.normal(0, rng.uniform(0, 0.05) * 255, views.shape)
        pattern = rng.random()
        if pattern < 0.25:
            views += rng.normal(0, rng.uniform(0, 0.05) * 255, views.shape[1:])
        elif pattern < 0.5:
            views += rng.normal(0, rng.uniform(0, 0.03) * 255, views.shape[2])  # columns
        if rng.random() < 0.5:
            views = np.clip(views, 0, 255) * rng.uniform(0.3, 1)
    return Pair(*np.rint(np.clip(views, 0, 255)).astype(np.uint8), *pair[2:])


def loader(dataset: Dataset, order: Sequence[int], workers: int) -> DataLoader:
    """Return an iterable over ``dataset`` in this order, drawn ahead by processes of its own."""
    return DataLoader(
        dataset, batch_size=None, sampler=order, num_workers=workers,
        multiprocessing_context='spawn' if workers else None,
        worker_init_fn=_one_thread, generator=torch.Generator(),
    )


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(1)


def _polygon(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return the corners (K, 2) px of a random patch."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
    radii = size[0] * rng.uniform(0.06, 0.28, (len(angles), 1))
    return rng.uniform(0.1, 0.9, 2) * size + radii * np.stack((np.cos(angles), np.sin(angles)), 1)


def _queries(rng: np.random.Generator, image: np.ndarray, corners: float) -> np.ndarray:
    at_corners = detect(image, round(corners * QUERIES))
    anywhere = rng.uniform(8, np.array(image.shape[::-1]) - 9, (QUERIES - len(at_corners), 2))
    return np.concatenate((at_corners, anywhere)).astype(np.float32)


def _jitter(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-JITTER_PX, JITTER_PX, (QUERIES, 2)).astype(np.float32)


def _at(image: np.ndarray, uv: np.ndarray) -> np.ndarray:
    column, row = np.rint(uv).astype(int).T
    return image[row, column]
