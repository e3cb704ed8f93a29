"""From a corpus on disk to packed batches: cells/s of our loader, the public collator and other loaders, in one run.

    python benchmarks/loader.py                                    # 1,000,000 cells made of real ones; half an hour
    python benchmarks/loader.py --cells 65536 --parts warm,stages --rounds 5 --json
    python benchmarks/loader.py --parts peers --peers-python PY312 PY311   # interpreters that hold other loaders

Parts: `warm` (our loader beside the public collator, the corpus in memory), `peers` (other loaders, stored values,
shuffled), `cold` (a corpus larger than the page cache), `stages` (where the nanoseconds go). Each run is a process of
its own, bound to its cores; sides take turns, medians and ranges are told, CPU seconds (all threads and processes of a
side) beside the clock: on a machine that others use they scatter less. What is written is kept in --folder and used
again. It takes 8 KB a cell, and 40 KB for each of --peer-cells.
"""
import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import loader_cold as cold
from benchmarks.loader_corpus import corpus_of, h5ad_of
from benchmarks.loader_peers import PEERS
from benchmarks.loader_sides import SIDES

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("warm", "peers", "cold", "stages")
COLD_SIDES = ("fetch", "loader 2 workers", "blocks")
THREADS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS", "TOKIO_WORKER_THREADS")


@dataclass(frozen=True, slots=True)
class Entry:
    """One side in one setting, and its runs."""

    part: str
    side: str
    work: str
    cores: int
    context: int | None   # None: what is read does not depend on it
    command: list[str] = field(repr=False)   # what is left to say: the seconds
    runs: list[dict[str, Any]] = field(default_factory=list)

    def median(self, what: str) -> float:
        """`per_s`: cells a second; `per_cpu_s`: cells a CPU second; `read_bytes`: bytes from storage a cell."""
        return statistics.median(self.of_runs(what))

    def of_runs(self, what: str) -> list[float]:
        """The same of each run."""
        over = {"per_s": lambda run: run["cells"] / run["seconds"],
                "per_cpu_s": lambda run: run["cells"] / max(run["cpu_s"], 1e-9),
                "read_bytes": lambda run: run["read_bytes"] / max(run["cells"], 1)}
        return [over[what](run) for run in self.runs]


def child(command: Sequence[str], cores: int, group: Path | None = None,
          limit_s: float | None = None) -> dict[str, Any]:
    """What a program prints last, as JSON; it is bound to `cores` cores, and to the cgroup `group`.

    Raises RuntimeError with its last words when it fails, and when it has not ended after `limit_s` seconds: it and the
    processes that it started are then ended.
    """
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict.fromkeys(THREADS, str(cores))}

    def bind() -> None:
        os.sched_setaffinity(0, allowed)
        if group is not None:
            cold.join(group)

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
                               preexec_fn=bind, start_new_session=True)
    try:
        output, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done within {limit_s:g} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: " + "\n".join(errors.splitlines()[-12:]))
    told: dict[str, Any] = json.loads(output.splitlines()[-1])
    return told


def our_entries(part: str, corpus: Path, sides: Sequence[str], contexts: Sequence[int],
                cores: Sequence[int]) -> list[Entry]:
    """Our sides in every setting that makes a difference."""
    return [Entry(part, name, SIDES[name].work, n_cores, context if SIDES[name].collates else None,
                  [sys.executable, str(ROOT / "benchmarks" / "loader_sides.py"), name, str(corpus), str(context),
                   str(n_cores)])
            for name in sides for n_cores in SIDES[name].cores if n_cores in cores
            for context in (contexts if SIDES[name].collates else contexts[:1])]


def peer_entries(folder: Path, n_cells: int, pythons: Sequence[str],
                 cores: Sequence[int]) -> tuple[list[Entry], dict[str, str]]:
    """Every peer that some interpreter holds, and why the others are missing."""
    entries, missing = [], {}
    program = str(ROOT / "benchmarks" / "loader_peers.py")
    for name, peer in PEERS.items():
        reasons = {}
        for python in pythons:
            tried = subprocess.run([python, program, name], capture_output=True, text=True, check=False,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)})
            if tried.returncode == 0:
                entries += [Entry("peers", name, peer.work, n_cores, None,
                                  [python, program, name, str(folder), str(n_cells), str(n_cores)])
                            for n_cores in cores]
                break
            reasons[python] = tried.stderr.strip().splitlines()[-1] if tried.stderr.strip() else "no word"
        else:
            missing[name] = f"pip install '{peer.package}' first; " + "; ".join(
                f"{python}: {reason}" for python, reason in reasons.items())
    return entries, missing


