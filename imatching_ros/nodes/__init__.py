"""The three ROS nodes and all that is ROS: messages, parameters, life cycle, diagnostics."""
