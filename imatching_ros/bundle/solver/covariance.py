"""How well a solved problem knows its poses."""

from __future__ import annotations

import torch
from torch import Tensor

from .adjust import arrays, compiled, free_parameters
from .problem import Problem
from .robust import Kernel, KERNELS
from .system import System


def covariance(
    problem: Problem, kernel: Kernel, fixed: Tensor | None = None, backend: str = 'auto'
) -> Tensor:
    """
    Return the covariances (K, 6, 6) of a solved problem's poses, in ``lie.retract``'s coordinates.

    They are the diagonal blocks of the reduced camera system's inverse, landmarks and prior
    included, in the gauge of ``adjust``. fixed: (K,) bool as there, or (K, 6) bool, single
    parameters. backend: as in ``AdjustOptions``.

    The information of an observation is J^T cov^-1 J times the kernel's weight rho'(s) at the
    solution. For Gaussian noise this is right without a kernel, and for Huber at two standard
    deviations within 1 % (its weights make up for what its bounded influence loses). It is the
    covariance of the observations' noise only, not of wrong correspondences. Held parameters have
    zeros; what nothing determines has a large, finite variance. Compiled, the Jacobian is rounded
    to single precision: some 1e-4 of the largest variance.
    """
    with torch.inference_mode(False), torch.no_grad():
        K = len(problem.T_world_camera)
        if fixed is not None and fixed.dim() == 2:
            free = (~fixed).flatten().nonzero().squeeze(-1)
        else:
            free = free_parameters(problem.T_world_camera, fixed)
        if backend != 'eager' and problem.points.device.type == 'cpu' and compiled():
            S = torch.from_numpy(
                compiled().reduced_system(
                    *arrays(problem), KERNELS.index(kernel.name), float(kernel.scale)
                )
            )
            if problem.prior is not None:
                prior, _ = problem.prior.linearise(problem.T_world_camera)
                rows = (6 * problem.prior.pose[:, None] + torch.arange(6)).flatten()
                S[rows[:, None], rows] += prior
        else:
            system = System(problem, kernel, free, torch.float64)
            system.linearise(system.evaluate(*system.start()), curved=False)
            S, _ = system.reduce(0.0)
        S = S[free][:, free]
        # Of one size, so that metres and radians do not matter to what counts as undetermined.
        scale = S.diagonal().clamp_min(1e-12).rsqrt()
        S = S * scale * scale[:, None]
        factor, failed = torch.linalg.cholesky_ex(S)
        if failed or float(factor.diagonal().amin() if len(free) else 1.0) < 1e-6:
            values, vectors = torch.linalg.eigh(S)
            inverse = (vectors / values.clamp_min(1e-12)) @ vectors.T
        else:
            inverse = torch.cholesky_inverse(factor)
        full = S.new_zeros(6 * K, 6 * K)
        full[free[:, None], free] = inverse * scale * scale[:, None]
        return full.view(K, 6, K, 6).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
