"""What the bundle knows, and what it says of an image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .motion import UNKNOWN
from .observations import Observations
from .odometry import ExternalOdometry
from .options import BundleOptions
from .registration import Registration
from .solver.problem import Problem
from .window import Window
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences

#: What ``Estimate.status`` may be.
INITIALISING = 'initialising'  #: no map yet: too few keyframes, or too little parallax among them
TRACKING = 'tracking'  #: the image is posed
LOST = 'lost'  #: the image does not agree with the window's landmarks; every next one tries again
#: lost for too long: a map begins again at the last pose, with a scale of its own
NEW_MAP = 'new map'

_WAITING = 20  #: keyframes that wait for a pose, or for a map


@dataclass(frozen=True)
class Estimate:
    """What the bundle says of one message's image."""

    stamp: int  #: ns
    T_world_camera: Tensor | None  #: (7,) float64
    #: (6, 6) float64, as ``lie.retract``, in the gauge of the window's oldest keyframe
    covariance: Tensor | None
    status: str  #: INITIALISING, TRACKING, LOST or NEW_MAP
    inliers: int  #: tracks of the image that agree with a landmark, or with a turn on the spot
    #: set where the message named a new keyframe and the window was solved with it
    window: Window | None
    motion: str = UNKNOWN  #: MOVING, STANDSTILL, ROTATION, BLIND or UNKNOWN: see motion.py
    reason: str = ''  #: one sentence where the status is not TRACKING
    #: poses (7,) of earlier images that are known only now
    earlier: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class State:
    """What the bundle knows between two messages; stamps are in ns, poses T_world_camera (7,)."""

    camera: Camera
    options: BundleOptions
    window: Window | None = None  #: the newest solution
    trajectory: dict[int, Tensor] = field(default_factory=dict)  #: every keyframe with a pose
    keyframes: int = 0  #: how many keyframes there have been, with or without a pose
    maps: int = 0  #: how many maps have been begun
    metric: bool = False  #: whether the world's unit is the odometry's metre
    #: tracks that are in the window's prior
    gone: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    #: of the keyframes in the window, or waiting for a pose
    messages: dict[int, Correspondences] = field(default_factory=dict)
    #: the newest images, which may yet be named as a keyframe or get a pose, oldest first
    pending: dict[int, tuple[Correspondences, Tensor | None]] = field(default_factory=dict)
    motions: dict[int, str] = field(default_factory=dict)  #: of the pending images
    named: set[int] = field(default_factory=set)  #: pending images that are keyframes
    last: tuple[Tensor, Tensor] | None = None  #: the poses of the two newest images
    failures: int = 0  #: images without a pose in a row
    origin: tuple[Tensor, float] | None = None  #: where, and how large, the next map begins
    odometry: ExternalOdometry = field(default_factory=ExternalOdometry)
    #: ``Estimate.earlier`` of the message that is being added
    earlier: dict[int, Tensor] = field(default_factory=dict)
    #: the newest of ``tracking.rests_on``
    rests: tuple[Window, Problem] | None = None
    #: the newest of what ``tracking`` sees of the window's landmarks
    sight: tuple[Correspondences, Window, Observations, Tensor] | None = None
    #: the newest of ``tracking.locate`` that can be trusted
    placed: tuple[Correspondences, Window, tuple[Registration, int]] | None = None

    def __post_init__(self) -> None:
        self.metric = self.options.poses == 'external'

    def waiting(self) -> list[Correspondences]:
        """Return the messages of keyframes that have no pose, oldest first."""
        unposed = [m for stamp, m in self.messages.items() if stamp not in self.trajectory]
        return unposed[-_WAITING:]

    def leave_map(self) -> None:
        """Leave the map behind; the next one begins at the newest pose, about as large."""
        T = next(
            (T for _, T in reversed(self.pending.values()) if T is not None),
            self.window.T_world_camera[-1],
        )
        distance = (self.window.points - self.window.T_world_camera[-1, :3]).norm(dim=-1).median()
        self.origin = T, float(distance)
        self.messages = {message.stamp: message for message in self.waiting()}
        self.window, self.failures, self.metric = None, 0, False
