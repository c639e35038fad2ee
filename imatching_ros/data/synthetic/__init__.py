"""Recordings that the program makes: scenes, camera paths, a camera's faults, exact truth."""

from .recording import make_scene, render_recording
from .scene import Scene
from .sensor import Sensor

__all__ = ['make_scene', 'render_recording', 'Scene', 'Sensor']
