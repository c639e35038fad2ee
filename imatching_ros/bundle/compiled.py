"""
The solver of adjust.py compiled for the CPU.

The same equations and the same decisions, landmarks side by side.

Observed landmarks are sorted by the keyframes they span and stand in blocks of ``LANES``, one per
SIMD lane. A block holds a *cell* for every pose that any of its landmarks is seen by, a cell one
*layer* per row that observes it; what is missing has no information. Sums run in a fixed order on
one thread, so that equal input gives equal bits.

State, residual, gradient, cost and Cholesky factors are float64. The Jacobian is rounded to
float32 before anything is made of it, so that the normal equations are exactly those of one
matrix; the elimination's products are float32, their sum float64. That costs a step about seven
digits, which the next step repairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from imatching_ros.bundle.compiled_blocks import (
    CHUNK,
    eliminate,
    evaluate,
    linearise,
    N,
    rho,
    S,
    SCRATCH,
    stay,
    steepest,
    step_points,
)  # fmt: skip
from imatching_ros.bundle.compiled_poses import (
    copy,
    LANES,
    linearise_prior,
    prior_cost,
    retract,
    solve_cameras,
)  # fmt: skip
from imatching_ros.bundle.problem import BEHIND_PX
from imatching_ros.jit import at, b1, entry, f4, F8, f8, I8, i8, inner, void
from numba import types
import numpy as np

_ints, _numbers, _rows, _narrow = i8[::1], f8[::1], f8[:, ::1], f4[::1]


@entry(types.UniTuple(i8, 3)(_ints, _ints, i8, i8, *[_ints] * 10))
def layout(
    pose, landmark, poses, landmarks, order, cell_of_block, cell_pose, layer_of_cell, chunks,
    slot, lane, envelope, room, count,
):  # fmt: skip
    """
    Say where every observation goes, and return how many blocks, cells and layers there are.

    It fills the arrays of ``Layout``. room: (4 L + K^2 + K + 2,). count: (K * LANES,) zeros.
    """
    observations, pose, landmark = len(pose), at(pose, 0), at(landmark, 0)
    low, high, place = at(room, 0), at(room, landmarks), at(room, 2 * landmarks)
    first_row = at(room, 3 * landmarks)
    start, base = at(first_row, landmarks + 1), at(first_row, landmarks + 2 + poses * poses)
    order, cell_of_block, cell_pose = at(order, 0), at(cell_of_block, 0), at(cell_pose, 0)
    layer_of_cell, chunks, count = at(layer_of_cell, 0), at(chunks, 0), at(count, 0)
    slot, lane, envelope = at(slot, 0), at(lane, 0), at(envelope, 0)
    cell_of_block[0] = layer_of_cell[0] = 0
    for m in range(landmarks):
        low[m], high[m], place[m], first_row[m + 1] = poses, -1, -1, 0
    for o in range(observations):
        m, k = landmark[o], pose[o]
        low[m], high[m] = min(low[m], k), max(high[m], k)
        first_row[m + 1] += 1
    first_row[0] = 0
    for m in range(landmarks):
        first_row[m + 1] += first_row[m]
    # Counting sort of the observed landmarks by first pose, two at a time, and last, these up and
    # down: neighbours see much the same.
    for n in range(poses * poses + 1):
        start[n] = 0
    for m in range(landmarks):
        if high[m] >= 0:
            pair = low[m] // 2
            place[m] = pair * poses + (high[m] if pair % 2 else poses - 1 - high[m])
            start[place[m] + 1] += 1
    for n in range(poses * poses):
        start[n + 1] += start[n]
    blocks = (start[poses * poses] + LANES - 1) // LANES
    for n in range(blocks * LANES):
        order[n] = -1
    for m in range(landmarks):
        if place[m] >= 0:
            order[start[place[m]]] = m
            start[place[m]] += 1
    for k in range(poses):
        envelope[k] = k
    cells, layers = 0, 0
    for b in range(blocks):
        begin, end, block = poses, -1, at(order, b * LANES)
        for i in range(LANES):
            m = block[i]
            if m < 0:
                continue
            begin, end = min(begin, low[m]), max(end, high[m])
            for o in range(first_row[m], first_row[m + 1]):
                k = pose[o]
                slot[o], lane[o] = count[k * LANES + i], i
                count[k * LANES + i] += 1
                envelope[k] = min(envelope[k], low[m])
        for k in range(begin, end + 1):
            deepest, left, right, seen = 0, LANES, 0, at(count, k * LANES)
            for i in range(LANES):
                if seen[i] > 0:
                    left, right = min(left, i), i
                    deepest = max(deepest, seen[i])
                    seen[i] = 0
            if deepest:
                base[k] = layers
                cell_pose[cells] = k
                chunks[2 * cells], chunks[2 * cells + 1] = left // CHUNK, right // CHUNK + 1
                layers += deepest
                cells += 1
                layer_of_cell[cells] = layers
        cell_of_block[b + 1] = cells
        for i in range(LANES):
            m = block[i]
            if m >= 0:
                for o in range(first_row[m], first_row[m + 1]):
                    slot[o] += base[pose[o]]
    return blocks, cells, layers


@inner(void(i8, I8, I8, F8, F8, F8))
def place_observations(observations, slot, lane, xy, cov, rows):
    """Write to rows (layers, 5 * LANES), which are zero, x, y and the information uu, uv, vv."""
    for o in range(observations):
        row, mean, v = at(rows, 5 * N * slot[o] + lane[o]), at(xy, 2 * o), at(cov, 3 * o)
        determinant = v[0] * v[2] - v[1] * v[1]
        row[0], row[N] = mean[0], mean[1]
        row[2 * N], row[3 * N] = v[2] / determinant, -v[1] / determinant
        row[4 * N] = v[0] / determinant


@inner(void(i8, I8, F8, F8, F8, b1))
def place_points(slots, order, points, origin, p, back):
    """Write to p (blocks, 3 * LANES) the points (L, 3) about the origin, or those to these."""
    for n in range(slots):
        if order[n] >= 0:
            there, here = at(p, 3 * N * (n // N) + n % N), at(points, 3 * order[n])
            for j in range(3):
                if back:
                    here[j] = there[N * j] + origin[j]
                else:
                    there[N * j] = here[j] - origin[j]


@entry(
    types.Tuple((i8, f8, f8, f8, b1))(
        i8, *[_rows] * 3, _numbers, _rows, _rows, f8, f8, i8[:, ::1], i8, f8, i8, f8, f8,
        _ints, _rows, _rows, _numbers, f8, *[_ints] * 8, *[_numbers] * 7, _narrow, _narrow,
        _numbers, _ints,
    )
)  # fmt: skip
def descend(
    blocks, q, c, points, origin, xy, cov, fx, fy, free, kernel, scale, max_iterations,
    relative_decrease, gradient, prior_pose, prior_T, prior_H, prior_g, prior_constant,
    order, cell_of_block, cell_pose, layer_of_cell, chunks, slot, lane, envelope,
    t, p, rows, point, H, reduced, room, jacobian, e, wide, held,
):  # fmt: skip
    """
    adjust.py's ``_minimise``: iterations, cost, relative decrease, gradient, converged.

    ``q`` (K, 4), ``c`` (K, 3), about the origin, and ``points`` are the start, and in the end the
    solution. After the problem and its prior come what ``layout`` filled, and a ``Room``. Where
    that is ``wide``, the reduced system at the end is left in it, undamped.
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
    exactly, wide, reduced = len(wide) > 0, at(wide, 0), at(reduced, 0)
    p_new = at(room, 0)
    q_new = at(p_new, 3 * N * blocks)
    c_new = at(q_new, 4 * K)
    R = at(c_new, 3 * K)
    R_new = at(R, 9 * K)
    g = at(R_new, 9 * K)
    step = at(g, 6 * K)
    rhs = at(step, 6 * K)
    A = at(rhs, 6 * N * K)
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
        )  # fmt: skip
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
                held, envelope, reduced, rhs, False, e, wide, cells,
            )  # fmt: skip
            if solve_cameras(
                K, H, g, reduced, rhs, free, damping, envelope, prior_pose, P, G, A, step
            ):
                slope, length = step_points(
                    t, c, p, blocks, cell_of_block, cell_pose, jacobian, point, damping, step,
                    p_new,
                )  # fmt: skip
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
                        )  # fmt: skip
                predicted = 0.5 * (damping * length - slope)
                if refused:
                    stay(
                        t, R, R_new, q, c, p, q_new, c_new, K, blocks, cell_of_block, cell_pose,
                        layer_of_cell, rows, p_new,
                    )  # fmt: skip
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

    if exactly:
        eliminate(
            t, c, p, K, blocks, cell_of_block, cell_pose, chunks, jacobian, point, 0.0, held,
            envelope, reduced, rhs, True, e, wide, cells,
        )  # fmt: skip
    copy(q, q_start, 4 * K)
    copy(c, c_start, 3 * K)
    place_points(blocks * N, at(order, 0), at(points, 0), at(origin, 0), p, True)
    return iterations, cost, decrease, slope_norm, converged


