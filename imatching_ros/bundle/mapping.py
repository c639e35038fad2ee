"""A map begins, begins anew, and takes in every window that is solved."""

from __future__ import annotations

import torch
from torch import Tensor

from .initialise import initialise
from .observations import index_of
from .state import State
from .tracking import locate
from .window import Window
from ..geometry import lie

_GENTLY = 0.1  #: share of a disagreement in scale with the odometry that a keyframe takes away


def begin(state: State) -> Window | None:
    """Begin a map of the keyframes that wait for one, at the last pose; None if that fails."""
    found = initialise(state.waiting(), state.camera, state.options)
    if found is None:
        return None
    if state.origin:
        T, scale = state.origin
        found = found.enlarged(scale, found.T_world_camera[0, :3]).moved(T)
    state.maps, state.origin = state.maps + 1, None
    return take(state, found)


def recover(state: State) -> Window | None:
    """
    Begin afresh where the newest keyframe fits nowhere, but in the same world.

    The fresh window is of the last posed keyframes and the waiting ones, and is joined to the old
    one at a keyframe and the landmarks that both hold. Returns None where that fails.
    """
    stamps = state.window.stamps.tolist()[-3:]
    waiting = state.waiting()
    found = initialise(
        [state.messages[stamp] for stamp in stamps] + waiting, state.camera, state.options
    )
    if found is None or not waiting or int(found.stamps[-1]) != waiting[-1].stamp:
        return None  # a map without the newest keyframe is less than what there is
    both = [stamp for stamp in stamps if stamp in found.stamps.tolist()]
    common = index_of(state.window.track, found.track)
    if not both or int((common >= 0).sum()) < state.options.min_landmarks:
        return None
    T_world = state.window.T_world_camera[state.window.stamps.tolist().index(both[-1])]
    T_found = found.T_world_camera[found.stamps.tolist().index(both[-1])]
    scale = (state.window.points[common[common >= 0]] - T_world[:3]).norm(dim=-1) / (
        found.points[common >= 0] - T_found[:3]
    ).norm(dim=-1)
    scale = float(scale.median())
    found = found.enlarged(scale, T_found[:3])
    return take(state, found.moved(lie.compose(T_world, lie.inverse(T_found))))


def take(state: State, window: Window) -> Window:
    """
    Make a solved window the newest, and return it in the world's scale.

    Images without a pose get theirs where it can give one.
    """
    state.window, state.failures = window, 0
    if window.prior is None:
        state.gone = state.gone[:0]
    if state.options.poses == 'own':
        _scale_to_odometry(state)
        window = state.window
    state.trajectory.update(zip(window.stamps.tolist(), window.T_world_camera, strict=True))
    for stamp, (message, T) in state.pending.items():
        if T is None:
            known = state.odometry.at(stamp) if state.options.poses == 'external' else None
            T = known[0] if known else state.trajectory.get(stamp)
            if T is None and (found := locate(state, message, None)):
                T = found[0].T_world_camera
            if T is not None:
                state.pending[stamp] = message, T
                state.earlier[stamp] = T
                if stamp in state.messages:
                    state.trajectory[stamp] = T
    keep = set(window.stamps.tolist()) | {message.stamp for message in state.waiting()}
    state.messages = {stamp: each for stamp, each in state.messages.items() if stamp in keep}
    return window


def _scale_to_odometry(state: State) -> None:
    """
    Put the map into metres, where the odometry tells them.

    This is done once for all poses, about the world's origin, as soon as it does; then a little
    with each keyframe, about the newest one, so that no pose jumps.
    """
    window = state.window
    scale = state.odometry.scale_of(window.stamps.tolist(), window.T_world_camera[:, :3])
    if scale is None:
        return
    if state.metric:
        scale = scale**_GENTLY
        state.window = window.enlarged(scale, window.T_world_camera[-1, :3])
        return
    state.metric = True

    def larger(T: Tensor | None) -> Tensor | None:
        return None if T is None else torch.cat((T[:3] * scale, T[3:]))

    state.window = window.enlarged(scale, torch.zeros(3, dtype=torch.float64))
    state.trajectory = {stamp: larger(T) for stamp, T in state.trajectory.items()}
    state.pending = {stamp: (each, larger(T)) for stamp, (each, T) in state.pending.items()}
    state.last = state.last and (larger(state.last[0]), larger(state.last[1]))