def measure(entries: Sequence[Entry], seconds: float, rounds: int, group: Path | None = None,
            before: Path | None = None, limit_s: float | None = None) -> dict[str, str]:
    """Let the sides take turns; `before` each run the pages of that corpus are dropped.

    Returns why a peer is missing: it is of another project, and no reason to lose the other figures.
    """
    missing: dict[str, str] = {}
    for number in range(rounds):
        for entry in entries:
            if entry.side in missing:
                continue
            if before is not None:
                cold.drop_pages(before)
            try:
                entry.runs.append(child([*entry.command, str(seconds)], entry.cores, group,
                                        limit_s if entry.side in PEERS else None))
            except RuntimeError as error:
                if entry.side not in PEERS:
                    raise
                missing[entry.side] = f"it fails: {str(error).splitlines()[-1]}"
                continue
            print(f"round {number + 1} {entry.part:6} {entry.cores} {entry.context or '':6} {entry.side:20} "
                  f"{entry.of_runs('per_s')[-1]:12,.0f} cells/s {entry.of_runs('per_cpu_s')[-1]:12,.0f} a CPU s",
                  file=sys.stderr)
    return missing


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for."""
    folder: Path = args.folder.resolve()
    told: dict[str, Any] = {"machine": machine(), "cells": args.cells, "peer_cells": args.peer_cells,
                            "seconds": args.seconds, "load": [os.getloadavg()[0]], "missing": {}}
    entries: list[Entry] = []
    corpus = corpus_of(folder, args.cells).files.folder if set(args.parts) - {"peers"} else None
    if "warm" in args.parts:
        cold.read_once(corpus)
        entries += our_entries("warm", corpus, ("public collator", "loader", "loader 1 worker", "loader 2 workers",
                                                "fetch"), args.contexts, args.cores)
    if "peers" in args.parts:
        h5ad_of(folder, args.peer_cells)
        ours = our_entries("peers", corpus_of(folder, args.peer_cells).files.folder, ("fetch",), args.contexts,
                           args.cores)
        theirs, told["missing"] = peer_entries(folder, args.peer_cells, [sys.executable, *args.peers_python],
                                               args.cores)
        entries += ours
        for entry in theirs:   # its form is written here, outside of what is timed
            try:
                child([*entry.command, "0.001"], os.cpu_count() or 1, limit_s=args.peer_limit_s)
                entries.append(entry)
            except RuntimeError as error:
                told["missing"][entry.side] = f"it fails: {str(error).splitlines()[-1]}"
    if args.check:
        told["seen"] = {f"{entry.part} {entry.side}": child(
            [*entry.command, "0"], entry.cores, limit_s=args.peer_limit_s if entry.side in PEERS else None)
            for entry in entries}
    told["missing"] |= measure(entries, args.seconds, args.rounds, limit_s=args.peer_limit_s)
    entries = [entry for entry in entries if entry.side not in told["missing"]]
    if "cold" in args.parts:
        limit = cold.limit_bytes(corpus)
        with cold.memory_limit(limit) as group:
            frozen = our_entries("cold", corpus, COLD_SIDES, args.contexts[:1], args.cores[-1:] + args.cores[:1])
            measure(frozen, args.seconds, args.rounds, group, corpus)
        entries += frozen
        told["cold"] = {"corpus_bytes": sum(path.stat().st_size for path in cold.files_of(corpus)),
                        "limit_bytes": limit if group is not None else None}
    if "stages" in args.parts:
        cold.read_once(corpus)
        program = str(ROOT / "benchmarks" / "loader_stages.py")
        told["stages"] = {context: child([sys.executable, program, str(corpus), str(context), str(args.stage_steps)], 1)
                          for context in args.contexts}
    told["load"].append(os.getloadavg()[0])
    told["entries"] = [{name: value for name, value in asdict(entry).items() if name != "command"} for entry in entries]
    return told


def machine() -> str:
    """This machine and the versions of what takes part."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return (f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            + ", ".join(f"{name} {version(name)}" for name in ("numpy", "numba", "pyarrow", "torch")))


