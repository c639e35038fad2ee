"""What every matcher family implements: f_theta of the paper (equation 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

FAILED = 0.3  #: of a match with a smaller score one assumes that it is not the point


@dataclass(frozen=True)
class Matches:
    """
    Where the query points of a reference image lie in a target image (equation 2).

    All of it is differentiable.
    """

    uv: Tensor  #: (B, N, 2) px in the target
    coarse_uv: Tensor  #: (B, N, 2) px in the target, of the coarse stage (paper 3.2.3)
    score: Tensor  #: (B, N) probability that the match lies within a pixel of the truth
    cov: Tensor  #: (B, N, 2, 2) px^2


class Matcher(Protocol):
    """
    A family of matchers encodes each image once and matches each pair once, both in batches.

    It is a ``torch.nn.Module`` whose ``state_dict`` is the whole model, and it stands in
    ``families.FAMILIES``: ``FAMILIES[family](**configuration)`` is an untrained one.
    """

    family: str  #: its name in the registry and in the weights' metadata
    configuration: dict[str, Any]  #: what builds it beside the defaults, for JSON

    def encode(self, images: Tensor) -> Any:
        """Return the features of images (B, 1, H, W), float in [0, 1]: what a keyframe caches."""

    def match(
        self, reference: Any, target: Any, queries: Tensor, around: Tensor | None = None
    ) -> Matches:
        """
        Find queries (B, N, 2), px in the reference, in the target.

        ``around`` (B, N, 2) px is where each is expected: to look there first is cheaper.
        """

    def reliability(self, features: Any, uv: Tensor) -> Tensor:
        """
        Return the log odds (B, N) that points uv (B, N, 2) px are found to a pixel.

        They are known before any match, from the image alone.
        """
