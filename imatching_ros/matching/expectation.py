"""
The expectation-based family.

A feature pyramid, a coarse expectation, a windowed fine expectation (paper 3.2.1), and what tells
good matches from bad ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

from imatching_ros import kernels
import numpy as np
import torch
from torch import nn, Tensor
import torch.nn.functional as F

from .protocol import FAILED, Matches

COARSE, RELIABILITY, FINE = 8, 4, 2  # strides of the three maps, px
COARSE_RADIUS, FINE_RADIUS = 2, 4  # half sizes of the windows that are searched, cells
MEAN_RADIUS = 2  # half size of the window of the fine mean, around its mode, cells
SEARCH_RADIUS = 5  # half size of the region searched around an expected place, coarse cells
CHUNK = 256  # queries whose similarities with a whole image are held at once
MULTIPLE = 32  # px, the coarsest stride: images are extended to it


@dataclass(frozen=True)
class Features:
    """What the network says of a batch of images; what a keyframe caches."""

    coarse: Tensor  #: (B, 64, ceil(H/32)*4, ceil(W/32)*4), 8x8 at least; unit descriptors
    #: (B, ceil(H/32)*16, ceil(W/32)*16, 32), channels last: windows gather whole descriptors. Of
    #: any length: a match makes those that it needs unit. Half precision as `encode` says.
    fine: Tensor
    #: (B, 1, ceil(H/32)*8, ceil(W/32)*8): log odds that a point here is found to a pixel
    reliability: Tensor
    size: tuple[int, int]  #: H, W of the images

    def __getitem__(self, index: slice) -> Features:
        return Features(
            self.coarse[index], self.fine[index], self.reliability[index], self.size
        )


class ExpectationMatcher(nn.Module):
    """
    f_theta by expectation (paper, equation 5), in two stages (paper 3.2.3).

    Equation 5 weights every location of the target by its similarity S. Over a whole image that
    mean is dragged between look-alike places, so each stage takes it over a window: the coarse one
    around the most similar cell of the region searched, the fine one around the most similar cell
    near the coarse result. S is the softmax of scaled cosine similarities.

    ``batch_norm`` is for training from nothing; ``folded`` gives the same function without, which
    is what ships.
    """

    family = 'expectation'

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()

        def conv(
            inputs: int, outputs: int, stride: int = 1, groups: int = 1, kernel: int = 3
        ) -> nn.Sequential:
            layers = [
                nn.Conv2d(
                    inputs, outputs, kernel, stride, kernel // 2, groups=groups,
                    bias=not batch_norm,
                )
            ]
            return nn.Sequential(
                *layers, *[nn.BatchNorm2d(outputs)] * batch_norm, nn.ReLU(inplace=True)
            )

        def depthwise(channels: int) -> nn.Sequential:
            return conv(channels, channels, groups=channels)

        def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 1)

        self.to_2 = conv(1, 16, 2)
        self.mix_2 = nn.Sequential(depthwise(16), conv(16, 16, kernel=1))
        self.to_4 = nn.Sequential(conv(16, 32, 2), conv(32, 32))
        self.to_8 = nn.Sequential(conv(32, 64, 2), conv(64, 64))
        self.to_16 = nn.Sequential(conv(64, 96, 2), conv(96, 96))
        self.to_32 = nn.Sequential(conv(96, 128, 2), conv(128, 128))
        self.from_32 = pointwise(128, 64)
        self.from_16 = pointwise(96, 64)
        self.from_8 = pointwise(64, 64)
        self.coarse_head = nn.Sequential(
            nn.ReLU(), depthwise(64), conv(64, 64, kernel=1), pointwise(64, 64)
        )
        self.context_4 = pointwise(64, 32)
        self.from_4 = pointwise(32, 32)
        self.mix_4 = nn.Sequential(nn.ReLU(), depthwise(32), pointwise(32, 32))
        self.up_2 = pointwise(32, 4 * 32)
        self.from_2 = pointwise(16, 32)
        self.fine_head = nn.Sequential(nn.ReLU(inplace=True), depthwise(32), pointwise(32, 32))
        self.reliability_head = nn.Sequential(nn.ReLU(), conv(32, 16), pointwise(16, 1))
        self.log_scale_coarse = nn.Parameter(torch.tensor(3.0))
        self.log_scale_fine = nn.Parameter(torch.tensor(3.0))
        # Covariance = exp(a) * spread of the fine expectation + exp(b) px^2: calibrated in
        # training.
        self.log_cov = nn.Parameter(torch.tensor([-1.0, -2.0]))
        # The score's weights of its evidence (`score`): fitted after training
        self.log_odds = nn.Parameter(torch.tensor([1.0, 4.0, 8.0, 20.0, -25.0]))

    def folded(self) -> ExpectationMatcher:
        """
        Return the same function in evaluation mode.

        Each batch normalisation folded into the convolution before it.
        """
        plain = ExpectationMatcher()
        state = {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name in plain.state_dict()
        }
        for name, block in self.named_modules():
            if [type(layer) for layer in block.children()][:2] == [nn.Conv2d, nn.BatchNorm2d]:
                fused = nn.utils.fusion.fuse_conv_bn_eval(block[0].eval(), block[1].eval())
                state[f'{name}.0.weight'], state[f'{name}.0.bias'] = fused.weight, fused.bias
        plain.load_state_dict(state)
        return plain.eval()

    def encode(self, images: Tensor, exact: bool = False) -> Features:
        """
        Features of images (B, 1, H, W) in [0, 1].

        Brightness and contrast are normalised away. The convolutions run in half precision where
        the processor has it, unless ``exact``: matches move by hundredths of a pixel.
        """
        height, width = images.shape[-2:]
        x = images - images.mean((-2, -1), keepdim=True)
        x = x / (x.square().mean((-2, -1), keepdim=True).sqrt() + 1e-3)
        # A multiple of the coarsest stride, and enough for one window of the coarse expectation
        x = F.pad(
            x, (0, max(-width % MULTIPLE, 64 - width), 0, max(-height % MULTIPLE, 64 - height)),
            mode='replicate',
        )
        x = x.contiguous(memory_format=torch.channels_last)
        single, learning = x.dtype == torch.float32, torch.is_grad_enabled()
        half = half_precision(x.device, learning) if single and not exact else None
        with torch.autocast(x.device.type, half, enabled=half is not None):
            coarse, fine, reliability = self.maps(x)
        coarse = F.normalize(coarse.to(x.dtype), dim=1)
        coarse = coarse.contiguous(memory_format=torch.channels_last)
        fine = fine.permute(0, 2, 3, 1).contiguous()
        if single and half is None and not (learning or exact):
            fine = fine.bfloat16()
        return Features(coarse, fine, reliability.to(x.dtype), (height, width))

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Return the coarse (stride 8), the fine (stride 2) and the reliability map (stride 4).

        They are of normalised images (B, 1, H, W), both edges multiples of 32.
        """
        x2 = self.to_2(x)
        x2 = x2 + self.mix_2(x2)
        x4 = self.to_4(x2)
        x8 = self.to_8(x4)
        x16 = self.to_16(x8)
        y16 = self.from_16(x16) + _twice(self.from_32(self.to_32(x16)))
        y8 = self.from_8(x8) + _twice(y16)
        y4 = self.from_4(x4) + _twice(self.context_4(y8))
        y4 = y4 + self.mix_4(y4)
        # As F.pixel_shuffle(self.up_2(y4), 2), but the channels of a pixel lie together: faster
        by_pixel = (
            p.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)
            for p in (self.up_2.weight, self.up_2.bias)
        )
        finer = F.conv2d(y4, *by_pixel).unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2)
        y2 = self.from_2(x2).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)) + finer
        y2 = y2.flatten(4).flatten(2, 3)
        return self.coarse_head(y8), self.fine_head(y2), self.reliability_head(y4)

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
        """``_search`` by compiled.py."""
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
        Return scaled cosine similarities (B, N, h * w).

        They are of queries (B, N, 2) with all cells of the target.
        """
        descriptors = F.normalize(_sample(reference.coarse, queries, COARSE), dim=1)  # (B, 64, N)
        scaled = descriptors.transpose(1, 2) * self.log_scale_coarse.exp()
        return torch.bmm(scaled, target.coarse.flatten(2))

    def coarse_expectation(
        self, log_similarity: Tensor, target: Features
    ) -> tuple[Tensor, Tensor]:
        """
        Equation 5 over the window around the mode.

        Coarse_uv (B, N, 2) px, and the cosine similarity of the mode (B, N).
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
        descriptors = F.normalize(_sample_fine(reference.fine, queries), dim=-1)  # (B, N, 32)
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
        Equation 5 over the cells around the mode of a window (`fine_similarity`).

        Uv (B, N, 2) px, its spread (B, N, 2, 2) px^2, and S within those cells (B, N).
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

    def reliability(self, features: Features, uv: Tensor) -> Tensor:
        """Log odds (B, N) that points uv (B, N, 2) px are found to a pixel, before any match."""
        height, width = (RELIABILITY * edge for edge in features.reliability.shape[-2:])
        grid = (uv + 0.5) * 2 / uv.new_tensor([width, height]) - 1
        return F.grid_sample(
            features.reliability, grid.unsqueeze(1).to(features.reliability.dtype),
            mode='bilinear', padding_mode='border', align_corners=False,
        )[:, 0, 0]

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


