"""
What the gradient of the upper level costs.

One step at the optimum, the adjoint, and unrolling the solver.

    python benchmarks/gradient.py [--quick] [--json PATH]

A solved window; the gradient of a loss by all matches. `one_step`: equation 7, the objective
evaluated and differentiated once at T*, p*. `adjoint`: one linear solve besides, for losses that
the bundle does not minimise. `unrolled`: 20 Levenberg-Marquardt iterations in differentiable
torch, and back through all of them. One thread; `ms` is the fastest of some repetitions, of the
gradient alone: for `unrolled` of its backward pass, beside `forward_ms`, the iterations with their
graph; for the others of forward and backward pass together, beside the time of the solver, which
keeps no graph. `peak_mb` is the most that torch held at one time for the gradient. `error` is the
relative difference from the gradient of the exact adjoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
import json
import os
from pathlib import Path
import sys
import time

for variable in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
    os.environ[variable] = '1'

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from bundle import KERNEL, SIZES, synthetic  # noqa: E402,I100
from imatching_ros.bundle.solver.adjust import adjust, AdjustOptions, free_parameters  # noqa: E402
from imatching_ros.bundle.solver.problem import Problem  # noqa: E402
from imatching_ros.bundle.solver.robust import Kernel  # noqa: E402
from imatching_ros.geometry import lie  # noqa: E402
from imatching_ros.learning.adjoint import optimum  # noqa: E402

ITERATIONS = 20
METHODS = ('one_step', 'adjoint', 'unrolled')


def unrolled(
    problem: Problem, kernel: Kernel, iterations: int = ITERATIONS, damping: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """
    Return T_world_camera (K, 7) and points (L, 3) after so many iterations.

    With the graph of all of them.
    """
    T, p, K, L = (
        problem.T_world_camera, problem.points, len(problem.T_world_camera), len(problem.points),
    )
    free = free_parameters(T, None)
    uu, uv, vv = problem.cov.unbind(-1)
    information = (
        torch.stack((vv, -uv, -uv, uu), -1).view(-1, 2, 2) / (uu * vv - uv * uv)[:, None, None]
    )
    seen = torch.bincount(problem.landmark, minlength=L) > 0
    held = torch.diag_embed((~seen).to(p.dtype)[:, None].expand(-1, 3))
    fx, fy = problem.focal

    def sums(blocks: Tensor, index: Tensor, count: int) -> Tensor:
        return blocks.new_zeros(count, *blocks.shape[1:]).index_add(0, index, blocks)

    for _ in range(iterations):
        R = lie.rotation(T[:, 3:])[problem.pose]
        d = p[problem.landmark] - T[problem.pose, :3]
        X, Y, Z = torch.einsum('oji,oj->io', R, d)
        inverse = 1 / Z
        u, v = X * inverse, Y * inverse
        e = (torch.stack((u, v), -1) - problem.xy) * problem.focal
        weighted = torch.einsum('oij,oj->oi', information, e)
        weight = kernel.weight((e * weighted).sum(-1))
        right, down, ahead = R.unbind(-1)
        rows = right - u[:, None] * ahead, down - v[:, None] * ahead
        # (O, 2, 3)
        A = torch.stack(((fx * inverse)[:, None] * rows[0], (fy * inverse)[:, None] * rows[1]), 1)
        C = torch.cat((-A, lie.cross(A, d[:, None])), -1)  # (O, 2, 6)
        M = weight[:, None, None] * information
        g = weight[:, None] * weighted
        MA = M @ A
        Hpp = sums(A.mT @ MA, problem.landmark, L) * (1 + damping) + held
        Hcc = torch.block_diag(*sums(C.mT @ (M @ C), problem.pose, K))
        Hcp = sums(C.mT @ MA, problem.landmark * K + problem.pose, L * K).view(L, 6 * K, 3)
        gp = sums(torch.einsum('oij,oi->oj', A, g), problem.landmark, L)
        gc = sums(torch.einsum('oij,oi->oj', C, g), problem.pose, K).view(-1)
        G = torch.linalg.solve(Hpp, Hcp.mT)
        S = Hcc * (1 + damping * torch.eye(6 * K, dtype=p.dtype)) - Hcp.permute(1, 0, 2).reshape(
            6 * K, -1
        ) @ G.reshape(-1, 6 * K)
        rhs = (gc - torch.einsum('lij,li->j', G, gp))[free]
        step = torch.zeros_like(gc).index_put((free,), -torch.linalg.solve(S[free][:, free], rhs))
        p = p - torch.linalg.solve(Hpp, gp) - G @ step
        T = lie.retract(T, step.view(K, 6))
    return T, p


def solved(keyframes: int, points: int, spacing: float) -> Problem:
    """Return a synthetic window at its optimum."""
    posed = synthetic(keyframes, points, spacing, disturb=0.0)
    found = adjust(
        posed, AdjustOptions(KERNEL, max_iterations=200, relative_decrease=1e-12, gradient=1e-8)
    )
    return replace(posed, T_world_camera=found.T_world_camera, points=found.points)


def gradient(method: str, posed: Problem) -> tuple[Tensor, float, float]:
    """
    Return dE/duv (O, 2) of the reprojection cost.

    Also the seconds of the forward and of the backward pass.
    """
    xy = posed.xy.clone().requires_grad_()
    posed = replace(posed, xy=xy)
    begin = time.perf_counter()
    if method == 'unrolled':
        T, points = unrolled(posed, KERNEL)
        posed = replace(posed, T_world_camera=T, points=points)
    elif method == 'adjoint':
        T, points = optimum(posed, KERNEL)
        posed = replace(posed, T_world_camera=T, points=points)
    cost = posed.cost(KERNEL)
    middle = time.perf_counter()
    (found,) = torch.autograd.grad(cost, xy)
    return found, middle - begin, time.perf_counter() - middle


def measure(size: tuple[int, int, float], repeats: int) -> list[dict]:
    posed = solved(*size)
    reference, *_ = gradient('adjoint', posed)
    start = replace(
        posed,
        T_world_camera=lie.retract(posed.T_world_camera, 1e-3 * _noise(len(posed.T_world_camera))),
    )
    solve_ms = min(
        _timed(lambda: adjust(start, AdjustOptions(KERNEL))) for _ in range(repeats + 1)
    )
    rows = []
    for method in METHODS:
        turns = [
            gradient(method, posed) for _ in range(2 if method == 'unrolled' else 3 * repeats)
        ]
        forward, backward = min(turn[1] for turn in turns), min(turn[2] for turn in turns)
        rows.append({
            'method': method, 'keyframes': size[0], 'points': size[1],
            'observations': len(posed.pose),
            'ms': 1e3 * (backward if method == 'unrolled' else forward + backward),
            'forward_ms': 1e3 * forward if method == 'unrolled' else solve_ms,
            'peak_mb': peak_mb(method, posed),
            'error': float((turns[0][0] - reference).norm() / reference.norm()),
        })
    one = rows[0]
    for row in rows:
        row['times_one_step'] = row['ms'] / one['ms']
        row['times_one_step_memory'] = row['peak_mb'] / one['peak_mb']
    return rows


def _noise(keyframes: int) -> Tensor:
    noise = torch.randn(
        keyframes, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    noise[0] = 0  # the gauge
    return noise


def _timed(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - begin)


def peak_mb(method: str, posed: Problem) -> float:
    """Return the most that torch held at one time for the gradient."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        gradient(method, posed)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--json', type=Path, help='write all rows to this file')
    parser.add_argument('--quick', action='store_true', help='only the smallest window')
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for size in SIZES[:1 if options.quick else 2]
        for row in measure(size, 2 if options.quick else 5)
    ]
    table = Table(title='The gradient by all matches')
    columns = ('ms', 'to one step', 'solver or forward, ms', 'MB', 'to one step', 'error')
    for name in ('keyframes / points / observations', 'method', *columns):
        table.add_column(name, justify='right' if name in columns else 'left')
    for row in rows:
        table.add_row(
            f"{row['keyframes']} / {row['points']} / {row['observations']}", row['method'],
            f"{row['ms']:.2f}",
            f"{row['times_one_step']:.1f}", f"{row['forward_ms']:.1f}", f"{row['peak_mb']:.1f}",
            f"{row['times_one_step_memory']:.1f}", f"{row['error']:.1e}",
        )
    Console(width=130).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
