"""
The scratch memory of a cell: ``LANES`` landmarks side by side, one per SIMD lane.

It is one flat array ``t`` of rows of ``LANES`` numbers, at offsets that are constants: the
compiler then sees that nothing overlaps, and vectorises.
"""

from __future__ import annotations

LANES = 64  #: landmarks side by side
CHUNK = 16  #: lanes; where two cells have none in common, their product is left out

N = LANES
# project: d = p - c, where the point projects on the plane z = 1, 1 / depth, and whether that is
# positive
DX, DY, DZ, U, V, INVERSE, FRONT = 0, N, 2 * N, 3 * N, 4 * N, 5 * N, 6 * N
# residual and reweight, of one layer: g = information times residual, s, the kernel's weight, and
# what that loses along the residual
GX, GY, S, WEIGHT, BEND = 9 * N, 10 * N, 11 * N, 12 * N, 13 * N
# linearise, summed over a cell's layers: the 2x2 information M and the gradient
XX, XY, YY, BX, BY = 14 * N, 15 * N, 16 * N, 17 * N, 18 * N
# whiten: a cell's W in float64, its first column and its second
W0, W1, W2, W3, W4, W5 = 19 * N, 20 * N, 21 * N, 22 * N, 23 * N, 24 * N
# factor_points: L of the damped Hpp, its diagonal inverted
L00, L10, L11, L20, L21, L22 = 25 * N, 26 * N, 27 * N, 28 * N, 29 * N, 30 * N
# solve_points: the right hand side, and then the solution
Q0, Q1, Q2 = 31 * N, 32 * N, 33 * N
SCRATCH = 34 * N
# Multiples of N, for what is named by its number alone; numba multiplies nothing beforehand.
N2, N3, N4, N5, N6, N7, N8, N9, N12, N15, N18 = (
    k * N for k in (2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 18)
)
