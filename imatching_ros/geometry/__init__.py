"""Cameras, two-view geometry, pose from points and triangulation, which know of no other room."""
