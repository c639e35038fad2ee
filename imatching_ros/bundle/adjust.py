"""Levenberg-Marquardt with Schur elimination (paper, equation 1b): the reference implementation, plain torch.

Notation, for pose k = (R, c) and landmark p, with d = p - c and the camera coordinates q = R^T d:
an observation's residual e has the Jacobian A = de/dp (2x3). Moving the camera by ``lie.retract`` gives
de/dc = -A and, for a rotation about the world's axes, de/dw = A [d]x, that is J_c^T = -[I; [d]x] A^T: all of it
follows from A and d. So per (pose, landmark) cell only B = A^T M A (3x3) and b = A^T g are made, M and g being the
2x2 information and the 2-vector gradient summed over the cell's observations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imatching_ros.bundle.problem import BEHIND_PX, MIN_DEPTH, Problem
from imatching_ros.bundle.robust import Kernel
from imatching_ros.geometry import lie


@dataclass(frozen=True)
class AdjustOptions:
    kernel: Kernel = Kernel()
    max_iterations: int = 50
    relative_decrease: float = 1e-6  #: of the cost in the last step
    gradient: float = 1e-3  #: largest cosine between the residual and a column of the Jacobian


@dataclass(frozen=True)
class Solution:
    T_world_camera: Tensor  #: (K, 7) float64
    points: Tensor  #: (L, 3) float64; landmarks without observations as they came
    iterations: int  #: steps taken
    cost: float  #: 1/2 sum rho(s)
    relative_decrease: float  #: of the cost in the last step
    gradient_norm: float  #: as ``AdjustOptions.gradient``
    converged: bool
    covariance: Tensor  #: (K, 6, 6) of each pose relative to the gauge, as ``lie.retract``; zero where fixed


def adjust(problem: Problem, options: AdjustOptions = AdjustOptions(), fixed: Tensor | None = None) -> Solution:
    """Minimise 1/2 sum rho over poses and landmarks.

    fixed: (K,) bool, poses held; by default the first. Where fewer than two are held, the scale is fixed by the
    largest translation component of the pose farthest from the first held one.
    Deterministic on the CPU. The state is centred on the first pose while solving, for the sake of rounding.
    Raises ValueError where there is no observation or no pose is held.
    """
    if len(problem.pose) == 0:
        raise ValueError("there is nothing to adjust: the bundle has no valid observation")
    system = _System(problem, options.kernel)
    free = _free(problem.T_world_camera, fixed)
    state = system.start()
    cost, iterations, decrease, damping, growth = system.cost(state), 0, 1.0, 1e-4, 2.0
    while True:
        system.linearise(state, curved=decrease < 1e-2)
        gradient = system.gradient_norm(free)
        # A cost this small is rounding: the cosine between noise and Jacobian means nothing.
        exact = cost <= 1e-18 * len(problem.pose)
        converged = exact or (decrease < options.relative_decrease and gradient < options.gradient)
        if converged or iterations >= options.max_iterations:
            break
        while True:
            step = system.solve(damping, free)
            if step is not None:
                trial = system.move(state, step)
                trial_cost = system.cost(trial)
                predicted = system.predicted_decrease(step)
                if trial_cost < cost:
                    gain = (cost - trial_cost) / max(predicted, 1e-300)
                    damping = max(damping * max(1 / 10, 1 - (2 * gain - 1) ** 3), 1e-12)
                    growth = 2.0
                    break
                if predicted <= 1e-13 * cost:
                    break
            damping, growth = damping * growth, growth * 2
            if damping > 1e12:
                break
        if step is None or trial_cost >= cost:
            # No step decreases the cost: a stationary point to rounding, if the gradient says so.
            decrease, converged = 0.0, gradient < options.gradient
            break
        decrease, state, cost = (cost - trial_cost) / cost, trial, trial_cost
        iterations += 1
    T, points = system.finish(state)
    covariance = system.covariance(free)
    return Solution(T, points, iterations, cost, decrease, gradient, converged, covariance)


def _free(T_world_camera: Tensor, fixed: Tensor | None) -> Tensor:
    """Indices of the free ones among the 6 K pose parameters: the gauge."""
    K = len(T_world_camera)
    if fixed is None:
        fixed = torch.arange(K) == 0
    if not fixed.any():
        raise ValueError("at least one pose must be held, or the bundle can float away")
    free = (~fixed)[:, None].expand(K, 6).clone()
    if int(fixed.sum()) == 1:
        offset = T_world_camera[:, :3] - T_world_camera[int(fixed.int().argmax()), :3]
        farthest = int(offset.norm(dim=-1).argmax())
        free[farthest, int(offset[farthest].abs().argmax())] = False
    return free.flatten().nonzero().squeeze(-1).to(T_world_camera.device)


class _System:
    """The normal equations on a keyframe x landmark grid: planes of (K, L), so that every sum is one product.

    Cells that no observation fills carry zero information. Poses live as R (K, 3, 3) and c (K, 3), landmarks as
    p (3, L).
    """

    def __init__(self, problem: Problem, kernel: Kernel) -> None:
        self.problem, self.kernel = problem, kernel
        self.K, self.L = len(problem.T_world_camera), len(problem.points)
        self.cell = problem.pose * self.L + problem.landmark
        uu, uv, vv = problem.cov.unbind(-1)
        determinant = uu * vv - uv * uv
        self.information = torch.stack((vv, -uv, uu)) / determinant  # (3, O)
        self.x, self.y = problem.xy.unbind(-1)
        self.fx, self.fy = problem.focal.unbind()
        self.origin = problem.T_world_camera[0, :3]
        self.observed = torch.zeros(self.L, dtype=torch.bool, device=self.x.device)
        self.observed[problem.landmark] = True

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """The state (q (K, 4), c (K, 3), p (3, L))."""
        T = self.problem.T_world_camera
        # Landmarks that nothing observes may be anything: keep them out of the arithmetic.
        points = torch.where(self.observed[:, None], self.problem.points, self.origin)
        return T[:, 3:], T[:, :3] - self.origin, (points - self.origin).T.contiguous()

    def finish(self, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q, c, p = state
        points = torch.where(self.observed[:, None], p.T + self.origin, self.problem.points)
        return torch.cat((c + self.origin, q), -1), points

    def _project(self, state):
        q, c, p = state
        R = lie.rotation(q)
        d = p - c[:, :, None]  # (K, 3, L)
        X, Y, Z = (R.mT @ d).unbind(1)
        front = Z > MIN_DEPTH
        inverse = torch.where(front, Z, 1.0).reciprocal()
        return R, d, X * inverse, Y * inverse, inverse, front

    def _residual(self, u: Tensor, v: Tensor, front: Tensor):
        ex = self.fx * (u.flatten()[self.cell] - self.x)
        ey = self.fy * (v.flatten()[self.cell] - self.y)
        a, b, c = self.information
        gx, gy = a * ex + b * ey, b * ex + c * ey
        seen = front.flatten()[self.cell]
        s = torch.where(seen, ex * gx + ey * gy, BEHIND_PX**2)
        return s, gx, gy, seen

    def cost(self, state) -> float:
        _, _, u, v, _, front = self._project(state)
        cost = 0.5 * self.kernel.rho(self._residual(u, v, front)[0]).sum().item()
        return cost if cost == cost else float("inf")

    def linearise(self, state, curved: bool) -> None:
        """Gradient and Hessian at the state. ``curved``: with the kernel's true curvature along the residual, held
        above a fifth of the weight so that the system stays definite; plain reweighting converges only linearly."""
        R, d, u, v, inverse, front = self._project(state)
        s, gx, gy, seen = self._residual(u, v, front)
        weight = torch.where(seen, self.kernel.weight(s), 0.0)
        self.energy = (weight * s).sum().item()
        m = weight * self.information
        if curved:
            bend = weight * (1 - self.kernel.radial(s).clamp_min(0.2)) / s.clamp_min(1e-12)
            m = m - bend * torch.stack((gx * gx, gx * gy, gy * gy))
        cells = torch.zeros(5, self.K * self.L, dtype=u.dtype, device=u.device)
        for plane, values in zip(cells, (*m, weight * gx, weight * gy), strict=True):
            plane.index_add_(0, self.cell, values)
        mxx, mxy, myy, ex, ey = cells.view(5, self.K, 1, self.L).unbind()
        # Rows of A: fx / Z (R e1 - u R e3), fy / Z (R e2 - v R e3).
        right, down, ahead = R[:, :, :, None].unbind(2)
        ax = (self.fx * inverse)[:, None] * (right - u[:, None] * ahead)
        ay = (self.fy * inverse)[:, None] * (down - v[:, None] * ahead)
        b = ax * ex + ay * ey  # (K, 3, L)
        B = ax[:, :, None] * (mxx * ax + mxy * ay)[:, None] + ay[:, :, None] * (mxy * ax + myy * ay)[:, None]
        D = _cross(d[:, :, None], B)  # (K, 3, 3, L): [d]x B
        self.Hcp = -torch.cat((B, D), 1)  # (K, 6, 3, L)
        self.Hpp, self.gp = B.sum(0), b.sum(0)
        upper = torch.cat((B.sum(-1), D.sum(-1).mT), -1)
        lower = torch.cat((D.sum(-1), _cross(d[:, None], D, 2).sum(-1)), -1)
        self.Hcc = torch.cat((upper, lower), 1)  # (K, 6, 6)
        self.gc = -torch.cat((b.sum(-1), _cross(d, b).sum(-1)), -1).flatten()

    def gradient_norm(self, free: Tensor) -> float:
        if self.energy == 0:
            return 0.0
        camera = self.gc.abs() / self.Hcc.diagonal(dim1=1, dim2=2).flatten().clamp_min(1e-300).sqrt()
        point = self.gp.abs() / self.Hpp.diagonal(dim1=0, dim2=1).T.clamp_min(1e-300).sqrt()
        return torch.cat((camera[free], point.flatten())).max().item() / self.energy**0.5

    def _eliminate(self, damping: float):
        """Landmarks whitened by the closed-form Cholesky L L^T of their damped Hessians.

        Returns E = Hcp L^-T (6 K, 3 L), y = L^-1 gp (3, L) and the factor's six planes.
        """
        (h00, h10, h20), (_, h11, h21), (_, _, h22) = (row.unbind(0) for row in self.Hpp.unbind(0))
        lift, trace = 1 + damping, h00 + h11 + h22
        # Far landmarks hardly know their depth, unobserved ones nothing at all: never divide by less than this.
        floor = torch.where(trace > 0, 1e-14 * trace, 1.0)
        l00 = (h00 * lift).clamp_min(floor).sqrt()
        l10, l20 = h10 / l00, h20 / l00
        l11 = (h11 * lift - l10 * l10).clamp_min(floor).sqrt()
        l21 = (h21 - l20 * l10) / l11
        l22 = (h22 * lift - l20 * l20 - l21 * l21).clamp_min(floor).sqrt()
        E = torch.empty_like(self.Hcp)
        torch.div(self.Hcp[:, :, 0], l00, out=E[:, :, 0])
        torch.div(self.Hcp[:, :, 1] - l10 * E[:, :, 0], l11, out=E[:, :, 1])
        torch.div(self.Hcp[:, :, 2] - l20 * E[:, :, 0] - l21 * E[:, :, 1], l22, out=E[:, :, 2])
        y0 = self.gp[0] / l00
        y1 = (self.gp[1] - l10 * y0) / l11
        y2 = (self.gp[2] - l20 * y0 - l21 * y1) / l22
        return E.view(6 * self.K, 3 * self.L), torch.stack((y0, y1, y2)), (l00, l10, l11, l20, l21, l22)

    def _reduced(self, E: Tensor, damping: float) -> Tensor:
        """Hcc - E E^T (6 K, 6 K)."""
        H = torch.block_diag(*self.Hcc)
        H.diagonal().mul_(1 + damping)
        return H - E @ E.T

    def solve(self, damping: float, free: Tensor) -> tuple[Tensor, Tensor] | None:
        """The damped step, poses (6 K,) and landmarks (3, L); None where the reduced system is not definite."""
        E, y, (l00, l10, l11, l20, l21, l22) = self._eliminate(damping)
        S = self._reduced(E, damping)[free][:, free]
        rhs = (E @ y.flatten() - self.gc)[free]
        factor, failed = torch.linalg.cholesky_ex(S)
        if failed.item():
            return None
        camera = torch.zeros_like(self.gc)
        camera[free] = torch.cholesky_solve(rhs[:, None], factor).squeeze(-1)
        z0, z1, z2 = -(y + (E.T @ camera).view(3, self.L))
        p2 = z2 / l22
        p1 = (z1 - l21 * p2) / l11
        p0 = (z0 - l10 * p1 - l20 * p2) / l00
        step = camera, torch.stack((p0, p1, p2))
        return step if all(part.isfinite().all() for part in step) else None

    def predicted_decrease(self, step: tuple[Tensor, Tensor]) -> float:
        """How much the undamped quadratic model falls along the step."""
        camera, point = step
        gradient = (self.gc * camera).sum() + (self.gp * point).sum()
        by_pose = camera.view(self.K, 6)
        mixed = torch.einsum("kc,kcil->il", by_pose, self.Hcp)
        curvature = torch.einsum("kc,kcd,kd->", by_pose, self.Hcc, by_pose)
        curvature = curvature + (2 * mixed * point).sum() + torch.einsum("il,ijl,jl->", point, self.Hpp, point)
        return -(gradient + 0.5 * curvature).item()

    def move(self, state, step):
        q, c, p = state
        T = lie.retract(torch.cat((c, q), -1), step[0].view(self.K, 6))
        return T[:, 3:], T[:, :3], p + step[1]

    def covariance(self, free: Tensor) -> Tensor:
        """Marginal covariance (K, 6, 6) of each pose: blocks of the reduced system's inverse."""
        E, _, _ = self._eliminate(1e-9)
        S = self._reduced(E, 1e-9)[free][:, free]
        full = torch.zeros(6 * self.K, 6 * self.K, dtype=S.dtype, device=S.device)
        factor, failed = torch.linalg.cholesky_ex(S)
        if failed.item():
            return torch.full((self.K, 6, 6), float("inf"), dtype=S.dtype, device=S.device)
        full[free[:, None], free] = torch.cholesky_inverse(factor)
        return full.view(self.K, 6, self.K, 6).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _cross(d: Tensor, M: Tensor, dim: int = 1) -> Tensor:
    """Cross product d x M along ``dim``, broadcasting (torch.linalg.cross first copies what it broadcasts)."""
    (dx, dy, dz), (mx, my, mz) = d.unbind(dim), M.unbind(dim)
    return torch.stack((dy * mz - dz * my, dz * mx - dx * mz, dx * my - dy * mx), dim)