@dataclass(frozen=True)
class Room:
    """What ``descend`` works in, and leaves behind."""

    t: np.ndarray  #: scratch of a cell
    p: np.ndarray  #: (blocks, 3, LANES), landmarks about the origin
    rows: np.ndarray  #: (layers, 5, LANES), x, y and the information's uu, uv, vv
    point: np.ndarray  #: (blocks, 9, LANES), Hpp and gp
    H: np.ndarray  #: (K, 21), Hcc: lower triangles, row by row
    reduced: np.ndarray  #: (K, K, 6, 6), lower blocks of E E^T inside the envelope
    more: np.ndarray
    jacobian: np.ndarray  #: (cells, 6, LANES), W
    e: np.ndarray  #: (K, 18, LANES), a block's E
    wide: np.ndarray  #: the same where products are wanted in float64, else empty
    held: np.ndarray  #: (2 K,)

    @classmethod
    def of(cls, K: int, P: int, blocks: int, cells: int, layers: int, wide: bool = False) -> Room:
        more = 3 * N * blocks + (37 + 6 * N) * K + 36 * K * K + 15 * P + 36 * P * P
        return cls(
            np.zeros(SCRATCH), np.zeros(blocks * 3 * N), np.zeros(layers * 5 * N),
            np.empty(blocks * 9 * N), np.empty(K * 21), np.zeros(K * K * 36), np.empty(more),
            np.empty(cells * 6 * N, np.float32), np.empty(K * 18 * N, np.float32),
            np.empty(K * 18 * N if wide else 0), np.zeros(2 * K, np.int64),
        )  # fmt: skip


