"""What can be set about the bundle."""

from __future__ import annotations

from dataclasses import dataclass, field

from .solver.adjust import AdjustOptions

POSES = ('own', 'external')


@dataclass(frozen=True)
class BundleOptions:
    #: of the window; the oldest leave (a first map may hold more, until the next keyframe)
    keyframes: int = 8
    #: an observation farther from its landmark, in undistorted pixels, is pruned
    prune_px: float = 3.0
    min_parallax_deg: float = 1.0  #: widest angle between a landmark's rays
    min_landmarks: int = 20  #: fewer inliers than this and a frame, or a map, is not trusted
    patience: int = 15  #: frames without a pose before a new map is begun
    #: "own", or "external": those of another odometry, held; only landmarks are solved
    poses: str = 'own'
    adjust: AdjustOptions = field(default_factory=AdjustOptions)

    def __post_init__(self) -> None:
        if self.poses not in POSES:
            raise ValueError(
                f"the bundle's poses are '{self.poses}', they must be one of {', '.join(POSES)}"
            )
        if self.keyframes < 3:
            raise ValueError(
                f"the bundle's window is {self.keyframes} keyframes, it must be at least 3"
            )
        for name in ('prune_px', 'min_parallax_deg', 'min_landmarks', 'patience'):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"the bundle's {name} is {getattr(self, name)}, it must be positive"
                )
