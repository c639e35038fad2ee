"""
The normal equations of bundle adjustment in plain torch: the reference of every back end.

For pose k = (R, c) and landmark p let d = p - c. An observation's residual e has the Jacobian A =
de/dp (2x3); moving the camera by ``lie.retract`` gives de/dc = -A and, for a rotation about the
world's axes, de/dw = A [d]x: J_c^T = -[I; [d]x] A^T. All observations of one (pose, landmark) cell
share A and d, so that they are first summed to a 2x2 information M = C C^T and a 2-vector
gradient; with W = A^T C (3x2) and V = [I; [d]x] W (6x2) the blocks of the normal equations are

    Hcc = sum_l V V^T,   Hpp = sum_k W W^T,   Hcp = -V W^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import BEHIND_PX, MIN_DEPTH, Problem
from .robust import Kernel
from ...geometry import lie

_WIDE = 24  #: more poses than this, and landmarks are told apart by where they are seen
_STEP = 8  #: poses between two strips


@dataclass(frozen=True)
class Projection:
    """What the o observations of a strip of k poses and l landmarks say at a state."""

    R: Tensor  # (k, 3, 3)
    d: Tensor  # (k, 3, l)
    u: Tensor  # (k, l): where p projects, on the plane z = 1
    v: Tensor
    inverse: Tensor  # (k, l): of the depth
    front: Tensor  # (k, l): whether the depth is positive
    g: Tensor  # (2, o): information times residual
    s: Tensor  # (o,): squared whitened residual


@dataclass(frozen=True)
class Estimate:
    """A state of K poses and L landmarks, what its observations say, and its cost."""

    q: Tensor  # (K, 4)
    c: Tensor  # (K, 3)
    p: Tensor  # (3, L), strip by strip
    cost: Tensor  # scalar, with the prior's
    strips: tuple[Projection, ...]


class System:
    """
    The normal equations of a problem.

    free: indices of the free ones among the 6 K pose parameters. dtype: of the Jacobian and of the
    elimination's products; single precision costs a step about seven digits, which the next one
    repairs.

    A window is one grid of all its poses and landmarks. Of a long path it would be mostly empty:
    there, landmarks that are first seen at about the same pose, and for about as long, form a
    strip with a grid of its own.
    """

    def __init__(
        self, problem: Problem, kernel: Kernel, free: Tensor, dtype: torch.dtype = torch.float32
    ) -> None:
        self.problem, self.kernel, self.free = problem, kernel, free
        K, L = len(problem.T_world_camera), len(problem.points)
        device = problem.pose.device
        self.origin = problem.T_world_camera[0, :3]
        self.observed = torch.zeros(L, dtype=torch.bool, device=device)
        self.observed[problem.landmark] = True
        if problem.prior is not None:
            self.known = (
                6 * problem.prior.pose[:, None] + torch.arange(6, device=device)
            ).flatten()
        if K <= _WIDE:
            self.order = torch.arange(L, device=device)
            self.strips = [_Strip(problem, dtype, slice(0, K), slice(0, L))]
            return
        first, last = (
            torch.full((L,), K - 1, device=device),
            torch.zeros(L, dtype=torch.int64, device=device),
        )
        first.scatter_reduce_(0, problem.landmark, problem.pose, 'amin')
        last.scatter_reduce_(0, problem.landmark, problem.pose, 'amax')
        last = torch.where(self.observed, last, K - 1)
        length = ((last - first + 1).clamp_min(1) / 16).log2().ceil().clamp_min(0).long()
        strip = first // _STEP * 64 + length
        self.order = torch.argsort(strip, stable=True)
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(L, device=device)
        rows = torch.argsort(place[problem.landmark], stable=True)
        counts = torch.unique(strip, return_counts=True)[1].tolist()
        self.strips, begin, row = [], 0, 0
        for count in counts:
            which = self.order[begin:begin + count]
            seen = rows[row:row + int((strip[problem.landmark] == strip[which[0]]).sum())]
            poses = slice(int(first[which].min()), int(last[which].max()) + 1)
            self.strips.append(
                _Strip(problem, dtype, poses, slice(begin, begin + count), seen, place)
            )
            begin, row = begin + count, row + len(seen)

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (K, 4), c (K, 3) and p (3, L) of the problem, about its first pose."""
        T = self.problem.T_world_camera
        # Landmarks that nothing observes may be anything: keep them out of the arithmetic.
        points = torch.where(self.observed[:, None], self.problem.points, self.origin)
        return T[:, 3:], T[:, :3] - self.origin, (points - self.origin)[self.order].T.contiguous()

    def finish(self, at: Estimate) -> tuple[Tensor, Tensor]:
        """Return the poses (K, 7) and points (L, 3) of a state, in the problem's world."""
        points = torch.empty_like(self.problem.points)
        points[self.order] = at.p.T + self.origin
        points = torch.where(self.observed[:, None], points, self.problem.points)
        return torch.cat((at.c + self.origin, at.q), -1), points

    def evaluate(self, q: Tensor, c: Tensor, p: Tensor) -> Estimate:
        """Return what the observations say at a state, and the cost there."""
        R = lie.rotation(q)
        parts = tuple(strip.project(R, c, p) for strip in self.strips)
        cost = 0.5 * sum(self.kernel.rho(part.s).sum() for part in parts)
        if self.problem.prior is not None:
            cost = cost + self.problem.prior.cost(torch.cat((c + self.origin, q), -1))
        return Estimate(q, c, p, cost, parts)

    def linearise(self, at: Estimate, curved: Tensor | bool) -> None:
        """
        Compute the blocks at a state.

        ``curved``: with the kernel's true curvature along the residual, held above a fifth of the
        weight so that the system stays definite; reweighting alone converges only linearly. Far
        from the optimum it overshoots: only once the cost falls by less than 1e-4.
        """
        K = len(at.q)
        self.gc, blocks = at.c.new_zeros(K, 6), at.c.new_zeros(K, 6, 6)
        self.energy, self.behind, gp, Hpp = 0.0, 0.0, [], []
        for strip, part in zip(self.strips, at.strips, strict=True):
            squared, behind, gp_strip, gc, Hpp_strip, Hcc = strip.linearise(
                part, self.kernel, curved
            )
            self.energy, self.behind = self.energy + squared, self.behind + behind
            self.gc[strip.poses] += gc
            blocks[strip.poses] += Hcc
            gp.append(gp_strip)
            Hpp.append(Hpp_strip)
        self.gc, self.gp, self.Hpp = self.gc.view(-1), torch.cat(gp, -1), torch.cat(Hpp, -1)
        self.Hcc = blocks.new_zeros(6 * K, 6 * K)
        self.Hcc.view(K, 6, K, 6).diagonal(dim1=0, dim2=2).copy_(blocks.permute(1, 2, 0))
        if self.problem.prior is not None:
            T = torch.cat((at.c + self.origin, at.q), -1)
            H, g = self.problem.prior.linearise(T)
            self.Hcc[self.known[:, None], self.known] += H
            self.gc[self.known] += g
            self.energy = self.energy + 2 * self.problem.prior.cost(T)

    def gradient_norm(self) -> Tensor:
        """
        Return how far from stationary the state is, a scalar.

        It is the largest cosine between the whitened residual and a column of its Jacobian.
        """
        camera = self.gc.abs() / self.Hcc.diagonal().clamp_min(1e-300).sqrt()
        point = self.gp.T.abs() / self.Hpp.diagonal(dim1=0, dim2=1).clamp_min(1e-300).sqrt()
        worst = torch.cat((camera[self.free], point.reshape(-1))).max()
        return torch.where(self.energy > 0, worst / self.energy.clamp_min(1e-300).sqrt(), 0.0)

    def reduce(self, damping: Tensor | float) -> tuple[Tensor, Tensor]:
        """
        Return the reduced camera system, which is what is left with all landmarks eliminated.

        It is a matrix (6 K, 6 K) and a gradient (6 K,).
        """
        S, gradient = self.Hcc.clone(), self.gc.clone()
        S.diagonal().mul_(1 + damping)
        for strip in self.strips:
            block = slice(6 * strip.poses.start, 6 * strip.poses.stop)
            where = strip.landmarks
            squared, along = strip.eliminate(self.Hpp[..., where], self.gp[:, where], 1 + damping)
            S[block, block] -= squared
            gradient[block] += along
        return S, gradient

    def solve(self, damping: Tensor | float) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """
        Return the damped step of poses (6 K,) and landmarks (3, L).

        Also whether the reduced system is definite; where it is not, the poses' step is zero.
        """
        S, gradient = self.reduce(damping)
        S.diagonal().add_(self.Hcc.diagonal() == 0)  # what nothing observes stays where it is
        factor, failed = torch.linalg.cholesky_ex(S[self.free][:, self.free])
        camera = torch.zeros_like(gradient)
        camera[self.free] = torch.cholesky_solve(-gradient[self.free, None], factor).squeeze(-1)
        camera = torch.where(failed == 0, camera, 0.0)
        point = [
            strip.substitute(camera[6 * strip.poses.start:6 * strip.poses.stop])
            for strip in self.strips
        ]
        return (camera, torch.cat(point, -1)), failed == 0

    def predicted_decrease(self, step: tuple[Tensor, Tensor], damping: Tensor) -> Tensor:
        """Return how much the quadratic model falls along the step that solved it, a scalar."""
        camera, point = step
        slope = (self.gc * camera).sum() + (self.gp * point).sum()
        held = (self.Hcc.diagonal() * camera * camera).sum()
        held = held + (self.Hpp.diagonal(dim1=0, dim2=1).T * point * point).sum()
        return 0.5 * (damping * held - slope)

    def move(
        self, at: Estimate, step: tuple[Tensor, Tensor], careful: Tensor | bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Return q, c and p after a step.

        careful: whether landmarks that would pass through the plane of a camera that sees them
        move with the camera instead. The cost leaps there, and one of them could keep all others
        from moving at all.
        """
        T = lie.retract(torch.cat((at.c, at.q), -1), step[0].view(-1, 6))
        q, c, p = T[:, 3:], T[:, :3], at.p + step[1]
        if isinstance(careful, Tensor) or careful:
            R = lie.rotation(q)
            stayed = [
                strip.stay(part, R, at.c, c, at.p, p)
                for strip, part in zip(self.strips, at.strips, strict=True)
            ]
            stayed = torch.cat(stayed, -1)
            p = torch.where(careful, stayed, p) if isinstance(careful, Tensor) else stayed
        return q, c, p


class _Strip:
    """
    Landmarks and the poses that see them, as planes (k, l), so that every sum is one product.

    Cells that no observation fills carry no information.
    """

    def __init__(
        self, problem: Problem, dtype: torch.dtype, poses: slice, landmarks: slice,
        rows: Tensor | None = None, place: Tensor | None = None,
    ) -> None:
        """
        Lay out the strip of these poses and landmarks.

        rows: of its observations; all by default. place: (L,) where each landmark stands among
        those of all strips; by default where it stands in the problem.
        """
        self.poses, self.landmarks, self.dtype = poses, landmarks, dtype
        self.l, self.k = landmarks.stop - landmarks.start, poses.stop - poses.start
        pose, landmark, cov, xy = problem.pose, problem.landmark, problem.cov, problem.xy
        if rows is not None:
            pose, landmark, cov, xy = pose[rows], place[landmark[rows]], cov[rows], xy[rows]
        self.cell = (pose - poses.start) * self.l + landmark - landmarks.start
        self.sees = torch.zeros(self.k, self.l, dtype=torch.bool, device=pose.device)
        self.sees.view(-1)[self.cell] = True
        uu, uv, vv = cov.unbind(-1)
        self.information = torch.stack((vv, -uv, uu)) / (uu * vv - uv * uv)  # (3, o)
        self.x, self.y = xy.T.contiguous()
        self.fx, self.fy = problem.focal.unbind()
        self.E = self.x.new_empty(self.k, 6, 3, self.l, dtype=dtype)

    def project(self, R: Tensor, c: Tensor, p: Tensor) -> Projection:
        """Return what the strip's observations say where cameras and landmarks are there."""
        R, d = R[self.poses], p[:, self.landmarks] - c[self.poses, :, None]
        X, Y, Z = (R.mT @ d).unbind(1)
        front = Z > MIN_DEPTH
        inverse = torch.where(front, Z, 1.0).reciprocal()
        u, v = X * inverse, Y * inverse
        ex = self.fx * (u.view(-1)[self.cell] - self.x)
        ey = self.fy * (v.view(-1)[self.cell] - self.y)
        xx, xy, yy = self.information
        gx, gy = xx * ex + xy * ey, xy * ex + yy * ey
        s = torch.where(front.view(-1)[self.cell], ex * gx + ey * gy, BEHIND_PX**2)
        return Projection(R, d, u, v, inverse, front, torch.stack((gx, gy)), s)

    def stay(
        self, at: Projection, R: Tensor, c: Tensor, c_new: Tensor, p: Tensor, p_new: Tensor
    ) -> Tensor:
        """Return p_new (3, l), but p moved with the camera for landmarks that passed one."""
        c, c_new, ahead = c[self.poses], c_new[self.poses], R[self.poses, :, 2]
        p, p_new = p[:, self.landmarks], p_new[:, self.landmarks]
        front = ahead @ p_new - (ahead * c_new).sum(-1, keepdim=True) > MIN_DEPTH
        passed = self.sees & (front != at.front)
        moved = p + (c_new - c)[passed.byte().argmax(0)].T
        return torch.where(passed.any(0), moved, p_new)

    def linearise(
        self, at: Projection, kernel: Kernel, curved: Tensor | bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """
        Return the blocks of the normal equations and what is summed on the way.

        These are the weighted residuals' square, the cost of points behind cameras, gp (3, l),
        gc (k, 6), Hpp (3, 3, l), and the diagonal blocks Hcc (k, 6, 6).
        """
        seen = at.front.view(-1)[self.cell]
        weight = torch.where(seen, kernel.weight(at.s), 0.0)
        energy = (weight * at.s).sum()
        behind = 0.5 * torch.where(seen, 0.0, kernel.rho(at.s)).sum()
        m = weight * self.information
        if isinstance(curved, Tensor) or curved:
            bend = (
                curved * weight * (1 - kernel.radial(at.s).clamp_min(0.2)) / at.s.clamp_min(1e-12)
            )
            gx, gy = at.g
            m = m - bend * torch.stack((gx * gx, gx * gy, gy * gy))
        cells = self.x.new_zeros(5, self.k * self.l)
        cells.index_add_(1, self.cell, torch.cat((m, weight * at.g)))
        xx, xy, yy, gx, gy = cells.view(5, self.k, 1, self.l)
        # Rows of A: fx / Z (R e1 - u R e3) and fy / Z (R e2 - v R e3).
        right, down, ahead = at.R[..., None].unbind(2)
        ax = (self.fx * at.inverse)[:, None] * (right - at.u[:, None] * ahead)  # (k, 3, l)
        ay = (self.fy * at.inverse)[:, None] * (down - at.v[:, None] * ahead)
        b = ax * gx + ay * gy
        gc = -torch.cat((b.sum(-1), _cross(at.d, b).sum(-1)), -1)
        c00 = xx.sqrt()
        c10 = xy / torch.where(xx > 0, c00, 1.0)
        c11 = (yy - c10 * c10).clamp_min(0).sqrt()
        # Rounded here, so that all blocks are those of one Jacobian.
        W = torch.stack((c00 * ax + c10 * ay, c11 * ay)).to(self.dtype)  # (2, k, 3, l)
        self.V = torch.cat((W, _cross(at.d.to(self.dtype), W)), 2)  # (2, k, 6, l)
        self.W = W.double()
        Hpp = torch.einsum('akil,akjl->ijl', self.W, self.W)
        return energy, behind, b.sum(0), gc, Hpp, (self.V @ self.V.mT).sum(0).double()

    def eliminate(self, Hpp: Tensor, gp: Tensor, lift: Tensor | float) -> tuple[Tensor, Tensor]:
        """
        Return E E^T (6 k, 6 k) and E y (6 k,), where E = -Hcp L^-T and y = L^-1 gp.

        L L^T are the Cholesky factors, in closed form, of the damped Hpp (3, 3, l).
        """
        (h00, h10, h20), (_, h11, h21), (_, _, h22) = Hpp
        trace = h00 + h11 + h22
        # Far landmarks hardly know their depth, unobserved ones nothing at all: never divide by
        # less than this.
        floor = torch.where(trace > 0, 1e-14 * trace, 1.0)
        l00 = (h00 * lift).clamp_min(floor).rsqrt()  # the factor's diagonal is kept as its inverse
        l10, l20 = h10 * l00, h20 * l00
        l11 = (h11 * lift - l10 * l10).clamp_min(floor).rsqrt()
        l21 = (h21 - l20 * l10) * l11
        l22 = (h22 * lift - l20 * l20 - l21 * l21).clamp_min(floor).rsqrt()

        def whiten(x: Tensor) -> Tensor:  # L^-1 x, (..., 3, l)
            x0, x1, x2 = x.unbind(-2)
            y0 = x0 * l00
            y1 = (x1 - l10 * y0) * l11
            return torch.stack((y0, y1, (x2 - l20 * y0 - l21 * y1) * l22), -2)

        U, y = whiten(self.W).to(self.dtype), whiten(gp)
        self.factor = l00, l10, l11, l20, l21, l22, y
        torch.mul(self.V[0, :, :, None], U[0, :, None], out=self.E)
        E = self.E.addcmul_(self.V[1, :, :, None], U[1, :, None]).view(6 * self.k, 3 * self.l)
        return (E @ E.T).double(), (E @ y.view(-1).to(self.dtype)).double()

    def substitute(self, camera: Tensor) -> Tensor:
        """Return the landmarks' step (3, l) that follows the cameras' (6 k,)."""
        l00, l10, l11, l20, l21, l22, y = self.factor
        E = self.E.view(6 * self.k, 3 * self.l)
        z0, z1, z2 = (E.T @ camera.to(self.dtype)).double().view(3, self.l) - y
        p2 = z2 * l22
        p1 = (z1 - l21 * p2) * l11
        return torch.stack(((z0 - l10 * p1 - l20 * p2) * l00, p1, p2))


def _cross(d: Tensor, x: Tensor) -> Tensor:
    """Return d x x along the last dimension but one, broadcasting."""
    (dx, dy, dz), (ax, ay, az) = d.unbind(-2), x.unbind(-2)
    return torch.stack((dy * az - dz * ay, dz * ax - dx * az, dx * ay - dy * ax), -2)
