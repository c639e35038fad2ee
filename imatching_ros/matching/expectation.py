"""
The expectation-based family.

A feature pyramid, a coarse expectation, a windowed fine expectation (paper 3.2.1), and what tells
good matches from bad ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn, Tensor
import torch.nn.functional as F

from .protocol import Matches

COARSE, RELIABILITY, FINE = 8, 4, 2  # strides of the three maps, px
COARSE_RADIUS, FINE_RADIUS = 2, 4  # half sizes of the windows that are searched, cells
MEAN_RADIUS = 2  # half size of the window of the fine mean, around its mode, cells
MULTIPLE = 32  # px, the coarsest stride: images are extended to it


@dataclass(frozen=True)
class Features:
    """What the network says of a batch of images; what a keyframe caches. Descriptors are unit."""

    coarse: Tensor  #: (B, 64, ceil(H/32)*4, ceil(W/32)*4), 8x8 at least
    #: (B, ceil(H/32)*16, ceil(W/32)*16, 32), channels last: windows gather whole descriptors
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
    around the most similar cell of the whole image, the fine one around the most similar cell near
    the coarse result. S is the softmax of scaled cosine similarities.

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
        self.fine_head = nn.Sequential(nn.ReLU(), depthwise(32), pointwise(32, 32))
        self.reliability_head = nn.Sequential(nn.ReLU(), conv(32, 16), pointwise(16, 1))
        self.log_scale_coarse = nn.Parameter(torch.tensor(3.0))
        self.log_scale_fine = nn.Parameter(torch.tensor(3.0))
        # Covariance = exp(a) * spread of the fine expectation + exp(b) px^2: calibrated in
        # training.
        self.log_cov = nn.Parameter(torch.tensor([-1.0, -2.0]))
        # The score's weights of its evidence (`score`): fitted after training
        self.log_odds = nn.Parameter(torch.tensor([0.5, 0.5, 1.0, 1.0, 0.0]))

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

    def encode(self, images: Tensor) -> Features:
        """
        Features of images (B, 1, H, W) in [0, 1].

        Brightness and contrast are normalised away. Without gradients the convolutions run in half
        precision where the processor has it: matches move by hundredths of a pixel.
        """
        height, width = images.shape[-2:]
        std, mean = torch.std_mean(images, dim=(-2, -1), keepdim=True)
        x = (images - mean) / (std + 1e-3)
        # A multiple of the coarsest stride, and enough for one window of the coarse expectation
        x = F.pad(
            x, (0, max(-width % MULTIPLE, 64 - width), 0, max(-height % MULTIPLE, 64 - height)),
            mode='replicate',
        )
        x = x.contiguous(memory_format=torch.channels_last)
        half = None if torch.is_grad_enabled() else half_precision(x.device)
        with torch.autocast(x.device.type, half, enabled=half is not None):
            coarse, fine, reliability = self.maps(x)
        coarse = F.normalize(coarse.float(), dim=1).contiguous()
        fine = F.normalize(fine.permute(0, 2, 3, 1).float(), dim=-1).contiguous()
        return Features(coarse, fine, reliability.float(), (height, width))

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
        y2 = self.from_2(x2) + F.pixel_shuffle(self.up_2(y4), 2)
        return self.coarse_head(y8), self.fine_head(y2), self.reliability_head(y4)

    def match(self, reference: Features, target: Features, queries: Tensor) -> Matches:
        """
        Find queries (B, N, 2), px in the reference, in the target (equation 5, coarse then fine).

        The positions of the windows are not differentiated, what lies in them is: coarse_uv
        carries gradient to the coarse descriptors, uv to the fine ones.
        """
        log_similarity = self.coarse_similarity(reference, target, queries)
        coarse_uv, coarse_mass = self.coarse_expectation(log_similarity, target)
        similarity, cells = self.fine_similarity(reference, target, queries, coarse_uv.detach())
        uv, spread, fine_mass = self.fine_expectation(similarity, cells)
        cov = (
            spread * self.log_cov[0].exp()
            + torch.eye(2, dtype=uv.dtype, device=uv.device) * self.log_cov[1].exp()
        )
        score = self.score(
            self.reliability(reference, queries), self.reliability(target, uv.detach()),
            coarse_mass, fine_mass,
        )
        return Matches(uv, coarse_uv, score, cov)

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

        Coarse_uv (B, N, 2) px, and S within the window (B, N).
        """
        h, w = target.coarse.shape[-2:]
        mode = log_similarity.detach().argmax(-1)
        cells, index = _window(mode // w, mode % w, COARSE_RADIUS, h, w)
        window = log_similarity.gather(-1, index)
        uv = (window.softmax(-1).unsqueeze(-1) * cells).sum(-2) * COARSE + (COARSE - 1) / 2
        return uv, (window.logsumexp(-1) - log_similarity.logsumexp(-1)).exp()

    def fine_similarity(
        self, reference: Features, target: Features, queries: Tensor, centre: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Return scaled cosine similarities (B, N, 81) of queries (B, N, 2) with a window's cells.

        The window lies around ``centre`` (B, N, 2) px; its cells (B, N, 81, 2) are x, y.
        """
        batch, h, w, channels = target.fine.shape
        descriptors = F.normalize(
            _sample(reference.fine.permute(0, 3, 1, 2), queries, FINE), dim=1
        )  # (B, 32, N)
        cell = ((centre - (FINE - 1) / 2) / FINE).round().long()
        cells, index = _window(cell[..., 1], cell[..., 0], FINE_RADIUS, h, w)
        first = torch.arange(batch, device=index.device).view(-1, 1, 1) * (h * w)
        # index_select, for the gradient of plain indexing adds up in an order that varies from run
        # to run
        window = target.fine.reshape(-1, channels).index_select(0, (index + first).flatten())
        window = window.view(*index.shape, channels)  # (B, N, 81, 32)
        descriptors = descriptors.transpose(1, 2) * self.log_scale_fine.exp()
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
            features.reliability, grid.unsqueeze(1), mode='bilinear', padding_mode='border',
            align_corners=False,
        )[:, 0, 0]

    def score(
        self, reference: Tensor, target: Tensor, coarse_mass: Tensor, fine_mass: Tensor
    ) -> Tensor:
        """
        Return the probability (B, N) that a match lies within a pixel of the truth.

        Its evidence are the reliability at both ends and how much of S lies within the windows
        of the two means.
        """
        a, b, c, d, e = self.log_odds
        least = 1e-6
        return torch.sigmoid(
            a * reference + b * target + c * coarse_mass.clamp_min(least).log()
            + d * fine_mass.clamp_min(least).log() + e
        )


@lru_cache
def half_precision(device: torch.device) -> torch.dtype | None:
    """Return the type in which a device multiplies faster than in float32, None where none is."""
    if device.type == 'cuda':
        return torch.float16
    # Since torch 2.2; emulated bfloat16 would be slower
    supported = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)
    return torch.bfloat16 if device.type == 'cpu' and supported() else None


def _twice(x: Tensor) -> Tensor:
    """Return a map (B, C, h, w) at twice its size: each cell four times."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def _sample(features: Tensor, uv: Tensor, stride: int) -> Tensor:
    """Bilinear features (B, C, h, w) at pixels uv (B, N, 2): (B, C, N)."""
    h, w = features.shape[-2:]
    size = uv.new_tensor([w * stride, h * stride])
    grid = (uv + 0.5) * 2 / size - 1
    return F.grid_sample(
        features, grid.unsqueeze(1).to(features.dtype), mode='bilinear', padding_mode='border',
        align_corners=False,
    ).squeeze(2)


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
