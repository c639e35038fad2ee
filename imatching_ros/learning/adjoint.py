"""
The optimum as a function of what was observed: the implicit terms of the paper's equation 4.

Where both levels have one objective, these terms vanish (equation 7) and T*, p* are constants.
Where an upper objective differs (a head of its own, an odometry that the poses should agree with,
a user's loss), they do not. With the lower level's cost g(x, f) stationary in x = (T, p), the
implicit function theorem gives

    dU/df = partial U/partial f - (d2g/df dx) lambda,    (d2g/dx2) lambda = partial U/partial x:

one linear solve with the lower level's Hessian, by the Schur complement over the landmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..bundle.solver.adjust import free_parameters
from ..bundle.solver.problem import MIN_DEPTH, Problem
from ..bundle.solver.robust import Kernel
from ..geometry import lie


def optimum(
    problem: Problem, kernel: Kernel, fixed: Tensor | None = None, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """
    Return the state of a solved problem as a function of its observations ``xy`` (O, 2).

    The state is T_world_camera (K, 7) and points (L, 3), the problem's own: nothing is solved
    anew. Backwards, what a loss asks of them reaches ``xy`` through the adjoint (module
    docstring), so that any loss of T*, p* and f has its total derivative (equation 4). kernel,
    fixed: as the problem was solved with. exact: with the Hessian; else with the Gauss-Newton
    matrix, which leaves out the curvature of kernel and projection. A pose prior counts by its
    Gauss-Newton matrix in both. Raises ValueError, when the gradient is taken, where the system is
    singular: the bundle is degenerate.
    """
    return _Optimum.apply(problem.xy, problem, kernel, fixed, exact)


class _Optimum(torch.autograd.Function):

    @staticmethod
    def forward(
        ctx, xy: Tensor, problem: Problem, kernel: Kernel, fixed: Tensor | None, exact: bool
    ):
        ctx.of = problem, kernel, fixed, exact
        return problem.T_world_camera.detach().clone(), problem.points.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, of_T: Tensor, of_points: Tensor):
        problem, kernel, fixed, exact = ctx.of
        system = _System(problem, kernel, exact)
        T = problem.T_world_camera.detach()
        with torch.enable_grad():  # from seven numbers of a pose to its six directions
            delta = torch.zeros(len(T), 6, dtype=T.dtype, device=T.device, requires_grad=True)
            (of_delta,) = torch.autograd.grad(lie.retract(T, delta), delta, of_T)
        moved = system.moved(*system.solve(of_delta, of_points, free_parameters(T, fixed)))
        of_xy = torch.einsum('oij,oj->oi', system.weight, moved) * problem.focal
        return of_xy, None, None, None, None


class _System:
    """
    The Hessian of 1/2 sum rho(s) at a state.

    Its directions are those of ``lie.retract``, and of the points.
    """

    def __init__(self, problem: Problem, kernel: Kernel, exact: bool) -> None:
        self.pose, self.landmark = problem.pose, problem.landmark
        self.K, self.L = len(problem.T_world_camera), len(problem.points)
        R = lie.rotation(problem.T_world_camera.detach()[:, 3:])[problem.pose]
        d = (
            problem.points.detach()[problem.landmark]
            - problem.T_world_camera.detach()[problem.pose, :3]
        )
        y = torch.einsum('oji,oj->oi', R, d)
        seen = y[:, 2] > MIN_DEPTH
        y = torch.where(seen[:, None], y, torch.ones_like(y))
        (fx, fy), (X, Y), inverse = problem.focal, y[:, :2].T, 1 / y[:, 2]
        u, v, zero = X * inverse, Y * inverse, torch.zeros_like(inverse)
        e = torch.stack((u, v), -1).sub(problem.xy.detach()) * problem.focal
        uu, uv, vv = problem.cov.detach().unbind(-1)
        information = (
            torch.stack((vv, -uv, -uv, uu), -1).view(-1, 2, 2) / (uu * vv - uv * uv)[:, None, None]
        )
        gradient = torch.einsum('oij,oj->oi', information, e)
        s = (e * gradient).sum(-1)
        weight = torch.where(seen, kernel.weight(s), 0.0)
        bend = weight * (kernel.radial(s) - 1) / s.clamp_min(1e-300)  # 2 rho''(s)
        self.by_camera = inverse[:, None, None] * torch.stack(  # de/dy (O, 2, 3)
            (fx + zero, zero, -fx * u, zero, fy + zero, -fy * v), -1
        ).view(-1, 2, 3)
        # y moves by R^T (m + d x w) with m = dp - dt; the second order is m x w + w x (w x d) / 2.
        self.R, self.d = R, d
        axes = R.mT
        self.by_state = torch.cat((-axes, axes @ _hat(d), axes), -1)  # dy/d(t, w, p) (O, 3, 9)
        #: How the gradient of the cost turns with the residual (O, 2, 2): exact whatever the
        #: system.
        outer = gradient[:, :, None] * gradient[:, None]
        self.weight = weight[:, None, None] * information + bend[:, None, None] * outer
        J = self.by_camera @ self.by_state
        if not exact:
            H = J.mT @ (weight[:, None, None] * information) @ J
        else:
            pull = weight[:, None] * gradient
            a, b = (pull * problem.focal).unbind(-1)
            square = inverse * inverse
            of_y = torch.stack(
                (zero, zero, -a, zero, zero, -b, -a, -b, 2 * (a * u + b * v)), -1
            ).view(-1, 3, 3)
            of_y = square[:, None, None] * of_y
            H = J.mT @ self.weight @ J + self.by_state.mT @ of_y @ self.by_state
            # the cost's slope by y, in the world
            n = torch.einsum('oij,okj,ok->oi', R, self.by_camera, pull)
            turn = _hat(n)
            H[:, 3:6, 6:] += turn
            H[:, 6:, 3:6] += turn.mT
            H[:, 3:6, :3] -= turn
            H[:, :3, 3:6] -= turn.mT
            outer = n[:, :, None] * d[:, None]
            H[:, 3:6, 3:6] += 0.5 * (outer + outer.mT)
            H[:, 3:6, 3:6].diagonal(dim1=1, dim2=2).sub_((n * d).sum(-1, keepdim=True))
        self.Hcc = torch.block_diag(*_sums(H[:, :6, :6], self.pose, self.K))
        if problem.prior is not None:
            axes = torch.arange(6, device=self.pose.device)
            at = (6 * problem.prior.pose[:, None] + axes).flatten()
            of_prior = problem.prior.linearise(problem.T_world_camera.detach())[0]
            self.Hcc[at[:, None], at] += of_prior
        self.Hpp = _sums(H[:, 6:, 6:], self.landmark, self.L)
        self.Hcp = _sums(H[:, :6, 6:], self.landmark * self.K + self.pose, self.L * self.K)

    def solve(self, of_pose: Tensor, of_point: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """Return H^-1 of (K, 6) and (L, 3), with the poses held that are not ``free``."""
        unseen = self.Hpp.diagonal(dim1=1, dim2=2).abs().sum(-1) == 0
        Hpp = self.Hpp + torch.diag_embed(unseen.to(self.Hpp.dtype)[:, None].expand(-1, 3))
        E = self.Hcp.view(self.L, self.K * 6, 3)
        G, singular = torch.linalg.solve_ex(Hpp, E.mT)  # (L, 3, 6 K)
        flat = E.permute(1, 0, 2).reshape(self.K * 6, -1)
        S = (self.Hcc - flat @ G.reshape(-1, self.K * 6))[free][:, free]
        rhs = of_pose.reshape(-1) - torch.einsum('lij,li->j', G, of_point)
        solution, failed = torch.linalg.solve_ex(S, rhs[free])
        if singular.any() or failed.item() or not bool(solution.isfinite().all()):
            raise ValueError(
                "the bundle's system is singular at its optimum: it has no implicit gradient"
            )
        pose = torch.zeros_like(rhs)
        pose[free] = solution
        point = torch.linalg.solve(Hpp, of_point) - G @ pose
        return pose.view(self.K, 6), torch.where(unseen[:, None], 0.0, point)

    def moved(self, pose: Tensor, point: Tensor) -> Tensor:
        """Return how residuals (O, 2), px, move when poses move by (K, 6) and points by (L, 3)."""
        state = torch.cat((pose[self.pose], point[self.landmark]), -1)
        return torch.einsum('oij,ojk,ok->oi', self.by_camera, self.by_state, state)


def _hat(x: Tensor) -> Tensor:
    """Return [x]x (..., 3, 3), for which [x]x y = x x y."""
    a, b, c = x.unbind(-1)
    zero = torch.zeros_like(a)
    return torch.stack((zero, -c, b, c, zero, -a, -b, a, zero), -1).unflatten(-1, (3, 3))


def _sums(blocks: Tensor, index: Tensor, count: int) -> Tensor:
    return blocks.new_zeros(count, *blocks.shape[1:]).index_add_(0, index, blocks)
