"""Try other tilings of the Triton kernels, on a GPU or as compiled for one that is not there.

    python -m bench.tune_triton                             times; all kernels of head_dim 32 and 64
    python -m bench.tune_triton --kernels forward --widths 64
    python -m bench.tune_triton --compile-only 90           registers, spills, shared memory; no GPU

Each entry of the tables (attn_kd/kernels/triton/configurations.py) is tried with the tilings one
step from it, in interleaved rounds of the pass that launches the kernel, and the results are
compared with those of the entry. A tiling is judged by its times at all shapes. What is better is
printed as it goes into the tables, by hand; then the next steps can be tried. What `tiling` makes
of an entry for an architecture, or where there are few rows, it makes of those tried too. Not yet
run on a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from attn_kd.kernels.triton.configurations import KERNELS, WIDTHS
from attn_kd.ops.backends import interprets_triton
from bench.cubins import ARCHITECTURES
from bench.devices import clock_for, default_device
from bench.kernel_resources import FIGURES, Row, compile_all
from bench.tables import Table, markdown
from bench.workloads import SHAPES, Shape, make_workload

if TYPE_CHECKING:
    # Imports the kernels, when TRITON_INTERPRET must be what it shall be.
    from bench.tiling_trials import Entry, Pass, Trial

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def passes_of(entry: Entry, shapes: Mapping[str, Shape], device: torch.device) -> dict[str, Pass]:
    """The passes by which an entry is judged, by shape and mode."""
    from bench.tiling_trials import MODES, make_pass

    passes = {}
    for name, shape in shapes.items():
        workload = make_workload(shape._replace(D=entry.width), entry.dtype, device=device)
        for mode, options in MODES[entry.kernel].items():
            title = ", ".join(filter(None, (name, mode)))
            passes[title] = make_pass(entry.kernel, options, workload)
    return passes


def time_table(trials: Sequence[Trial]) -> Table:
    """Microseconds of each tiling in each pass, and the geometric mean of its ratios."""
    head = ["tiling", *(f"{name}, µs" for name in trials[0].seconds), "to the first"]
    return [head, *(_times(trial, trials[0]) for trial in trials)]


def _times(trial: Trial, present: Trial) -> list[str]:
    from bench.tiling_trials import written

    cells = [
        f"{1e6 * statistics.median(seconds):.1f}" if seconds else ""
        for seconds in trial.seconds.values()
    ]
    verdict = f"{trial.ratio(present):.3f}" if trial.fault is None else trial.fault
    return [f"`{written(trial.tiling)}`", *cells, verdict]


def table_entry(entry: Entry, trials: Sequence[Trial]) -> str:
    """The line of the tables with the best tiling."""
    from bench.tiling_trials import best, written

    chosen, present = best(trials), trials[0]
    line = f'("{entry.kernel}", {entry.width}): {written(chosen.tiling)},'
    if chosen is present:
        return line
    return f"{line}  # {chosen.ratio(present):.2f} of the time of {written(present.tiling)}"


def compile_near(entries: Sequence[Entry], arch: int, jobs: int) -> list[Row]:
    """The tilings near the entries as compiled for sm_`arch`; Triton keeps them for later."""
    from bench.tiling_trials import compiled_rows, near

    pieces = [
        partial(compiled_rows, entry, tile, arch)
        for entry in entries
        for tile in near(entry.tiling, entry.kernel)
    ]
    return compile_all(pieces, jobs)


def compile_ahead(entries: Sequence[Entry], arch: int, jobs: int) -> None:
    """`compile_near`; what does not compile is told when it is tried."""
    try:
        compile_near(entries, arch, jobs)
    except Exception as error:
        print(f"bench.tune_triton: compiling ahead: {error}", file=sys.stderr)


def resource_table(rows: Sequence[Row]) -> Table:
    """What kernels need, one line each."""
    head = ["kernel", "tiling", *FIGURES]
    return [
        head,
        *([f"`{row.kernel}`", row.call, *(read(row) for read in FIGURES.values())] for row in rows),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune_triton", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--widths", nargs="+", type=int, choices=WIDTHS, default=(32, 64))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=("paper", "coco", "dc5", "video")
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=0.3,
        metavar="SECONDS",
        help="for the rounds of one pass (default: 0.3)",
    )
    parser.add_argument(
        "--compile-only",
        type=int,
        choices=ARCHITECTURES,
        metavar="ARCH",
        help="no times: what the tilings need as compiled for sm_80, sm_90 or sm_100",
    )
    jobs = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=jobs, help="compiling at a time")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.compile_only:
        os.environ.pop("TRITON_INTERPRET", None)
    elif not torch.cuda.is_available() and not interprets_triton():
        print("bench.tune_triton: error: torch finds no GPU; see --compile-only", file=sys.stderr)
        return 2
    from bench.tiling_trials import TOO_LARGE, Entry, near, try_all

    entries = [
        Entry(name, width, DTYPES[args.dtype]) for width in args.widths for name in args.kernels
    ]
    if args.compile_only:
        print(markdown(resource_table(compile_near(entries, args.compile_only, args.jobs))))
        return 0
    device = default_device()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if (arch := 10 * major + minor) in ARCHITECTURES:
            compile_ahead(entries, arch, args.jobs)  # by all cores; on other GPUs one by one
    shapes = {name: SHAPES[name] for name in args.shapes}
    found = {}
    for entry in entries:
        passes = passes_of(entry, shapes, device)
        tilings = near(entry.tiling, entry.kernel)
        found[entry] = try_all(entry, tilings, passes, clock_for(device), args.budget)
        times, line = markdown(time_table(found[entry])), table_entry(entry, found[entry])
        # At once: whoever has little time on a GPU may interrupt the next.
        print(f"### {entry.kernel}, head_dim {entry.width}\n\n{times}\n\n{line}\n", flush=True)
    print("\n".join(table_entry(entry, trials) for entry, trials in found.items()))
    faults = {trial.fault for trials in found.values() for trial in trials}
    return 0 if faults <= {None, TOO_LARGE} else 1


if __name__ == "__main__":
    sys.exit(main())
