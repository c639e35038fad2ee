"""
The executable imatching_node runs matcher, bundle and learner in one process.

Each has a thread of its own, and they share one model in memory.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
import threading

import rclpy
import torch

from . import parameters
from .bundle import BundleNode
from .learner import LearnerNode
from .matcher import MatcherNode
from .process import run_ros, spin_nodes
from .weights import load_weights
from ..matching import weights

CLASSES = {node_class.role: node_class for node_class in (MatcherNode, BundleNode, LearnerNode)}


class SharedWeights:
    """
    Reads a weights file once for all who ask for it.

    What is shared is never changed, for the matcher only computes with it and the learner trains a
    copy.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[object, ...] | None = None
        self._loaded: tuple[torch.nn.Module, weights.WeightsInfo] | None = None

    def load(self, path: Path, device: str) -> tuple[torch.nn.Module, weights.WeightsInfo]:
        """Do as ``load_weights`` does, but read a file only once."""
        with self._lock:
            key = (
                (path, device, path.stat().st_mtime_ns, path.stat().st_size)
                if path.is_file()
                else None
            )
            if key is None or key != self._key:
                self._loaded, self._key = load_weights(path, device), key
            return self._loaded


def _roles() -> list[str]:
    """Return what the parameter ``nodes`` names."""
    node = rclpy.create_node('imatching', start_parameter_services=False)
    try:
        if wrong := parameters.declare(node, 'imatching', lambda _: None):
            raise ValueError(f'imatching: {"; ".join(wrong.values())}')
        return list(node.get_parameter('nodes').value)
    finally:
        node.destroy_node()


def main(arguments: list[str] | None = None) -> None:
    def body(stack: contextlib.ExitStack) -> None:
        roles, shared = _roles(), SharedWeights()
        spin_nodes([CLASSES[role] for role in CLASSES if role in roles], stack, load=shared.load)

    run_ros(body, arguments)


if __name__ == '__main__':
    main()