@lru_cache
def half_precision(device: torch.device, learning: bool) -> torch.dtype | None:
    """
    Return the type in which a device multiplies faster than in float32, None where none is.

    For ``learning`` it is not float16, in which small gradients vanish. A processor is taken for
    what torch uses of it (``ATEN_CPU_CAPABILITY=avx2``: bfloat16 would be emulated, and slower).
    """
    if device.type == 'cuda':
        if not learning:
            return torch.float16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else None
    if device.type != 'cpu' or torch.backends.cpu.get_cpu_capability() != 'AVX512':
        return None
    supported = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)  # since torch 2.2
    return torch.bfloat16 if supported() else None


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


def _twice(x: Tensor) -> Tensor:
    """Return a map (B, C, h, w) at twice its size: each cell four times."""
    return F.interpolate(x, scale_factor=2.0)


def _sample(features: Tensor, uv: Tensor, stride: int) -> Tensor:
    """Bilinear features (B, C, h, w) at pixels uv (B, N, 2): (B, C, N)."""
    h, w = features.shape[-2:]
    size = uv.new_tensor([w * stride, h * stride])
    grid = (uv + 0.5) * 2 / size - 1
    return F.grid_sample(
        features, grid.unsqueeze(1).to(features.dtype), mode='bilinear', padding_mode='border',
        align_corners=False,
    ).squeeze(2)


