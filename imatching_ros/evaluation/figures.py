"""The figures of a run: which there are, what JSON can say of them, and how they are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
import math
from typing import Any

import numpy as np

MMA = {'mma_1px': 'MMA at 1 px', 'mma_2px': 'MMA at 2 px', 'mma_5px': 'MMA at 5 px'}
AUC = {'auc_5': 'Pose AUC at 5°', 'auc_10': 'Pose AUC at 10°', 'auc_20': 'Pose AUC at 20°'}
ACCURACY = MMA | AUC
#: Every figure that report.json holds, whether it can be had or not.
FIGURES = {
    'input': ('frames', 'frames_matched', 'keyframes', 'dropped', 'true_poses'),
    'trajectory': ('ate_m', 'path_m', 'ate_percent'),
    'learning': ('steps', 'windows', 'promotions', 'rollbacks', 'seconds', 'model_version'),
    'latency_ms': ('matcher_p50', 'matcher_p95', 'bundle_p50', 'bundle_p95', 'learner_step_p50'),
}
SCALARS = ('throughput_hz', 'peak_memory_mb')

NO_TRUTH = 'not available: no ground truth in the recording'
NO_POSES = (
    'not available: fewer than three poses with ground truth on a path that fixes the alignment'
)


def complete(figures: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return ``figures`` with every key of report.json; what is missing or not finite is None.

    A section may be a mapping or a dataclass: MatchingAccuracy, or TrajectoryAccuracy, whose
    arrays are left out.
    """
    given = _plain(figures)
    whole: dict[str, Any] = {
        section: dict.fromkeys(keys) | _section(given.pop(section, None))
        for section, keys in FIGURES.items()
    }
    matching = _section(given.pop('matching', None))
    whole['matching'] = {
        when: dict.fromkeys(ACCURACY) | _section(matching.get(when))
        for when in ('before', 'after')
    }
    return whole | {key: given.pop(key, None) for key in SCALARS} | given


def _plain(value: Any) -> Any:
    """Return a value without what JSON cannot say: NaN, arrays and numpy's scalars."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {
            key: item for key, item in asdict(value).items() if not isinstance(item, np.ndarray)
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _section(section: Any) -> dict[str, Any]:
    return section if isinstance(section, dict) else {}


def number(value: Any, digits: int = 1, unit: str = '') -> str:
    """Return a figure as text, floats with so many digits; a dash where there is none."""
    if value is None:
        return '–'
    return (f'{value:.{digits}f}' if isinstance(value, float) else str(value)) + unit


def metres(value: float | None) -> str:
    """Return a length, metres, as text: below one metre in centimetres."""
    if value is None:
        return '–'
    return f'{100 * value:.1f} cm' if value < 1 else f'{value:.2f} m'


def change(before: float | None, after: float | None) -> str:
    """Return by how many percent a figure changed, as text."""
    return f'{100 * (after / before - 1):+.1f} %' if before and after is not None else '–'


def sign(before: float | None, after: float | None) -> int:
    """Return 1 where a figure grew, -1 where it fell, 0 where it stayed or cannot be compared."""
    return 0 if before is None or after is None else (after > before) - (after < before)
