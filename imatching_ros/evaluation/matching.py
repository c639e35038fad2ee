"""
Mean matching accuracy (MMA) by depth and poses, and accuracy of the relative pose (AUC).

A matcher is measured on every query that is visible in both images: it cannot win by rejecting the
hard ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .trajectory import associate
from ..geometry import lie
from ..geometry.camera import Camera
from ..geometry.two_view import relative_pose
from ..matching.detector import detect
from ..matching.pair import match_pair
from ..matching.protocol import Matcher

if TYPE_CHECKING:
    from ..data.recording import Recording

# an image's pose is its own: 1 ms allows for stamps rounded in a text file
POSE_TOLERANCE_NS = 1_000_000
# relative: above the noise of depth cameras, below the step at an occlusion
DEPTH_TOLERANCE = 0.03
BORDER_PX = 4.0  # true matches nearer to the border of the target are not counted
MIN_POINTS = 10  # a pair with fewer visible queries says nothing
MIN_BASELINE = 0.02  # of the median depth; below, the direction of translation is noise
MIN_BASELINE_M = 0.05  # the same where no depth is known, metres
POSE_THRESHOLD_PX = 1.0  # Sampson threshold of the essential matrix


@dataclass(frozen=True)
class Pair:
    """Two images of a recording and the true motion between them."""

    reference: int  #: stamp, ns
    target: int  #: stamp, ns
    #: (7,) float64, takes points of the reference camera to the target camera
    T_target_reference: Tensor
    baseline: bool  #: long enough for its direction to be known


@dataclass(frozen=True)
class PairMatches:
    """What a matcher said of one pair, beside the truth."""

    pair: Pair
    reference: np.ndarray  #: (H, W) uint8
    target: np.ndarray  #: (H, W) uint8
    queries: Tensor  #: (N, 2) float32 px in the reference
    uv: Tensor  #: (N, 2) float32 px in the target, by the matcher
    true_uv: Tensor  #: (N, 2) float32 px in the target, by depth and pose; NaN where not visible
    visible: Tensor  #: (N,) bool, the true match is known, in frame and not occluded
    error_px: Tensor  #: (N,) float32, NaN where not visible
    #: error of the relative pose; inf where none was found, None without a baseline
    rotation_deg: float | None
    translation_deg: float | None  #: the same, angle between the directions of translation


@dataclass(frozen=True)
class MatchingAccuracy:
    """
    How well a matcher matched, percent.

    ``mma`` is None where the recording has no depth, ``auc`` where no pair has poses and a
    baseline.
    """

    mma_1px: float | None
    mma_2px: float | None
    mma_5px: float | None
    auc_5: float | None
    auc_10: float | None
    auc_20: float | None
    pairs: int  #: pairs that were matched
    points: int  #: visible queries over all pairs


def evaluation_pairs(
    recording: Recording, first_index: int, last_index: int, steps: Sequence[int] = (5, 10, 20),
    per_step: int = 20,
) -> list[Pair]:
    """
    Return pairs of images that lie 5, 10 and 20 images apart, spread evenly over a recording.

    There are at most ``per_step`` for each of ``steps``, of the images ``first_index`` to
    ``last_index``, inclusive, counted among those that can be used. Both images of a pair have a
    true pose and, if the recording has depth at all, depth. Without ground truth there are none.
    """
    if recording.ground_truth is None:
        return []
    stamps = [stamp for stamp, _ in recording][max(first_index, 0):last_index + 1]
    index, true_index = associate(np.asarray(stamps), recording.ground_truth[0], POSE_TOLERANCE_NS)
    poses = torch.as_tensor(recording.ground_truth[1], dtype=torch.float64)
    # text files round
    poses = torch.cat((poses[:, :3], torch.nn.functional.normalize(poses[:, 3:], dim=-1)), -1)
    posed = dict(zip(index.tolist(), poses[torch.as_tensor(true_index)], strict=True))
    deep = {i for i in posed if recording.depth(stamps[i]) is not None}
    usable = deep or posed.keys()
    pairs = []
    for step in steps:
        starts = [i for i in sorted(usable) if i + step in usable]
        chosen = np.unique(
            np.linspace(0, len(starts) - 1, min(per_step, len(starts))).round().astype(int)
        )
        for i in (starts[k] for k in chosen):
            motion = lie.compose(lie.inverse(posed[i + step]), posed[i])
            pairs.append(
                Pair(stamps[i], stamps[i + step], motion, _moved(recording, stamps[i], motion))
            )
    return pairs


def match_pairs(
    matcher: Matcher, recording: Recording, pairs: Sequence[Pair], queries: int = 500
) -> Iterator[PairMatches]:
    """Yield each pair matched at up to ``queries`` of the detector's points, the same for all."""
    needed = {stamp for pair in pairs for stamp in (pair.reference, pair.target)}
    images = {stamp: image for stamp, image in recording if stamp in needed}
    for pair in pairs:
        reference, target = images[pair.reference], images[pair.target]
        points = torch.as_tensor(detect(reference, queries), dtype=torch.float32).reshape(-1, 2)
        matched = match_pair(matcher, reference, target, points)
        uv, kept = matched.uv, matched.kept
        camera = recording.camera_of(pair.reference)
        true_uv, visible = true_matches(
            camera, pair, points, recording.depth(pair.reference), recording.depth(pair.target)
        )
        error = torch.where(visible, (uv - true_uv).norm(dim=-1).nan_to_num(torch.inf), torch.nan)
        rotation, translation = None, None
        if pair.baseline:
            rotation, translation = pose_errors(camera, pair, points[kept], uv[kept])
        yield PairMatches(
            pair, reference, target, points, uv, true_uv, visible, error, rotation, translation
        )


