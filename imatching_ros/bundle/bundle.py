"""
The lower level online.

Correspondences in, the motion of every image and a solved window per keyframe out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
import math

import torch
from torch import Tensor

from .initialise import initialise
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
from .observations import (
    index_of,
    Observations,
    own,
    pose_problem,
    survives,
    surviving,
)
from .odometry import ExternalOdometry
from .options import BundleOptions
from .prior import left_behind, Prior
from .registration import register, Registration
from .solve import solve
from .solver.adjust import compiled, free_parameters
from .solver.covariance import covariance
from .solver.problem import Problem
from .window import Window
from ..geometry import lie, two_view
from ..geometry.camera import Camera
from ..geometry.correspondences import Correspondences

__all__ = ['BLIND', 'MOVING', 'ROTATION', 'STANDSTILL', 'UNKNOWN', 'Bundle', 'Estimate']

#: What ``Estimate.status`` may be.
INITIALISING = 'initialising'  #: no map yet: too few keyframes, or too little parallax among them
TRACKING = 'tracking'  #: the image is posed
LOST = 'lost'  #: the image does not agree with the window's landmarks; every next one tries again
#: lost for too long: a map begins again at the last pose, with a scale of its own
NEW_MAP = 'new map'

_PENDING = 128  #: images that may yet be named as a keyframe, or get a pose later
_WAITING = 20  #: keyframes that wait for a pose, or for a map
_SPAN = 5  #: images back, to see whether the camera stands still
_KNOWN = 3.0  #: times ``min_parallax_deg``: the parallax of landmarks that the prior is made of
_GENTLY = 0.1  #: share of a disagreement in scale with the odometry that a keyframe takes away


@dataclass(frozen=True)
class Estimate:
    """What one message's image has to say."""

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


