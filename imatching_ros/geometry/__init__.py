"""
Cameras, two-view geometry, pose from points, triangulation.

Knows nothing of the other rooms.
"""
