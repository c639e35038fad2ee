"""Robust kernels, defined once for both levels of the bilevel problem (equations 1a and 1b)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KERNELS = ('none', 'huber', 'cauchy', 'geman_mcclure')


@dataclass(frozen=True)
class Kernel:
    """
    The cost rho(s) of a squared whitened residual s >= 0, of which the objective is half the sum.

    Near zero rho(s) ~ s; ``scale`` is in standard deviations. Raises ValueError for an unknown
    name or a scale that is not positive.
    """

    name: str = 'huber'
    scale: float = 2.0

    def __post_init__(self) -> None:
        if self.name not in KERNELS:
            raise ValueError(
                f"robust kernel '{self.name}' is not known; use one of {', '.join(KERNELS)}"
            )
        if not self.scale > 0:
            raise ValueError(f"the robust kernel's scale is {self.scale:g}, it must be positive")

    def rho(self, s: Tensor) -> Tensor:
        """Return the cost of s, differentiable (also at s = 0)."""
        c2 = self.scale**2
        if self.name == 'huber':
            # clamp_min keeps the root's slope finite in the branch that is not taken
            return torch.where(s <= c2, s, 2 * self.scale * s.clamp_min(c2).sqrt() - c2)
        if self.name == 'cauchy':
            return c2 * torch.log1p(s / c2)
        if self.name == 'geman_mcclure':
            return c2 * s / (c2 + s)
        return s

    def weight(self, s: Tensor) -> Tensor:
        """Return rho'(s), the residual's weight in iteratively reweighted least squares."""
        c2 = self.scale**2
        if self.name == 'huber':
            return self.scale / s.clamp_min(c2).sqrt()
        if self.name == 'cauchy':
            return c2 / (c2 + s)
        if self.name == 'geman_mcclure':
            return (c2 / (c2 + s)).square()
        return torch.ones_like(s)

    def radial(self, s: Tensor) -> Tensor:
        """
        Return the true curvature along the residual, as a part of the weight.

        It is 1 + 2 s rho''(s) / rho'(s): one where the kernel is quadratic, zero or less where
        more residual costs ever less.
        """
        c2 = self.scale**2
        if self.name == 'huber':
            return (s <= c2).to(s.dtype)
        if self.name == 'cauchy':
            return (c2 - s) / (c2 + s)
        if self.name == 'geman_mcclure':
            return (c2 - 3 * s) / (c2 + s)
        return torch.ones_like(s)
