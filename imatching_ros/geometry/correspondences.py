"""What travels from matcher to bundle and learner: where points of keyframes are seen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Correspondences:
    """
    Point correspondences of one image j with its past keyframes i (paper, equation 2).

    One row is one pair (u_i, u_j). A track is one physical point: its rows in different images
    share an id. Several rows of one image may carry the same track, one for each past keyframe
    that saw it. A keyframe is an image that a later one names as its reference. The first row
    that ever names a track gives, by its reference point, the observation that began the track.
    All tensors live on the CPU.
    """

    stamp: int  #: image j, nanoseconds
    uv: Tensor  #: (M, 2) float32, predicted pixel in image j (raw, distorted)
    xy: Tensor  #: (M, 2) float32, the same, undistorted, on the plane z = 1
    ref_stamp: Tensor  #: (M,) int64, keyframe i, nanoseconds
    ref_uv: Tensor  #: (M, 2) float32, query pixel in keyframe i (raw, distorted)
    track: Tensor  #: (M,) int64, below 2^32
    score: Tensor  #: (M,) float32 in [0, 1]
    cov: Tensor  #: (M, 3) float32, covariance of uv: uu, uv, vv, px^2
    model: int  #: version of the weights that made the rows

    def __len__(self) -> int:
        return len(self.track)
