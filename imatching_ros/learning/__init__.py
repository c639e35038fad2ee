"""The upper level: the objective at the bundle's optimum, the learner, and the gate that guards the robot."""
