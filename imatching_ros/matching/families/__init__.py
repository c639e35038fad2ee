"""The ways to predict a match, one file each, and the registry of their names."""

from torch import nn

from .expectation import ExpectationMatcher

#: What a weights file calls a family, to the class that its configuration builds.
FAMILIES: dict[str, type[nn.Module]] = {ExpectationMatcher.family: ExpectationMatcher}
