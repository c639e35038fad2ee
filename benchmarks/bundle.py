"""
Windowed bundle adjustment beside Ceres and GTSAM.

The same problems, one thread each, in one process run.

    python benchmarks/bundle.py [--quick] [--scaling] [--json PATH]

The peers are optional: ``pip install pycolmap pyceres gtsam``. All begin at the same state and are
judged by this package's own cost function. Times are the process's processor time, all threads
together, on one core; repetitions are interleaved and the fastest counts: a busy machine then
disturbs little, and all alike. ``ms_per_iteration`` is the slope between runs of one iteration and
of many (set-up excluded); ``ms_to_1e-4`` and ``ms_to_1e-6`` are whole runs, set-up included, until
the cost is that close, relatively, to the best one any solver found. A peer's problem is built
beforehand and not timed. On a GPU, where there is one, time is what CUDA events around the whole
call say, with the problem already there. ``peak_mb`` is how far a process grows while it solves,
beyond the problem.
"""

from __future__ import annotations

import argparse
import ctypes
from dataclasses import replace
import json
import os
from pathlib import Path
import subprocess
import sys

for variable in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
    os.environ[variable] = '1'

from imatching_ros.bundle.solver.adjust import adjust, AdjustOptions  # noqa: E402
from imatching_ros.bundle.solver.problem import Problem, problem  # noqa: E402
from imatching_ros.geometry import lie, triangulation  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from solvers import FOCAL, KERNEL, Run, Solver, solvers  # noqa: E402
import torch  # noqa: E402

#: Keyframes, points, and metres between keyframes: 3,000, 16,000 and 58,000 observations.
SIZES = ((8, 500, 0.5), (12, 2000, 0.55), (20, 5000, 0.41))
SCALING = (8, 12, 20, 50, 100, 200)


