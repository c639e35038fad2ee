"""The lower level online: correspondences in, the motion of every image and a solved window per keyframe out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from imatching_ros.bundle.adjust import compiled
from imatching_ros.bundle.initialise import initialise
from imatching_ros.bundle.observations import index_of, observations
from imatching_ros.bundle.options import BundleOptions
from imatching_ros.bundle.registration import Registration, register
from imatching_ros.bundle.solve import solve
from imatching_ros.bundle.window import Window
from imatching_ros.geometry import lie
from imatching_ros.geometry.camera import Camera
from imatching_ros.geometry.correspondences import Correspondences

#: What ``Estimate.status`` may be.
INITIALISING = "initialising"  #: no map yet: too few keyframes, or too little parallax among them
TRACKING = "tracking"  #: the image is posed against the window's landmarks
LOST = "lost"  #: the image does not agree with the window's landmarks; every next one tries again
NEW_MAP = "new map"  #: lost for too long: a map begins again at the last pose, with a scale of its own

#: What ``Estimate.motion`` may be: what the image's correspondences say of the camera's motion.
MOVING = "moving"
STANDSTILL = "standstill"
ROTATION = "rotation only"  #: turning on the spot: nothing new can be triangulated
BLIND = "blind"  #: too few correspondences: a covered lens, a blank wall, the dark
UNKNOWN = "unknown"  #: nothing to compare with yet

_PENDING = 64  #: images that may yet be named as a keyframe
_ODOMETRY = 4000  #: poses of the other odometry that are remembered
_WAITING = 20  #: keyframes that wait for a pose, or for a map


@dataclass(frozen=True)
class Estimate:
    """What one message's image has to say."""

    stamp: int  #: ns
    T_world_camera: Tensor | None  #: (7,) float64
    covariance: Tensor | None  #: (6, 6) float64, as ``lie.retract``, landmarks taken as exact
    status: str  #: INITIALISING, TRACKING, LOST or NEW_MAP
    inliers: int  #: tracks of the image that agree with a landmark
    window: Window | None  #: set where the message named a new keyframe and the window was solved with it
    motion: str = UNKNOWN  #: MOVING, STANDSTILL, ROTATION, BLIND or UNKNOWN
    reason: str = ""  #: one sentence where the status is not TRACKING
    earlier: dict[int, Tensor] = field(default_factory=dict)  #: poses (7,) of earlier stamps that are only now known


