"""
Levenberg-Marquardt with Schur elimination, which solves the paper's equation 1b.

It runs in torch on any device, or compiled for the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import count
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .problem import PosePrior, Problem
from .robust import Kernel, KERNELS
from .system import Estimate, System
from ... import kernels

BACKENDS = ('auto', 'eager', 'cpu')


@dataclass(frozen=True)
class AdjustOptions:
    """The robust kernel, when ``adjust`` is done, and by what it computes."""

    kernel: Kernel = Kernel()
    max_iterations: int = 50
    #: of the cost in the last step, without what points behind their cameras cost
    relative_decrease: float = 1e-6
    #: largest cosine between the whitened residual and a column of its Jacobian
    gradient: float = 1e-3
    #: "eager": torch, any device; "cpu": compiled by numba; "auto": this one where it can be
    backend: str = 'auto'

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(
                f"bundle back end '{self.backend}' is not known; use one of {', '.join(BACKENDS)}"
            )


@dataclass(frozen=True)
class Solution:
    """Where ``adjust`` ended, and how."""

    T_world_camera: Tensor  #: (K, 7) float64
    points: Tensor  #: (L, 3) float64; landmarks without observations as they came
    iterations: int  #: steps taken
    cost: float  #: 1/2 sum rho(s), and the prior's
    relative_decrease: float  #: in the last step, as ``AdjustOptions.relative_decrease``
    gradient_norm: float  #: as ``AdjustOptions.gradient``
    converged: bool


def adjust(
    problem: Problem, options: AdjustOptions | None = None, fixed: Tensor | None = None
) -> Solution:
    """
    Minimise 1/2 sum rho(s), and the prior, over poses and landmarks.

    fixed: (K,) bool, poses held (all of them, and only landmarks move); by default the first.
    Where only one is held, the scale is fixed by the largest translation component of the pose
    farthest from it. Converged: the last step's relative decrease and the gradient are both below
    their bounds, or the cost is rounding. Deterministic on the CPU. While solving, the first pose
    is the origin, for the sake of rounding. Raises ValueError where there is no observation or no
    pose is held, or the back end is "cpu" and cannot be had.
    """
    options = options or AdjustOptions()
    if len(problem.pose) == 0:
        raise ValueError('there is nothing to adjust: the bundle has no valid observation')
    on_cpu = problem.points.device.type == 'cpu'
    if options.backend == 'cpu' and not (on_cpu and compiled()):
        raise ValueError(
            "the bundle's back end 'cpu' wants tensors on the CPU and numba; use 'auto' or 'eager'"
        )
    if options.backend != 'eager' and on_cpu and compiled():
        with torch.inference_mode():
            free = free_parameters(problem.T_world_camera, fixed)
        return _minimise_compiled(problem, options, free)
    # In floating point: what overflows is refused.
    with torch.inference_mode(), np.errstate(all='ignore'):
        free = free_parameters(problem.T_world_camera, fixed)
        solution = _minimise(System(problem, options.kernel, free), options)
    # Cloned outside, they are ordinary tensors that autograd may use.
    return replace(
        solution, T_world_camera=solution.T_world_camera.clone(), points=solution.points.clone()
    )


def compiled() -> ModuleType | None:
    """Return compiled/minimise.py, ready, or None where numba is not to be had (kernels.py)."""
    return kernels.load(f'{__package__}.compiled.minimise')


def _minimise_compiled(problem: Problem, options: AdjustOptions, free: Tensor) -> Solution:
    mask = np.zeros((len(problem.T_world_camera), 6), np.bool_)
    mask.reshape(-1)[free.numpy()] = True
    pose, T, information, gradient, constant = prior_arrays(problem)
    T, points, *rest = compiled().minimise(
        *arrays(problem), mask, KERNELS.index(options.kernel.name), float(options.kernel.scale),
        options.max_iterations, options.relative_decrease, options.gradient, pose, T, information,
        gradient, float(constant),
    )
    return Solution(torch.from_numpy(T), torch.from_numpy(points), *rest)


def arrays(problem: Problem) -> tuple:
    """Return a problem's arrays as compiled/minimise.py takes them, without its prior."""
    rows = (
        problem.T_world_camera, problem.points, problem.pose, problem.landmark, problem.xy,
        problem.cov,
    )
    return *map(array, rows), *problem.focal.tolist()


def prior_arrays(problem: Problem) -> tuple:
    """Return a problem's prior likewise; it speaks of no pose where there is none."""
    if problem.prior is None:
        return _NO_PRIOR
    return tuple(array(getattr(problem.prior, field.name)) for field in fields(PosePrior))


