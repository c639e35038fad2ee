"""What training minimises, stage by stage of the matcher."""

from __future__ import annotations

from imatching_ros.matching.encoder import COARSE, Features, FINE
from imatching_ros.matching.families.expectation import ExpectationMatcher, FINE_RADIUS
from pairs import Pair
import torch
from torch import Tensor
import torch.nn.functional as F

WEIGHTS = {'coarse': 1.0, 'fine': 1.0, 'distance': 1.5, 'nll': 0.1, 'reliability': 0.2}
NEAR_PX = 4.0  # a fine match farther from the truth is a wrong one, not an inaccurate one


def losses(matcher: ExpectationMatcher, batch: Pair) -> dict[str, Tensor]:
    """
    Return the losses of ``WEIGHTS``, and what is good: the shares of visible queries that hit.

    batch: on the matcher's device. coarse: cross entropy over all cells of the target, so that
    each of its other places is a negative. fine: the same within the window, around the truth
    displaced by the jitter. distance: of the fine expectation from the truth, px. nll: of its
    errors under the covariance. reliability: cross entropy with what hits. hit_1px: coarse and
    fine in turn, within a pixel; coarse_hit: the coarse stage, within 6 px.
    """
    known = batch.truth.isfinite().all(-1)
    truth = torch.where(known[..., None], batch.truth, batch.queries)
    reference, target = encoded(matcher, batch)
    similarity = matcher.coarse_similarity(reference, target, batch.queries)
    h, w = target.coarse.shape[-2:]
    coarse = cross_entropy(similarity, (truth - (COARSE - 1) / 2) / COARSE, h, w)

    window, cells = matcher.fine_similarity(
        reference, target, batch.queries, truth + batch.jitter
    )
    side = 2 * FINE_RADIUS + 1
    at = (truth - (FINE - 1) / 2) / FINE - cells[..., 0, :]  # cells from the window's corner
    inside = known & ((at >= 0) & (at <= side - 1)).all(-1)
    fine = cross_entropy(window, at, side, side)
    uv, spread, _ = matcher.fine_expectation(window, cells)
    error = uv - truth
    near = inside & (error.norm(dim=-1) < NEAR_PX)
    distance = (error.square().sum(-1) + 0.01).sqrt() - 0.1

    with torch.no_grad():  # coarse and fine in turn, as in use
        centre, _ = matcher.coarse_expectation(similarity, target)
        found, _, _ = matcher.fine_expectation(
            *matcher.fine_similarity(reference, target, batch.queries, centre)
        )
    hit = (found - truth).norm(dim=-1) < 1
    coarse_hit = (centre - truth).norm(dim=-1) < 6
    reliability = F.binary_cross_entropy_with_logits(
        matcher.reliability(reference, batch.queries), hit.float(), reduction='none'
    )
    return {
        'coarse': _mean(coarse, known),
        'fine': _mean(fine, inside),
        'distance': _mean(distance, near),
        'nll': _mean(student(matcher, error.detach(), spread.detach()), near),
        'reliability': _mean(reliability, known),
        'hit_1px': _mean(hit.float(), known),
        'coarse_hit': _mean(coarse_hit.float(), known),
    }


def encoded(matcher: ExpectationMatcher, batch: Pair) -> tuple[Features, Features]:
    """Return the features of the references and of the targets."""
    images = torch.cat((batch.reference, batch.target)).unsqueeze(1).float() / 255
    features = matcher.encode(images)
    half = len(batch.reference)
    return features[:half], features[half:]


def cross_entropy(similarity: Tensor, at: Tensor, h: int, w: int) -> Tensor:
    """
    Return the cross entropy (B, N) of a grid's similarities (B, N, h * w) with a place in it.

    at: (B, N, 2), x and y in cells; its four neighbours share the target as in interpolation.
    """
    log_p = similarity.log_softmax(-1)
    low = at.floor()
    part = at - low
    total = torch.zeros_like(log_p[..., 0])
    for dx in (0, 1):
        for dy in (0, 1):
            column = (low[..., 0] + dx).clamp(0, w - 1)
            row = (low[..., 1] + dy).clamp(0, h - 1)
            share = (part[..., 0] - (1 - dx)).abs() * (part[..., 1] - (1 - dy)).abs()
            index = (row * w + column).long()
            total = total - share * log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return total


def student(matcher: ExpectationMatcher, error: Tensor, spread: Tensor) -> Tensor:
    """
    Return the negative log likelihood (B, N) of errors (B, N, 2), px, by the matcher's covariance.

    It is that of Student's t with 4 degrees of freedom instead of a Gaussian: a few gross errors
    must not set the scale.
    """
    floor = torch.eye(2, device=error.device) * matcher.log_cov[1].exp()
    cov = spread * matcher.log_cov[0].exp() + floor
    error = error.unsqueeze(-1)
    squared = (error.mT @ torch.linalg.solve(cov, error)).flatten(-3)
    return 0.5 * torch.logdet(cov) + 3.0 * torch.log1p(squared / 4)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean over some, zero where there are none."""
    return (values * where).sum() / where.sum().clamp(min=1)
