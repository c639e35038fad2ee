"""The upper level: the objective at the bundle's optimum, the learner, and its gate."""