class Bundle:
    """Keyframe window, tracking and mapping. ``add`` once per message, in the order of the stamps."""

    def __init__(self, camera: Camera, options: BundleOptions | None = None) -> None:
        self.camera, self.options = camera, options or BundleOptions()
        if self.options.adjust.backend != "eager":
            compiled()  # now, not when the first keyframe waits for it
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.window: Window | None = None  #: the newest solution
        self.trajectory: dict[int, Tensor] = {}  #: stamp to T_world_camera (7,) of every keyframe that got a pose
        self.keyframes = 0  #: how many keyframes there have been, with or without a pose
        self.maps = 0  #: how many maps have been begun
        self.metric = False  #: the world's unit is the odometry's metre
        self._messages: dict[int, Correspondences] = {}  # of the keyframes in the window, or waiting for a pose
        self._pending: dict[int, tuple[Correspondences, Tensor | None]] = {}
        self._named: set[int] = set()
        self._last: tuple[Tensor, Tensor] | None = None  # the poses of the two newest images
        self._failures = 0
        self._odometry: deque[tuple[int, Tensor]] = deque(maxlen=_ODOMETRY)
        self._origin: tuple[Tensor, float] | None = None  # where, and how large, the next map begins

    def add_odometry(self, stamp: int, T_world_camera: Tensor, covariance: Tensor | None = None) -> None:
        """A pose (7,) of the camera in the frame of another odometry, metres, at ``stamp`` ns.

        Raises ValueError, one sentence, where it is not finite or not newer than the one before.
        """
        if self._odometry and stamp <= self._odometry[-1][0]:
            raise ValueError(f"the odometry of {stamp} ns is not newer than the last one; reset when time goes back")
        if T_world_camera.shape != (7,) or not T_world_camera.isfinite().all():
            raise ValueError(f"the odometry's pose of {stamp} ns is not seven finite numbers")
        self._odometry.append((stamp, T_world_camera.double()))

    def add(self, message: Correspondences) -> Estimate:
        """Pose the message's image; solve the window first where the message names a new keyframe.

        Raises ValueError where the stamp is not newer than the message's before: reset first when time goes back.
        """
        if self._pending and message.stamp <= next(reversed(self._pending)):
            raise ValueError(
                f"the correspondences of {message.stamp} ns are not newer than the last ones; "
                "reset the bundle when time goes back"
            )
        window = None
        for stamp in torch.unique(message.ref_stamp).tolist():
            if stamp in self._pending and stamp not in self._named:
                window = self._keyframe(stamp) or window
        estimate = self._track(message, window)
        self._pending[message.stamp] = message, estimate.T_world_camera
        while len(self._pending) > _PENDING:
            del self._pending[next(iter(self._pending))]
        return estimate

    def _track(self, message: Correspondences, window: Window | None) -> Estimate:
        if self.window is None:
            status = NEW_MAP if self._origin else INITIALISING
            return Estimate(message.stamp, None, None, status, 0, window)
        found = self._register(message, self._predict())
        if found is None:
            self._last, self._failures = None, self._failures + 1
            if self._failures > self.options.patience:
                self._begin_again()
            return Estimate(message.stamp, None, None, LOST, 0, window)
        registration, inliers = found
        T = registration.T_world_camera
        self._failures, self._last = 0, (self._last[1] if self._last else T, T)
        return Estimate(message.stamp, T, registration.covariance, TRACKING, inliers, window)

    def _predict(self) -> Tensor | None:
        """Constant velocity: the newest motion once more."""
        if self._last is None:
            return None
        before, last = self._last
        return lie.compose(last, lie.compose(lie.inverse(before), last))

    def _register(self, message: Correspondences, guess: Tensor | None) -> tuple[Registration, int] | None:
        """The image against the window's landmarks, and how many tracks agree; None where it is not to be trusted."""
        observed = observations([message], self.camera)
        observed = observed.select(observed.stamp == message.stamp)
        place = index_of(self.window.track, observed.track)
        observed, place = observed.select(place >= 0), place[place >= 0]
        tracks = len(torch.unique(place))
        if tracks < self.options.min_landmarks:
            return None
        focal = torch.tensor([self.camera.fx, self.camera.fy], dtype=torch.float64)
        result = register(
            self.window.points[place], observed.xy, observed.cov, focal, guess,
            self.options.adjust.kernel, self.options.prune_px,
        )  # fmt: skip
        if result is None:
            return None
        inliers = len(torch.unique(place[result.inliers]))
        if inliers < max(self.options.min_landmarks, 0.25 * tracks):
            return None
        return result, inliers

    def _keyframe(self, stamp: int) -> Window | None:
        """Take the image into the window, or into what waits for a pose, and solve."""
        message, T = self._pending[stamp]
        self._named = {named for named in self._named if named in self._pending} | {stamp}
        self._messages[stamp] = message
        self.keyframes += 1
        if self.window is None:
            return self._initialise()
        if T is None and (found := self._register(message, None)):
            T = found[0].T_world_camera
        solved = T is not None and self._extend(message, T)
        return solved or self._recover()

    def _waiting(self) -> list[Correspondences]:
        """Keyframes without a pose, oldest first."""
        return [m for stamp, m in self._messages.items() if stamp not in self.trajectory][-_WAITING:]

    def _extend(self, message: Correspondences, T: Tensor) -> Window | None:
        """The window with one more keyframe; the oldest leaves."""
        kept = self.window.stamps.tolist()[-(self.options.keyframes - 1) :]
        poses = torch.cat((self.window.T_world_camera[-len(kept) :], T[None]))
        messages = [self._messages[stamp] for stamp in kept] + [message]
        solved = solve(messages, poses, self.window.track, self.window.points, self.camera, self.options)
        return solved and self._take(solved[0])

    def _recover(self) -> Window | None:
        """The newest keyframe fits nowhere: a fresh map of the last posed and the waiting ones, joined to this one."""
        shared = self.window.stamps.tolist()[-3:]
        found = initialise(
            [self._messages[stamp] for stamp in shared] + self._waiting(), self.camera, self.options
        )
        if found is None:
            return None
        both = [stamp for stamp in shared if stamp in found.stamps.tolist()]
        common = index_of(self.window.track, found.track)
        if not both or int((common >= 0).sum()) < self.options.min_landmarks:
            return None
        T_world = self.window.T_world_camera[self.window.stamps.tolist().index(both[-1])]
        T_found = found.T_world_camera[found.stamps.tolist().index(both[-1])]
        scale = (self.window.points[common[common >= 0]] - T_world[:3]).norm(dim=-1) / (
            found.points[common >= 0] - T_found[:3]
        ).norm(dim=-1)
        scale = float(scale.median())
        T_found = torch.cat((T_found[:3] * scale, T_found[3:]))
        return self._take(_placed(found, lie.compose(T_world, lie.inverse(T_found)), scale))

    def _initialise(self) -> Window | None:
        found = initialise(self._waiting(), self.camera, self.options)
        if found is None:
            return None
        if self._origin:
            found = _placed(found, *self._origin)
        self.maps, self._origin = self.maps + 1, None
        return self._take(found)

    def _take(self, window: Window) -> Window:
        """The window is solved: keep its poses, and give the waiting keyframes theirs where it can."""
        self.window, self._failures = window, 0
        self.trajectory.update(zip(window.stamps.tolist(), window.T_world_camera, strict=True))
        for message in self._waiting():
            if found := self._register(message, None):
                self.trajectory[message.stamp] = found[0].T_world_camera
        keep = set(window.stamps.tolist()) | {message.stamp for message in self._waiting()}
        self._messages = {stamp: message for stamp, message in self._messages.items() if stamp in keep}
        return window

    def _begin_again(self) -> None:
        """Leave the map behind; the next one begins where this one ended, about as large."""
        distance = (self.window.points - self.window.T_world_camera[-1, :3]).norm(dim=-1).median()
        self._origin = self.window.T_world_camera[-1], float(distance)
        self._messages = {message.stamp: message for message in self._waiting()}
        self.window, self._failures = None, 0


def _placed(window: Window, T: Tensor, scale: float) -> Window:
    """The window enlarged by ``scale`` and then moved by T."""
    poses = torch.cat((window.T_world_camera[:, :3] * scale, window.T_world_camera[:, 3:]), -1)
    points = lie.act(T, window.points * scale)
    return replace(window, T_world_camera=lie.compose(T, poses), points=points)
