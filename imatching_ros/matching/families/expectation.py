"""
The expectation-based family.

Of the encoder's features it takes a coarse expectation and a windowed fine one (paper 3.2.1), and
says what tells good matches from bad ones.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import nn, Tensor
import torch.nn.functional as F

from ..encoder import COARSE, Encoder, Features, FINE, sample_coarse, sample_fine
from ..protocol import FAILED, Matches
from ... import kernels

COARSE_RADIUS, FINE_RADIUS = 2, 4  # half sizes of the windows that are searched, cells
MEAN_RADIUS = 2  # half size of the window of the fine mean, around its mode, cells
SEARCH_RADIUS = 5  # half size of the region searched around an expected place, coarse cells
CHUNK = 256  # queries whose similarities with a whole image are held at once


class ExpectationMatcher(Encoder):
    """
    f_theta by expectation (paper, equation 5), in two stages (paper 3.2.3).

    Equation 5 weights every location of the target by its similarity S. Over a whole image that
    mean is dragged between look-alike places, so each stage takes it over a window: the coarse one
    around the most similar cell of the region searched, the fine one around the most similar cell
    near the coarse result. S is the softmax of scaled cosine similarities.
    """

    family = 'expectation'

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__(batch_norm)
        self.log_scale_coarse = nn.Parameter(torch.tensor(3.0))
        self.log_scale_fine = nn.Parameter(torch.tensor(3.0))
        # Covariance = exp(a) * spread of the fine expectation + exp(b) px^2: calibrated in
        # training
        self.log_cov = nn.Parameter(torch.tensor([-1.0, -2.0]))
        # The score's weights of its evidence (`score`): fitted after training
        self.log_odds = nn.Parameter(torch.tensor([1.0, 4.0, 8.0, 20.0, -25.0]))

    def match(
        self, reference: Features, target: Features, queries: Tensor, around: Tensor | None = None
    ) -> Matches:
        """
        Find queries (B, N, 2), px in the reference, in the target (equation 5, coarse then fine).

        ``around`` (B, N, 2) px is where each is expected: the coarse stage searches the cells
        within ``SEARCH_RADIUS`` of it, and the whole image for the matches whose score is then
        below ``FAILED``; the better one is kept. Without, it searches the whole image for all.

        The positions of the windows are not differentiated, what lies in them is: coarse_uv
        carries gradient to the coarse descriptors, uv to the fine ones.
        """
        queries = queries.to(reference.coarse.dtype)
        matches = self._search(reference, target, queries, around)
        if around is None:
            return matches
        failed = (matches.score < FAILED).any(0).nonzero().squeeze(-1)
        if not len(failed):
            return matches
        again = self._search(reference, target, queries[:, failed], None)
        better = again.score > matches.score[:, failed] + 1e-5  # not by rounding

        def best(name: str) -> Tensor:
            first, second = getattr(matches, name), getattr(again, name)
            mask = better.view(*better.shape, *[1] * (first.dim() - 2))
            return first.index_copy(1, failed, torch.where(mask, second, first[:, failed]))

        return Matches(*map(best, ('uv', 'coarse_uv', 'score', 'cov')))

    def _search(
        self, reference: Features, target: Features, queries: Tensor, around: Tensor | None
    ) -> Matches:
        """Match in the regions around some places, or in the whole image."""
        if _is_for_compiled(reference, target, queries) and compiled():
            return self._search_compiled(reference, target, queries, around)
        log_similarity = self.coarse_similarity(reference, target, queries)
        if around is not None:
            log_similarity = log_similarity.masked_fill(~_region(around, target), -torch.inf)
        coarse_uv, coarse_cosine = self.coarse_expectation(log_similarity, target)
        similarity, cells = self.fine_similarity(reference, target, queries, coarse_uv.detach())
        uv, spread, mass = self.fine_expectation(similarity, cells)
        cov = (
            spread * self.log_cov[0].exp()
            + torch.eye(2, dtype=uv.dtype, device=uv.device) * self.log_cov[1].exp()
        )
        fine_cosine = similarity.amax(-1) / self.log_scale_fine.exp()
        score = self.score(
            self.reliability(target, uv.detach()), mass, coarse_cosine, fine_cosine
        )
        return Matches(uv, coarse_uv, score, cov)

    def _search_compiled(
        self, reference: Features, target: Features, queries: Tensor, around: Tensor | None
    ) -> Matches:
        """Do the same as ``_search``, by compiled.py."""
        scales = self.log_scale_coarse.exp().item(), self.log_scale_fine.exp().item()
        fitted = self.log_cov.numpy(force=True), self.log_odds.numpy(force=True)
        rows = []
        for b in range(len(queries)):
            i, j = _arrays(reference[b:b + 1])[:2], _arrays(target[b:b + 1])
            # The whole image in parts whose similarities stay in the cache
            size = max(queries.shape[1] if around is not None else CHUNK, 1)
            for part in queries[b].split(size):
                whole = (
                    self.coarse_similarity(reference[b:b + 1], target[b:b + 1], part[None])[0]
                    if around is None else part.new_empty(0, 0)
                )
                near = part.new_empty(0, 2) if around is None else around[b]
                rows.append(
                    compiled().match(
                        *i, *j, _array(part), _array(near), _array(whole), *scales, *fitted
                    )
                )
        columns = (torch.from_numpy(np.concatenate(column)) for column in zip(*rows, strict=True))
        return Matches(*(column.unflatten(0, queries.shape[:2]) for column in columns))

    def coarse_similarity(self, reference: Features, target: Features, queries: Tensor) -> Tensor:
        """
        Return scaled cosine similarities of queries (B, N, 2) px with all cells of the target.

        They are (B, N, h * w), row by row of the target's coarse map.
        """
        descriptors = F.normalize(sample_coarse(reference.coarse, queries), dim=1)  # (B, 64, N)
        scaled = descriptors.transpose(1, 2) * self.log_scale_coarse.exp()
        return torch.bmm(scaled, target.coarse.flatten(2))

    def coarse_expectation(
        self, log_similarity: Tensor, target: Features
    ) -> tuple[Tensor, Tensor]:
        """
        Return what equation 5 gives over the window around the mode.

        That is coarse_uv (B, N, 2) px, and beside it the mode's cosine similarity (B, N).
        """
        h, w = target.coarse.shape[-2:]
        peak, mode = log_similarity.detach().max(-1)
        cells, index = _window(mode // w, mode % w, COARSE_RADIUS, h, w)
        window = log_similarity.gather(-1, index)
        uv = (window.softmax(-1).unsqueeze(-1) * cells).sum(-2) * COARSE + (COARSE - 1) / 2
        return uv, peak / self.log_scale_coarse.detach().exp()

    def fine_similarity(
        self, reference: Features, target: Features, queries: Tensor, centre: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Return scaled cosine similarities (B, N, 81) of queries (B, N, 2) with a window's cells.

        The window lies around ``centre`` (B, N, 2) px; its cells (B, N, 81, 2) are x, y.
        """
        batch, h, w, channels = target.fine.shape
        descriptors = F.normalize(sample_fine(reference.fine, queries), dim=-1)  # (B, N, 32)
        cell = ((centre - (FINE - 1) / 2) / FINE).round().long()
        cells, index = _window(cell[..., 1], cell[..., 0], FINE_RADIUS, h, w)
        first = torch.arange(batch, device=index.device).view(-1, 1, 1) * (h * w)
        # index_select, for the gradient of plain indexing adds up in an order that varies from run
        # to run
        window = target.fine.reshape(-1, channels).index_select(0, (index + first).flatten())
        window = F.normalize(window.to(queries.dtype), dim=-1).view(*index.shape, channels)
        descriptors = descriptors * self.log_scale_fine.exp()
        return (window @ descriptors.unsqueeze(-1)).squeeze(-1), cells

    def fine_expectation(self, similarity: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Return what equation 5 gives over the cells around the mode of a window.

        The window is that of ``fine_similarity``. Returned are uv (B, N, 2) px, its spread
        (B, N, 2, 2) px^2, and how much of S lies within those cells (B, N).
        """
        edge = 2 * FINE_RADIUS + 1
        mode = similarity.detach().argmax(-1)
        _, index = _window(mode // edge, mode % edge, MEAN_RADIUS, edge, edge)
        near = similarity.gather(-1, index)
        at = cells.gather(-2, index.unsqueeze(-1).expand(*index.shape, 2))
        weights = near.softmax(-1).unsqueeze(-1)
        mean = (weights * at).sum(-2)
        offset = at - mean.unsqueeze(-2)
        spread = torch.einsum('bnki,bnkj->bnij', weights * offset, offset) * FINE**2
        mass = (near.logsumexp(-1) - similarity.logsumexp(-1)).exp()
        return mean * FINE + (FINE - 1) / 2, spread, mass

    def score(
        self, reliability: Tensor, mass: Tensor, coarse_cosine: Tensor, fine_cosine: Tensor
    ) -> Tensor:
        """
        Return the probability (B, N) that a match lies within a pixel of the truth.

        A logistic regression from what is known of it: the reliability of the place that was
        found, how much of S lies near the fine mode, and how alike both modes are to the query.
        """
        evidence = (reliability, mass.clamp_min(1e-6).log(), coarse_cosine, fine_cosine)
        *weights, bias = self.log_odds
        return torch.sigmoid(sum(w * e for w, e in zip(weights, evidence, strict=True)) + bias)


def compiled() -> ModuleType | None:
    """Return compiled.py, ready, or None where numba is not to be had (kernels.py)."""
    return kernels.load('imatching_ros.matching.compiled')


def _is_for_compiled(reference: Features, target: Features, queries: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and queries.device.type == 'cpu'
        and queries.dtype == reference.coarse.dtype == target.coarse.dtype == torch.float32
        and reference.fine.dtype == target.fine.dtype == torch.bfloat16
    )


def _arrays(features: Features) -> tuple[np.ndarray, ...]:
    """Return the maps of one image as compiled.py takes them."""
    return (
        _array(features.coarse[0].permute(1, 2, 0)),
        _array(features.fine[0].view(torch.int16)).view(np.uint16),
        _array(features.reliability[0, 0]),
    )


def _array(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.numpy())


def _region(around: Tensor, target: Features) -> Tensor:
    """Return which cells of the target (B, N, h * w) are searched around places (B, N, 2) px."""
    h, w = target.coarse.shape[-2:]
    centre = ((around - (COARSE - 1) / 2) / COARSE).clamp(min=0)
    inside = [
        (torch.arange(size, device=around.device) - x.clamp(max=size - 1).round().unsqueeze(-1))
        .abs() <= SEARCH_RADIUS
        for x, size in zip(centre.unbind(-1), (w, h), strict=True)
    ]
    return (inside[1].unsqueeze(-1) & inside[0].unsqueeze(-2)).flatten(-2)


def _window(row: Tensor, column: Tensor, radius: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """
    Return the cells around (row, column), both (B, N): (x, y) (B, N, K, 2), index (B, N, K).

    The index is that of the flat map. At the image's border the window is moved inwards, not cut:
    every query sees as many cells.
    """
    row, column = row.clamp(radius, h - 1 - radius), column.clamp(radius, w - 1 - radius)
    offset = torch.arange(-radius, radius + 1, device=row.device)
    rows = (
        (row[..., None, None] + offset[:, None])
        .expand(*row.shape, len(offset), len(offset))
        .flatten(-2)
    )
    columns = (
        (column[..., None, None] + offset).expand(*row.shape, len(offset), len(offset)).flatten(-2)
    )
    return torch.stack((columns, rows), -1).to(torch.float32), rows * w + columns
