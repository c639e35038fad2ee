"""
The expectation-based family.

A feature pyramid, a coarse expectation, a windowed fine expectation (paper 3.2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn, Tensor
import torch.nn.functional as F

from .protocol import Matches

COARSE, FINE = 8, 2  # strides of the two feature maps, px
COARSE_RADIUS, FINE_RADIUS = 2, 4  # half sizes of the windows of the two expectations, cells


@dataclass(frozen=True)
class Features:
    """Unit descriptors of a batch of images; what a keyframe caches."""

    coarse: Tensor  #: (B, 64, ceil(H/16)*2, ceil(W/16)*2), 6x6 at least
    #: (B, ceil(H/16)*8, ceil(W/16)*8, 32), channels last: windows gather whole descriptors
    fine: Tensor
    size: tuple[int, int]  #: H, W of the images

    def __getitem__(self, index: slice) -> Features:
        return Features(self.coarse[index], self.fine[index], self.size)


class ExpectationMatcher(nn.Module):
    """
    f_theta by expectation (paper, equation 5), in two stages (paper 3.2.3).

    Equation 5 weights every location of the target by its similarity S. Over a whole image that
    mean is dragged between look-alike places, so each stage takes it over a window: the coarse one
    around the most similar cell of the whole image, the fine one around the coarse result. S is
    the softmax of scaled cosine similarities.

    ``batch_norm`` is for training from nothing; ``folded`` gives the same function without, which
    is what ships.
    """

    family = 'expectation'

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            layers = [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not batch_norm)]
            return nn.Sequential(
                *layers, *[nn.BatchNorm2d(outputs)] * batch_norm, nn.ReLU(inplace=True)
            )

        self.to_2 = nn.Sequential(conv(1, 16, 2), conv(16, 24))
        self.to_4 = nn.Sequential(conv(24, 48, 2), conv(48, 48))
        self.to_8 = nn.Sequential(conv(48, 64, 2), conv(64, 64))
        self.to_16 = nn.Sequential(conv(64, 96, 2), conv(96, 96))
        self.to_32 = nn.Sequential(conv(96, 128, 2), conv(128, 128))
        self.from_32 = _Pointwise(128, 64)
        self.from_16 = _Pointwise(96, 64)
        self.from_8 = _Pointwise(64, 64)
        self.coarse_head = nn.Sequential(conv(64, 64), _Pointwise(64, 64))
        self.context_4 = _Pointwise(64, 32)
        self.from_4 = _Pointwise(48, 32)
        self.from_2 = _Pointwise(24, 32)
        self.fine_head = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Sequential(
                nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=not batch_norm),
                *[nn.BatchNorm2d(32)] * batch_norm,
            ),
            _Pointwise(32, 32),
            nn.ReLU(inplace=True),
            _Pointwise(32, 32),
        )
        self.log_scale_coarse = nn.Parameter(torch.tensor(3.0))
        self.log_scale_fine = nn.Parameter(torch.tensor(3.0))
        # Covariance = exp(a) * spread of the fine expectation + exp(b) px^2: calibrated in
        # training.
        self.log_cov = nn.Parameter(torch.tensor([-1.0, -2.0]))

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

        Brightness and contrast are normalised away.
        """
        height, width = images.shape[-2:]
        std, mean = torch.std_mean(images, dim=(-2, -1), keepdim=True)
        x = (images - mean) / (std + 1e-3)
        # A multiple of 16, and enough for one window of the coarse expectation
        x = F.pad(
            x, (0, max(-width % 16, 48 - width), 0, max(-height % 16, 48 - height)),
            mode='replicate',
        )
        x = x.contiguous(memory_format=torch.channels_last)
        x2 = self.to_2(x)
        x4 = self.to_4(x2)
        x8 = self.to_8(x4)
        x16 = self.to_16(x8)
        x32 = self.to_32(x16)
        y16 = self.from_16(x16) + _resize(self.from_32(x32), x16)
        y8 = self.from_8(x8) + _resize(y16, x8)
        y4 = self.from_4(x4) + _resize(self.context_4(y8), x4)
        y2 = self.from_2(x2) + _resize(y4, x2)
        coarse = F.normalize(self.coarse_head(y8), dim=1).contiguous()
        fine = F.normalize(self.fine_head(y2), dim=1).permute(0, 2, 3, 1).contiguous()
        return Features(coarse, fine, (height, width))

    def match(self, reference: Features, target: Features, queries: Tensor) -> Matches:
        """
        Find queries (B, N, 2), px in the reference, in the target (equation 5, coarse then fine).

        The positions of the windows are not differentiated, what lies in them is: coarse_uv
        carries gradient to the coarse descriptors, uv to the fine ones.
        """
        log_similarity = self.coarse_similarity(reference, target, queries)
        coarse_uv, mass = self.coarse_expectation(log_similarity, target)
        uv, spread = self.fine_expectation(reference, target, queries, coarse_uv.detach())
        cov = (
            spread * self.log_cov[0].exp()
            + torch.eye(2, dtype=uv.dtype, device=uv.device) * self.log_cov[1].exp()
        )
        return Matches(uv, coarse_uv, mass, cov)

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
        weights = window.softmax(-1)
        uv = (weights.unsqueeze(-1) * cells).sum(-2) * COARSE + (COARSE - 1) / 2
        mass = (window.logsumexp(-1) - log_similarity.logsumexp(-1)).exp()
        return uv, mass

    def fine_expectation(
        self, reference: Features, target: Features, queries: Tensor, centre: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Equation 5 over the window around ``centre`` (B, N, 2) px.

        Uv (B, N, 2) px, its spread (B, N, 2, 2) px^2.
        """
        batch, h, w, channels = target.fine.shape
        descriptors = F.normalize(
            _sample(reference.fine.permute(0, 3, 1, 2), queries, FINE), dim=1
        )  # (B, 32, N)
        cell = ((centre - (FINE - 1) / 2) / FINE).round().long()
        # (B, N, 81, 2), (B, N, 81)
        cells, index = _window(cell[..., 1], cell[..., 0], FINE_RADIUS, h, w)
        first = torch.arange(batch, device=index.device).view(-1, 1, 1) * (h * w)
        # index_select, for the gradient of plain indexing adds up in an order that varies from run
        # to run
        window = target.fine.reshape(-1, channels).index_select(0, (index + first).flatten())
        window = window.view(*index.shape, channels)  # (B, N, 81, 32)
        descriptors = descriptors.transpose(1, 2) * self.log_scale_fine.exp()
        similarity = (window @ descriptors.unsqueeze(-1)).squeeze(-1)
        weights = similarity.softmax(-1).unsqueeze(-1)
        mean = (weights * cells).sum(-2)
        offset = cells - mean.unsqueeze(-2)
        spread = torch.einsum('bnki,bnkj->bnij', weights * offset, offset) * FINE**2
        return mean * FINE + (FINE - 1) / 2, spread


class _Pointwise(nn.Linear):
    """
    A 1x1 convolution as the matrix product that it is.

    Torch's own takes a slow path on one thread.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode='bilinear', align_corners=False)


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
