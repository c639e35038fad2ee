"""
The landmarks' step that follows the cameras', and where it may not lead.

Substituted back, Hpp step_p = -(gp + Hpc step_c), and Hpc step_c = -W V^T step_c.
"""

from __future__ import annotations

from numba import types

from .eliminate import factor_points, solve_points
from .lanes import FRONT, LANES, N, N2, N3, N4, N5, N6, N7, N8, N9, Q0, Q1, Q2, S
from .linearise import project
from .poses import copy, rotations
from ....jit import at, F4, F8, f8, I8, i8, inner, void


@inner(types.UniTuple(f8, 2)(F8, F8, F8, i8, I8, I8, F4, F8, f8, F8, F8))
def step_points(t, c, p, blocks, cell_of_block, cell_pose, jacobian, point, damping, step, moved):
    """
    Write the landmarks after the step that follows the cameras' to ``moved``.

    Returns the step's slope g'x, and its squared length in the diagonal of Hpp.
    """
    slope, length = 0.0, 0.0
    for b in range(blocks):
        h, here, there = at(point, N9 * b), at(p, N3 * b), at(moved, N3 * b)
        for i in range(N3):
            t[Q0 + i] = -h[N6 + i]
        for cell in range(cell_of_block[b], cell_of_block[b + 1]):
            k = cell_pose[cell]
            recall(t, here, at(c, 3 * k), at(jacobian, N6 * cell), at(step, 6 * k))
        factor_points(t, h, damping)
        solve_points(t)
        for i in range(LANES):
            x, y, z = t[Q0 + i], t[Q1 + i], t[Q2 + i]
            slope += x * h[N6 + i] + y * h[N7 + i] + z * h[N8 + i]
            length += x * x * h[i] + y * y * h[N2 + i] + z * z * h[N5 + i]
        for i in range(N3):
            there[i] = here[i] + t[Q0 + i]
    return slope, length


@inner(void(F8, F8, F8, F4, F8))
def recall(t, p, c, w, step):
    """Add W V^T of a camera's step to Q: what the step does to a block's landmarks."""
    c0, c1, c2 = c[0], c[1], c[2]
    s0, s1, s2, s3, s4, s5 = step[0], step[1], step[2], step[3], step[4], step[5]
    for i in range(LANES):
        x, y, z = p[i] - c0, p[N + i] - c1, p[N2 + i] - c2
        v0, v1, v2 = s0 + s4 * z - s5 * y, s1 + s5 * x - s3 * z, s2 + s3 * y - s4 * x
        a0, a1, a2, b0, b1, b2 = (
            w[i], w[N + i], w[N2 + i], w[N3 + i], w[N4 + i], w[N5 + i],
        )
        a, b = a0 * v0 + a1 * v1 + a2 * v2, b0 * v0 + b1 * v1 + b2 * v2
        t[Q0 + i] += a0 * a + b0 * b
        t[Q1 + i] += a1 * a + b1 * b
        t[Q2 + i] += a2 * a + b2 * b


@inner(void(*[F8] * 8, i8, i8, I8, I8, I8, F8, F8))
def stay(
    t, R, R_new, q, c, p, q_new, c_new, K, blocks, cell_of_block, cell_pose, layer_of_cell, rows,
    p_new,
):
    """Move the landmarks that passed a camera with it instead, as system.py's ``stay`` does."""
    rotations(q, K, R)
    rotations(q_new, K, R_new)
    for b in range(blocks):
        here, there = at(p, N3 * b), at(p_new, N3 * b)
        for cell in range(cell_of_block[b], cell_of_block[b + 1]):
            k = cell_pose[cell]
            project(t, here, at(R, 9 * k), at(c, 3 * k))
            copy(at(t, FRONT), at(t, S), N)
            project(t, there, at(R_new, 9 * k), at(c_new, 3 * k))
            for layer in range(layer_of_cell[cell], layer_of_cell[cell + 1]):
                seen = at(rows, (5 * layer + 2) * N)
                for i in range(LANES):
                    if t[S + i] != t[FRONT + i] and seen[i] > 0:
                        for j in range(3):
                            there[j * N + i] = here[j * N + i] + c_new[3 * k + j] - c[3 * k + j]
