"""
The upper level.

The objective at the bundle's optimum, the learner, and the gate that guards the robot.
"""
