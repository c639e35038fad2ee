"""The network that makes features of images, which the families match with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn, Tensor
import torch.nn.functional as F

COARSE, RELIABILITY, FINE = 8, 4, 2  # strides of the three maps, px
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


class Encoder(nn.Module):
    """
    A pyramid of convolutions that says of an image what its places look like (paper 3.2.1).

    ``batch_norm`` is for training from nothing; ``folded`` gives the same function without, which
    is what ships.
    """

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        #: what builds the same network again, as keyword arguments, beside the defaults
        self.configuration: dict[str, Any] = {'batch_norm': True} if batch_norm else {}

        def conv(
            inputs: int, outputs: int, stride: int = 1, groups: int = 1, kernel: int = 3
        ) -> nn.Sequential:
            convolution = nn.Conv2d(
                inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=not batch_norm
            )
            norms = [nn.BatchNorm2d(outputs)] if batch_norm else []
            return nn.Sequential(convolution, *norms, nn.ReLU(inplace=True))

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

    def folded(self) -> Encoder:
        """
        Return the same function in evaluation mode, without batch normalisation.

        Each normalisation is folded into the convolution before it.
        """
        plain = type(self)(**{**self.configuration, 'batch_norm': False})
        known = plain.state_dict().keys()
        state = {name: tensor for name, tensor in self.state_dict().items() if name in known}
        for name, block in self.named_modules():
            if [type(layer) for layer in block.children()][:2] == [nn.Conv2d, nn.BatchNorm2d]:
                fused = nn.utils.fusion.fuse_conv_bn_eval(block[0].eval(), block[1].eval())
                state[f'{name}.0.weight'], state[f'{name}.0.bias'] = fused.weight, fused.bias
        plain.load_state_dict(state)
        return plain.eval()

    def encode(self, images: Tensor, exact: bool = False) -> Features:
        """
        Return the features of images (B, 1, H, W) in [0, 1].

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
        Return the coarse, the fine and the reliability map of normalised images (B, 1, H, W).

        Both edges of the images are multiples of ``MULTIPLE``; the maps have the strides
        ``COARSE``, ``FINE`` and ``RELIABILITY``.
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
        # Channels stay last: the gradient of any other order is copied three times
        finer = F.conv2d(y4, *by_pixel).permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))
        y2 = self.from_2(x2).permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        y2 = (y2 + finer.transpose(2, 3)).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        return self.coarse_head(y8), self.fine_head(y2), self.reliability_head(y4)

    def reliability(self, features: Features, uv: Tensor) -> Tensor:
        """
        Return the log odds (B, N) that points uv (B, N, 2) px are found to a pixel.

        They are known before any match, from the image alone.
        """
        height, width = (RELIABILITY * edge for edge in features.reliability.shape[-2:])
        grid = (uv + 0.5) * 2 / uv.new_tensor([width, height]) - 1
        return F.grid_sample(
            features.reliability, grid.unsqueeze(1).to(features.reliability.dtype),
            mode='bilinear', padding_mode='border', align_corners=False,
        )[:, 0, 0]


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


def _twice(x: Tensor) -> Tensor:
    """Return a map (B, C, h, w) at twice its size: each cell four times."""
    return F.interpolate(x, scale_factor=2.0)


def sample_coarse(coarse: Tensor, uv: Tensor) -> Tensor:
    """Return the descriptors (B, C, N) of a coarse map (B, C, h, w) at pixels uv (B, N, 2)."""
    h, w = coarse.shape[-2:]
    size = uv.new_tensor([w * COARSE, h * COARSE])
    grid = (uv + 0.5) * 2 / size - 1
    return F.grid_sample(
        coarse, grid.unsqueeze(1).to(coarse.dtype), mode='bilinear', padding_mode='border',
        align_corners=False,
    ).squeeze(2)


def sample_fine(fine: Tensor, uv: Tensor) -> Tensor:
    """
    Return the descriptors (B, N, C) of a fine map (B, h, w, C) at pixels uv (B, N, 2).

    Those of the four cells around a pixel are made unit before they are interpolated.
    """
    batch, h, w, channels = fine.shape
    last = uv.new_tensor([w - 1, h - 1])
    at = ((uv + 0.5) / FINE - 0.5).clamp(min=torch.zeros_like(last), max=last).unsqueeze(1)
    cell = at.detach().floor()
    step = uv.new_tensor([[0, 0], [1, 0], [0, 1], [1, 1]]).unsqueeze(1)  # to the corners (4, 1, 2)
    beyond = at - cell
    share = torch.where(step > 0, beyond, 1 - beyond).prod(-1, keepdim=True)  # (B, 4, N, 1)
    column, row = torch.minimum(cell + step, last).long().unbind(-1)
    first = torch.arange(batch, device=uv.device).view(-1, 1, 1) * (h * w)
    # All at once: each selection has a gradient as large as the map
    index = (first + row * w + column).flatten()
    corner = fine.reshape(-1, channels).index_select(0, index).to(uv.dtype)
    return (share * F.normalize(corner, dim=-1).view(batch, 4, -1, channels)).sum(1)