def _sample_fine(fine: Tensor, uv: Tensor) -> Tensor:
    """Bilinear unit descriptors (B, N, C), of a map (B, h, w, C) of any, at pixels (B, N, 2)."""
    batch, h, w, channels = fine.shape
    last = uv.new_tensor([w - 1, h - 1])
    at = ((uv + 0.5) / FINE - 0.5).clamp(min=torch.zeros_like(last), max=last)
    cell = at.detach().floor()
    right, below = (at - cell).unsqueeze(-2).unbind(-1)  # shares (B, N, 1)
    first = torch.arange(batch, device=uv.device).view(-1, 1) * (h * w)
    total = 0
    for x, y in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = torch.minimum(cell + cell.new_tensor([x, y]), last).long().unbind(-1)
        corner = fine.reshape(-1, channels).index_select(0, (first + row * w + column).flatten())
        corner = F.normalize(corner.to(uv.dtype), dim=-1).view(batch, -1, channels)
        total = total + (right if x else 1 - right) * (below if y else 1 - below) * corner
    return total


def _region(around: Tensor, target: Features) -> Tensor:
    """Which cells of the target (B, N, h * w) are searched around some places (B, N, 2) px."""
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
    Cells around (row, column) (B, N): their (x, y) (B, N, K, 2) and flat index (B, N, K).

    At the image's border the window is moved inwards, not cut: every query sees as many cells.
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
