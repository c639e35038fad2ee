"""An image is tracked: where it is, and how it moves (paper 3.1.2, frame tracking)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .motion import (
    BLIND,
    motion_of,
    MOVING,
    Pair,
    pair_with,
    ROTATION,
    shared,
    stands_still,
    STANDSTILL,
    UNKNOWN,
)
from .observations import index_of, Observations, own, pose_problem, survives, surviving
from .registration import register, Registration
from .solver.adjust import free_parameters
from .solver.covariance import covariance
from .solver.problem import Problem
from .state import Estimate, INITIALISING, LOST, NEW_MAP, State, TRACKING
from ..geometry import lie, two_view
from ..geometry.correspondences import Correspondences

_SPAN = 5  #: images back, to see whether the camera stands still


def track(state: State, message: Correspondences) -> Estimate:
    """Return where the image is and how it moves, without ``window`` and ``earlier``."""
    if state.options.poses == 'external':
        return _follow(state, message)
    found = locate(state, message, _predict(state)) if state.window else None
    T = found[0].T_world_camera if found else None
    motion, turned = _motion(state, message, T)
    if found is not None:
        state.failures, state.last = 0, (state.last[1] if state.last else T, T)
        cov = _covariance(state, message, found[0])
        return Estimate(message.stamp, T, cov, TRACKING, found[1], None, motion)
    if state.window is not None and turned is not None:
        # No landmark in view, but the camera only turned: it is where it was.
        T, cov, inliers = turned
        state.failures, state.last = 0, (T, T)
        return Estimate(message.stamp, T, cov, TRACKING, inliers, None, motion)
    if state.window is not None:
        state.last = None
        # in the dark nothing says that the camera is elsewhere, nor maps it
        state.failures += motion != BLIND
        if state.failures <= state.options.patience:
            return _unposed(message, LOST, motion)
        state.leave_map()
    return _unposed(message, NEW_MAP if state.origin else INITIALISING, motion)


def _unposed(message: Correspondences, status: str, motion: str) -> Estimate:
    """Return what is said of an image without a pose, and why it has none."""
    if motion == BLIND:
        why = 'the image shows too few points of the past keyframes'
    elif status == LOST:
        why = "the image does not agree with the window's landmarks"
    elif motion == STANDSTILL:
        why = 'the camera stands still, which shows no depth'
    elif motion == ROTATION:
        why = 'the camera only turns, which shows no depth'
    else:
        why = 'there are too few keyframes with parallax so far'
    what = {
        LOST: 'Tracking is lost',
        NEW_MAP: 'A new map, with a scale of its own, is about to begin at the last pose',
        INITIALISING: 'There is no map yet',
    }[status]
    return Estimate(message.stamp, None, None, status, 0, None, motion, f'{what}: {why}.')


def _predict(state: State) -> Tensor | None:
    """Return the pose after the newest motion once more; None where that is not known."""
    if state.last is None:
        return None
    before, last = state.last
    return lie.compose(last, lie.compose(lie.inverse(before), last))


def _motion(
    state: State, message: Correspondences, T: Tensor | None
) -> tuple[str, tuple[Tensor, Tensor, int] | None]:
    """
    Return what the correspondences say of the motion.

    Where it is a turn on the spot and the image has no pose T, also the pose, covariance and
    agreeing tracks that follow from a posed keyframe.
    """
    if not state.pending:
        return UNKNOWN, None
    stamps, rows = torch.unique(message.ref_stamp, return_counts=True)
    enough = stamps[rows >= state.options.min_landmarks].tolist()
    if not enough:
        return BLIND, None
    before = list(state.pending.values())[-_SPAN:][0][0]
    since = (
        shared(before, message) if len(before) else pair_with(message, before.stamp, state.camera)
    )
    focal, bound = state.camera.focal, state.options.prune_px
    still = len(since) >= state.options.min_landmarks and stands_still(since, focal)
    if still and T is not None:
        return STANDSTILL, None
    motion, turned = BLIND, None
    for stamp in enough:  # the oldest that it was matched with: there the parallax is largest
        pair = pair_with(message, stamp, state.camera)
        reference = state.trajectory.get(stamp, state.pending.get(stamp, (None, None))[1])
        both = T is not None and reference is not None
        T_j_i = lie.compose(lie.inverse(T), reference) if both else None
        motion, turn = motion_of(
            pair, focal, T_j_i, bound, state.options.min_landmarks, state.options.adjust.backend
        )
        known = reference is not None and state.window is not None
        if motion == ROTATION and T is None and known:
            turned = _turned(state, pair, turn, reference)
        if motion != BLIND:
            break
    if motion == BLIND and T is not None:
        motion = MOVING  # landmarks know better
    return STANDSTILL if still else motion, turned


def _turned(
    state: State, pair: Pair, turn: Tensor, reference: Tensor
) -> tuple[Tensor, Tensor, int]:
    """
    Return the pose after a turn on the spot, its covariance, and how many tracks agree.

    turn: T_j_i (7,) of the pair. reference: pose (7,) of its image i. The position may be off by
    what goes unnoticed as parallax: by ``min_parallax_deg`` seen from the landmarks.
    """
    focal = state.camera.focal
    error = two_view.transfer_error(lie.rotation(turn[3:]), pair.xy_i, pair.xy_j) * focal
    agree = error < state.options.prune_px
    T = lie.compose(reference, lie.inverse(turn))
    distance = float((state.window.points - reference[:3]).norm(dim=-1).median())
    position = (distance * state.options.min_parallax_deg * torch.pi / 180) ** 2
    angle = float(pair.variance[agree].mean()) / focal**2 / max(int(agree.sum()), 1)
    cov = torch.tensor([position] * 3 + [angle] * 3, dtype=torch.float64).diag()
    return T, cov, int(agree.sum())


def locate(
    state: State, message: Correspondences, guess: Tensor | None
) -> tuple[Registration, int] | None:
    """
    Return the image's registration to the window's landmarks, and how many tracks agree.

    guess: T_world_camera (7,), if there is one. Returns None where the registration is not to be
    trusted: another guess may do. Where it is, it is kept for this message and window.
    """
    known = state.placed
    if known is None or known[0] is not message or known[1] is not state.window:
        found = _register(state, message, guess)
        if found is None:
            return None
        state.placed = known = message, state.window, found
    return known[2]


def _register(
    state: State, message: Correspondences, guess: Tensor | None
) -> tuple[Registration, int] | None:
    """Do what ``locate`` does, without a memory."""
    observed, place = _seen(state, message)
    focal = torch.tensor([state.camera.fx, state.camera.fy], dtype=torch.float64)
    tracks = len(torch.unique_consecutive(place))
    if tracks < state.options.min_landmarks:
        return None
    result = register(
        state.window.points[place], observed.xy, observed.cov, focal, guess,
        state.options.adjust, state.options.prune_px,
    )
    if result is None:
        return None
    inliers = len(torch.unique_consecutive(place[result.inliers]))
    if inliers < max(state.options.min_landmarks, 0.25 * tracks):
        return None
    return result, inliers


def _seen(state: State, message: Correspondences) -> tuple[Observations, Tensor]:
    """Return the image's observations of landmarks, and the landmarks' indices, ascending."""
    known = state.sight
    if known is None or known[0] is not message or known[1] is not state.window:
        observed = own(message, state.camera)
        place = index_of(state.window.track, observed.track)
        rows = (place >= 0).nonzero().squeeze(-1)
        state.sight = known = message, state.window, observed.select(rows), place[rows]
    return known[2:]


def rests_on(state: State) -> Problem:
    """Return what the window's solution rests on, put together once for each window."""
    if state.rests is None or state.rests[0] is not state.window:
        messages = [state.messages[stamp] for stamp in state.window.stamps.tolist()]
        state.rests = (
            state.window,
            surviving(state.window, messages, state.camera, state.options.prune_px)[1],
        )
    return state.rests[1]