def table(told: dict[str, Any]) -> str:
    """The figures as Markdown."""
    entries = [Entry(**entry, command=[]) for entry in told["entries"]]
    lines = [told["machine"], f"load {told['load'][0]:.1f} before, {told['load'][1]:.1f} after"]
    if any(entry.part == "warm" for entry in entries):
        lines += ["", f"{told['cells']:,} cells, in memory", "",
                  "| context | cores | side | cells/s (range) | cells a CPU s | of the public collator |",
                  "|---|---|---|---|---|---|"]
        base = {entry.context: entry.median("per_cpu_s") for entry in entries if entry.side == "public collator"}
        warm = [entry for entry in entries if entry.part == "warm"]
        for entry in sorted(warm, key=lambda entry: entry.context or 0):
            over = f"{entry.median('per_cpu_s') / base[entry.context]:,.1f} x" if entry.context in base else ""
            lines.append(f"| {entry.context or ''} | {entry.cores} | {entry.side} | {_rate(entry)} | "
                         f"{entry.median('per_cpu_s'):,.0f} | {over} |")
    if any(entry.part == "peers" for entry in entries):
        lines += ["", f"{told['peer_cells']:,} cells, in memory, stored values, shuffled", "",
                  "| cores | side | what it does | cells/s (range) | cells a CPU s |", "|---|---|---|---|---|"]
        for entry in sorted((entry for entry in entries if entry.part == "peers"), key=lambda entry: entry.cores):
            lines.append(f"| {entry.cores} | {entry.side} | {entry.work} | {_rate(entry)} | "
                         f"{entry.median('per_cpu_s'):,.0f} |")
        lines += [f"missing: {name} ({reason})" for name, reason in told["missing"].items()]
    if "cold" in told:
        limit = told["cold"]["limit_bytes"]
        how = (f"in a memory cgroup of {limit / 2**30:.2f} GiB" if limit
               else "pages dropped before each run, as no memory cgroup could be made")
        lines += ["", f"a corpus of {told['cold']['corpus_bytes'] / 2**30:.2f} GiB {how}", "",
                  "| cores | side | cells/s (range) | cells a CPU s | KiB from storage a cell |",
                  "|---|---|---|---|---|"]
        lines += [f"| {entry.cores} | {entry.side} | {_rate(entry)} | {entry.median('per_cpu_s'):,.0f} | "
                  f"{entry.median('read_bytes') / 1024:.1f} |" for entry in entries if entry.part == "cold"]
    for context, stages in told.get("stages", {}).items():
        copied = dict.fromkeys(("collate", "load"), stages["read_bytes"] + stages["batch_bytes"])
        sizes = (f"context {context}: {stages['values']:,.0f} values, {stages['tokens']:,.0f} tokens a cell; "
                 f"one core copies {stages['copy_bytes_per_s'] / 1e9:.1f} GB/s")
        lines += ["", sizes, "",
                  "| stage | ns a cell | ns a token | of it, copying at that speed |", "|---|---|---|---|"]
        for stage, ns in stages["ns"].items():
            bound = (f"{copied[stage] / stages['copy_bytes_per_s'] * 1e9:,.0f} ns" if stage in copied else "")
            lines.append(f"| {stage} | {ns:,.0f} | {ns / stages['tokens']:.2f} | {bound} |")
    return "\n".join(lines)


def _rate(entry: Entry) -> str:
    rates = entry.of_runs("per_s")
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def _leave(number: int, frame: FrameType | None) -> None:
    """A signal ends the program through its `finally` blocks."""
    raise SystemExit(128 + number)


def _list(kind: type) -> Any:
    return lambda text: [kind(word) for word in text.split(",")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000, help="of the corpus (default 1,000,000)")
    parser.add_argument("--peer-cells", type=int, default=100_000, help="that other loaders read (default 100,000)")
    parser.add_argument("--contexts", type=_list(int), default=[1_200, 2_048], help="default 1200,2048")
    parser.add_argument("--cores", type=_list(int), default=[1, 2], help="default 1,2")
    parser.add_argument("--parts", type=_list(str), default=list(PARTS), help=f"default {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="a run (default 5)")
    parser.add_argument("--stage-steps", type=int, default=32, help="steps of 512 cells that stages are told of")
    parser.add_argument("--peers-python", nargs="+", default=[], metavar="PYTHON", help="interpreters that hold peers")
    parser.add_argument("--peer-limit-s", type=float, default=900, help="seconds that a peer may take to write "
                        "its form, and for a run, before it is told as missing (default 900)")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "bench-loader", help="for what is written")
    parser.add_argument("--check", action="store_true", help="tell what an epoch of each side holds; needs full steps")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}: choose among {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, _leave)
    told = compare(args)
    print(json.dumps(told) if args.json else table(told))


if __name__ == "__main__":
    main()
