"""What camera_info says of the camera: which of it is followed, doubted or refused."""

from __future__ import annotations

from collections.abc import Sequence

from sensor_msgs.msg import CameraInfo
from std_msgs.msg import Header

from ..geometry.camera import Camera, is_rectified, unclear


class Calibration:
    """
    Reads the camera out of one node's camera_info messages.

    Whether P describes the images, because they are rectified, or K and D do, the parameter
    ``rectified`` says; where it is auto, the names of the image topics tell.
    """

    def __init__(self, rectified: str, topics: Sequence[str]) -> None:
        """
        Begin without a camera_info.

        rectified: auto, always or never. topics: the resolved names that images may come on, the
        raw images' first.
        """
        self._auto, self._topic = rectified == 'auto', topics[0]
        self._rectified = any(map(is_rectified, topics)) if self._auto else rectified == 'always'
        self._newest: CameraInfo | None = None  # without its header

    def read(self, message: CameraInfo) -> Camera | None:
        """
        Return the camera of a message, or None where the message before said the same.

        Raises ValueError where it describes no camera.
        """
        message.header = Header()  # its stamp is each image's own, the calibration is not
        if message == self._newest:
            return None
        self._newest = message
        return Camera.from_camera_info(message, self._rectified)

    def doubts(self, camera: Camera) -> list[str]:
        """
        Return what is odd about the camera that was read last, one sentence each.

        The last of them says so where nothing tells whether the images are rectified, and it
        matters.
        """
        doubts = [f'camera_info: {doubt}' for doubt in camera.doubts()]
        if self._auto and not self._rectified:
            if (apart := unclear(self._newest, self._topic)) is not None:
                doubts.append(
                    f"the images of {self._topic} are taken as raw, by camera_info's K and D; by "
                    f'P pixels lie up to {apart:.0f} px elsewhere: if they are rectified, set the '
                    'parameter rectified to always, else to never'
                )
        return doubts
