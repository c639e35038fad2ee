"""Imperative learning of feature correspondence for ROS 2 (iMatching, ECCV 2024)."""

__version__ = '0.1.0'