def synthetic(
    keyframes: int, points: int, spacing: float, disturb: float = 0.02, seed: int = 0
) -> Problem:
    """
    Return a camera that passes a cloud 3 to 9 m away.

    0.5 px of noise, 20 % outliers of 30 px, tracks of three or more.

    disturb: standard deviation, m and rad, of the start's poses; twice that of its points.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    T = lie.identity(keyframes)
    T[:, 0] = spacing * torch.arange(keyframes)
    T = lie.retract(T, 0.02 * normal(keyframes, 6))
    size = torch.tensor([spacing * keyframes + 4, 4.0, 6.0], dtype=torch.float64)
    p = torch.rand(points, 3, generator=g, dtype=torch.float64) * size + torch.tensor(
        [-2.0, -2.0, 3.0]
    )
    xy, _ = triangulation.reproject(T, p[:, None])
    seen = (xy.abs() < torch.tensor([0.64, 0.48])).all(-1)
    seen &= seen.sum(-1, keepdim=True) >= 3
    xy = xy + 0.5 / FOCAL * normal(*xy.shape)
    wrong = torch.rand(points, keyframes, generator=g) < 0.2
    xy = torch.where(wrong[..., None], xy + 30 / FOCAL * normal(*xy.shape), xy)
    landmark, pose = seen.nonzero().unbind(-1)
    start = lie.retract(T, disturb * normal(keyframes, 6) * (torch.arange(keyframes) > 0)[:, None])
    cov = torch.tensor([1.0, 0.0, 1.0]).expand(len(pose), 3)
    focal = torch.tensor([FOCAL, FOCAL])
    return problem(
        start, p + 2 * disturb * normal(points, 3), pose, landmark, xy[landmark, pose], cov, focal
    )


def cost(posed: Problem, run: Run) -> float:
    return float(replace(posed, T_world_camera=run.T_world_camera, points=run.points).cost(KERNEL))


def iterations_to(posed: Problem, solver: Solver, goal: float, limit: int) -> int | None:
    """
    Return the fewest iterations after which the cost is below ``goal``, by bisection.

    Costs never rise.
    """
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(posed, solver(middle, False)) <= goal else (middle, high)
    return high


def compare(
    posed: Problem,
    size: tuple[int, int],
    names: list[str] | None,
    repeats: int,
    note: str = '',
    converge: bool = True,
) -> list[dict]:
    """
    One row per solver, its name followed by the note.

    Without ``converge`` only what an iteration costs.
    """
    running = {name: make(posed) for name, make in solvers(names).items()}
    ends = {name: solver(60 if converge else 4, converge) for name, solver in running.items()}
    final = {name: cost(posed, end) for name, end in ends.items()}
    best = min(final.values())
    stops: dict[str, dict[float, int]] = {name: {} for name in running}
    for name, solver in running.items() if converge else ():
        limit = max(ends[name].iterations, 1)
        for tolerance in (1e-6, 1e-4):
            if final[name] <= best * (1 + tolerance):
                limit = stops[name][tolerance] = iterations_to(
                    posed, solver, best * (1 + tolerance), limit
                )
    seconds: dict[tuple[str, int], float] = {}
    for turn in range(repeats):
        for name, solver in running.items():
            # The long runs of the slow ones only twice.
            whole = stops[name].values() if turn < 2 or ends[name].seconds < 1 else ()
            for n in {1, min(6, ends[name].iterations), *whole}:
                seconds[name, n] = min(seconds.get((name, n), np.inf), solver(n, False).seconds)
    rows = []
    for name in running:
        long = min(6, ends[name].iterations)
        slope = (
            (seconds[name, long] - seconds[name, 1]) / (long - 1) if long > 1 else seconds[name, 1]
        )
        ms = {t: 1e3 * seconds[name, n] for t, n in stops[name].items()}
        mine = name in ('eager', 'cpu', 'gpu')
        rows.append({
            'keyframes': size[0], 'points': size[1], 'observations': len(posed.pose),
            'solver': ('imatching' if mine else name) + note, 'backend': name if mine else None,
            'dtype': 'float64/float32' if mine else 'float64', 'threads': 1,
            'ms_per_iteration': 1e3 * slope, 'ms_to_1e-4': ms.get(1e-4),
            'ms_to_1e-6': ms.get(1e-6),
            'iterations_to_1e-6': stops[name].get(1e-6), 'final_cost': final[name],
            'peak_mb': None,
        })
    return rows


def peak_mb(row: dict, spacing: float) -> float | None:
    """
    How much a solver's memory grows, at its highest, over the problem it was given.

    In a process of its own.
    """
    name, keyframes, points = row['backend'] or row['solver'], row['keyframes'], row['points']
    if name == 'gpu':
        return None
    command = [sys.executable, __file__, '--peak', name, str(keyframes), str(points), str(spacing)]
    result = subprocess.run(command, capture_output=True, text=True)
    return float(result.stdout.split()[-1]) if result.returncode == 0 and result.stdout else None


def _measure_peak(name: str, keyframes: int, points: int, spacing: float) -> None:
    def memory(field: str) -> float:
        return (
            next(
                int(line.split()[1])
                for line in open('/proc/self/status')
                if line.startswith(field)
            )
            / 1024
        )

    # A small one first: what libraries take once is no part of it.
    solvers([name])[name](synthetic(4, 60, 0.3))(2, False)
    posed = synthetic(keyframes, points, spacing)
    ctypes.CDLL(None).malloc_trim(0)  # what is free already must not hide what is taken
    before = memory('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # begin VmHWM anew
    solvers([name])[name](posed)(3, False)
    print(memory('VmHWM') - before)


def show(rows: list[dict], title: str) -> None:
    table = Table(title=title)
    for column in ('keyframes / points / observations', 'solver'):
        table.add_column(column)
    for column in (
        'ms / iteration', 'to Ceres', 'to GTSAM', 'ms to 1e-4', 'ms to 1e-6', 'iterations', 'cost',
        'MB',
    ):
        table.add_column(column, justify='right')
    for row in rows:
        peers = {
            peer['solver'].split()[0]: peer['ms_per_iteration'] for peer in rows
            if all(peer[key] == row[key] for key in ('keyframes', 'points'))
        }

        def number(value, form='.3f'):
            return '-' if value is None else format(value, form)

        def ratio(peer, row=row, peers=peers):
            return f'{peers[peer] / row["ms_per_iteration"]:.1f}' if peer in peers else '-'

        table.add_row(
            f"{row['keyframes']} / {row['points']} / {row['observations']}",
            row['solver'] + (f" {row['backend']}" if row['backend'] else ''),
            number(row['ms_per_iteration']), ratio('ceres'), ratio('gtsam'),
            number(row['ms_to_1e-4'], '.2f'),
            number(row['ms_to_1e-6'], '.2f'), number(row['iterations_to_1e-6'], 'd'),
            number(row['final_cost'], '.6f'), number(row['peak_mb'], '.1f'),
        )
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--json', type=Path, help='write all rows to this file')
    parser.add_argument(
        '--scaling', action='store_true', help='also the curve from 8 to 200 keyframes'
    )
    parser.add_argument(
        '--quick', action='store_true', help='only the smallest window, few repetitions'
    )
    parser.add_argument(
        '--solver', action='append', help='eager, cpu, gpu, ceres or gtsam; may be repeated'
    )
    parser.add_argument('--no-memory', action='store_true', help='do not measure memory')
    parser.add_argument('--peak', nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        name, keyframes, points, spacing = options.peak
        return _measure_peak(name, int(keyframes), int(points), float(spacing))
    if hasattr(os, 'sched_setaffinity'):  # GTSAM's threads cannot be told otherwise
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    repeats = 3 if options.quick else 7

    rows = []
    for keyframes, points, spacing in SIZES[:1] if options.quick else SIZES:
        posed = synthetic(keyframes, points, spacing)
        found = compare(posed, (keyframes, points), options.solver, repeats)
        for row in [] if options.no_memory else found:
            row['peak_mb'] = peak_mb(row, spacing)
        rows += found
    show(rows, 'Cold start: poses off by 2 cm and 1 degree, points by 4 cm')
    sys.stdout.flush()
    if not options.quick:
        keyframes, points, spacing = SIZES[1]
        posed = synthetic(keyframes, points, spacing, disturb=0.0)
        solved = adjust(posed, AdjustOptions(KERNEL, relative_decrease=1e-12, gradient=1e-7))
        g = torch.Generator().manual_seed(1)
        noise = 2e-3 * torch.randn(keyframes, 6, generator=g, dtype=torch.float64)
        noise[0] = 0  # the gauge
        warm = replace(
            posed, T_world_camera=lie.retract(solved.T_world_camera, noise),
            points=solved.points + 4e-3 * torch.randn(points, 3, generator=g, dtype=torch.float64),
        )
        found = compare(warm, (keyframes, points), options.solver, repeats, ' (warm)')
        show(found, 'Warm start: poses off by 2 mm and 0.1 degree, points by 4 mm')
        rows += found
    if options.scaling:
        found = []
        for keyframes in SCALING:
            posed = synthetic(keyframes, 100 * keyframes, 0.55)
            grown = compare(posed, (keyframes, 100 * keyframes), options.solver, 2, converge=False)
            for row in [] if options.no_memory else grown:
                row['peak_mb'] = peak_mb(row, 0.55)
            found += grown
        show(found, 'Growing with the path: 100 points per keyframe')
        rows += found
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
