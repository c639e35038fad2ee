"""
What a first start costs, before anything is kept on disk, and what every other one does.

    python benchmarks/first_run.py [--json PATH]

Each row is a fresh process that makes all kernels ready: first in an empty cache folder, then in
the one that the first has filled, and last where no folder can be written. Seconds are of the
process's processor time and of the clock, from before numba is imported, without what the package
imports beside it. With ``NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=`` it compiles as for a
processor without AVX-512.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
import platform
import shutil
import subprocess
import sys
import tempfile

from rich.console import Console
from rich.table import Table

CASES = ('first', 'kept', 'no folder')
CHILD = """
import json, time
import imatching_ros.bundle.bundle, imatching_ros.matching.tracker
from imatching_ros import kernels
rows = []
for name in kernels.MODULES:
    begun = time.process_time(), time.perf_counter()
    kernels.load(name)
    spent = time.process_time() - begun[0], time.perf_counter() - begun[1]
    rows.append({'kernels': name, 'processor_s': spent[0], 'clock_s': spent[1]})
print(json.dumps({'rows': rows, 'state': kernels.state()}))
"""


def processor() -> str:
    """Return the processor's name, and the one that is compiled for where it is another."""
    name = platform.processor() or platform.machine()
    lines = Path('/proc/cpuinfo')
    if lines.is_file():
        found = [line for line in lines.read_text().splitlines() if line.startswith('model name')]
        name = found[0].partition(':')[2].strip() if found else name
    given = os.environ.get('NUMBA_CPU_NAME')
    return f'{name}, compiled for {given}' if given else name


def run(package: Path, cache: Path, home: Path) -> dict:
    """Start a process with this copy of the package and these folders for what is compiled."""
    environment = os.environ | {
        'PYTHONPATH': str(package), 'NUMBA_CACHE_DIR': str(cache), 'XDG_CACHE_HOME': str(home),
    }
    done = subprocess.run(
        [sys.executable, '-c', CHILD], env=environment, check=True, stdout=subprocess.PIPE,
        text=True, cwd=package,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--json', type=Path, help='write all rows to this file')
    options = parser.parse_args()
    source = Path(__file__).resolve().parents[1] / 'imatching_ros'
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        package, nowhere = Path(folder, 'package'), Path(folder, 'file')
        shutil.copytree(
            source, package / source.name, ignore=shutil.ignore_patterns('__pycache__')
        )
        nowhere.touch()
        # A file, so that this folder can be written by nobody, be it root
        (package / source.name / '__pycache__').touch()
        for case in CASES:
            cache = nowhere if case == 'no folder' else Path(folder, 'cache')
            found = run(package, cache / 'numba', nowhere)
            rows += [{'processor': processor(), 'case': case, **row} for row in found['rows']]
            print(f'{case}: {found["state"] or "ready"}', file=sys.stderr)
    table = Table('case', 'kernels', 'processor, s', 'clock, s', title=processor())
    for case in CASES:
        some = [row for row in rows if row['case'] == case]
        for row in some:
            name = row['kernels'].removeprefix('imatching_ros.')
            table.add_row(case, name, f'{row["processor_s"]:.2f}', f'{row["clock_s"]:.2f}')
        total = [sum(row[key] for row in some) for key in ('processor_s', 'clock_s')]
        table.add_row(case, 'all', *(f'{seconds:.2f}' for seconds in total), end_section=True)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