def evaluate_matching(
    matcher: Matcher, recording: Recording, pairs: Sequence[Pair], queries: int = 500
) -> MatchingAccuracy:
    """Return the accuracy of a matcher on pairs of a recording."""
    return accuracy(match_pairs(matcher, recording, pairs, queries))


def accuracy(matches: Iterable[PairMatches]) -> MatchingAccuracy:
    """Return the matching accuracy, a mean over pairs, and the area under the recall of poses."""
    mma: list[list[float]] = []
    errors: list[float] = []
    pairs = points = 0
    for match in matches:
        pairs += 1
        error = match.error_px[match.visible]
        points += len(error)
        if len(error) >= MIN_POINTS:
            mma.append(
                [100 * (error <= threshold).double().mean().item() for threshold in (1, 2, 5)]
            )
        if match.rotation_deg is not None and match.translation_deg is not None:
            errors.append(max(match.rotation_deg, match.translation_deg))
    means = np.mean(mma, axis=0).tolist() if mma else [None] * 3
    areas = [pose_auc(errors, threshold) if errors else None for threshold in (5, 10, 20)]
    return MatchingAccuracy(*means, *areas, pairs=pairs, points=points)


def pose_auc(errors: Sequence[float], threshold: float) -> float:
    """
    Return the area under the recall over the angular error, percent (SuperGlue, section 5.2).

    ``errors`` and ``threshold``, where the area ends, are in degrees; a pair that failed is an
    infinite error. Recall is linear from (0, 0) through each sorted error (e_k, k / n), then
    constant up to the threshold.
    """
    error = np.sort(np.asarray(errors, np.float64))
    below = error[error < threshold]
    recall = np.arange(len(below) + 1) / len(error)
    x = np.concatenate(([0.0], below, [threshold]))
    y = np.append(recall, recall[-1])
    return float(100 * np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / threshold)


