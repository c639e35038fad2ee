"""
A process of nodes, from the beginning of ROS to its end.

Each node has a thread; what ends the process are signals, a node's refusal and a node's end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import ctypes
import os
import sys
import threading
import traceback
from typing import Any

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

from .core_node import CoreNode

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT, _LARGEST = 64 << 20, 32 << 20  # bytes; what encoding an image of 640x480 takes, and gives


def run(node_class: type[CoreNode], arguments: list[str] | None = None) -> None:
    """Run one node, as the ``main`` of its executable does."""
    run_ros(lambda stack: spin_nodes([node_class], stack), arguments)


def spin_nodes(
    node_classes: Sequence[type[CoreNode]], stack: contextlib.ExitStack, **node_options: Any
) -> None:
    """
    Make nodes and spin each in a thread of its own, until ROS is shut down.

    What ends them goes on the stack. Raises ValueError with one sentence where a node that is to
    start by itself refuses.
    """
    nodes, broken = [], []
    for node_class in node_classes:
        nodes.append(node_class(**node_options))
        stack.callback(_end, nodes[-1])
    for node in nodes:
        if node.value('autostart'):
            node.start()

    def spin(node: CoreNode) -> None:
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        try:
            executor.spin()
        except (KeyboardInterrupt, ExternalShutdownException):
            pass
        except Exception:
            if rclpy.ok():  # otherwise the end came first, and this is its work
                traceback.print_exc()
                broken.append(node)
        finally:
            rclpy.try_shutdown()  # one ends, all end

    threads = [threading.Thread(target=spin, args=(node,), name=node.role) for node in nodes[1:]]
    for thread in threads:
        thread.start()
    spin(nodes[0])
    for thread in threads:
        thread.join()
    if broken:
        sys.exit(1)


def run_ros(body: Callable[[contextlib.ExitStack], None], arguments: list[str] | None) -> None:
    """
    Call ``body`` between the beginning and the end of ROS, and end the process.

    What it puts on the stack is undone before ROS ends. The exit code is 0 after SIGINT or
    SIGTERM, and 2 with one sentence where the input is wrong.
    """
    rclpy.init(args=arguments)
    code = 0
    with contextlib.ExitStack() as stack:
        stack.callback(rclpy.try_shutdown)
        try:
            body(stack)
        except (KeyboardInterrupt, ExternalShutdownException):
            pass
        except Exception as error:
            if rclpy.ok():  # otherwise the signal to end came first, and this is its work
                if not isinstance(error, ValueError | OSError):
                    raise
                print(error, file=sys.stderr)
                code = 2
    sys.exit(code)


def keep_freed_memory() -> None:
    """
    Have glibc's allocator keep some of what is freed; with another, nothing happens.

    Else it gives the memory of an image's feature maps back after each image, and to have the
    pages anew takes half as long as to compute what is written there.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)


def _end(node: CoreNode) -> None:
    if not node.close():
        print(
            f'{node.get_name()}: the work in hand does not end, so the process ends without it',
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(1)
    node.destroy_node()
