"""What a learner can be told."""

from __future__ import annotations

from dataclasses import dataclass

from .objectives import OBJECTIVES


@dataclass(frozen=True)
class LearnerOptions:
    """How fast, how much and how carefully the learner learns."""

    #: the bundle's reprojection error, or "sgp": two views, RANSAC, no bundle
    objective: str = 'imatching'
    rate: float = 5e-4  #: Adam's learning rate (the paper's is 1e-4, over hours)
    clip: float = 1.0  #: largest norm of a gradient
    #: of the candidate's weights: what one step adds is one part in ten of what is judged
    average: float = 0.9
    coarse: float = 0.2  #: weight of the coarse head's loss
    #: weight of the known warps: windows show few views, and what they do not show is forgotten
    anchor: float = 0.3
    anchor_every: int = 4  #: steps, of which one has an anchor
    pairs: int = 1  #: of keyframes per step
    steps_per_solve: int = 5  #: gradient steps before the window is matched and solved anew
    lessons: int = 24  #: windows that are remembered, half of them of earlier places
    new_keyframes: int = 3  #: by which a window must differ from the last one remembered
    #: of so many windows one is held out, its images never train: the gate's evidence
    held_out: int = 8
    judged: int = 6  #: held-out windows that are remembered, half of them of earlier places
    images: int = 200  #: that wait for their window
    #: versions by which the weights behind a window may be older than those in use
    max_age: int = 3
    #: share of one processor's time that steps and verdicts may take: they rest in between
    duty: float = 1.0
    verdict_every: int = 30  #: steps
    #: verdicts "worse" in a row, or twice as many that promote nothing, before the candidate goes
    #: back to the weights in use
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"the learner's objective '{self.objective}' is not known; use "
                f'{" or ".join(OBJECTIVES)}'
            )
        if not 0.0 < self.duty <= 1.0:
            raise ValueError(
                f"the learner's duty is {self.duty:g}, it must lie above 0 and not above 1"
            )