def _covariance(state: State, message: Correspondences, registered: Registration) -> Tensor:
    """
    Return the covariance (6, 6) of an image's pose, the landmarks' doubt included.

    It is that of the window's problem with one more pose.
    """
    window, posed = state.window, rests_on(state)
    observed, place = _seen(state, message)
    observed, place = observed.select(registered.inliers), place[registered.inliers]
    K = len(window.stamps)
    order = torch.argsort(torch.cat((posed.landmark, place)), stable=True)
    extended = replace(
        posed, T_world_camera=torch.cat((window.T_world_camera, registered.T_world_camera[None])),
        pose=torch.cat((posed.pose, torch.full_like(place, K)))[order],
        landmark=torch.cat((posed.landmark, place))[order],
        xy=torch.cat((posed.xy, observed.xy))[order],
        cov=torch.cat((posed.cov, observed.cov))[order],
    )
    # The window's own gauge: never a component of this pose, of which nothing would then be
    # unknown.
    fixed = torch.ones((K + 1) * 6, dtype=torch.bool)
    fixed[free_parameters(window.T_world_camera, None)] = False
    fixed = fixed.view(-1, 6)
    fixed[K] = False
    adjust = state.options.adjust
    found = covariance(extended, adjust.kernel, fixed, adjust.backend)[K]
    return (found + found.mT) / 2


def _follow(state: State, message: Correspondences) -> Estimate:
    """Return the image at the pose where another odometry says that it is."""
    found = state.odometry.at(message.stamp)
    T = found[0] if found else None
    motion, _ = _motion(state, message, T)
    if found is None:
        status = LOST if state.window else INITIALISING
        why = f'the odometry has no pose within reach of {message.stamp} ns'
        return Estimate(
            message.stamp, None, None, status, 0, None, motion,
            f'The image is left out: {why}.',
        )
    if state.window is None:
        return replace(
            _unposed(message, INITIALISING, motion), T_world_camera=T, covariance=found[1]
        )
    observed, _ = _seen(state, message)
    _, posed = pose_problem(
        observed, torch.tensor([message.stamp]), T[None], state.window.track,
        state.window.points, state.camera,
    )
    inliers = len(torch.unique(posed.landmark[survives(posed, state.options.prune_px)]))
    return Estimate(message.stamp, T, found[1], TRACKING, inliers, None, motion)