def true_matches(
    camera: Camera, pair: Pair, queries: Tensor, depth_reference: np.ndarray | None,
    depth_target: np.ndarray | None,
) -> tuple[Tensor, Tensor]:
    """
    Return where queries (N, 2), px, truly lie in the target, and whether they are visible there.

    The former is (N, 2) float32, NaN where a query is not visible, the latter (N,) bool. Depths
    are (H, W), metres along the optical axis, 0 where unknown, or None. A query is visible if its
    depth is known and its point lands in the target's frame on a surface of the same depth. At an
    edge of the depth image the truth is uncertain, in the reference as in the target: such a query
    is not counted.
    """
    unknown = torch.full_like(queries, torch.nan), torch.zeros(len(queries), dtype=torch.bool)
    if depth_reference is None or depth_target is None or not len(queries):
        return unknown
    uv = queries.double()
    z, known = _depth_at(depth_reference, uv)
    rays = torch.cat((camera.normalise(uv), torch.ones_like(uv[:, :1])), -1)
    points = lie.act(pair.T_target_reference, rays * z[:, None])
    depth = points[:, 2]
    uv = camera.project(points[:, :2] / depth.clamp_min(1e-6)[:, None])
    last = uv.new_tensor([camera.width - 1.0, camera.height - 1.0])
    inside = ((uv >= BORDER_PX) & (uv <= last - BORDER_PX)).all(-1) & (depth > 0)
    surface, seen = _depth_at(depth_target, torch.where(inside[:, None], uv, 0.0))
    visible = known & inside & seen & ((surface - depth).abs() <= DEPTH_TOLERANCE * depth)
    return torch.where(visible[:, None], uv, torch.nan).float(), visible


def _depth_at(depth: np.ndarray, uv: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return the depth (N,) at pixels (N, 2), and whether it is certain.

    It is where all four neighbours are known and on one surface. The inverse of depth is
    interpolated: on a plane it is linear in the pixel.
    """
    image = torch.as_tensor(np.asarray(depth, np.float64))
    height, width = image.shape
    left = uv[:, 0].floor().long().clamp(0, width - 2)
    top = uv[:, 1].floor().long().clamp(0, height - 2)
    a, b = uv[:, 0] - left, uv[:, 1] - top
    corners = torch.stack([image[top + dy, left + dx] for dy in (0, 1) for dx in (0, 1)], -1)
    weights = torch.stack(((1 - a) * (1 - b), a * (1 - b), (1 - a) * b, a * b), -1)
    certain = (corners > 0).all(-1) & corners.isfinite().all(-1)
    corners = torch.where(certain[:, None], corners, 1.0)
    certain &= corners.amax(-1) <= (1 + DEPTH_TOLERANCE) * corners.amin(-1)
    return 1 / (weights / corners).sum(-1), certain


def pose_errors(camera: Camera, pair: Pair, uv_i: Tensor, uv_j: Tensor) -> tuple[float, float]:
    """
    Return the errors, degrees, of a pair's rotation and of its direction of translation.

    The pose is that of the matches ``uv_i`` and ``uv_j`` (N, 2), px; where there is none, both
    errors are infinite.
    """
    found = relative_pose(
        camera.normalise(uv_i.double()), camera.normalise(uv_j.double()), POSE_THRESHOLD_PX,
        camera.focal,
    )
    if found is None:
        return float('inf'), float('inf')
    estimate, truth = found[0].double().cpu(), pair.T_target_reference
    cosine = (estimate[3:] * truth[3:]).sum().abs() / (estimate[3:].norm() * truth[3:].norm())
    rotation = 2 * torch.acos(cosine.clamp(max=1.0))
    a, b = estimate[:3], truth[:3]
    translation = torch.atan2(torch.linalg.cross(a, b).norm(), (a * b).sum())
    return torch.rad2deg(rotation).item(), torch.rad2deg(translation).item()


def _moved(recording: Recording, reference: int, motion: Tensor) -> bool:
    depth = recording.depth(reference)
    known = depth[(depth > 0) & np.isfinite(depth)] if depth is not None else np.empty(0)
    least = MIN_BASELINE * float(np.median(known)) if len(known) else MIN_BASELINE_M
    return motion[:3].norm().item() >= least
