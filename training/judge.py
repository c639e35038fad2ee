"""What a matcher is worth on pairs that did not train it, and the odds that its score names."""

from __future__ import annotations

from collections.abc import Iterable
import math

from imatching_ros.matching.families.expectation import ExpectationMatcher
from losses import encoded
from pairs import Pair
import torch
from torch import Tensor
import torch.nn.functional as F

BINS = 10  # of the score
ROUNDS = 20  # of Newton's method
LEAST_SIGMA = 0.1  # px, of a match


@torch.no_grad()
def accuracy(matcher: ExpectationMatcher, batches: Iterable[Pair]) -> float:
    """Return the share of visible queries that are found within a pixel."""
    hits = [_scored(matcher, batch)[1][batch.truth.isfinite().all(-1)] for batch in batches]
    return torch.cat(hits).mean().item()


@torch.no_grad()
def calibrate(matcher: ExpectationMatcher, batches: Iterable[Pair]) -> None:
    """
    Fit the weights of the score's evidence by logistic regression on hits within a pixel.

    The covariance is kept above the least that is believable. A point that the other view does not
    show cannot be hit: the score must tell these too. By Newton's method, damped, so that evidence
    that always agrees gives an answer too.
    """
    count = len(matcher.log_odds)
    rows, hits = [], []
    for batch in batches:
        columns = []
        for k in range(count - 1):
            # With the weight of one piece of evidence alone, the score's log odds are that piece
            matcher.log_odds.copy_(torch.eye(count)[k])
            score, hit = _scored(matcher, batch)
            columns.append(score.flatten().double().cpu().logit(1e-9))
        rows.append(torch.stack((*columns, torch.ones_like(columns[0])), -1))
        hits.append(hit.flatten().double().cpu())
    x, y = torch.cat(rows), torch.cat(hits)

    def loss(odds: Tensor) -> float:
        return (F.softplus(x @ odds) - y * (x @ odds)).sum().item()

    odds, ridge = x.new_zeros(count), 1e-6 * len(x) * torch.eye(count, dtype=x.dtype)
    for _ in range(ROUNDS):
        p = torch.sigmoid(x @ odds)
        step = torch.linalg.solve((x.T * (p * (1 - p))) @ x + ridge, x.T @ (y - p))
        while loss(odds + step) > loss(odds):
            step = step / 2
        odds = odds + step
    matcher.log_odds.copy_(odds)
    # Whatever training's pairs say: no camera shows a point better than this
    matcher.log_cov[1].clamp_(min=math.log(LEAST_SIGMA**2))


@torch.no_grad()
def calibration_error(matcher: ExpectationMatcher, batches: Iterable[Pair]) -> float:
    """Return the expected calibration error, over ``BINS`` bins of the score."""
    pairs = (_scored(matcher, batch) for batch in batches)
    score, hit = (torch.cat(column).flatten() for column in zip(*pairs, strict=True))
    chosen = (score * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS, device=score.device).index_add(0, chosen, score - hit)
    return (gap.abs().sum() / len(score)).item()


def _scored(matcher: ExpectationMatcher, batch: Pair) -> tuple[Tensor, Tensor]:
    """Return score and hit (B, N) of the queries of a batch; what has no truth is not hit."""
    matches = matcher.match(*encoded(matcher, batch), batch.queries)
    hit = (matches.uv - batch.truth).norm(dim=-1) < 1
    return matches.score, hit.float()
