"""
From correspondences to observations, and which of them a solved window rests on.

Shared with the learner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from imatching_ros.bundle.problem import MIN_DEPTH, Problem, problem
from imatching_ros.bundle.window import Window
from imatching_ros.geometry.camera import Camera
from imatching_ros.geometry.correspondences import Correspondences
import torch
from torch import Tensor

#: Covariance (uu, uv, vv), px^2, of the detected point that begins a track.
QUERY_COV = (0.25, 0.0, 0.25)


@dataclass(frozen=True)
class Observations:
    """O observations, sorted by track, then image, then the message and row they come from."""

    stamp: Tensor  #: (O,) int64 ns, the image
    track: Tensor  #: (O,) int64
    xy: Tensor  #: (O, 2) float64, undistorted, on the plane z = 1
    cov: Tensor  #: (O, 3) float64, uu uv vv, undistorted px^2
    message: Tensor  #: (O,) int64, which of the given messages says so
    row: Tensor  #: (O,) int64, its row; -1 for the reference point that began the track

    def __len__(self) -> int:
        return len(self.track)

    def select(self, keep: Tensor) -> Observations:
        """Those of a (O,) bool mask or an index."""
        return Observations(*(getattr(self, field.name)[keep] for field in fields(self)))


def observations(messages: Sequence[Correspondences], camera: Camera) -> Observations:
    """
    Every observation that the messages hold.

    A row observes its track in the message's own image, whichever keyframe it was matched against.
    The reference point of a row observes it too where it began the track: where no row of any
    message finds the track in the reference image. (A later reference point only repeats what the
    reference image's own rows say.) Rows that are not finite, or have a covariance that is not
    positive definite, are left out.
    """
    parts = [_rows(index, message, camera) for index, message in enumerate(messages)]
    if not parts:
        empty = torch.zeros(0, dtype=torch.int64)
        return Observations(
            empty, empty, torch.zeros(0, 2).double(), torch.zeros(0, 3).double(), empty, empty
        )
    rows = Observations(
        *(
            torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(Observations)
        )
    )
    begun = _begun(messages, rows, camera)
    both = Observations(
        *(
            torch.cat((getattr(rows, field.name), getattr(begun, field.name)))
            for field in fields(Observations)
        )
    )
    return both.select(_order(both, (both.stamp, both.track)))


def own(message: Correspondences, camera: Camera) -> Observations:
    """
    Return what a message says of its own image.

    Its observations without the reference points.
    """
    rows = _rows(0, message, camera)
    return rows.select(_order(rows, (rows.track,)))


def _order(rows: Observations, keys: tuple[Tensor, ...]) -> Tensor:
    """
    Return the good ones' indices, sorted by the last key first.

    Equal ones stay in order, which is that of the messages.
    """
    uu, uv, vv = rows.cov.unbind(-1)
    good = (rows.xy.sum(-1) + rows.cov.sum(-1)).isfinite() & (uu > 0) & (uu * vv - uv * uv > 0)
    order = good.nonzero().squeeze(-1)
    for key in keys:
        order = order[torch.argsort(key[order], stable=True)]
    return order


def _rows(index: int, message: Correspondences, camera: Camera) -> Observations:
    n = len(message)
    xy = message.xy.double()
    return Observations(
        torch.full((n,), message.stamp, dtype=torch.int64), message.track, xy,
        camera.undistorted_covariance(xy, message.cov.double()),
        torch.full((n,), index, dtype=torch.int64), torch.arange(n),
    )  # fmt: skip


def _begun(
    messages: Sequence[Correspondences], rows: Observations, camera: Camera
) -> Observations:
    """Return the reference points that began their tracks, each once."""
    ref_stamp = torch.cat([message.ref_stamp for message in messages])
    ref_uv = torch.cat([message.ref_uv for message in messages])
    valid = ref_uv.isfinite().all(-1)
    # Image and track as one number (unique over pairs is a hundred times slower than over
    # numbers).
    _, image = torch.unique(torch.cat((rows.stamp, ref_stamp)), return_inverse=True)
    tracks, track = torch.unique(rows.track, return_inverse=True)
    _, label = torch.unique(image * len(tracks) + torch.cat((track, track)), return_inverse=True)
    seen, asked = label[:len(rows)], label[len(rows):]
    first = torch.full((int(label.max()) + 1 if len(label) else 0,), len(rows), dtype=torch.int64)
    position = torch.where(valid, torch.arange(len(rows)), len(rows))
    first.scatter_reduce_(0, asked, position, 'amin')
    first[seen] = len(rows)
    first = first[first < len(rows)]
    n = len(first)
    xy = camera.normalise(ref_uv[first].double())
    return Observations(
        ref_stamp[first], rows.track[first], xy,
        camera.undistorted_covariance(xy, xy.new_tensor(QUERY_COV).expand(n, 3)),
        rows.message[first], torch.full((n,), -1, dtype=torch.int64),
    )  # fmt: skip


def select(message: Correspondences, rows: Tensor) -> Correspondences:
    """
    Return some rows of the correspondences of an image.

    ``rows``: a bool mask (M,) or an index.
    """
    columns = ('uv', 'xy', 'ref_stamp', 'ref_uv', 'track', 'score', 'cov')
    return replace(message, **{name: getattr(message, name)[rows] for name in columns})


def index_of(ids: Tensor, values: Tensor) -> Tensor:
    """Where each of ``values`` stands in the ascending ``ids``; -1 where it does not."""
    if len(ids) == 0:
        return torch.full_like(values, -1)
    place = torch.searchsorted(ids, values).clamp_max(len(ids) - 1)
    return torch.where(ids[place] == values, place, -1)


def pose_problem(
    observed: Observations, stamps: Tensor, T_world_camera: Tensor, track: Tensor, points: Tensor,
    camera: Camera,
) -> tuple[Observations, Problem]:
    """
    Return the observations of these keyframes and tracks (both ascending).

    And, row by row, the problem that they pose.
    """
    pose, landmark = index_of(stamps, observed.stamp), index_of(track, observed.track)
    used = (pose >= 0) & (landmark >= 0)
    observed = observed.select(used)
    focal = torch.tensor([camera.fx, camera.fy], dtype=torch.float64)
    posed = problem(
        T_world_camera, points, pose[used], landmark[used], observed.xy, observed.cov, focal
    )
    return observed, posed


def surviving(
    window: Window, messages: Sequence[Correspondences], camera: Camera, prune_px: float
) -> tuple[Observations, Problem]:
    """
    Return the observations that the window's solution rests on.

    And, row by row, the objective over them.

    ``messages`` of the window's keyframes (others do no harm). An observation survives if its
    landmark is in the window and reprojects in front of the camera less than ``prune_px``
    undistorted pixels away. At the window's poses and points the problem's cost, the window's
    prior included, is stationary (paper, equation 7).
    """
    ours = [message for message in messages if bool((window.stamps == message.stamp).any())]
    places = torch.tensor(
        [i for i, m in enumerate(messages) if bool((window.stamps == m.stamp).any())]
    )
    observed = observations(ours, camera)
    observed, posed = pose_problem(
        observed, window.stamps, window.T_world_camera, window.track, window.points, camera
    )
    if window.prior is not None:
        posed = replace(posed, prior=window.prior.on(window.stamps))
    keep = survives(posed, prune_px)
    observed = observed.select(keep)
    if len(observed):
        observed = Observations(**{**vars(observed), 'message': places[observed.message]})
    return observed, posed.select(keep)


def survives(posed: Problem, prune_px: float) -> Tensor:
    """
    Return (O,) bool, which observations are good.

    The residual is less than ``prune_px`` and the landmark in front of the camera.
    """
    residual, depth = posed.residual()
    return (residual.norm(dim=-1) < prune_px) & (depth > MIN_DEPTH)
