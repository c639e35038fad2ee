"""
The three ROS nodes and all that is ROS: messages, parameters, diagnostics.

No mathematics.
"""
