"""What a node says of itself: in its log what goes wrong, on /diagnostics how it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import textwrap
import time
import traceback

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node
from std_msgs.msg import Header

from .diagnostics import Health

SENTENCE = 400  #: characters of what is said, at most
REPEAT_S = 5.0  #: the same sentence goes to the log this seldom


class Reporter:
    """Says what goes wrong in a node in its log, and how it is on /diagnostics."""

    def __init__(
        self, node: Node, health: Health, describe: Callable[[], tuple[int, str, dict]],
        at_once: bool,
    ) -> None:
        """
        Make the publisher.

        describe: returns level, sentence and values to publish. at_once: whether each failure is
        published when it comes, because a replay waits until each image is answered or refused.
        """
        self._node, self._health = node, health
        self._describe, self._at_once = describe, at_once
        self._last_said = ('', 0.0)
        self._publisher = node.create_publisher(DiagnosticArray, '/diagnostics', 10)

    @property
    def last(self) -> str:
        """The last sentence about what went wrong."""
        return self._health.last_error

    def fault(self, sentence: str) -> None:
        """Say it in diagnostics, and in the log unless it was just said there."""
        # what a broken message names may be anything
        sentence = textwrap.shorten(sentence, SENTENCE, placeholder=' …')
        said, when = self._last_said
        if sentence != said or time.monotonic() > when + REPEAT_S:
            self._last_said = sentence, time.monotonic()
            self._node.get_logger().error(sentence)
        self._health.fault(sentence)

    def failed(self, error: Exception) -> None:
        """Say what was raised, and where, unless it was to be expected."""
        if not self._node.context.ok():
            return  # the signal to end came first, and nothing can be published any more
        if isinstance(error, ValueError | OSError):
            self.fault(str(error))
        else:
            self.fault(f'unexpected {type(error).__name__}: {error}')
            self._node.get_logger().error(
                ''.join(traceback.format_exception(error)), throttle_duration_sec=10.0
            )
        if self._at_once:
            self.publish()

    def publish(self) -> None:
        """Say once how the node is."""
        level, text, values = self._describe()
        status = diagnostic_status(level, self._node.get_fully_qualified_name(), text, values)
        head = Header(stamp=self._node.get_clock().now().to_msg())
        self._publisher.publish(DiagnosticArray(header=head, status=[status]))


def diagnostic_status(
    level: int, name: str, message: str, values: Mapping[str, object]
) -> DiagnosticStatus:
    """
    Return one status of the levels 0 OK, 1 WARN, 2 ERROR and 3 STALE.

    Floats are written with six figures, and truth as true or false.
    """

    def text(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return f'{value:.6g}' if isinstance(value, float) else str(value)

    return DiagnosticStatus(
        level=bytes([level]),
        name=name,
        message=message,
        values=[KeyValue(key=key, value=text(value)) for key, value in values.items()],
    )
