"""What a camera does to the light that reaches it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Sensor:
    """
    A camera's faults: noise, a fixed pattern, motion blur, wandering exposure, vignetting.

    Out of the scene's irradiance E in [0, 1] comes ``255 * (gain * vignette * E + pattern + noise)
    ** gamma``, where gain and gamma wander with time. Noise is Gaussian; at E = 1/2 a fifth of its
    variance is read noise, the rest shot noise, which grows with E. The pattern stays: most of it
    is columns, as the amplifiers of a CMOS sensor make.
    """

    noise: float = 2.0  #: standard deviation at mid-grey, grey levels of 255
    #: standard deviation of what each column and pixel adds to every image, grey levels
    fixed_pattern: float = 0.0
    #: noise is blurred by a Gaussian of this deviation (as in-camera processing does)
    grain_px: float = 0.0
    exposure_s: float = 0.008  #: the shutter's opening: how long motion is averaged
    brightness: float = 1.0  #: mean gain
    #: by how much the gain (in e-folds) and the gamma change over some seconds
    wander: float = 0.15
    vignetting: float = 0.25  #: loss of light in the corners, 0 to 1

    @classmethod
    def low_light(cls, strength: float) -> Sensor:
        """
        Return a sensor in the dark, from daylight (0) to all but blind (1).

        At 1 the noise, of 25 grey levels, all but hides the texture. Raises ValueError for a
        strength beyond these.
        """
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f'low light has a strength from 0 to 1, {strength:g} was given')
        return cls(
            noise=2.0 + 23.0 * strength,
            grain_px=0.6 * strength,
            exposure_s=0.008 + 0.017 * strength,
            brightness=1.0 - 0.45 * strength,
            wander=0.15 + 0.2 * strength,
            vignetting=0.25 + 0.3 * strength,
        )

    def pattern(self, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """
        Return the sensor's fixed pattern (H, W) float32 for images of ``size`` (W, H) px.

        It is in units of full light, and is added to every image.
        """
        columns = rng.standard_normal((1, size[0]), dtype=np.float32)
        pixels = rng.standard_normal(size[::-1], dtype=np.float32)
        return np.float32(self.fixed_pattern / 255) * (
            np.float32(0.9) * columns + np.float32(0.44) * pixels
        )

    def expose(
        self, irradiance: np.ndarray, wander: np.ndarray, rng: np.random.Generator,
        pattern: np.ndarray | float = 0.0,
    ) -> np.ndarray:
        """
        Return the image (H, W) uint8 of an irradiance (H, W) float32 in [0, 1].

        ``wander`` are two values of about -1 to 1, by which gain and gamma are off; ``pattern`` is
        what :meth:``pattern`` gave.
        """
        height, width = irradiance.shape
        gain = np.float32(self.brightness * np.exp(self.wander * wander[0]))
        light = irradiance * gain * self._vignette(height, width)
        noise = rng.standard_normal((height, width), dtype=np.float32)
        if self.grain_px > 0:
            noise = cv2.GaussianBlur(noise, (0, 0), self.grain_px)
            noise /= noise.std()
        light += (self.noise / 255) * np.sqrt(0.2 + 1.6 * light) * noise + pattern
        np.clip(light, 0, 1, out=light)
        light = cv2.pow(light, float(np.exp(self.wander * wander[1])))
        return np.rint(255 * light).astype(np.uint8)

    def _vignette(self, height: int, width: int) -> np.ndarray:
        y, x = (
            np.linspace(-1, 1, height, dtype=np.float32)[:, None],
            np.linspace(-1, 1, width, dtype=np.float32),
        )
        return 1 - np.float32(self.vignetting / 2) * (x * x + y * y)