class Bundle:
    """
    Keyframe window, tracking and mapping.

    ``add`` once per message, in the order of the stamps.
    """

    def __init__(self, camera: Camera, options: BundleOptions | None = None) -> None:
        self.camera, self.options = camera, options or BundleOptions()
        if self.options.adjust.backend != 'eager':
            compiled()  # now, not when the first keyframe waits for it
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.window: Window | None = None  #: the newest solution
        #: stamp to T_world_camera (7,) of every keyframe that got a pose
        self.trajectory: dict[int, Tensor] = {}
        self.keyframes = 0  #: how many keyframes there have been, with or without a pose
        self.maps = 0  #: how many maps have been begun
        self.metric = self.options.poses == 'external'  #: the world's unit is the odometry's metre
        self._gone = torch.zeros(0, dtype=torch.int64)  # tracks that are in the window's prior
        self._rests: tuple[Window, Problem] | None = None
        # the newest of ``_seen``
        self._sight: tuple[Correspondences, Window, Observations, Tensor] | None = None
        # the newest of ``_register`` that can be trusted
        self._placed: tuple[Correspondences, Window, tuple[Registration, int]] | None = None
        # of the keyframes in the window, or waiting for a pose
        self._messages: dict[int, Correspondences] = {}
        self._pending: dict[int, tuple[Correspondences, Tensor | None]] = {}
        self._named: set[int] = set()
        self._motions: dict[int, str] = {}  # of the pending images
        self._last: tuple[Tensor, Tensor] | None = None  # the poses of the two newest images
        self._failures = 0
        # where, and how large, the next map begins
        self._origin: tuple[Tensor, float] | None = None
        self._odometry = ExternalOdometry()
        self._earlier: dict[int, Tensor] = {}

    def recalibrate(self, camera: Camera) -> None:
        """
        Go on with a camera that was focused anew; with another one a new map begins.

        It begins at the newest pose, and what was solved before stays in ``trajectory``.
        """
        if not camera.goes_on_from(self.camera):
            if self.window is not None:
                self._begin_again()
            self.metric = self.options.poses == 'external'
            for images in (self._messages, self._pending, self._motions, self._named):
                images.clear()
            self._last = None
        self.camera = camera

    def add_odometry(
        self, stamp: int, T_world_camera: Tensor, covariance: Tensor | None = None
    ) -> None:
        """
        Add the pose (7,) of the camera at ``stamp`` ns.

        It is in the frame of another odometry, metres, at any rate.

        With ``options.poses`` "own" it gives the map its scale and nothing else; with "external"
        it gives the poses, and ``covariance`` (6, 6) is theirs. Raises ValueError, one sentence,
        where it is not a pose, or not newer than the one before.
        """
        self._odometry.add(stamp, T_world_camera, covariance)

    def add(self, message: Correspondences) -> Estimate:
        """
        Pose the message's image; solve the window first where the message names a new keyframe.

        Raises ValueError where the stamp is not newer than the message's before: reset first when
        time goes back.
        """
        if self._pending and message.stamp <= next(reversed(self._pending)):
            raise ValueError(
                f'the correspondences of {message.stamp} ns are not newer than the last ones; '
                'reset the bundle when time goes back'
            )
        window, self._earlier = None, {}
        for stamp in torch.unique(message.ref_stamp).tolist():
            if stamp in self._pending and stamp not in self._named:
                window = self._keyframe(stamp) or window
        estimate = self._track(message)
        self._pending[message.stamp] = message, estimate.T_world_camera
        self._motions[message.stamp] = estimate.motion
        while len(self._pending) > _PENDING:
            oldest = next(iter(self._pending))
            del self._pending[oldest], self._motions[oldest]
        return replace(estimate, window=window, earlier=self._earlier)

    # The image: where it is, and how it moves ----------------------------------------------------

    def _track(self, message: Correspondences) -> Estimate:
        if self.options.poses == 'external':
            return self._follow(message)
        found = self._register(message, self._predict()) if self.window else None
        T = found[0].T_world_camera if found else None
        motion, turned = self._motion(message, T)
        if found is not None:
            self._failures, self._last = 0, (self._last[1] if self._last else T, T)
            cov = self._covariance(message, found[0])
            return Estimate(message.stamp, T, cov, TRACKING, found[1], None, motion)
        if self.window is not None and turned is not None:
            # No landmark in view, but the camera only turned: it is where it was.
            T, cov, inliers = turned
            self._failures, self._last = 0, (T, T)
            return Estimate(message.stamp, T, cov, TRACKING, inliers, None, motion)
        if self.window is not None:
            self._last = None
            # in the dark nothing says that the camera is elsewhere, nor maps it
            self._failures += motion != BLIND
            if self._failures <= self.options.patience:
                return self._unposed(message, LOST, motion)
            self._begin_again()
        return self._unposed(message, NEW_MAP if self._origin else INITIALISING, motion)

    def _unposed(self, message: Correspondences, status: str, motion: str) -> Estimate:
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
            LOST: 'Tracking is lost', NEW_MAP: 'A new map, with a scale of its own, is about '
                                               'to begin at the last pose',
            INITIALISING: 'There is no map yet',
        }[status]
        return Estimate(message.stamp, None, None, status, 0, None, motion, f'{what}: {why}.')

    def _predict(self) -> Tensor | None:
        """Constant velocity: the newest motion once more."""
        if self._last is None:
            return None
        before, last = self._last
        return lie.compose(last, lie.compose(lie.inverse(before), last))

    def _motion(
        self, message: Correspondences, T: Tensor | None
    ) -> tuple[str, tuple[Tensor, Tensor, int] | None]:
        """
        Return what the correspondences say of the motion.

        Where it is a turn on the spot and the image has no pose T, also the pose, covariance and
        agreeing tracks that follow from a posed keyframe.
        """
        if not self._pending:
            return UNKNOWN, None
        stamps, rows = torch.unique(message.ref_stamp, return_counts=True)
        enough = stamps[rows >= self.options.min_landmarks].tolist()
        if not enough:
            return BLIND, None
        before = list(self._pending.values())[-_SPAN:][0][0]
        since = (
            shared(before, message)
            if len(before)
            else pair_with(message, before.stamp, self.camera)
        )
        focal, bound = self.camera.focal, self.options.prune_px
        still = len(since) >= self.options.min_landmarks and stands_still(since, focal)
        if still and T is not None:
            return STANDSTILL, None
        motion, turned = BLIND, None
        for stamp in enough:  # the oldest that it was matched with: there the parallax is largest
            pair = pair_with(message, stamp, self.camera)
            reference = self.trajectory.get(stamp, self._pending.get(stamp, (None, None))[1])
            T_j_i = (
                lie.compose(lie.inverse(T), reference)
                if T is not None and reference is not None
                else None
            )
            motion, turn = motion_of(
                pair, focal, T_j_i, bound, self.options.min_landmarks, self.options.adjust.backend
            )
            if (
                motion == ROTATION
                and T is None
                and reference is not None
                and self.window is not None
            ):
                turned = self._turned(pair, turn, reference)
            if motion != BLIND:
                break
        if motion == BLIND and T is not None:
            motion = MOVING  # landmarks know better
        return STANDSTILL if still else motion, turned

    def _turned(self, pair: Pair, turn: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, int]:
        """
        Return the pose after a turn on the spot, its covariance, and how many tracks agree.

        The position may be off by what goes unnoticed as parallax: by ``min_parallax_deg`` seen
        from the landmarks.
        """
        focal = self.camera.focal
        error = two_view.transfer_error(lie.rotation(turn[3:]), pair.xy_i, pair.xy_j) * focal
        agree = error < self.options.prune_px
        T = lie.compose(reference, lie.inverse(turn))
        distance = float((self.window.points - reference[:3]).norm(dim=-1).median())
        position = (distance * self.options.min_parallax_deg * torch.pi / 180) ** 2
        angle = float(pair.variance[agree].mean()) / focal**2 / max(int(agree.sum()), 1)
        cov = torch.tensor([position] * 3 + [angle] * 3, dtype=torch.float64).diag()
        return T, cov, int(agree.sum())

    def _register(
        self, message: Correspondences, guess: Tensor | None
    ) -> tuple[Registration, int] | None:
        """
        Return the image against the window's landmarks, and how many tracks agree.

        None where it is not to be trusted: another guess may do. Where it is, it is kept for this
        message and window.
        """
        known = self._placed
        if known is None or known[0] is not message or known[1] is not self.window:
            found = self._place(message, guess)
            if found is None:
                return None
            self._placed = known = message, self.window, found
        return known[2]

    def _place(
        self, message: Correspondences, guess: Tensor | None
    ) -> tuple[Registration, int] | None:
        observed, place = self._seen(message)
        tracks = len(torch.unique_consecutive(place))
        if tracks < self.options.min_landmarks:
            return None
        result = register(
            self.window.points[place], observed.xy, observed.cov, self._focal, guess,
            self.options.adjust, self.options.prune_px,
        )
        if result is None:
            return None
        inliers = len(torch.unique_consecutive(place[result.inliers]))
        if inliers < max(self.options.min_landmarks, 0.25 * tracks):
            return None
        return result, inliers

    @property
    def _focal(self) -> Tensor:
        return torch.tensor([self.camera.fx, self.camera.fy], dtype=torch.float64)

    def _seen(self, message: Correspondences) -> tuple[Observations, Tensor]:
        """Return the image's observations of landmarks, and the indices of these, ascending."""
        known = self._sight
        if known is None or known[0] is not message or known[1] is not self.window:
            observed = own(message, self.camera)
            place = index_of(self.window.track, observed.track)
            rows = (place >= 0).nonzero().squeeze(-1)
            self._sight = known = message, self.window, observed.select(rows), place[rows]
        return known[2:]

    def _posed(self) -> Problem:
        """Return what the window's solution rests on, put together once for each window."""
        if self._rests is None or self._rests[0] is not self.window:
            messages = [self._messages[stamp] for stamp in self.window.stamps.tolist()]
            self._rests = (
                self.window,
                surviving(self.window, messages, self.camera, self.options.prune_px)[1],
            )
        return self._rests[1]

    def _covariance(self, message: Correspondences, registered: Registration) -> Tensor:
        """
        Return an image pose's covariance (6, 6), the landmarks' doubt included.

        From the window's problem with one more pose.
        """
        window, posed = self.window, self._posed()
        observed, place = self._seen(message)
        observed, place = observed.select(registered.inliers), place[registered.inliers]
        K = len(window.stamps)
        order = torch.argsort(torch.cat((posed.landmark, place)), stable=True)
        extended = replace(
            posed, T_world_camera=torch.cat((window.T_world_camera,
                                             registered.T_world_camera[None])),
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
        found = covariance(
            extended, self.options.adjust.kernel, fixed, self.options.adjust.backend
        )[K]
        return (found + found.mT) / 2

    # The keyframe: the window, or the first map --------------------------------------------------

    def _keyframe(self, stamp: int) -> Window | None:
        """Take the image into the window, or into what waits for a pose, and solve."""
        message, T = self._pending[stamp]
        self._named = {named for named in self._named if named in self._pending} | {stamp}
        self.keyframes += 1
        if self._motions[stamp] == BLIND:
            return None
        self._messages[stamp] = message
        if self.options.poses == 'external':
            return self._map_from_odometry()
        if self.window is None:
            return self._initialise()
        found = self._register(message, T)
        # posed by its turn alone: it has nothing to add to the window
        if found is None and T is not None:
            self.trajectory[stamp] = T
            return None
        solved = found and self._extend(message, found[0].T_world_camera)
        return solved or self._recover()

    def _waiting(self) -> list[Correspondences]:
        """Keyframes without a pose, oldest first."""
        return [m for stamp, m in self._messages.items() if stamp not in self.trajectory][
            -_WAITING:
        ]

    def _extend(self, message: Correspondences, T: Tensor) -> Window | None:
        """
        Return the window with one more keyframe.

        The oldest leaves; but the newest before, where that one only turned: turning on the spot
        must not push out the keyframes that show depth.
        """
        window, size = self.window, len(self.window.stamps)
        leaves = torch.zeros(size, dtype=torch.bool)
        leaves[-1] = size > 2 and self._only_turned(*window.stamps.tolist()[-2:])
        leaves[:max(0, size - int(leaves.sum()) - (self.options.keyframes - 1))] = True
        prior, gone = self._leave(leaves, message)
        poses = torch.cat((window.T_world_camera[~leaves], T[None]))
        messages = [*(self._messages[stamp] for stamp in window.stamps[~leaves].tolist()), message]
        gone = gone[torch.isin(gone, torch.cat([m.track for m in messages]))]
        solved = solve(
            messages, poses, window.track, window.points, self.camera, self.options, prior, gone
        )
        if solved is None:
            return None
        self._gone, self._rests = gone, (solved[0], solved[2])
        return self._take(solved[0])

    def _leave(self, leaves: Tensor, message: Correspondences) -> tuple[Prior | None, Tensor]:
        """
        Return what leaving keyframes (K,) know of those that stay.

        Also the tracks that are used up in it.

        Landmarks that a leaving keyframe sees leave with it where their tracks have ended (the new
        image does not see them), two that stay see them too, and the parallax is large enough for
        a linear account of them. All their observations are in the prior: while one of these
        keyframes is in the window, they must not come back.
        """
        window = self.window
        if not leaves.any():
            return window.prior, self._gone
        posed = self._posed()
        seen = torch.zeros(len(window.track), len(window.stamps), dtype=torch.bool)
        seen[posed.landmark, posed.pose] = True
        ray = torch.nn.functional.normalize(
            window.points[:, None] - window.T_world_camera[:, :3], dim=-1
        )
        widest = (
            torch.where(seen[:, :, None] & seen[:, None], ray @ ray.mT, 1.0).flatten(1).amin(1)
        )
        known = widest < math.cos(math.radians(_KNOWN * self.options.min_parallax_deg))
        gone = seen[:, leaves].any(-1) & (seen[:, ~leaves].sum(-1) >= 2) & known
        gone &= ~torch.isin(window.track, message.track)
        if leaves[-1]:
            gone[:] = False  # it only turned: what it knows of landmarks, others know
        prior = left_behind(posed, self.options.adjust.kernel, window.stamps, leaves, gone)
        return prior, torch.cat((self._gone, window.track[gone]))

    def _only_turned(self, before: int, stamp: int) -> bool:
        """
        Return whether a posed keyframe without parallax is hardly elsewhere than the one before.

        Parallax is what motion.py says. Half of the landmarks then see less than half of
        ``min_parallax_deg`` between the two.
        """
        if self._motions.get(stamp) not in (ROTATION, STANDSTILL) or self.window is None:
            return False
        a, b = (self.window.points - self.trajectory[k][:3] for k in (before, stamp))
        angle = torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))
        return float(angle.median().rad2deg()) < 0.5 * self.options.min_parallax_deg

    def _recover(self) -> Window | None:
        """
        Begin a fresh map where the newest keyframe fits nowhere.

        It is of the last posed and the waiting ones, joined to this one.
        """
        stamps = self.window.stamps.tolist()[-3:]
        waiting = self._waiting()
        found = initialise(
            [self._messages[stamp] for stamp in stamps] + waiting, self.camera, self.options
        )
        if found is None or not waiting or int(found.stamps[-1]) != waiting[-1].stamp:
            return None  # a map without the newest keyframe is less than what there is
        both = [stamp for stamp in stamps if stamp in found.stamps.tolist()]
        common = index_of(self.window.track, found.track)
        if not both or int((common >= 0).sum()) < self.options.min_landmarks:
            return None
        T_world = self.window.T_world_camera[self.window.stamps.tolist().index(both[-1])]
        T_found = found.T_world_camera[found.stamps.tolist().index(both[-1])]
        scale = (self.window.points[common[common >= 0]] - T_world[:3]).norm(dim=-1) / (
            found.points[common >= 0] - T_found[:3]
        ).norm(dim=-1)
        scale = float(scale.median())
        found = found.enlarged(scale, T_found[:3])
        return self._take(found.moved(lie.compose(T_world, lie.inverse(T_found))))

    def _initialise(self) -> Window | None:
        found = initialise(self._waiting(), self.camera, self.options)
        if found is None:
            return None
        if self._origin:
            T, scale = self._origin
            found = found.enlarged(scale, found.T_world_camera[0, :3]).moved(T)
        self.maps, self._origin = self.maps + 1, None
        return self._take(found)

    def _take(self, window: Window) -> Window:
        """
        Keep the poses of the solved window.

        Images without a pose get theirs where it can give one.
        """
        self.window, self._failures = window, 0
        if window.prior is None:
            self._gone = self._gone[:0]
        if self.options.poses == 'own':
            self._scale_to_odometry()
            window = self.window
        self.trajectory.update(zip(window.stamps.tolist(), window.T_world_camera, strict=True))
        for stamp, (message, T) in self._pending.items():
            if T is None:
                known = self._odometry.at(stamp) if self.options.poses == 'external' else None
                T = known[0] if known else self.trajectory.get(stamp)
                if T is None and (found := self._register(message, None)):
                    T = found[0].T_world_camera
                if T is not None:
                    self._pending[stamp] = message, T
                    self._earlier[stamp] = T
                    if stamp in self._messages:
                        self.trajectory[stamp] = T
        keep = set(window.stamps.tolist()) | {message.stamp for message in self._waiting()}
        self._messages = {
            stamp: message for stamp, message in self._messages.items() if stamp in keep
        }
        return window

    def _begin_again(self) -> None:
        """Leave the map behind; the next one begins at the newest pose, about as large."""
        T = next(
            (T for _, T in reversed(self._pending.values()) if T is not None),
            self.window.T_world_camera[-1],
        )
        distance = (self.window.points - self.window.T_world_camera[-1, :3]).norm(dim=-1).median()
        self._origin = T, float(distance)
        self._messages = {message.stamp: message for message in self._waiting()}
        self.window, self._failures, self.metric = None, 0, False

    # Another odometry: its scale, or its poses ---------------------------------------------------

    def _scale_to_odometry(self) -> None:
        """
        Put the map into metres.

        Once as soon as the odometry tells, about the world's origin; then a little with each
        keyframe, about the newest one, so that no pose jumps.
        """
        scale = self._odometry.scale_of(
            self.window.stamps.tolist(), self.window.T_world_camera[:, :3]
        )
        if scale is None:
            return
        if self.metric:
            scale = scale**_GENTLY
            self.window = self.window.enlarged(scale, self.window.T_world_camera[-1, :3])
            return
        self.metric = True

        def larger(T: Tensor | None) -> Tensor | None:
            return None if T is None else torch.cat((T[:3] * scale, T[3:]))

        self.window = self.window.enlarged(scale, torch.zeros(3, dtype=torch.float64))
        self.trajectory = {stamp: larger(T) for stamp, T in self.trajectory.items()}
        self._pending = {
            stamp: (message, larger(T)) for stamp, (message, T) in self._pending.items()
        }
        self._last = self._last and (larger(self._last[0]), larger(self._last[1]))

    def _follow(self, message: Correspondences) -> Estimate:
        """Return the image where the odometry says that it is."""
        found = self._odometry.at(message.stamp)
        T = found[0] if found else None
        motion, _ = self._motion(message, T)
        if found is None:
            status = LOST if self.window else INITIALISING
            why = f'the odometry has no pose within reach of {message.stamp} ns'
            return Estimate(
                message.stamp, None, None, status, 0, None, motion,
                f'The image is left out: {why}.',
            )
        if self.window is None:
            return replace(
                self._unposed(message, INITIALISING, motion), T_world_camera=T, covariance=found[1]
            )
        observed, place = self._seen(message)
        _, posed = pose_problem(
            observed, torch.tensor([message.stamp]), T[None], self.window.track,
            self.window.points, self.camera,
        )
        inliers = len(torch.unique(posed.landmark[survives(posed, self.options.prune_px)]))
        return Estimate(message.stamp, T, found[1], TRACKING, inliers, None, motion)

    def _map_from_odometry(self) -> Window | None:
        """Return the landmarks of the newest keyframes that the odometry has poses of."""
        poses = {
            stamp: found[0] for stamp in self._messages if (found := self._odometry.at(stamp))
        }
        self.trajectory.update(poses)
        stamps = sorted(poses)
        if len(stamps) > 3 and self._only_turned(*stamps[-3:-1]):
            del stamps[-2]
        stamps = stamps[-self.options.keyframes:]
        self._messages = {stamp: self._messages[stamp] for stamp in stamps}
        if len(stamps) < 2:
            return None
        known = (
            (self.window.track, self.window.points)
            if self.window
            else (torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.float64))
        )
        solved = solve(
            list(self._messages.values()), torch.stack([poses[s] for s in stamps]), *known,
            self.camera, self.options,
        )
        if solved is None:
            return None
        self.maps = max(self.maps, 1)
        return self._take(solved[0])
