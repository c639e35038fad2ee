"""Play a recording through the three real nodes, in three processes, without loss."""

try:
    import rclpy  # noqa: F401
except ImportError:
    raise RuntimeError(
        "ROS 2 is not installed: source an installation, or pip install 'imatching_ros[ros]'; "
        'tune and evaluate work without it'
    ) from None

from .processes import ReplayError
from .run import LearningEvent, replay, ReplayResult

__all__ = ['LearningEvent', 'ReplayError', 'ReplayResult', 'replay']
