"""The pinhole camera: pixels, distortion, normalised image plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
import math
import re
from typing import Any

import torch
from torch import Tensor

from .calibration import DISTORTION_MODELS, focal_lengths, intrinsics, lens

#: A calibration that moves no pixel farther than this is the same camera, focused anew; px.
FOLLOWED_PX = 3.0

#: What image_transport appends to the name of an image topic.
TRANSPORTS = (
    'compressed', 'compressedDepth', 'theora', 'ffmpeg', 'zstd', 'avif', 'draco',
)
#: Where kitti2bag writes KITTI's pictures, which are rectified.
KITTI = re.compile(r'/kitti/camera_(gray|color)_(left|right)/image')


def is_rectified(topic: str) -> bool:
    """
    Return whether the name of an image topic says that its images are rectified.

    So it is where the last part begins with ``image_rect`` (REP 104, image_proc), where a part is
    ``rect``, ``rectified`` or ``rectify``, and where kitti2bag writes. A transport at the end of
    the name counts for nothing.
    """
    parts = topic.split('/')
    if len(parts) > 1 and parts[-1] in TRANSPORTS:
        parts.pop()
    return (
        parts[-1].startswith('image_rect')
        or bool({'rect', 'rectified', 'rectify'} & set(parts))
        or KITTI.fullmatch('/'.join(parts)) is not None
    )


def unclear(info: Any, topic: str) -> float | None:
    """
    Return how far apart, px, a CameraInfo says raw and rectified images of a topic are.

    None where it does not matter, or the topic's name says which of them they are.
    """
    if is_rectified(topic) or 'raw' in topic:
        return None
    try:
        raw, rectified = (Camera.from_camera_info(info, choice) for choice in (False, True))
    except ValueError:
        return None
    apart = raw.moved_px(rectified)
    return apart if apart > FOLLOWED_PX else None


@dataclass(frozen=True)
class Camera:
    """
    Intrinsics of one camera, for which an integer pixel coordinate is a pixel's centre.

    Frames: optical, x right, y down, z forward. ``fx fy cx cy`` are in pixels, ``distortion`` in
    the coefficient order of sensor_msgs/CameraInfo (OpenCV's).
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    distortion_model: str = 'none'
    distortion: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        focal_lengths(self.fx, self.fy)
        _check_size(self.width, self.height)
        if not all(abs(value) < float('inf') for value in (self.cx, self.cy, *self.distortion)):
            raise ValueError(
                "the camera's principal point and distortion must be finite; calibrate the "
                'camera again'
            )
        if self.distortion_model not in DISTORTION_MODELS:
            known = ', '.join(DISTORTION_MODELS)
            raise ValueError(
                f"distortion model '{self.distortion_model}' is not known; use one of {known}"
            )
        if len(self.distortion) not in DISTORTION_MODELS[self.distortion_model]:
            raise ValueError(
                f"distortion model '{self.distortion_model}' takes "
                f'{DISTORTION_MODELS[self.distortion_model]} coefficients, '
                f'{len(self.distortion)} were given'
            )
        if any(self.distortion[12:]):
            raise ValueError(
                'a tilted sensor (distortion coefficients 13 and 14) is not supported; '
                'calibrate without'
            )

    @classmethod
    def from_intrinsics(
        cls, width: int, height: int, K: Sequence[float], D: Sequence[float] = (), model: str = '',
        name: str = 'K',
    ) -> Camera:
        """
        Return the camera with the row-major 3x3 matrix K and the distortion coefficients D.

        The model goes by any of its usual names (``calibration.NAMES``). Raises ValueError, one
        sentence, where the calibration is missing, or is none that a camera can have; ``name`` is
        what the matrix is called there.
        """
        _check_size(width, height)
        model, D = lens(model, D)
        fx, fy, cx, cy = intrinsics(K, width, height, model, name)
        return cls(int(width), int(height), fx, fy, cx, cy, model, D)

    @classmethod
    def from_camera_info(cls, info: Any, rectified: bool = False) -> Camera:
        """
        Return the camera of the images that a sensor_msgs/CameraInfo belongs to.

        A raw image has the intrinsics of K and the distortion of D, a rectified one those of P and
        none. Where only P is filled in, images can be nothing but rectified; where it is not, K
        describes them if there is no distortion. The camera is cut out and binned as the message
        says. ``info`` is anything with its fields. Raises ValueError, one sentence, where the
        camera is not calibrated, or none that can be.
        """
        K, P = [float(value) for value in info.k], [float(value) for value in info.p]
        P = [*P[:3], *P[4:7], *P[8:11]]
        distorted = any(value != 0.0 for value in info.d)
        if rectified and not any(P):
            if distorted:
                raise ValueError(
                    'the images are rectified but the projection matrix P, which describes them, '
                    'is all zero; publish the whole calibration, or say rectified: never'
                )
            rectified = False
        if rectified or any(P) and K[0] == K[4] == 0.0:
            camera = cls.from_intrinsics(info.width, info.height, P, name='P')
        else:
            camera = cls.from_intrinsics(
                info.width, info.height, K, info.d, info.distortion_model
            )
        roi = info.roi
        cut = camera.cropped(roi.x_offset, roi.y_offset, roi.width, roi.height)
        return cut.binned(info.binning_x or 1, info.binning_y or 1)

    def doubts(self) -> list[str]:
        """Return what is odd about the camera though it can be, one sentence each."""
        doubts = []
        x, y = (self.cx + 0.5) / self.width, (self.cy + 0.5) / self.height
        if not (0.25 < x < 0.75 and 0.25 < y < 0.75):
            doubts.append(
                f'the principal point ({self.cx:g}, {self.cy:g}) is far off the middle of the '
                f'{self.width}x{self.height} image; is it the calibration of this image size?'
            )
        if not 1 / 1.5 <= self.fx / self.fy <= 1.5:
            doubts.append(
                f'fx is {self.fx:g} and fy {self.fy:g}, but pixels are nearly square; check the '
                'calibration'
            )
        fisheye = self.distortion_model == 'equidistant'
        half = max(self.width / self.fx, self.height / self.fy) / 2
        angle = math.degrees(2 * (half if fisheye else math.atan(half)))
        if not 5.0 <= angle <= (250.0 if fisheye else 170.0):
            doubts.append(
                f'the field of view is {angle:.0f} degrees with fx {self.fx:g} and fy '
                f'{self.fy:g} for {self.width}x{self.height} pixels; check the calibration'
            )
        return doubts

    def moved_px(self, other: Camera) -> float:
        """
        Return how far, px, a pixel of this camera at most lies from where the other has its ray.

        Pixels are looked at all over the image and on its edge. Infinite where the images differ
        in size.
        """
        if (self.width, self.height) != (other.width, other.height):
            return math.inf
        u = torch.linspace(0, self.width - 1, 9, dtype=torch.float64)
        v = torch.linspace(0, self.height - 1, 9, dtype=torch.float64)
        uv = torch.cartesian_prod(u, v)
        moved = (other.project(self.normalise(uv)) - uv).norm(dim=-1)
        moved = moved[moved.isfinite()]
        return float(moved.max()) if len(moved) else math.inf

    def goes_on_from(self, before: Camera) -> bool:
        """Return whether what was seen with the camera ``before`` still holds with this one."""
        return self == before or self.moved_px(before) <= FOLLOWED_PX

    @property
    def focal(self) -> float:
        """The mean focal length in pixels, which scales normalised residuals to pixels."""
        return 0.5 * (self.fx + self.fy)

    def scaled(self, sx: float, sy: float) -> Camera:
        """
        Return the same camera for an image resized by ``sx`` and ``sy``.

        Pixel centres stay at integers: cx' = (cx + 0.5) sx - 0.5.
        """
        return replace(
            self,
            width=round(self.width * sx), height=round(self.height * sy),
            fx=self.fx * sx, fy=self.fy * sy,
            cx=(self.cx + 0.5) * sx - 0.5, cy=(self.cy + 0.5) * sy - 0.5,
        )

    def cropped(self, x: int, y: int, width: int, height: int) -> Camera:
        """
        Return the same camera for the window of the image whose first pixel is (x, y).

        The window is ``width`` by ``height`` px; where all four numbers are zero, it is the whole
        image. Raises ValueError where it leaves the image.
        """
        if not (x or y or width or height):
            return self
        width, height = width or self.width - x, height or self.height - y
        if x + width > self.width or y + height > self.height:
            raise ValueError(
                f"the region of interest {width}x{height} at ({x}, {y}) leaves the camera's "
                f'{self.width}x{self.height}'
            )
        return replace(self, width=width, height=height, cx=self.cx - x, cy=self.cy - y)

    def binned(self, x: int, y: int) -> Camera:
        """
        Return the same camera for an image whose pixels are means of ``x`` times ``y`` pixels.

        The new pixel u covers the old ones from x u to x u + x - 1, so its centre lies at x u + (x
        - 1) / 2: therefore cx' = (cx + 0.5) / x - 0.5, which image_geometry's cx / x misses by up
        to half a pixel.
        """
        if x == y == 1:
            return self
        return replace(self.scaled(1 / x, 1 / y), width=self.width // x, height=self.height // y)

    def normalise(self, uv: Tensor) -> Tensor:
        """
        Return where pixels (..., 2) lie, undistorted, on the plane z = 1 (..., 2), differentiable.

        They are NaN where the distortion model cannot produce the pixel, as far outside what was
        calibrated it may not.
        """
        distorted = (uv - uv.new_tensor([self.cx, self.cy])) / uv.new_tensor([self.fx, self.fy])
        if self.distortion_model == 'none':
            return distorted
        with torch.no_grad():
            xy = self._undistorted_guess(distorted)
            for _ in range(12):
                value, jacobian = self._distort_with_jacobian(xy)
                xy = xy - _solve2(jacobian, value - distorted)
            value, jacobian = self._distort_with_jacobian(xy)
            valid = ((value - distorted).norm(dim=-1) < 1e-3) & (torch.linalg.det(jacobian) > 0)
            # a NaN here would reach the gradient of the others' sum
            xy = torch.where(valid[..., None], xy, 0.0)
        # One more step of Newton's method, from the solution: by the implicit function theorem all
        # of its gradient.
        value, jacobian = self._distort_with_jacobian(xy)
        solution = xy - _solve2(jacobian.detach(), value.detach() - distorted)
        return torch.where(valid[..., None], solution, torch.nan)

    def _undistorted_guess(self, distorted: Tensor) -> Tensor:
        if self.distortion_model != 'equidistant':
            return distorted
        # Towards 90 degrees the plane z = 1 recedes to infinity: solve for the angle, which stays
        # small.
        k1, k2, k3, k4 = self.distortion
        theta_d = distorted.norm(dim=-1, keepdim=True)
        theta = theta_d.clamp_max(1.5)
        for _ in range(12):
            t2 = theta * theta
            value = theta * (1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4)))) - theta_d
            slope = 1 + t2 * (3 * k1 + t2 * (5 * k2 + t2 * (7 * k3 + t2 * 9 * k4)))
            theta = theta - value / slope
        theta = torch.where((theta >= 0) & (theta < 1.55), theta, torch.nan)
        longer = torch.tan(theta) / theta_d.clamp_min(1e-8)
        return distorted * torch.where(theta_d > 1e-8, longer, 1.0)

    def project(self, xy: Tensor) -> Tensor:
        """
        Return the pixels (..., 2) of undistorted points (..., 2) on the plane z = 1.

        It is differentiable.
        """
        focal, centre = xy.new_tensor([[self.fx, self.fy], [self.cx, self.cy]])
        return self._distort(xy) * focal + centre

    def undistorted_covariance(self, xy: Tensor, cov: Tensor) -> Tensor:
        """
        Return covariances of raw pixels as those of the undistorted pixels ``(fx x, fy y)``.

        Both are (..., 3): uu, uv, vv in px^2. ``xy`` (..., 2) are the undistorted points, on the
        plane z = 1.
        """
        if self.distortion_model == 'none':
            return cov
        # Raw pixels are f * distort(xy), so undistorted ones move by F J^-1 F^-1 of a raw pixel's
        # movement.
        focal = xy.new_tensor([self.fx, self.fy])
        jacobian = self._distort_with_jacobian(xy)[1] * focal[:, None] / focal
        inverse = torch.linalg.inv_ex(jacobian)[0]
        full = torch.stack((cov[..., 0], cov[..., 1], cov[..., 1], cov[..., 2]), -1).unflatten(
            -1, (2, 2)
        )
        full = inverse @ full @ inverse.mT
        return torch.stack((full[..., 0, 0], full[..., 0, 1], full[..., 1, 1]), -1)

    def _distort(self, xy: Tensor) -> Tensor:
        if self.distortion_model == 'none':
            return xy
        return self._distort_with_jacobian(xy)[0]

    def _distort_with_jacobian(self, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Return distorted coordinates (..., 2) and their Jacobian (..., 2, 2), as OpenCV does."""
        x, y = xy.unbind(-1)
        r2 = x * x + y * y
        if self.distortion_model == 'equidistant':
            k1, k2, k3, k4 = self.distortion
            r = r2.clamp_min(1e-16).sqrt()
            theta = torch.atan(r)
            t2 = theta * theta
            theta_d = theta * (1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4))))
            d_theta = 1 + t2 * (3 * k1 + t2 * (5 * k2 + t2 * (7 * k3 + t2 * 9 * k4)))
            scale = theta_d / r
            # d scale / d r2 = (d theta_d / dr * r - theta_d) / r^2 / (2 r)
            slope = torch.where(
                r2 < 1e-12, torch.zeros_like(r), (d_theta / (1 + r2) * r - theta_d) / (2 * r2 * r)
            )
            tx = ty = dtx_x = dtx_y = dty_x = dty_y = torch.zeros_like(x)
        else:
            known = (*self.distortion[:12], *[0.0] * 12)[:12]
            k1, k2, p1, p2, k3, k4, k5, k6, s1, s2, s3, s4 = known
            top, d_top = 1 + r2 * (k1 + r2 * (k2 + r2 * k3)), k1 + r2 * (2 * k2 + r2 * 3 * k3)
            low, d_low = 1 + r2 * (k4 + r2 * (k5 + r2 * k6)), k4 + r2 * (2 * k5 + r2 * 3 * k6)
            scale, slope = top / low, (d_top * low - top * d_low) / (low * low)
            tx = 2 * p1 * x * y + p2 * (r2 + 2 * x * x) + r2 * (s1 + r2 * s2)
            ty = p1 * (r2 + 2 * y * y) + 2 * p2 * x * y + r2 * (s3 + r2 * s4)
            dsx, dsy = s1 + 2 * r2 * s2, s3 + 2 * r2 * s4
            dtx_x = 2 * p1 * y + 6 * p2 * x + 2 * x * dsx
            dtx_y = 2 * p1 * x + 2 * p2 * y + 2 * y * dsx
            dty_x = 2 * p1 * x + 2 * p2 * y + 2 * x * dsy
            dty_y = 6 * p1 * y + 2 * p2 * x + 2 * y * dsy
        value = torch.stack((x * scale + tx, y * scale + ty), -1)
        jacobian = (
            scale + 2 * x * x * slope + dtx_x, 2 * x * y * slope + dtx_y,
            2 * x * y * slope + dty_x, scale + 2 * y * y * slope + dty_y,
        )
        jacobian = torch.stack(jacobian, -1).unflatten(-1, (2, 2))
        return value, jacobian


def _check_size(width: int, height: int) -> None:
    if width <= 0 or height <= 0:
        raise ValueError(f"the camera's image size is {width}x{height}, it must be positive")


def _solve2(A: Tensor, b: Tensor) -> Tensor:
    """Return A^-1 b of (..., 2, 2) and (..., 2), not finite where A is singular."""
    (a00, a01), (a10, a11) = (row.unbind(-1) for row in A.unbind(-2))
    b0, b1 = b.unbind(-1)
    determinant = a00 * a11 - a01 * a10
    return torch.stack((a11 * b0 - a01 * b1, a00 * b1 - a10 * b0), -1) / determinant[..., None]
