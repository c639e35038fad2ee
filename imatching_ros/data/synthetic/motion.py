"""How the camera of a recording moves: carried through a room, or on a car."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ...geometry import lie

Motion = Callable[[np.ndarray], np.ndarray]  # seconds (N,) -> T_world_camera (N, 7)


class Road:
    """A winding centre line in the plane z = 0, by its arc length in metres."""

    def __init__(self, rng: np.random.Generator, length: float) -> None:
        self.length = length
        self._s = np.arange(-40.0, length + 40.0, 0.1)
        phase = rng.uniform(0, 2 * np.pi, 2)
        self._heading = 0.22 * np.sin(2 * np.pi * self._s / 55 + phase[0])
        self._heading += 0.10 * np.sin(2 * np.pi * self._s / 23 + phase[1])
        self._xy = 0.1 * np.cumsum(np.stack((np.cos(self._heading), np.sin(self._heading)), 1), 0)

    def at(self, s: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the point (..., 2) and the heading (...), radians, at arc length s (...)."""
        xy = np.stack([np.interp(s, self._s, self._xy[:, k]) for k in range(2)], -1)
        return xy, np.interp(s, self._s, self._heading)

    def distance(self, xy: np.ndarray) -> float:
        """Return how many metres a point (2,) is away from the centre line."""
        return float(np.linalg.norm(self._xy - xy, axis=1).min())


def handheld(rng: np.random.Generator) -> Motion:
    """
    Return a hand-held path through the free middle of ``places.room``.

    It strolls, looks about, and trembles a little.
    """
    metres = (1.0, 0.2, 0.004, 0.001), (0.8, 0.2, 0.004, 0.001), (0.2, 0.07, 0.005, 0.001)
    travel = [wandering(rng, size, (0.055, 0.19, 1.1, 2.6)) for size in metres]
    radians = (
        (0.7, 0.08, 0.003, 0.0008), (0.12, 0.04, 0.003, 0.0008), (0.06, 0.03, 0.003, 0.0008),
    )
    turns = [wandering(rng, size, (0.035, 0.17, 1.3, 3.1)) for size in radians]
    facing = rng.uniform(0, 2 * np.pi)

    def path(t: np.ndarray) -> np.ndarray:
        at = np.stack([move(t) for move in travel], -1) + (0, 0, 1.45)
        yaw, pitch, roll = (move(t) for move in turns)
        return _poses(at, facing + yaw, pitch - 0.08, roll)

    return path


def driving(rng: np.random.Generator, road: Road, speed: float) -> Motion:
    """
    Return a car's path along ``road`` at ``speed`` m/s.

    It follows the bends, sways in its lane and rocks on its springs.
    """
    sway = wandering(rng, (0.5, 0.1), (0.11, 0.3))
    lift_and_turns = (0.015, 0.004), (0.006, 0.003), (0.006, 0.003)  # metres, radians
    rock = [wandering(rng, size, (0.6, 1.7)) for size in lift_and_turns]

    def path(t: np.ndarray) -> np.ndarray:
        s = speed * t
        xy, heading = road.at(s)
        # The lane's offset turns the car too: heading changes by its slope.
        slope = (sway(t + 0.05) - sway(t - 0.05)) / (0.1 * speed)
        left = np.stack((-np.sin(heading), np.cos(heading)), -1)
        lift, pitch, roll = (move(t) for move in rock)
        at = np.concatenate((xy + left * sway(t)[..., None], (1.5 + lift)[..., None]), -1)
        return _poses(at, heading + slope, pitch - 0.02, roll)

    return path


def wandering(
    rng: np.random.Generator, sizes, frequencies_hz
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a smooth random function of time, sines of about these sizes and frequencies."""
    sizes = np.array(sizes) * rng.uniform(0.8, 1.2, len(sizes))
    rates = 2 * np.pi * np.array(frequencies_hz) * rng.uniform(0.8, 1.2, len(sizes))
    phases = rng.uniform(0, 2 * np.pi, len(sizes))
    return lambda t: (sizes * np.sin(rates * np.asarray(t)[..., None] + phases)).sum(-1)


def _poses(at: np.ndarray, yaw: np.ndarray, pitch: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """
    Return T_world_camera (N, 7) of cameras at (N, 3), turned by three angles (N,), radians.

    They look along yaw about z, are pitched up, and rolled clockwise.
    """
    out = np.empty((*at.shape[:-1], 7))
    out[..., :3] = at
    # Optical axes of yaw 0: z forward is x of the world, x right is -y, y down is -z.
    level = torch.tensor([-0.5, 0.5, -0.5, 0.5], dtype=torch.float64)
    spin = lie.multiply(_about(2, yaw), level)
    out[..., 3:] = lie.multiply(spin, lie.multiply(_about(0, pitch), _about(2, roll)))
    return out


def _about(axis: int, angle: np.ndarray) -> torch.Tensor:
    """Return quaternions (..., 4) of turns by angles (...), radians, about one of the axes."""
    q = torch.zeros(*np.shape(angle), 4, dtype=torch.float64)
    half = torch.as_tensor(angle) / 2
    q[..., axis], q[..., 3] = half.sin(), half.cos()
    return q
