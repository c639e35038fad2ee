"""A keyframe is added: the window goes on, or a map begins (paper 3.1.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .mapping import begin, recover, take
from .motion import BLIND, ROTATION, STANDSTILL
from .prior import left_behind, Prior
from .solve import solve
from .state import State
from .tracking import locate, rests_on
from .window import Window
from ..geometry.correspondences import Correspondences

_KNOWN = 3.0  #: times ``min_parallax_deg``: the parallax of landmarks that the prior is made of


def add_keyframe(state: State, stamp: int) -> Window | None:
    """
    Make a pending image a keyframe of the window, or of what waits for a pose, and solve.

    Returns the solved window, or None where there is none with it.
    """
    message, T = state.pending[stamp]
    state.named = {named for named in state.named if named in state.pending} | {stamp}
    state.keyframes += 1
    if state.motions[stamp] == BLIND:
        return None
    state.messages[stamp] = message
    if state.options.poses == 'external':
        return _map_from_odometry(state)
    if state.window is None:
        return begin(state)
    found = locate(state, message, T)
    # posed by its turn alone: it has nothing to add to the window
    if found is None and T is not None:
        state.trajectory[stamp] = T
        return None
    solved = found and _extend(state, message, found[0].T_world_camera)
    return solved or recover(state)


def _extend(state: State, message: Correspondences, T: Tensor) -> Window | None:
    """
    Return the window solved with one more keyframe, whose pose T (7,) is about known.

    The oldest leaves; but the newest before, where that one only turned: turning on the spot must
    not push out the keyframes that show depth.
    """
    window, size = state.window, len(state.window.stamps)
    leaves = torch.zeros(size, dtype=torch.bool)
    leaves[-1] = size > 2 and _only_turned(state, *window.stamps.tolist()[-2:])
    leaves[:max(0, size - int(leaves.sum()) - (state.options.keyframes - 1))] = True
    prior, gone = _leave(state, leaves, message)
    poses = torch.cat((window.T_world_camera[~leaves], T[None]))
    messages = [*(state.messages[stamp] for stamp in window.stamps[~leaves].tolist()), message]
    gone = gone[torch.isin(gone, torch.cat([m.track for m in messages]))]
    solved = solve(
        messages, poses, window.track, window.points, state.camera, state.options, prior, gone
    )
    if solved is None:
        return None
    state.gone, state.rests = gone, (solved[0], solved[2])
    return take(state, solved[0])


def _leave(state: State, leaves: Tensor, message: Correspondences) -> tuple[Prior | None, Tensor]:
    """
    Return what leaving keyframes ((K,) bool) know of those that stay, and the tracks used for it.

    Landmarks that a leaving keyframe sees leave with it where their tracks have ended (the new
    image does not see them), two that stay see them too, and the parallax is large enough for a
    linear account of them. All their observations are in the prior: while one of these keyframes
    is in the window, they must not come back.
    """
    window = state.window
    if not leaves.any():
        return window.prior, state.gone
    posed = rests_on(state)
    seen = torch.zeros(len(window.track), len(window.stamps), dtype=torch.bool)
    seen[posed.landmark, posed.pose] = True
    offset = window.points[:, None] - window.T_world_camera[:, :3]
    ray = torch.nn.functional.normalize(offset, dim=-1)
    both = seen[:, :, None] & seen[:, None]
    widest = torch.where(both, ray @ ray.mT, 1.0).flatten(1).amin(1)
    known = widest < math.cos(math.radians(_KNOWN * state.options.min_parallax_deg))
    gone = seen[:, leaves].any(-1) & (seen[:, ~leaves].sum(-1) >= 2) & known
    gone &= ~torch.isin(window.track, message.track)
    if leaves[-1]:
        gone[:] = False  # it only turned: what it knows of landmarks, others know
    prior = left_behind(posed, state.options.adjust.kernel, window.stamps, leaves, gone)
    return prior, torch.cat((state.gone, window.track[gone]))


def _only_turned(state: State, before: int, stamp: int) -> bool:
    """
    Return whether a posed keyframe without parallax is hardly elsewhere than the one before.

    It moved without parallax where motion.py says so, and is hardly elsewhere where half of the
    landmarks see less than half of ``min_parallax_deg`` between the two.
    """
    if state.motions.get(stamp) not in (ROTATION, STANDSTILL) or state.window is None:
        return False
    a, b = (state.window.points - state.trajectory[k][:3] for k in (before, stamp))
    angle = torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))
    return float(angle.median().rad2deg()) < 0.5 * state.options.min_parallax_deg


def _map_from_odometry(state: State) -> Window | None:
    """Return the window of the newest keyframes that the odometry has poses of."""
    poses = {stamp: found[0] for stamp in state.messages if (found := state.odometry.at(stamp))}
    state.trajectory.update(poses)
    stamps = sorted(poses)
    if len(stamps) > 3 and _only_turned(state, *stamps[-3:-1]):
        del stamps[-2]
    stamps = stamps[-state.options.keyframes:]
    state.messages = {stamp: state.messages[stamp] for stamp in stamps}
    if len(stamps) < 2:
        return None
    known = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.float64)
    if state.window:
        known = state.window.track, state.window.points
    solved = solve(
        list(state.messages.values()), torch.stack([poses[s] for s in stamps]), *known,
        state.camera, state.options,
    )
    if solved is None:
        return None
    state.maps = max(state.maps, 1)
    return take(state, solved[0])
