"""The topics and services that a node has while it is configured."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import copy
from typing import Any

from rclpy.lifecycle import LifecycleNode, LifecyclePublisher
from rclpy.qos import QoSProfile
from rclpy.qos_overriding_options import QoSOverridingOptions
from std_srvs.srv import Trigger


class Endpoints:
    """Makes a node's publishers, subscriptions and services, and takes all of them away again."""

    def __init__(
        self,
        node: LifecycleNode,
        on_error: Callable[[Exception], None],
        run: Callable[[str, Callable[[], str]], tuple[bool, str]],
    ) -> None:
        """
        Begin without any.

        on_error: is told what a subscription's callback raised. run: runs the action of a service
        of that name, and returns whether it went well and what to say.
        """
        self._node, self._on_error, self._run = node, on_error, run
        self._publishers: dict[str, LifecyclePublisher] = {}  # by topic
        self._undo = contextlib.ExitStack()

    def advertise(self, kind: type, topic: str, qos: QoSProfile) -> LifecyclePublisher:
        """Return a publisher, which is silent while the node is not active."""
        publisher = self._node.create_lifecycle_publisher(
            kind, topic, copy.copy(qos),
            qos_overriding_options=QoSOverridingOptions.with_default_policies(),
        )
        self.on_close(self._node.destroy_lifecycle_publisher, publisher)
        self._publishers[topic] = publisher
        return publisher

    def subscribe(
        self, kind: type, topic: str, callback: Callable[[Any], None], qos: QoSProfile
    ) -> None:
        """Have ``callback`` called with each message; what it raises is said, and ends nothing."""

        def guarded(message: Any) -> None:
            try:
                callback(message)
            except Exception as error:
                self._on_error(error)

        subscription = self._node.create_subscription(
            kind, topic, guarded, copy.copy(qos),
            qos_overriding_options=QoSOverridingOptions.with_default_policies(),
        )
        self.on_close(self._node.destroy_subscription, subscription)

    def offer_service(self, kind: type, name: str, callback: Callable[[Any, Any], Any]) -> None:
        """Have ``callback`` answer the requests to a service."""
        service = self._node.create_service(kind, name, callback)
        self.on_close(self._node.destroy_service, service)

    def offer_trigger(self, name: str, action: Callable[[], str]) -> None:
        """Have a Trigger service run ``action`` in the core's thread, and say what it returns."""

        def respond(_: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            response.success, response.message = self._run(name, action)
            return response

        self.offer_service(Trigger, name, respond)

    def on_close(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a function called when the endpoints are taken away, the last given first."""
        self._undo.callback(function, *arguments)

    def listeners(self) -> dict[str, int]:
        """Return how many subscriptions each topic has that the node publishes."""
        return {
            topic: publisher.get_subscription_count()
            for topic, publisher in self._publishers.items()
        }

    def close(self) -> None:
        """Take all of them away."""
        self._undo.close()
        self._publishers = {}  # another thread may be counting the old one's listeners
