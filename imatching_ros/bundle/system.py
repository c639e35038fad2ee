"""The normal equations of bundle adjustment in plain torch: the reference of every back end.

For pose k = (R, c) and landmark p let d = p - c. An observation's residual e has the Jacobian A = de/dp (2x3);
moving the camera by ``lie.retract`` gives de/dc = -A and, for a rotation about the world's axes, de/dw = A [d]x:
J_c^T = -[I; [d]x] A^T. All observations of one (pose, landmark) cell share A and d, so that they are first summed to a
2x2 information M = C C^T and a 2-vector gradient; with W = A^T C (3x2) and V = [I; [d]x] W (6x2) the blocks of the
normal equations are

    Hcc = sum_l V V^T,   Hpp = sum_k W W^T,   Hcp = -V W^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imatching_ros.bundle.problem import BEHIND_PX, MIN_DEPTH, Problem
from imatching_ros.bundle.robust import Kernel
from imatching_ros.geometry import lie


@dataclass(frozen=True)
class Estimate:
    """A state, what its observations say, and its cost. K poses, L landmarks, O observations."""

    q: Tensor  # (K, 4)
    c: Tensor  # (K, 3)
    p: Tensor  # (3, L)
    R: Tensor  # (K, 3, 3)
    d: Tensor  # (K, 3, L)
    u: Tensor  # (K, L): where p projects, on the plane z = 1
    v: Tensor
    inverse: Tensor  # (K, L): of the depth
    seen: Tensor  # (O,): in front
    g: Tensor  # (2, O): information times residual
    s: Tensor  # (O,): squared whitened residual
    cost: Tensor  # scalar, with the prior's


class System:
    """The normal equations on a keyframe x landmark grid: planes of (K, L), so that every sum is one product.

    Cells that no observation fills carry no information. free: indices of the free ones among the 6 K pose parameters.
    dtype: of the Jacobian and of the elimination's products; a single precision only the step feels, by about seven
    digits, and the next one repairs it.
    """

    def __init__(self, problem: Problem, kernel: Kernel, free: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.problem, self.kernel, self.free, self.dtype = problem, kernel, free, dtype
        self.K, self.L = len(problem.T_world_camera), len(problem.points)
        self.cell = problem.pose * self.L + problem.landmark
        uu, uv, vv = problem.cov.unbind(-1)
        self.information = torch.stack((vv, -uv, uu)) / (uu * vv - uv * uv)  # (3, O)
        self.x, self.y = problem.xy.T.contiguous()
        self.fx, self.fy = problem.focal.unbind()
        self.origin = problem.T_world_camera[0, :3]
        self.observed = torch.zeros(self.L, dtype=torch.bool, device=self.x.device)
        self.observed[problem.landmark] = True
        self.E = self.x.new_empty(self.K, 6, 3, self.L, dtype=dtype)
        if problem.prior is not None:
            self.known = (6 * problem.prior.pose[:, None] + torch.arange(6).to(problem.pose)).flatten()

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """q (K, 4), c (K, 3), p (3, L), centred."""
        T = self.problem.T_world_camera
        # Landmarks that nothing observes may be anything: keep them out of the arithmetic.
        points = torch.where(self.observed[:, None], self.problem.points, self.origin)
        return T[:, 3:], T[:, :3] - self.origin, (points - self.origin).T.contiguous()

    def finish(self, at: Estimate) -> tuple[Tensor, Tensor]:
        points = torch.where(self.observed[:, None], at.p.T + self.origin, self.problem.points)
        return torch.cat((at.c + self.origin, at.q), -1), points

    def evaluate(self, q: Tensor, c: Tensor, p: Tensor) -> Estimate:
        R = lie.rotation(q)
        d = p - c[:, :, None]
        X, Y, Z = (R.mT @ d).unbind(1)
        front = Z > MIN_DEPTH
        inverse = torch.where(front, Z, 1.0).reciprocal()
        u, v = X * inverse, Y * inverse
        ex = self.fx * (u.view(-1)[self.cell] - self.x)
        ey = self.fy * (v.view(-1)[self.cell] - self.y)
        xx, xy, yy = self.information
        gx, gy = xx * ex + xy * ey, xy * ex + yy * ey
        seen = front.view(-1)[self.cell]
        s = torch.where(seen, ex * gx + ey * gy, BEHIND_PX**2)
        cost = 0.5 * self.kernel.rho(s).sum()
        if self.problem.prior is not None:
            cost = cost + self.problem.prior.cost(torch.cat((c + self.origin, q), -1))
        return Estimate(q, c, p, R, d, u, v, inverse, seen, torch.stack((gx, gy)), s, cost)

    def linearise(self, at: Estimate, curved: Tensor | bool) -> None:
        """The blocks at a state. ``curved``: with the kernel's true curvature along the residual, held above a fifth
        of the weight so that the system stays definite; reweighting alone converges only linearly. Far from the optimum
        it overshoots: only once the cost falls by less than 1e-4."""
        weight = torch.where(at.seen, self.kernel.weight(at.s), 0.0)
        self.energy = (weight * at.s).sum()
        bend = curved * weight * (1 - self.kernel.radial(at.s).clamp_min(0.2)) / at.s.clamp_min(1e-12)
        gx, gy = at.g
        m = weight * self.information - bend * torch.stack((gx * gx, gx * gy, gy * gy))
        cells = self.x.new_zeros(5, self.K * self.L)
        cells.index_add_(1, self.cell, torch.cat((m, weight * at.g)))
        xx, xy, yy, gx, gy = cells.view(5, self.K, 1, self.L)
        # Rows of A: fx / Z (R e1 - u R e3) and fy / Z (R e2 - v R e3).
        right, down, ahead = at.R[..., None].unbind(2)
        ax = (self.fx * at.inverse)[:, None] * (right - at.u[:, None] * ahead)  # (K, 3, L)
        ay = (self.fy * at.inverse)[:, None] * (down - at.v[:, None] * ahead)
        b = ax * gx + ay * gy
        self.gp = b.sum(0)  # (3, L)
        self.gc = -torch.cat((b.sum(-1), _cross(at.d, b).sum(-1)), -1).view(-1)  # (6 K,)
        c00 = xx.sqrt()
        c10 = xy / torch.where(xx > 0, c00, 1.0)
        c11 = (yy - c10 * c10).clamp_min(0).sqrt()
        # Rounded here, so that all blocks are those of one Jacobian.
        W = torch.stack((c00 * ax + c10 * ay, c11 * ay)).to(self.dtype)  # (2, K, 3, L)
        self.V = torch.cat((W, _cross(at.d.to(self.dtype), W)), 2)  # (2, K, 6, L)
        self.W = W.double()
        self.Hpp = torch.einsum("akil,akjl->ijl", self.W, self.W)
        self.Hcc = torch.block_diag(*(self.V @ self.V.mT).sum(0).double())  # (6 K, 6 K)
        if self.problem.prior is not None:
            T = torch.cat((at.c + self.origin, at.q), -1)
            H, g = self.problem.prior.linearise(T)
            self.Hcc[self.known[:, None], self.known] += H
            self.gc[self.known] += g
            self.energy = self.energy + 2 * self.problem.prior.cost(T)

    def gradient_norm(self) -> Tensor:
        """The largest cosine between the whitened residual and a column of its Jacobian, scalar."""
        camera = self.gc.abs() / self.Hcc.diagonal().clamp_min(1e-300).sqrt()
        point = self.gp.T.abs() / self.Hpp.diagonal(dim1=0, dim2=1).clamp_min(1e-300).sqrt()
        worst = torch.cat((camera[self.free], point.reshape(-1))).max()
        return torch.where(self.energy > 0, worst / self.energy.clamp_min(1e-300).sqrt(), 0.0)

    def reduce(self, damping: Tensor | float) -> tuple[Tensor, Tensor]:
        """The reduced camera system, landmarks eliminated: its matrix (6 K, 6 K) and gradient (6 K,)."""
        # Landmarks whitened by the closed-form Cholesky L L^T of their Hessians.
        (h00, h10, h20), (_, h11, h21), (_, _, h22) = self.Hpp
        lift, trace = 1 + damping, h00 + h11 + h22
        # Far landmarks hardly know their depth, unobserved ones nothing at all: never divide by less than this.
        floor = torch.where(trace > 0, 1e-14 * trace, 1.0)
        l00 = (h00 * lift).clamp_min(floor).rsqrt()  # the factor's diagonal is kept as its inverse
        l10, l20 = h10 * l00, h20 * l00
        l11 = (h11 * lift - l10 * l10).clamp_min(floor).rsqrt()
        l21 = (h21 - l20 * l10) * l11
        l22 = (h22 * lift - l20 * l20 - l21 * l21).clamp_min(floor).rsqrt()

        def whiten(x: Tensor) -> Tensor:  # L^-1 x, (..., 3, L)
            x0, x1, x2 = x.unbind(-2)
            y0 = x0 * l00
            y1 = (x1 - l10 * y0) * l11
            return torch.stack((y0, y1, (x2 - l20 * y0 - l21 * y1) * l22), -2)

        U = whiten(self.W).to(self.dtype)
        torch.mul(self.V[0, :, :, None], U[0, :, None], out=self.E)
        E = self.E.addcmul_(self.V[1, :, :, None], U[1, :, None]).view(6 * self.K, 3 * self.L)  # -Hcp L^-T
        y = whiten(self.gp)
        self.factor = l00, l10, l11, l20, l21, l22, y
        S = self.Hcc.clone()
        S.diagonal().mul_(lift)
        return S - (E @ E.T).double(), self.gc + (E @ y.view(-1).to(self.dtype)).double()

    def solve(self, damping: Tensor | float) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The damped step, poses (6 K,) and landmarks (3, L); and whether the reduced system is definite. If not, the
        step is zero."""
        S, gradient = self.reduce(damping)
        S.diagonal().add_(self.Hcc.diagonal() == 0)  # what nothing observes stays where it is
        factor, failed = torch.linalg.cholesky_ex(S[self.free][:, self.free])
        camera = torch.zeros_like(gradient)
        camera[self.free] = torch.cholesky_solve(-gradient[self.free, None], factor).squeeze(-1)
        camera = torch.where(failed == 0, camera, 0.0)
        l00, l10, l11, l20, l21, l22, y = self.factor
        E = self.E.view(6 * self.K, 3 * self.L)
        z0, z1, z2 = (E.T @ camera.to(self.dtype)).double().view(3, self.L) - y
        p2 = z2 * l22
        p1 = (z1 - l21 * p2) * l11
        p0 = (z0 - l10 * p1 - l20 * p2) * l00
        return (camera, torch.stack((p0, p1, p2))), failed == 0

    def predicted_decrease(self, step: tuple[Tensor, Tensor], damping: Tensor) -> Tensor:
        """How much the quadratic model falls along the step that solved it."""
        camera, point = step
        slope = (self.gc * camera).sum() + (self.gp * point).sum()
        held = (self.Hcc.diagonal() * camera * camera).sum()
        held = held + (self.Hpp.diagonal(dim1=0, dim2=1).T * point * point).sum()
        return 0.5 * (damping * held - slope)

    def move(self, at: Estimate, step: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        T = lie.retract(torch.cat((at.c, at.q), -1), step[0].view(self.K, 6))
        return T[:, 3:], T[:, :3], at.p + step[1]


def _cross(d: Tensor, x: Tensor) -> Tensor:
    """d x x along the last dimension but one, broadcasting."""
    (dx, dy, dz), (ax, ay, az) = d.unbind(-2), x.unbind(-2)
    return torch.stack((dy * az - dz * ay, dz * ax - dx * az, dx * ay - dy * ax), -2)