def minimise(
    T, points, pose, landmark, xy, cov, fx, fy, free, kernel, scale, max_iterations,
    relative_decrease, gradient, prior_pose, prior_T, prior_H, prior_g, prior_constant,
):  # fmt: skip
    """
    adjust.py's ``_minimise``.

    Arrays as of ``Problem`` and ``PosePrior``, free: (K, 6) bool. Returns T (K, 7), points (L, 3),
    iterations, cost, relative decrease, gradient, converged.
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
    )  # fmt: skip
    return np.concatenate((c + origin, q), 1), points, *said


def reduced_system(T, points, pose, landmark, xy, cov, fx, fy, kernel, scale):
    """
    Return system.py's ``reduce`` without damping and without a prior, (6 K, 6 K).

    Its products are in float64.
    """
    K, origin = len(T), T[0, :3].copy()
    q, c, none = T[:, 3:].copy(), T[:, :3] - origin, np.zeros(0)
    sizes, places = _laid_out(pose, landmark, K, len(points))
    room = Room.of(K, 0, *sizes, wide=True)
    descend(
        sizes[0], q, c, points.copy(), origin, xy, cov, fx, fy, np.ones((K, 6), np.int64), kernel,
        scale, 0, 0.0, 0.0, np.zeros(0, np.int64), np.zeros((0, 7)), np.zeros((0, 0)), none, 0.0,
        *places, *vars(room).values(),
    )  # fmt: skip
    row, column = np.tril_indices(6)
    each = np.arange(K)[:, None]
    whole = -room.reduced.reshape(K, K, 6, 6).swapaxes(1, 2)
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
