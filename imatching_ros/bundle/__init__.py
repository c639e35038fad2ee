"""The lower level (paper 3.1.2): a window of keyframes, its poses and its landmarks."""
