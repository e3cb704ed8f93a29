"""An h5ad file to a corpus on disk: cells/s, CPU, memory and bytes a cell, beside other tools, in one run.

    python benchmarks/data.py                            # 20,000 and 100,000 cells, gzip, every side, three rounds
    python benchmarks/data.py --cells 20000 --sides decompress,pipeline --compression gzip,lzf,none --rounds 5
    python benchmarks/data.py --python annbatch=PYTHON   # a side runs in a Python that has its package
    python benchmarks/data.py --memory csr,csc,dense     # 500,000 cells (a fifth of it dense): memory of workers

The files hold cells of examples/atlas, drawn with replacement (seeded), written by anndata. Sides take turns, each in a
process of its own, bound to one core or to two, and have each done a tiny file before: machine code that a side
compiles once and keeps is no part of a run. Medians and the spread are told. CPU seconds are those of all its
processes: on a machine that others use they scatter less than the clock. Two sizes tell a start from what a cell costs.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.data_sides import MODULES, SIDES, SMALL_SHARD, corpus_config, write_cells, write_synthetic
from benchmarks.measuring import Run, measure, this_machine

TINY_CELLS = 200   # of the file that every side does first
PACKAGES = ("numpy", "h5py", "isal", "ray", "pyarrow", "datasets")
COMPRESSIONS = {"gzip": "gzip", "lzf": "lzf", "none": None}
RUN = ("-m", "benchmarks.data_sides")


@dataclass(frozen=True, slots=True)
class Case:
    """What was run."""

    compression: str
    cores: int
    side: str
    cells: int


Runs = dict[Case, list[Run]]


def missing(side: str, python: str) -> str | None:
    """Why a side cannot run, or None."""
    if side not in MODULES:
        return None
    try:
        done = subprocess.run([python, "-c", f"import {MODULES[side]}"], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else f"{python}: {done.stderr.strip().rpartition(chr(10))[2]}"


def compare(cases: Iterable[Case], files: Mapping[tuple[str, int], Path], work: Path, pythons: Mapping[str, str],
            rounds: int) -> Runs:
    """The runs of each case; all take turns, after one run of each side that is not counted."""
    cases, results, out = list(cases), Runs(), work / "out"
    for number in range(rounds + 1):
        for case in cases:
            cells = case.cells if number else TINY_CELLS
            if not number and case.cells != cases[0].cells:
                continue
            command = [pythons.get(case.side, sys.executable), *RUN, case.side, str(files[case.compression, cells]),
                       str(out / "corpus"), str(case.cores)]
            found = measure(command, out, case.cores)
            shutil.rmtree(out)
            if number:
                results.setdefault(case, []).append(found)
            print(f"{f'round {number}' if number else 'warm-up'}: {case.compression} {case.cores} {case.side:15} "
                  f"{cells:8,} cells {found.seconds:8.2f} s {found.cpu_s:8.2f} s CPU {found.told[:120]}",
                  file=sys.stderr)
    return results


def table(results: Runs) -> list[str]:
    """Medians of each case, as Markdown."""
    heads = ("file", "cores", "side", "cells", "cells/s", "seconds (range)", "CPU s", "of decompressing", "peak memory",
             "bytes a cell")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case, runs in results.items():
        seconds, cpu = [run.seconds for run in runs], cpu_s(runs)
        base = results.get(Case(case.compression, case.cores, "decompress", case.cells))
        share = f"{cpu / cpu_s(base):.1f} x" if base else ""
        peak = statistics.median(run.peak_bytes for run in runs)
        lines.append(f"| {case.compression} | {case.cores} | {case.side} | {case.cells:,} | "
                     f"{case.cells / statistics.median(seconds):,.0f} | "
                     f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | {cpu:.1f} | "
                     f"{share} | {peak / 2**20:,.0f} MiB | {runs[-1].written_bytes / case.cells:,.0f} |")
    return lines


def beyond_start(results: Runs) -> dict[tuple[str, int, str], tuple[float, float]]:
    """(compression, cores, side) -> CPU seconds of its start, and of a cell beyond it: a line through two sizes."""
    sizes = sorted({case.cells for case in results})
    if len(sizes) < 2:
        return {}
    few, many = sizes[0], sizes[-1]
    found = {}
    for case in results:
        if case.cells == few:
            low, high = (cpu_s(results[Case(case.compression, case.cores, case.side, cells)]) for cells in (few, many))
            cell = (high - low) / (many - few)
            found[case.compression, case.cores, case.side] = low - cell * few, cell
    return found


def table_beyond_start(results: Runs) -> list[str]:
    """The same as Markdown; nothing where there is one size."""
    found = beyond_start(results)
    lines = ["| file | cores | side | start, CPU s | a cell beyond it, CPU us | of decompressing |",
             "|---|---|---|---|---|---|"]
    for (compression, cores, side), (start, cell) in found.items():
        base = found.get((compression, cores, "decompress"))
        share = f"{cell / base[1]:.1f} x" if base else ""
        lines.append(f"| {compression} | {cores} | {side} | {start:.1f} | {1e6 * cell:,.0f} | {share} |")
    return lines if found else []


def cpu_s(runs: Sequence[Run]) -> float:
    """The median CPU seconds."""
    return statistics.median(run.cpu_s for run in runs)


# ---- memory


def memory(forms: list[str], n_cells: int, work: Path) -> list[dict[str, object]]:
    """The most memory of a Ray worker of a build on two cores, beside what the plan says."""
    from data_pipeline.plan import make_plan

    rows: list[dict[str, object]] = []
    for form in forms:
        file, out = work / f"{form}.h5ad", work / "out"
        cells = n_cells // 5 if form == "dense" else n_cells
        write_synthetic(file, cells, form)
        plan = make_plan(corpus_config(file, max_bytes=SMALL_SHARD))
        command = [sys.executable, *RUN, "small-shards", str(file), str(out / "corpus"), "2"]
        found = measure(command, out, 2, only="ray::")
        rows.append({"form": form, "cells": cells, "file_bytes": file.stat().st_size, "values": plan.n_values,
                     "worker_bytes": found.worker_bytes, "promised_bytes": plan.worker_bytes,
                     "seconds": round(found.seconds, 1)})
        shutil.rmtree(out)
        file.unlink()
    return rows


def _memory_table(rows: list[dict[str, object]]) -> str:
    lines = ["| form | cells | values | file | most memory of a worker | the plan says | seconds |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        mebi = {key: f"{int(str(row[key])) / 2**20:,.0f} MiB" for key in ("file_bytes", "worker_bytes",
                                                                          "promised_bytes")}
        lines.append(f"| {row['form']} | {row['cells']:,} | {row['values']:,} | {mebi['file_bytes']} | "
                     f"{mebi['worker_bytes']} | {mebi['promised_bytes']} | {row['seconds']} |")
    return "\n".join(lines)


# ---- command line


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _pair(text: str) -> tuple[str, str]:
    side, equals, python = text.partition("=")
    if not equals or side not in SIDES:
        raise argparse.ArgumentTypeError(f"give SIDE=PYTHON, SIDE one of {', '.join(SIDES)}")
    return side, python


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=_numbers, help="one size or more (20000,100000; with --memory 500000)")
    parser.add_argument("--compression", type=_words, default=["gzip"], help="of the file: gzip, lzf, none (gzip)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=_numbers, default=[1, 2])
    parser.add_argument("--sides", type=_words, default=list(SIDES), help=", ".join(SIDES))
    parser.add_argument("--python", type=_pair, action="append", default=[], metavar="SIDE=PYTHON",
                        help="the Python that a side runs in (default: this one)")
    parser.add_argument("--memory", type=_words, metavar="FORMS", help="csr, csc, dense")
    parser.add_argument("--folder", type=Path, help="where files are written for the time being (default: TMPDIR)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser


def main() -> None:
    """Measure and print."""
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as folder:
        work = Path(folder)
        if args.memory:
            rows = memory(args.memory, (args.cells or [500_000])[0], work)
            print(json.dumps({"memory": rows}) if args.json else _memory_table(rows))
            return
        pythons = dict(args.python)
        reasons = {side: missing(side, pythons.get(side, sys.executable)) for side in args.sides}
        left_out = {side: reason for side, reason in reasons.items() if reason is not None}
        sizes, machine = args.cells or [20_000, 100_000], this_machine(PACKAGES)
        files = {(name, cells): work / f"cells-{name}-{cells}.h5ad" for name in args.compression
                 for cells in (TINY_CELLS, *sizes)}
        for (name, cells), path in files.items():
            write_cells(path, cells, compression=COMPRESSIONS[name])
        cases = [Case(name, cores, side, cells) for name in args.compression for cores in args.cores
                 for cells in sizes for side in args.sides if side not in left_out]
        results = compare(cases, files, work, pythons, args.rounds)
        if args.json:
            print(json.dumps({"machine": machine, "missing": left_out, "file_bytes": {
                f"{name} {cells}": path.stat().st_size for (name, cells), path in files.items()}, "runs": [
                    asdict(case) | asdict(run) for case, runs in results.items() for run in runs]}))
            return
        print(machine, *(f"{cells:,} cells, {name}: {path.stat().st_size / 1e6:,.0f} MB"
                         for (name, cells), path in files.items()), "", *table(results), sep="\n")
        print("", *table_beyond_start(results), *(f"missing: {side} ({reason})" for side, reason in left_out.items()),
              sep="\n")


if __name__ == "__main__":
    main()
