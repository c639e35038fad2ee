"""
Bundle adjustment of poses and points under a robust kernel, with a prior on poses.

It knows indices and arrays only: no image, no keyframe, no track.
"""
