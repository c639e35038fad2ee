"""The topics and services that a node has while it is configured."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as Unfinished
import contextlib
import copy
from typing import Any

from rclpy.lifecycle import LifecycleNode, LifecyclePublisher
from rclpy.qos import QoSProfile
from rclpy.qos_overriding_options import QoSOverridingOptions
from std_srvs.srv import Trigger

from .reporter import Reporter
from .worker import PATIENCE_S, Worker

STILL_BUSY = 'the node is still busy; try again'  #: says a service that has waited too long


class Endpoints:
    """Makes a node's publishers, subscriptions and services, and takes all of them away again."""

    def __init__(
        self,
        node: LifecycleNode,
        reporter: Reporter,
        worker: Callable[[], Worker],
    ) -> None:
        """
        Begin without any.

        reporter: is told what callbacks and actions raise. worker: returns the worker in whose
        thread the actions of services run; each configuration has a new one.
        """
        self._node, self._reporter, self._worker = node, reporter, worker
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
                self._reporter.failed(error)

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
            response.success, response.message = self.run(name, action)
            return response

        self.offer_service(Trigger, name, respond)

    def run(self, name: str, action: Callable[[], str]) -> tuple[bool, str]:
        """
        Run an action in the core's thread, and wait for it.

        name: what faults call it. Returns whether it went well, and what it says.
        """
        try:
            return True, self._worker().request(action).result(timeout=PATIENCE_S)
        except (Unfinished, CancelledError):  # first, for it may be an OSError too
            return False, STILL_BUSY
        except (ValueError, OSError) as error:
            self._reporter.fault(f'{name}: {error}')
            return False, str(error)
        except Exception as error:
            self._reporter.failed(error)
            return False, self._reporter.last

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
