"""Levenberg-Marquardt with Schur elimination (paper, equation 1b), and its reference implementation in plain torch.

For pose k = (R, c) and landmark p let d = p - c. An observation's residual e has the Jacobian A = de/dp (2x3);
moving the camera by ``lie.retract`` gives de/dc = -A and, for a rotation about the world's axes, de/dw = A [d]x:
J_c^T = -[I; [d]x] A^T. All observations of one (pose, landmark) cell share A and d, so that they are first summed to a
2x2 information M = C C^T and a 2-vector gradient; with W = A^T C (3x2) and V = [I; [d]x] W (6x2) the blocks of the
normal equations are

    Hcc = sum_l V V^T,   Hpp = sum_k W W^T,   Hcp = -V W^T.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from imatching_ros.bundle.problem import BEHIND_PX, MIN_DEPTH, Problem
from imatching_ros.bundle.robust import KERNELS, Kernel
from imatching_ros.geometry import lie

BACKENDS = ("auto", "eager", "cpu")


@dataclass(frozen=True)
class AdjustOptions:
    kernel: Kernel = Kernel()
    max_iterations: int = 50
    relative_decrease: float = 1e-6  #: of the cost in the last step
    gradient: float = 1e-3  #: largest cosine between the whitened residual and a column of its Jacobian
    backend: str = "auto"  #: "eager": torch, any device; "cpu": compiled by numba; "auto": this one where it can be

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"bundle back end '{self.backend}' is not known; use one of {', '.join(BACKENDS)}")


@dataclass(frozen=True)
class Solution:
    T_world_camera: Tensor  #: (K, 7) float64
    points: Tensor  #: (L, 3) float64; landmarks without observations as they came
    iterations: int  #: steps taken
    cost: float  #: 1/2 sum rho(s)
    relative_decrease: float  #: of the cost in the last step
    gradient_norm: float  #: as ``AdjustOptions.gradient``
    converged: bool


def adjust(problem: Problem, options: AdjustOptions | None = None, fixed: Tensor | None = None) -> Solution:
    """Minimise 1/2 sum rho(s) over poses and landmarks.

    fixed: (K,) bool, poses held; by default the first. Where only one is held, the scale is fixed by the largest
    translation component of the pose farthest from it.
    Converged: the last step's relative decrease and the gradient are both below their bounds, or the cost is rounding.
    Deterministic on the CPU. While solving, the first pose is the origin, for the sake of rounding.
    Raises ValueError where there is no observation or no pose is held, or the back end is "cpu" and cannot be had.
    """
    options = options or AdjustOptions()
    if len(problem.pose) == 0:
        raise ValueError("there is nothing to adjust: the bundle has no valid observation")
    on_cpu = problem.points.device.type == "cpu"
    if options.backend == "cpu" and not (on_cpu and compiled()):
        raise ValueError("the bundle's back end 'cpu' wants tensors on the CPU and numba; use 'auto' or 'eager'")
    with torch.inference_mode():
        free = _free(problem.T_world_camera, fixed)
        if options.backend != "eager" and on_cpu and compiled():
            solution = _minimise_compiled(problem, options, free)
        else:
            solution = _minimise(_System(problem, options.kernel, free), options)
    # Cloned outside, they are ordinary tensors that autograd may use.
    return replace(
        solution, T_world_camera=solution.T_world_camera.clone(), points=solution.points.clone()
    )


@cache
def compiled() -> ModuleType | None:
    """compiled.py, or None with a notice where numba is not to be had. The first time on a machine this compiles for
    some twenty seconds: call it when starting up."""
    try:
        return importlib.import_module("imatching_ros.bundle.compiled")
    except (ImportError, RuntimeError) as error:  # numba absent, at odds with numpy, or nowhere to keep its cache
        logging.getLogger(__name__).warning(
            "bundle adjustment runs ten times slower, in plain torch: numba cannot be used (%s)", error
        )
        return None


def _minimise_compiled(problem: Problem, options: AdjustOptions, free: Tensor) -> Solution:
    def array(tensor: Tensor):
        return tensor.detach().contiguous().numpy()

    fx, fy = problem.focal.tolist()
    mask = torch.zeros(len(problem.T_world_camera), 6, dtype=torch.bool)
    mask.view(-1)[free] = True
    T, points, *rest = compiled().minimise(
        array(problem.T_world_camera), array(problem.points), array(problem.pose), array(problem.landmark),
        array(problem.xy), array(problem.cov), fx, fy, array(mask), KERNELS.index(options.kernel.name),
        float(options.kernel.scale), options.max_iterations, options.relative_decrease, options.gradient,
    )  # fmt: skip
    return Solution(torch.from_numpy(T), torch.from_numpy(points), *rest)


def _minimise(system: _System, options: AdjustOptions) -> Solution:
    here = system.evaluate(*system.start())
    exact = 1e-18 * len(system.problem.pose)  # below this the cost is rounding, and its gradient means nothing
    iterations, decrease, damping, growth = 0, 1.0, 1e-4, 2.0
    while True:
        system.linearise(here, curved=decrease < 1e-4)
        gradient = system.gradient_norm()
        converged = here.cost <= exact or (decrease < options.relative_decrease and gradient < options.gradient)
        if converged or iterations >= options.max_iterations:
            break
        there = None
        while damping < 1e12:
            step = system.solve(damping)
            if step is not None:
                there = system.evaluate(*system.move(here, step))
                predicted = system.predicted_decrease(step, damping)
                # The second test: so near the optimum, rounding decides which cost is less.
                if there.cost < here.cost or predicted <= 1e-13 * here.cost:
                    break
            damping, growth = damping * growth, growth * 2
        if there is None or not there.cost < here.cost:
            decrease, converged = 0.0, gradient < options.gradient
            break
        gain = (here.cost - there.cost) / max(predicted, 1e-300)
        damping, growth = max(damping * max(0.1, 1 - (2 * gain - 1) ** 3), 1e-12), 2.0
        decrease, here = (here.cost - there.cost) / here.cost, there
        iterations += 1
    return Solution(*system.finish(here), iterations, here.cost, decrease, gradient, converged)


def _free(T_world_camera: Tensor, fixed: Tensor | None) -> Tensor:
    """Indices of the free ones among the 6 K pose parameters: the gauge."""
    K = len(T_world_camera)
    if fixed is None:
        fixed = torch.arange(K, device=T_world_camera.device) == 0
    if not fixed.any():
        raise ValueError("at least one pose must be held, or the bundle can float away")
    free = (~fixed)[:, None].repeat(1, 6)
    if int(fixed.sum()) == 1:
        offset = T_world_camera[:, :3] - T_world_camera[int(fixed.int().argmax()), :3]
        farthest = int(offset.norm(dim=-1).argmax())
        free[farthest, int(offset[farthest].abs().argmax())] = False
    return free.flatten().nonzero().squeeze(-1)


@dataclass(frozen=True)
class _Estimate:
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
    cost: float


class _System:
    """The normal equations on a keyframe x landmark grid: planes of (K, L), so that every sum is one product.

    Cells that no observation fills carry no information.
    """

    def __init__(self, problem: Problem, kernel: Kernel, free: Tensor) -> None:
        self.problem, self.kernel, self.free = problem, kernel, free
        self.K, self.L = len(problem.T_world_camera), len(problem.points)
        self.cell = problem.pose * self.L + problem.landmark
        uu, uv, vv = problem.cov.unbind(-1)
        self.information = torch.stack((vv, -uv, uu)) / (uu * vv - uv * uv)  # (3, O)
        self.x, self.y = problem.xy.T.contiguous()
        self.fx, self.fy = problem.focal.unbind()
        self.origin = problem.T_world_camera[0, :3]
        self.observed = torch.zeros(self.L, dtype=torch.bool, device=self.x.device)
        self.observed[problem.landmark] = True
        self.E = self.x.new_empty(self.K, 6, 3, self.L, dtype=torch.float32)

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """q (K, 4), c (K, 3), p (3, L), centred."""
        T = self.problem.T_world_camera
        # Landmarks that nothing observes may be anything: keep them out of the arithmetic.
        points = torch.where(self.observed[:, None], self.problem.points, self.origin)
        return T[:, 3:], T[:, :3] - self.origin, (points - self.origin).T.contiguous()

    def finish(self, at: _Estimate) -> tuple[Tensor, Tensor]:
        points = torch.where(self.observed[:, None], at.p.T + self.origin, self.problem.points)
        return torch.cat((at.c + self.origin, at.q), -1), points

    def evaluate(self, q: Tensor, c: Tensor, p: Tensor) -> _Estimate:
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
        cost = 0.5 * self.kernel.rho(s).sum().item()
        return _Estimate(q, c, p, R, d, u, v, inverse, seen, torch.stack((gx, gy)), s, cost)

    def linearise(self, at: _Estimate, curved: bool) -> None:
        """The blocks at a state. ``curved``: with the kernel's true curvature along the residual, held above a fifth
        of the weight so that the system stays definite; reweighting alone converges only linearly. Far from the optimum
        it overshoots: only once the cost falls by less than 1e-4."""
        weight = torch.where(at.seen, self.kernel.weight(at.s), 0.0)
        self.energy = (weight * at.s).sum().item()
        m = weight * self.information
        if curved:
            bend = weight * (1 - self.kernel.radial(at.s).clamp_min(0.2)) / at.s.clamp_min(1e-12)
            gx, gy = at.g
            m = m - bend * torch.stack((gx * gx, gx * gy, gy * gy))
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
        # Rounded here, so that all blocks are those of one Jacobian, and twice as many numbers fit a register. Only the
        # step suffers, by about seven digits, and the next one repairs it.
        W = torch.stack((c00 * ax + c10 * ay, c11 * ay)).float()  # (2, K, 3, L)
        self.V = torch.cat((W, _cross(at.d.float(), W)), 2)  # (2, K, 6, L)
        self.W = W.double()
        self.Hpp = torch.einsum("akil,akjl->ijl", self.W, self.W)
        self.Hcc = (self.V @ self.V.mT).sum(0).double()  # (K, 6, 6)

    def gradient_norm(self) -> float:
        if self.energy == 0:
            return 0.0
        camera = self.gc.abs() / self.Hcc.diagonal(dim1=1, dim2=2).reshape(-1).clamp_min(1e-300).sqrt()
        point = self.gp.T.abs() / self.Hpp.diagonal(dim1=0, dim2=1).clamp_min(1e-300).sqrt()
        return torch.cat((camera[self.free], point.reshape(-1))).max().item() / self.energy**0.5

    def solve(self, damping: float) -> tuple[Tensor, Tensor] | None:
        """The damped step, poses (6 K,) and landmarks (3, L); None where the reduced system is not definite."""
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

        U = whiten(self.W).float()
        torch.mul(self.V[0, :, :, None], U[0, :, None], out=self.E)
        E = self.E.addcmul_(self.V[1, :, :, None], U[1, :, None]).view(6 * self.K, 3 * self.L)  # -Hcp L^-T
        y = whiten(self.gp)
        H = torch.block_diag(*self.Hcc)
        H.diagonal().mul_(lift)
        S = (H - (E @ E.T).double())[self.free][:, self.free]
        factor, failed = torch.linalg.cholesky_ex(S)
        if failed.item():
            return None
        camera = torch.zeros_like(self.gc)
        rhs = -(self.gc + (E @ y.view(-1).float()).double())[self.free]
        camera[self.free] = torch.cholesky_solve(rhs[:, None], factor).squeeze(-1)
        z0, z1, z2 = (E.T @ camera.float()).double().view(3, self.L) - y
        p2 = z2 * l22
        p1 = (z1 - l21 * p2) * l11
        p0 = (z0 - l10 * p1 - l20 * p2) * l00
        return camera, torch.stack((p0, p1, p2))

    def predicted_decrease(self, step: tuple[Tensor, Tensor], damping: float) -> float:
        """How much the quadratic model falls along the step that solved it."""
        camera, point = step
        slope = (self.gc * camera).sum() + (self.gp * point).sum()
        held = (self.Hcc.diagonal(dim1=1, dim2=2).reshape(-1) * camera * camera).sum()
        held = held + (self.Hpp.diagonal(dim1=0, dim2=1).T * point * point).sum()
        return 0.5 * (damping * held - slope).item()

    def move(self, at: _Estimate, step: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        T = lie.retract(torch.cat((at.c, at.q), -1), step[0].view(self.K, 6))
        return T[:, 3:], T[:, :3], at.p + step[1]


def _cross(d: Tensor, x: Tensor) -> Tensor:
    """d x x along the last dimension but one, broadcasting."""
    (dx, dy, dz), (ax, ay, az) = d.unbind(-2), x.unbind(-2)
    return torch.stack((dy * az - dz * ay, dz * ax - dx * az, dx * ay - dy * ax), -2)
