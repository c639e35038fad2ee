"""Two images, matched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .detector import detect
from .protocol import Matcher
from .tracker import round_trip, TrackerOptions


@dataclass(frozen=True)
class MatchedPair:
    """Where points of a reference image lie in a target image."""

    queries: Tensor  #: (N, 2) float32 px in the reference
    uv: Tensor  #: (N, 2) float32 px in the target
    score: Tensor  #: (N,) probability that the match lies within a pixel of the truth
    kept: Tensor  #: (N,) bool: it lies in the target and comes back to its query


@torch.no_grad()
def match_pair(
    matcher: Matcher,
    reference: np.ndarray,
    target: np.ndarray,
    queries: Tensor | None = None,
    points: int = 1000,
) -> MatchedPair:
    """
    Match points of a grey image (H, W) uint8 with another image of any size.

    ``queries`` are (N, 2) float32 px; where None, up to ``points`` corners that the detector
    finds.
    """
    if queries is None:
        queries = torch.from_numpy(detect(reference, points))
    if not len(queries):
        nothing = torch.zeros(0)
        return MatchedPair(queries, queries, nothing, nothing.bool())
    device = (
        next((p.device for p in matcher.parameters()), 'cpu')
        if isinstance(matcher, torch.nn.Module)
        else 'cpu'
    )
    first, second = (
        matcher.encode(torch.tensor(image, device=device)[None, None].float() / 255)
        for image in (reference, target)
    )
    matches, distance = round_trip(matcher, first, second, queries[None].to(device))
    uv = matches.uv[0].cpu().float()
    height, width = target.shape
    inside = ((uv >= 0) & (uv <= uv.new_tensor([width - 1, height - 1]))).all(-1)
    kept = inside & (distance[0].cpu() < TrackerOptions.round_trip_px)
    return MatchedPair(queries, uv, matches.score[0].cpu(), kept)
