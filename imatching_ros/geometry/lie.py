"""
Rigid transforms on plain tensors.

A pose is a (..., 7) tensor ``tx ty tz qx qy qz qw``: the storage of ``pypose.SE3``, so that
``pypose.SE3(T)`` and ``T.tensor()`` are the whole conversion. ``T_a_b`` takes points of b to a.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def identity(*shape: int) -> Tensor:
    """Return identity poses (*shape, 7), float64."""
    T = torch.zeros(*shape, 7, dtype=torch.float64)
    T[..., 6] = 1.0
    return T


def matrix(T: Tensor) -> Tensor:
    """Return poses (..., 7) as [R | t] (..., 3, 4); a quaternion off unit norm is normalised."""
    R = rotation(T[..., 3:])
    return torch.cat((R, T[..., :3, None]), -1)


def rotation(q: Tensor) -> Tensor:
    """Return rotation matrices (..., 3, 3) of quaternions x y z w (..., 4), of any norm but 0."""
    q = q / q.norm(dim=-1, keepdim=True)
    products = (q[..., :, None] * q[..., None, :]).flatten(-2)
    return (products @ _from_products(q.dtype, q.device)).unflatten(-1, (3, 3))


#: (16, 9): a rotation matrix is linear in the products of a quaternion's parts. One product
#: instead of thirty small operations, of which each costs torch more than the arithmetic.
_FROM_PRODUCTS = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
for _i, _j, _k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
    _FROM_PRODUCTS[3, 3, _i, _i] = _FROM_PRODUCTS[_i, _i, _i, _i] = 1
    _FROM_PRODUCTS[_j, _j, _i, _i] = _FROM_PRODUCTS[_k, _k, _i, _i] = -1
    _FROM_PRODUCTS[_i, _j, _i, _j] = _FROM_PRODUCTS[_i, _j, _j, _i] = 2
    _FROM_PRODUCTS[_k, 3, _j, _i], _FROM_PRODUCTS[_k, 3, _i, _j] = 2, -2
_FROM_PRODUCTS = _FROM_PRODUCTS.view(16, 9)


@cache
def _from_products(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept, and autograd may want it later
        return _FROM_PRODUCTS.to(device, dtype)  # once: a GPU would be waited for every time


def from_matrix(Rt: Tensor) -> Tensor:
    """Return [R | t] (..., 3, 4), where R must be a rotation, as poses (..., 7) with qw >= 0."""
    m = Rt[..., :3, :3]
    a, b, c = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    # Four ways to write the quaternion, each scaled by one of its components; the largest divides
    # safely.
    xy, xz, yz = (m[..., j, i] + m[..., i, j] for i, j in ((0, 1), (0, 2), (1, 2)))
    wx, wy, wz = (m[..., j, i] - m[..., i, j] for i, j in ((1, 2), (2, 0), (0, 1)))
    ways = (
        1 + a - b - c, xy, xz, wx,
        xy, 1 - a + b - c, yz, wy,
        xz, yz, 1 - a - b + c, wz,
        wx, wy, wz, 1 + a + b + c,
    )
    ways = torch.stack(ways, -1).unflatten(-1, (4, 4))
    best = ways.diagonal(dim1=-2, dim2=-1).argmax(-1)
    q = torch.take_along_dim(ways, best[..., None, None], -2).squeeze(-2)
    q = q / q.norm(dim=-1, keepdim=True)
    q = torch.where(q[..., 3:] < 0, -q, q)
    return torch.cat((Rt[..., :3, 3], q), -1)


def cross(a: Tensor, b: Tensor) -> Tensor:
    """
    Return a x b, (..., 3), whatever leading shapes the two have, as long as they broadcast.

    ``torch.linalg.cross`` wants equally many dimensions, and copies.
    """
    if a.shape == b.shape:
        return torch.linalg.cross(a, b)
    (ax, ay, az), (bx, by, bz) = a.unbind(-1), b.unbind(-1)
    return torch.stack((ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx), -1)


def multiply(p: Tensor, q: Tensor) -> Tensor:
    """Return the product p q of quaternions x y z w (..., 4)."""
    a, b = p[..., :3], q[..., :3]
    vector = p[..., 3:] * b + q[..., 3:] * a + cross(a, b)
    scalar = p[..., 3:] * q[..., 3:] - (a * b).sum(-1, keepdim=True)
    return torch.cat((vector, scalar), -1)


def rotate(q: Tensor, p: Tensor) -> Tensor:
    """Return points (..., 3) turned by unit quaternions (..., 4)."""
    v = q[..., :3]
    twice = 2 * cross(v, p)
    return p + q[..., 3:] * twice + cross(v, twice)


def compose(A: Tensor, B: Tensor) -> Tensor:
    """Return the poses A B (..., 7), which take a point by B first, then by A."""
    q = multiply(A[..., 3:], B[..., 3:])
    return torch.cat((act(A, B[..., :3]), q / q.norm(dim=-1, keepdim=True)), -1)


def inverse(T: Tensor) -> Tensor:
    """Return the pose (..., 7) that undoes T."""
    q = torch.cat((-T[..., 3:6], T[..., 6:]), -1)
    return torch.cat((-rotate(q, T[..., :3]), q), -1)


def act(T: Tensor, p: Tensor) -> Tensor:
    """Return points (..., 3) taken by poses (..., 7); leading shapes broadcast."""
    return rotate(T[..., 3:], p) + T[..., :3]


def retract(T: Tensor, delta: Tensor) -> Tensor:
    """
    Return the pose T (..., 7) moved by delta (..., 6): t + delta[:3], and Exp(delta[3:]) R.

    Both act on the left, that is in the axes of the frame T leads to (the world, for
    ``T_world_camera``), and translation and rotation do not mix. A covariance of delta is
    therefore the one of geometry_msgs/PoseWithCovariance.
    """
    half = 0.5 * delta[..., 3:]
    angle = half.norm(dim=-1, keepdim=True)
    turn = torch.cat((torch.sinc(angle / torch.pi) * half, torch.cos(angle)), -1)
    q = multiply(turn, T[..., 3:])
    return torch.cat((T[..., :3] + delta[..., :3], q / q.norm(dim=-1, keepdim=True)), -1)


def local(T: Tensor, T_moved: Tensor) -> Tensor:
    """
    Return the delta (..., 6) that :func:`retract` takes from T (..., 7) to T_moved.

    Its rotation goes the shorter way round.
    """
    turn = multiply(T_moved[..., 3:], torch.cat((-T[..., 3:6], T[..., 6:]), -1))
    return torch.cat((T_moved[..., :3] - T[..., :3], log(turn)), -1)


def log(q: Tensor) -> Tensor:
    """Return unit quaternions (..., 4) as rotation vectors (..., 3) of at most pi."""
    q = torch.where(q[..., 3:] < 0, -q, q)
    sine = q[..., :3].norm(dim=-1, keepdim=True)
    # The angle's ratio to its sine is then that of the limit, and would be 0 / 0
    tiny = sine < 1e-150
    ratio = 2 * torch.atan2(sine, q[..., 3:]) / torch.where(tiny, 1.0, sine)
    return q[..., :3] * torch.where(tiny, 2.0, ratio)


def left_jacobian_inverse(phi: Tensor) -> Tensor:
    """
    Return the matrices (..., 3, 3) by which phi changes when R = Exp(phi) becomes Exp(w) R.

    To first order in w, phi (..., 3) grows by the matrix times w. It is I - [phi]x / 2 + (1 - h
    cot h) / |phi|^2 [phi]x^2, h = |phi| / 2 (Barfoot, State Estimation for Robotics, 7.1.5).
    """
    angle = phi.norm(dim=-1)
    small = angle < 0.05
    safe = torch.where(small, 1.0, angle)
    square = angle.square()
    series = 1 / 12 + square / 720 + square.square() / 30240
    b = torch.where(small, series, (1 - safe / 2 / torch.tan(safe / 2)) / safe.square())
    b = b[..., None, None]
    x, y, z = phi.unbind(-1)
    zero = torch.zeros_like(x)
    hat = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).unflatten(-1, (3, 3))
    return torch.eye(3, dtype=phi.dtype, device=phi.device) - 0.5 * hat + b * (hat @ hat)
