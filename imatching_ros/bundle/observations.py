"""
From correspondences to observations, and which of them a solved window rests on.

The learner shares this, so that both levels speak of the same observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .compiled import ready
from .solver.adjust import array
from .solver.problem import MIN_DEPTH, Problem, problem
from .window import Window
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences

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
        """Return the observations of a (O,) bool mask or an index."""
        keep = keep.nonzero().squeeze(-1) if keep.dtype == torch.bool else keep
        return Observations(*(column.index_select(0, keep) for column in vars(self).values()))


def observations(
    messages: Sequence[Correspondences], camera: Camera, backend: str = 'eager'
) -> Observations:
    """
    Return every observation that the messages hold.

    A row observes its track in the message's own image, whichever keyframe it was matched against.
    The reference point of a row observes it too where it began the track: where no row of any
    message finds the track in the reference image. (A later reference point only repeats what the
    reference image's own rows say.) Rows that are not finite, or have a covariance that is not
    positive definite, are left out. backend: as in ``AdjustOptions``.
    """
    if not messages:
        empty = torch.zeros(0, dtype=torch.int64)
        return Observations(
            empty, empty, torch.zeros(0, 2).double(), torch.zeros(0, 3).double(), empty, empty
        )
    rows = _rows(messages, camera)
    ref_stamp = torch.cat([message.ref_stamp for message in messages])
    ref_uv = torch.cat([message.ref_uv for message in messages])
    which, begun = _arranged(rows, ref_stamp, ref_uv.isfinite().all(-1), backend)
    observed = rows.select(which)
    first = begun.nonzero().squeeze(-1)
    xy = camera.normalise(ref_uv[which[first]].double())
    cov = camera.undistorted_covariance(xy, xy.new_tensor(QUERY_COV).expand(len(xy), 3))
    observed.xy[first], observed.cov[first], observed.row[first] = xy, cov, -1
    observed.stamp[first] = ref_stamp[which[first]]
    sound = _sound(xy, cov)
    if not bool(sound.all()):
        observed = observed.select(torch.ones_like(begun).index_put_((first,), sound))
    return observed


def own(message: Correspondences, camera: Camera) -> Observations:
    """Return a message's observations of its own image, without the reference points."""
    rows = _rows([message], camera)
    good = _sound(rows.xy, rows.cov).nonzero().squeeze(-1)
    return rows.select(good[torch.argsort(rows.track[good], stable=True)])


def _sound(xy: Tensor, cov: Tensor) -> Tensor:
    uu, uv, vv = cov.unbind(-1)
    return (xy.sum(-1) + cov.sum(-1)).isfinite() & (uu > 0) & (uu * vv - uv * uv > 0)


def _rows(messages: Sequence[Correspondences], camera: Camera) -> Observations:
    """Return what the messages say of their own images, row by row."""
    xy = torch.cat([message.xy for message in messages]).double()
    cov = torch.cat([message.cov for message in messages]).double()
    lengths = torch.tensor([len(message) for message in messages])
    index = torch.arange(len(messages)).repeat_interleave(lengths)
    return Observations(
        torch.tensor([message.stamp for message in messages])[index],
        torch.cat([message.track for message in messages]), xy,
        camera.undistorted_covariance(xy, cov), index,
        torch.arange(len(xy)) - (lengths.cumsum(0) - lengths)[index],
    )


def _arranged(
    rows: Observations, ref_stamp: Tensor, valid: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """
    Return the rows that observe a track, sorted by track, then image, then message and row.

    Also (O,) bool, where it is not the row but its reference point that does. valid: (M,) bool,
    rows with a finite one.
    """
    order = torch.argsort(rows.track, stable=True)
    if tracks := ready('tracks', backend):
        columns = order, rows.track, rows.stamp, ref_stamp, rows.xy, rows.cov, valid
        found = tracks.arranged(*map(array, columns))
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])
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
    good = _sound(rows.xy, rows.cov).nonzero().squeeze(-1)
    which = torch.cat((good, first))
    order = torch.argsort(torch.cat((rows.stamp[good], ref_stamp[first])), stable=True)
    order = order[torch.argsort(rows.track[which[order]], stable=True)]
    return which[order], order >= len(good)


def select(message: Correspondences, rows: Tensor) -> Correspondences:
    """
    Return some rows of the correspondences of an image.

    ``rows``: a bool mask (M,) or an index.
    """
    columns = ('uv', 'xy', 'ref_stamp', 'ref_uv', 'track', 'score', 'cov')
    return replace(message, **{name: getattr(message, name)[rows] for name in columns})


def index_of(ids: Tensor, values: Tensor) -> Tensor:
    """Return where each of ``values`` stands in the ascending ``ids``; -1 where it does not."""
    if len(ids) == 0:
        return torch.full_like(values, -1)
    place = torch.searchsorted(ids, values).clamp_max(len(ids) - 1)
    return torch.where(ids[place] == values, place, -1)


def pose_problem(
    observed: Observations, stamps: Tensor, T_world_camera: Tensor, track: Tensor, points: Tensor,
    camera: Camera,
) -> tuple[Observations, Problem]:
    """
    Return the observations of these keyframes and tracks, and the problem that they pose.

    stamps: (K,) and track: (L,), both ascending. The rows of the two results correspond.
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
    Return the observations that the window's solution rests on, and the problem that they pose.

    The rows of the two correspond. ``messages`` of the window's keyframes (others do no harm). An
    observation survives if its landmark is in the window and reprojects in front of the camera
    less than ``prune_px`` undistorted pixels away. At the window's poses and points the problem's
    cost, the window's prior included, is stationary (paper, equation 7).
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

    Their residual is less than ``prune_px`` and the landmark in front of the camera.
    """
    residual, depth = posed.residual()
    return (residual.norm(dim=-1) < prune_px) & (depth > MIN_DEPTH)