_NO_PRIOR = np.zeros(0, np.int64), np.zeros((0, 7)), np.zeros((0, 0)), np.zeros(0), np.zeros(())


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor on the CPU as a contiguous array, without a copy where it is one."""
    return tensor.detach().contiguous().numpy()


def _minimise(system: System, options: AdjustOptions) -> Solution:
    """
    Minimise in torch, in a loop in which nothing waits for a GPU.

    Every round linearises, steps and judges, and what it judges is
    taken or left elementwise. Whether it is over is asked in every eighth round. On the CPU asking
    is free, and the judgement is made in numbers.
    """
    here = system.evaluate(*system.start())
    asking_is_free = _asking_is_free(here.cost)
    every, moved = 8, True
    where, at_least, read = torch.where, torch.clamp_min, _identity
    if asking_is_free:
        every, where, at_least, read = 1, _branch, max, _number
    # below this the cost is rounding, and its gradient means nothing
    exact = 1e-18 * len(system.problem.pose)
    iterations, decrease, damping, growth = map(read, here.cost.new_tensor([0.0, 1.0, 1e-4, 2.0]))
    cost = read(here.cost)
    stuck = refused = cost < 0
    for turn in count():
        if moved:
            system.linearise(here, decrease < 1e-4)
            gradient, behind = read(system.gradient_norm()), read(system.behind)
        flat = gradient < options.gradient
        converged = (cost <= exact) | ((decrease < options.relative_decrease) | stuck) & flat
        done = converged | stuck | (iterations >= options.max_iterations)
        if turn % every == 0 and done:
            break
        step, definite = system.solve(damping)
        there = system.evaluate(*system.move(here, step, refused))
        predicted, definite = read(system.predicted_decrease(step, damping)), read(definite)
        cost_there = read(there.cost)
        better = definite & (cost_there < cost)
        accepted, refused = better & ~done, ~better
        # So near the optimum, rounding decides which cost is less.
        stuck = stuck | ~better & ~done & (
            definite & (predicted <= 1e-13 * cost) | (damping >= 1e12)
        )
        gain = (cost - cost_there) / at_least(predicted, 1e-300)
        eased = at_least(damping * at_least(1 - (2 * gain - 1) ** 3, 0.1), 1e-12)
        damping = where(better, eased, damping * growth)
        growth = where(better, 0 * growth + 2, 2 * growth)
        relative = (cost - cost_there) / at_least(cost - behind, 1e-300)
        decrease = where(accepted, relative, where(stuck, 0 * decrease, decrease))
        iterations = iterations + accepted
        here, cost = _choose(accepted, there, here), where(accepted, cost_there, cost)
        moved = accepted if asking_is_free else True
    T, points = system.finish(here)
    return Solution(
        T, points, int(iterations), float(cost), float(decrease), float(gradient), bool(converged)
    )


def _asking_is_free(scalar: Tensor) -> bool:
    """Return whether ``if scalar:`` is: a GPU first does all that has been asked of it."""
    return scalar.device.type == 'cpu'


def _identity(scalar: Tensor) -> Tensor:
    return scalar


def _number(scalar: Tensor) -> np.generic:
    return scalar.numpy()[()]


def _branch(first: bool, one, other):
    return one if first else other


def _choose(first: Tensor | np.bool_, one: Estimate, other: Estimate) -> Estimate:
    """Return ``one if first else other``, elementwise where only a GPU knows ``first``."""
    if not isinstance(first, Tensor):
        return one if first else other
    if isinstance(one, Tensor):
        return torch.where(first, one, other)
    if isinstance(one, tuple):
        return tuple(_choose(first, *both) for both in zip(one, other, strict=True))
    return type(one)(*_choose(first, tuple(vars(one).values()), tuple(vars(other).values())))


def free_parameters(T_world_camera: Tensor, fixed: Tensor | None) -> Tensor:
    """
    Return the indices of those of the 6 K pose parameters that are free in ``adjust``'s gauge.

    T_world_camera: (K, 7). fixed: (K,) bool, as in ``adjust``. Raises ValueError where no pose is
    held.
    """
    held = [0] if fixed is None else fixed.nonzero().flatten().tolist()
    if not held:
        raise ValueError('at least one pose must be held, or the bundle can float away')
    free = torch.ones(len(T_world_camera), 6, dtype=torch.bool, device=T_world_camera.device)
    free[held] = False
    if len(held) == 1:
        offset = T_world_camera[:, :3] - T_world_camera[held[0], :3]
        farthest = int(offset.norm(dim=-1).argmax())
        free[farthest, int(offset[farthest].abs().argmax())] = False
    return free.flatten().nonzero().squeeze(-1)
