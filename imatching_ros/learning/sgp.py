"""
Self-supervision without bundle adjustment, to compare with: SGP with a student after CAPS.

SGP (Yang et al., Self-supervised Geometric Perception, CVPR 2021) alternates a teacher, RANSAC,
which finds the relative pose of an image pair from the matches of the weights of now, with a
student, the network, which trains on these poses as if they were true. The student's loss is the
one of CAPS (Wang et al., Learning Feature Descriptors using Camera Pose Supervision, ECCV 2020):
distance from the epipolar line and from where a match, matched back, began; each point counts by
its certainty, and no gradient passes through that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .lesson import encode, Lesson, match, Pair
from ..geometry import lie
from ..geometry.camera import Camera
from ..geometry.two_view import relative_pose
from ..matching.detector import detect
from ..matching.protocol import Matcher, Matches

CORNERS = 300  # per image
THRESHOLD_PX = 1.0  # epipolar error of the teacher's inliers
INLIERS = 0.3  # of the points: fewer, and the teacher does not believe the pose itself
CYCLE = 0.1  # weight of the cycle loss beside the epipolar one
CYCLE_PX = 20.0  # a point that comes back farther from its start is occluded, or lost


@dataclass(frozen=True)
class Labels:
    """What the teacher says of the pairs of a lesson."""

    corners: dict[int, Tensor]  #: reference's index in the window to its points (N, 2) px
    #: (reference, target) to T_target_reference (7,), translation of length 1
    T: dict[tuple[int, int], Tensor]

    def labelled(self, pairs: list[Pair]) -> list[Pair]:
        """Return those of the pairs that have a pose."""
        return [pair for pair in pairs if (pair.reference, pair.target) in self.T]


@torch.no_grad()
def teach(matcher: Matcher, lesson: Lesson, pairs: list[Pair]) -> Labels:
    """
    Return the teacher's relative poses of the pairs, by RANSAC.

    Pairs whose pose is not to be believed have none.
    """
    corners = {
        i: torch.from_numpy(detect(lesson.images[i][0].numpy(), CORNERS))
        for i in {pair.reference for pair in pairs}
    }
    camera, T = lesson.camera, {}
    for pair, matches in zip(pairs, match(matcher, lesson, pairs, corners), strict=True):
        xy_i = camera.normalise(corners[pair.reference].double())
        xy_j = camera.normalise(matches.uv[0].cpu().double())
        found = relative_pose(xy_i, xy_j, THRESHOLD_PX, camera.focal)
        if found is not None and found[1].double().mean() >= INLIERS:
            T[pair.reference, pair.target] = found[0]
    return Labels(corners, T)


def student_loss(
    matcher: Matcher, lesson: Lesson, labels: Labels, pairs: list[Pair]
) -> tuple[Tensor, int]:
    """
    Return the student's CAPS loss of both stages, summed over points, and the number of points.

    The points are those of the pairs that have a label; the loss is in px, and differentiable.
    """
    pairs = labels.labelled(pairs)
    device = next(matcher.parameters()).device
    features = encode(matcher, lesson, pairs)
    total, rows = torch.zeros((), dtype=torch.float64), 0
    for pair in pairs:
        T = labels.T[pair.reference, pair.target]
        queries = labels.corners[pair.reference].to(device).unsqueeze(0)
        there = matcher.match(features[pair.reference], features[pair.target], queries)
        back = matcher.match(features[pair.target], features[pair.reference], there.uv)
        coarse_back = matcher.match(
            features[pair.target], features[pair.reference], there.coarse_uv
        )
        weight = _certainty(there)
        for uv, home in ((there.uv, back.uv), (there.coarse_uv, coarse_back.coarse_uv)):
            cycle = (home - queries).norm(dim=-1)[0].cpu()
            seen = weight * (cycle.detach() < CYCLE_PX)
            epipolar = epipolar_distance(lesson.camera, T, queries[0].cpu(), uv[0].cpu())
            total = total + (seen * (epipolar + CYCLE * cycle)).sum()
        rows += queries.shape[1]
    return total, rows


def epipolar_distance(camera: Camera, T_j_i: Tensor, uv_i: Tensor, uv_j: Tensor) -> Tensor:
    """
    Return how far (N,) points in image j lie from the epipolar lines of points in image i.

    Both are (N, 2) px; the distance is in undistorted px.
    """
    R, t = lie.matrix(T_j_i).split((3, 1), -1)
    E = torch.linalg.cross(t.expand(3, 3), R, dim=0)
    x_i, x_j = (
        torch.cat((camera.normalise(uv.double()), torch.ones(len(uv), 1, dtype=torch.float64)), -1)
        for uv in (uv_i, uv_j)
    )
    line = x_i @ E.mT
    return (x_j * line).sum(-1).abs() / line[:, :2].norm(dim=-1).clamp_min(1e-9) * camera.focal


def _certainty(matches: Matches) -> Tensor:
    """Return how much each point counts (N,), 1 on average: the more, the surer its match."""
    certainty = matches.cov[0].detach().cpu().diagonal(dim1=-2, dim2=-1).sum(-1).rsqrt()
    return certainty / certainty.mean()
