"""
The lower level online.

Correspondences come in, the motion of every image and a solved window per keyframe come out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .keyframe import add_keyframe
from .options import BundleOptions
from .solver.adjust import compiled
from .state import Estimate, INITIALISING, LOST, NEW_MAP, State, TRACKING
from .tracking import track
from .window import Window
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences

__all__ = ['Bundle', 'Estimate', 'INITIALISING', 'LOST', 'NEW_MAP', 'TRACKING']

_PENDING = 128  #: images that may yet be named as a keyframe, or get a pose later


class Bundle:
    """
    Poses every image against a window of keyframes that it solves.

    ``add`` once per message, in the order of the stamps.
    """

    def __init__(self, camera: Camera, options: BundleOptions | None = None) -> None:
        self.state = State(camera, options or BundleOptions())
        if self.options.adjust.backend != 'eager':
            compiled()  # now, not when the first keyframe waits for it

    @property
    def camera(self) -> Camera:
        """Return the camera of the newest images."""
        return self.state.camera

    @property
    def options(self) -> BundleOptions:
        """Return what was set."""
        return self.state.options

    @property
    def window(self) -> Window | None:
        """Return the newest solution."""
        return self.state.window

    @property
    def trajectory(self) -> dict[int, Tensor]:
        """Return stamp to T_world_camera (7,) of every keyframe that got a pose."""
        return self.state.trajectory

    @property
    def keyframes(self) -> int:
        """Return how many keyframes there have been, with or without a pose."""
        return self.state.keyframes

    @property
    def maps(self) -> int:
        """Return how many maps have been begun."""
        return self.state.maps

    @property
    def metric(self) -> bool:
        """Return whether the world's unit is the odometry's metre."""
        return self.state.metric

    def reset(self) -> None:
        """Forget everything but the camera and the options."""
        self.state = State(self.camera, self.options)

    def recalibrate(self, camera: Camera) -> None:
        """
        Go on with a camera that was focused anew; with another one a new map begins.

        It begins at the newest pose, and what was solved before stays in ``trajectory``.
        """
        state = self.state
        if not camera.goes_on_from(state.camera):
            if state.window is not None:
                state.leave_map()
            state.metric = state.options.poses == 'external'
            for images in (state.messages, state.pending, state.motions, state.named):
                images.clear()
            state.last = None
        state.camera = camera

    def add_odometry(
        self, stamp: int, T_world_camera: Tensor, covariance: Tensor | None = None
    ) -> None:
        """
        Add the pose (7,) of the camera at ``stamp`` ns in another odometry's frame, in metres.

        They may come at any rate. With ``options.poses`` "own" the odometry gives the map its
        scale and nothing else; with "external" it gives the poses, and ``covariance`` (6, 6) is
        theirs. Raises ValueError, one sentence, where it is not a pose, or not newer than the one
        before.
        """
        self.state.odometry.add(stamp, T_world_camera, covariance)

    def add(self, message: Correspondences) -> Estimate:
        """
        Pose the message's image; solve the window first where the message names a new keyframe.

        Raises ValueError where the stamp is not newer than the message's before: reset first when
        time goes back.
        """
        state = self.state
        if state.pending and message.stamp <= next(reversed(state.pending)):
            raise ValueError(
                f'the correspondences of {message.stamp} ns are not newer than the last ones; '
                'reset the bundle when time goes back'
            )
        window, state.earlier = None, {}
        for stamp in torch.unique(message.ref_stamp).tolist():
            if stamp in state.pending and stamp not in state.named:
                window = add_keyframe(state, stamp) or window
        estimate = track(state, message)
        state.pending[message.stamp] = message, estimate.T_world_camera
        state.motions[message.stamp] = estimate.motion
        while len(state.pending) > _PENDING:
            oldest = next(iter(state.pending))
            del state.pending[oldest], state.motions[oldest]
        return replace(estimate, window=window, earlier=state.earlier)
