"""
The solver of adjust.py compiled for the CPU.

The same equations and the same decisions, landmarks side by side (layout.py). Sums run in a fixed
order on one thread, so that equal input gives equal bits.

State, residual, gradient, cost and Cholesky factors are float64. The Jacobian is rounded to
float32 before anything is made of it, so that the normal equations are exactly those of one
matrix; the elimination's products are float32, their sum float64. That costs a step about seven
digits, which the next step repairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from numba import types
import numpy as np

from .cameras import solve_cameras
from .eliminate import eliminate, eliminate_exactly
from .lanes import LANES, N, S, SCRATCH
from .layout import layout, place_observations, place_points
from .linearise import evaluate, linearise, rho, steepest
from .poses import copy, retract
from .prior import linearise_prior, prior_cost
from .step import stay, step_points
from ..problem import BEHIND_PX
from ....jit import at, b1, entry, f4, f8, i8

_ints, _numbers, _rows, _narrow = i8[::1], f8[::1], f8[:, ::1], f4[::1]


@entry(
    types.Tuple((i8, f8, f8, f8, b1))(
        i8, *[_rows] * 3, _numbers, _rows, _rows, f8, f8, i8[:, ::1], i8, f8, i8, f8, f8,
        _ints, _rows, _rows, _numbers, f8, *[_ints] * 8, *[_numbers] * 6, _narrow, _narrow, _ints,
    )
)
def descend(
    blocks, q, c, points, origin, xy, cov, fx, fy, free, kernel, scale, max_iterations,
    relative_decrease, gradient, prior_pose, prior_T, prior_H, prior_g, prior_constant,
    order, cell_of_block, cell_pose, layer_of_cell, chunks, slot, lane, envelope,
    t, p, rows, point, H, room, jacobian, e, held,
):
    """
    Run adjust.py's ``_minimise``.

    ``q`` (K, 4), ``c`` (K, 3), about the origin, and ``points`` are the start, and in the end the
    solution. After the problem and its prior come what ``layout`` filled, and a ``Room``. Returns
    iterations, cost, relative decrease, gradient, and whether it converged.
    """
    K, P, observations = len(q), len(prior_pose), len(slot)
    xy, cov, free, held = at(xy, 0), at(cov, 0), at(free, 0), at(held, 0)
    envelope, cells = at(envelope, 0), at(held, K)
    cell_of_block, cell_pose, layer_of_cell, chunks = (
        at(cell_of_block, 0), at(cell_pose, 0), at(layer_of_cell, 0), at(chunks, 0),
    )
    prior_pose, prior_T, prior_H, prior_g = (
        at(prior_pose, 0), at(prior_T, 0), at(prior_H, 0), at(prior_g, 0),
    )
    t, p_start, rows, point, H = at(t, 0), at(p, 0), at(rows, 0), at(point, 0), at(H, 0)
    jacobian, e, q_start, c_start = at(jacobian, 0), at(e, 0), at(q, 0), at(c, 0)
    p_new = at(room, 0)
    q_new = at(p_new, 3 * N * blocks)
    c_new = at(q_new, 4 * K)
    R = at(c_new, 3 * K)
    R_new = at(R, 9 * K)
    g = at(R_new, 9 * K)
    step = at(g, 6 * K)
    rhs = at(step, 6 * K)
    reduced = at(rhs, 6 * N * K)
    A = at(reduced, 36 * K * K)
    d = at(A, 36 * K * K)
    J = at(d, 6 * P)
    G = at(J, 9 * P)
    place_observations(observations, at(slot, 0), at(lane, 0), xy, cov, rows)
    place_points(blocks * N, at(order, 0), at(points, 0), at(origin, 0), p_start, False)
    q, c, p = q_start, c_start, p_start
    for k in range(K):
        held[k] = 1
        for j in range(6):
            if free[6 * k + j]:
                held[k] = 0

    cost = evaluate(
        t, R, q, c, p, K, blocks, cell_of_block, cell_pose, layer_of_cell, rows, fx, fy, kernel,
        scale,
    ) + prior_cost(prior_pose, P, prior_T, prior_H, prior_g, prior_constant, q, c, d)
    for i in range(LANES):
        t[S + i] = BEHIND_PX * BEHIND_PX
    each = 0.5 * rho(t, kernel, scale) / LANES  # what a row costs whose point is behind its camera
    iterations, decrease, damping, growth = 0, 1.0, 1e-4, 2.0
    while True:
        energy, behind = linearise(
            t, R, q, c, p, K, blocks, cell_of_block, cell_pose, layer_of_cell, rows, fx, fy,
            kernel, scale, decrease < 1e-4, jacobian, point, H, g,
        )
        if P:
            linearise_prior(prior_pose, P, prior_T, prior_H, prior_g, q, c, d, J, G, H, g)
            energy += 2 * prior_cost(
                prior_pose, P, prior_T, prior_H, prior_g, prior_constant, q, c, d
            )
        slope_norm = steepest(point, blocks, H, g, K, free, energy)
        converged = cost <= 1e-18 * observations or (
            decrease < relative_decrease and slope_norm < gradient
        )
        if converged or iterations >= max_iterations:
            break
        cost_new, predicted, refused = np.inf, 0.0, False
        while damping < 1e12:
            eliminate(
                t, c, p, K, blocks, cell_of_block, cell_pose, chunks, jacobian, point, damping,
                held, envelope, reduced, rhs, e, cells,
            )
            if solve_cameras(
                K, H, g, reduced, rhs, free, damping, envelope, prior_pose, P, G, A, step
            ):
                slope, length = step_points(
                    t, c, p, blocks, cell_of_block, cell_pose, jacobian, point, damping, step,
                    p_new,
                )
                for k in range(K):
                    for j in range(6):
                        x = step[6 * k + j]
                        slope += g[6 * k + j] * x
                        length += H[21 * k + j * (j + 3) // 2] * x * x
                    if held[k]:  # to the last bit
                        copy(at(q, 4 * k), at(q_new, 4 * k), 4)
                        copy(at(c, 3 * k), at(c_new, 3 * k), 3)
                    else:
                        retract(
                            at(q, 4 * k), at(c, 3 * k), at(step, 6 * k), at(q_new, 4 * k),
                            at(c_new, 3 * k),
                        )
                predicted = 0.5 * (damping * length - slope)
                if refused:
                    stay(
                        t, R, R_new, q, c, p, q_new, c_new, K, blocks, cell_of_block, cell_pose,
                        layer_of_cell, rows, p_new,
                    )
                cost_new = evaluate(
                    t, R, q_new, c_new, p_new, K, blocks, cell_of_block, cell_pose, layer_of_cell,
                    rows, fx, fy, kernel, scale,
                ) + prior_cost(
                    prior_pose, P, prior_T, prior_H, prior_g, prior_constant, q_new, c_new, d
                )
                if cost_new < cost or predicted <= 1e-13 * cost:
                    break
            damping, growth, refused = damping * growth, growth * 2, True
        if not cost_new < cost:
            decrease, converged = 0.0, slope_norm < gradient
            break
        gain = (cost - cost_new) / max(predicted, 1e-300)
        damping, growth = max(damping * max(0.1, 1 - (2 * gain - 1) ** 3), 1e-12), 2.0
        decrease, cost = (cost - cost_new) / max(cost - behind * each, 1e-300), cost_new
        q, c, p, q_new, c_new, p_new = q_new, c_new, p_new, q, c, p
        iterations += 1

    copy(q, q_start, 4 * K)
    copy(c, c_start, 3 * K)
    place_points(blocks * N, at(order, 0), at(points, 0), at(origin, 0), p, True)
    return iterations, cost, decrease, slope_norm, converged


@dataclass(frozen=True)
class Room:
    """What ``descend`` works in, and leaves behind."""

    t: np.ndarray  #: scratch of a cell (lanes.py)
    p: np.ndarray  #: (blocks, 3, LANES), landmarks about the origin
    rows: np.ndarray  #: (layers, 5, LANES), x, y and the information's uu, uv, vv
    point: np.ndarray  #: (blocks, 9, LANES), Hpp and gp
    H: np.ndarray  #: (K, 21), Hcc: lower triangles, row by row
    more: np.ndarray  #: the state after a step, rotations, gc, the step, the reduced system
    jacobian: np.ndarray  #: (cells, 6, LANES), W
    e: np.ndarray  #: (K, 18, LANES), a block's E
    held: np.ndarray  #: (2 K,), which poses are held, and a block's cells of the others

    @classmethod
    def of(cls, K: int, P: int, blocks: int, cells: int, layers: int) -> Room:
        """Return room for K poses, a prior on P of them, and landmarks laid out so."""
        more = 3 * N * blocks + (37 + 6 * N) * K + 72 * K * K + 15 * P + 36 * P * P
        return cls(
            np.zeros(SCRATCH), np.zeros(blocks * 3 * N), np.zeros(layers * 5 * N),
            np.empty(blocks * 9 * N), np.empty(K * 21), np.empty(more),
            np.empty(cells * 6 * N, np.float32), np.empty(K * 18 * N, np.float32),
            np.zeros(2 * K, np.int64),
        )


def minimise(
    T, points, pose, landmark, xy, cov, fx, fy, free, kernel, scale, max_iterations,
    relative_decrease, gradient, prior_pose, prior_T, prior_H, prior_g, prior_constant,
):
    """
    Run adjust.py's ``_minimise`` on arrays as of ``Problem`` and ``PosePrior``.

    free: (K, 6) bool. Returns T (K, 7), points (L, 3), iterations, cost, relative decrease,
    gradient, and whether it converged.
    """
    origin = T[0, :3].copy()
    q, c, points = T[:, 3:].copy(), T[:, :3] - origin, points.copy()
    sizes, places = _laid_out(pose, landmark, len(T), len(points))
    if len(prior_pose):
        prior_T, envelope = prior_T.copy(), places[-1]
        prior_T[:, :3] -= origin
        envelope[prior_pose] = np.minimum(envelope[prior_pose], prior_pose.min())
    said = descend(
        sizes[0], q, c, points, origin, xy, cov, fx, fy, free.astype(np.int64), kernel, scale,
        max_iterations, relative_decrease, gradient, prior_pose, prior_T, prior_H, prior_g,
        prior_constant, *places, *vars(Room.of(len(T), len(prior_pose), *sizes)).values(),
    )
    return np.concatenate((c + origin, q), 1), points, *said


def reduced_system(T, points, pose, landmark, xy, cov, fx, fy, kernel, scale):
    """
    Return the matrix (6 K, 6 K) of system.py's ``reduce`` without damping and without a prior.

    Its products are in float64.
    """
    K, origin = len(T), T[0, :3].copy()
    q, c, none = T[:, 3:].copy(), T[:, :3] - origin, np.zeros(0)
    sizes, places = _laid_out(pose, landmark, K, len(points))
    room = Room.of(K, 0, *sizes)
    descend(
        sizes[0], q, c, points.copy(), origin, xy, cov, fx, fy, np.ones((K, 6), np.int64), kernel,
        scale, 0, 0.0, 0.0, np.zeros(0, np.int64), np.zeros((0, 7)), np.zeros((0, 0)), none, 0.0,
        *places, *vars(room).values(),
    )
    _, cell_of_block, cell_pose, _, chunks, _, _, envelope = places
    reduced = np.zeros((K, K, 6, 6))
    eliminate_exactly(
        sizes[0], room.t, c, room.p, room.point, cell_of_block, cell_pose, chunks, envelope,
        room.jacobian, reduced.reshape(-1), np.empty(K * 6 * N), np.empty(K * 18 * N), room.held,
    )
    row, column = np.tril_indices(6)
    each = np.arange(K)[:, None]
    whole = -reduced.swapaxes(1, 2)
    whole[each, row, each, column] += room.H.reshape(K, 21)
    lower = np.tril(whole.reshape(6 * K, 6 * K))
    return lower + np.tril(lower, -1).T


def _laid_out(pose, landmark, K: int, L: int) -> tuple[tuple[int, int, int], tuple]:
    """Return how many blocks, cells and layers there are, and what ``layout`` fills."""
    blocks = -(-L // LANES)
    cells = min(len(pose), blocks * K)
    sizes = (
        blocks * LANES, blocks + 1, cells, cells + 1, 2 * cells, len(pose), len(pose), K,
    )
    places = tuple(np.empty(size, np.int64) for size in sizes)
    room, count = np.empty(4 * L + K * K + K + 2, np.int64), np.zeros(K * LANES, np.int64)
    return layout(pose, landmark, K, L, *places, room, count), places
