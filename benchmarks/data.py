"""Gzip-compressed h5ad to a corpus on disk: cells/s, CPU, memory and bytes a cell, beside other tools, in one run.

    python benchmarks/data.py                            # 100,000 cells made of real ones, every side, three rounds
    python benchmarks/data.py --cells 20000 --sides decompress,pipeline --rounds 5 --json
    python benchmarks/data.py --memory csr,csc,dense     # 500,000 cells (a fifth of it dense): memory of workers

The file holds cells of examples/atlas, drawn with replacement (seeded), written by anndata with its gzip. Sides take
turns, each in a process of its own, bound to one core or to two; medians and the spread are told. CPU seconds are those
of all its processes: on a machine that others use they scatter less than the clock.
"""
import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SMALL_SHARD = "64MiB"   # where memory is measured: else all a worker may take is for merging large shards
SLICE = 4 << 20   # values of a piece that is read at once


def write_cells(path: Path, n_cells: int) -> None:
    """Real cells over and over, as one h5ad."""
    import anndata
    import pandas as pd

    real = anndata.read_h5ad(ROOT / "examples" / "atlas" / "pancreas-baron2016.h5ad")
    rows = np.random.default_rng(0).integers(0, real.n_obs, n_cells)
    cells = anndata.AnnData(real.X[rows], obs=pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)]),
                            var=pd.DataFrame(index=real.var_names))
    cells.write_h5ad(path, compression="gzip")


# ---- sides: (file, folder for what is written, cores)


def decompress(file: Path, out: Path, cores: int) -> None:
    """Only read: h5py takes all values and indices from the file, in one process a core."""
    from multiprocessing import get_context

    with get_context("spawn").Pool(cores) as pool:
        pool.starmap(_read_part, [(file, part, cores) for part in range(cores)])


def _read_part(file: Path, part: int, parts: int) -> None:
    import h5py

    with h5py.File(file) as opened:
        for name in ("data", "indices"):
            array = opened["X"][name]
            for first in range(part * SLICE, array.shape[0], parts * SLICE):
                array[first:first + SLICE]


def pipeline(file: Path, out: Path, cores: int) -> None:
    """`scgpt data build`, with the Ray that it starts."""
    from data_pipeline.execute import build

    result = build(_config(file), out)
    print(json.dumps({name: round(seconds, 2) for name, seconds in result.seconds.items()}))


def without_ray(file: Path, out: Path, cores: int) -> None:
    """The same tasks one after the other in one process."""
    from tests.data_pipeline.atlases import build_here

    build_here(_config(file), out)


def small_shards(file: Path, out: Path, cores: int) -> None:
    """A build whose workers promise little memory."""
    from data_pipeline.execute import build

    build(_config(file, max_bytes=SMALL_SHARD), out)


def _config(file: Path, *, max_bytes: str = "512MiB") -> "CorpusConfig":   # noqa: F821  imported where it is needed
    from data_pipeline.config import CorpusConfig
    from scgpt.config import validate

    return validate(CorpusConfig, {"sources": [str(file)], "cells": {"min_genes": 1}, "splits": {"valid": 0.03},
                                   "shards": {"max_bytes": max_bytes}})


def _rows_and_ids(file: Path) -> "tuple[csr_matrix, np.ndarray]":   # noqa: F821
    """The whole matrix in memory, and a token id, or -100, for each of its columns."""
    import anndata

    from scgpt.vocab import GeneVocab

    cells, vocab = anndata.read_h5ad(file), GeneVocab.named("scgpt-human").get_stoi()
    return cells.X, np.array([vocab.get(name, -100) for name in cells.var_names])


def scbank(file: Path, out: Path, cores: int) -> None:
    """The public scgpt package's way (scbank.DataBank 0.2.4): a Python loop over rows, from_dict, Parquet."""
    from datasets import Dataset

    rows, ids = _rows_and_ids(file)
    table: dict[str, list[object]] = {"id": list(range(rows.shape[0])), "genes": [], "expressions": []}
    for i in range(rows.shape[0]):
        part = slice(rows.indptr[i], rows.indptr[i + 1])
        genes, values = ids[rows.indices[part]], rows.data[part]
        known = genes != -100
        table["genes"].append(genes[known])
        table["expressions"].append(values[known])
    Dataset.from_dict(table).to_parquet(out / "X.datatable.parquet")


def from_generator(file: Path, out: Path, cores: int) -> None:
    """Tahoe-x1's way (scripts/data_prep): a generator of cells as tensors, from_generator, save_to_disk.

    Its processes are one a file, so that a second core helps little.
    """
    from datasets import Dataset

    cells = Dataset.from_generator(_generate, gen_kwargs={"files": [file]}, cache_dir=str(out.parent / ".hf"))
    cells.save_to_disk(out)


def _generate(files: list[Path]) -> Iterator[dict[str, object]]:
    import anndata
    import torch

    from scgpt.vocab import GeneVocab

    vocab = GeneVocab.named("scgpt-human").get_stoi()
    for file in files:
        cells = anndata.read_h5ad(file, backed="r")
        ids = np.array([vocab.get(name, -1) for name in cells.var_names])
        obs = cells.obs.reset_index()
        rows, ids = cells[:, ids >= 0].X.tocsr(), ids[ids >= 0]
        for i in range(rows.shape[0]):
            row = rows[i]
            genes, values = np.insert(ids[row.indices], 0, vocab["<cls>"]), np.insert(row.data, 0, -2)
            yield {"id": i, "genes": torch.tensor(genes), "expressions": torch.tensor(values, dtype=torch.float),
                   "index": obs.iloc[i]["index"]}


def scdl(file: Path, out: Path, cores: int) -> None:
    """bionemo-scdl: memory-mapped CSR arrays, columns as they are."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    SingleCellMemMapDataset(str(out / "scdl"), str(file), use_X_not_raw=True).save()


def annbatch(file: Path, out: Path, cores: int) -> None:
    """annbatch: shuffled, sharded Zarr, columns as they are."""
    from annbatch import DatasetCollection

    DatasetCollection(out / "cells.zarr").add_adatas(adata_paths=[file], shuffle=True, rng=np.random.default_rng(0))


SIDES: dict[str, Callable[[Path, Path, int], None]] = {
    "decompress": decompress, "without-ray": without_ray, "pipeline": pipeline, "scbank": scbank,
    "from-generator": from_generator, "scdl": scdl, "annbatch": annbatch}


# ---- measuring


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one side."""

    seconds: float
    cpu_s: float          # of all processes
    peak_bytes: int       # resident, of all processes together
    worker_bytes: int     # resident at most, of the largest process
    written_bytes: int
    told: str             # last line that it printed


def measure(command: list[str], out: Path, cores: int, *, only: str = "") -> Run:
    """Run a command bound to `cores` cores, and look at its processes ten times a second.

    `only`: start of the command line of the processes that `worker_bytes` is about.
    """
    import psutil

    allowed = sorted(os.sched_getaffinity(0))[:cores]
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores), "NUMBA_NUM_THREADS": str(cores),
                   "HF_HOME": str(out / ".hf"), "PYTHONPATH": os.pathsep.join(
                       [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    out.mkdir(parents=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as told:
        started = time.perf_counter()
        process = psutil.Popen(command, env=environment, stdout=told, stderr=subprocess.STDOUT, cwd=ROOT,
                               preexec_fn=lambda: os.sched_setaffinity(0, allowed))
        cpu: dict[tuple[int, float], float] = {}
        peak = worker = 0
        while process.poll() is None:
            together = 0
            for member in _family(process):
                try:
                    times, resident = member.cpu_times(), member.memory_info().rss
                    command_line = " ".join(member.cmdline())
                    highest = _highest_resident(member.pid)
                except (psutil.Error, OSError):   # it has ended
                    continue
                cpu[member.pid, member.create_time()] = times.user + times.system
                together += resident
                if command_line.startswith(only):
                    worker = max(worker, highest)
            peak = max(peak, together)
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        told.seek(0)
        lines = told.read().splitlines()
    if process.returncode != 0:
        raise RuntimeError("\n".join(lines[-12:]))
    shutil.rmtree(out / ".hf", ignore_errors=True)
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)   # exact, but blind to processes of others, as Ray's are
    reaped = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, max(sum(cpu.values()), reaped), peak, worker, written, lines[-1] if lines else "")


def _family(process: "psutil.Process") -> "list[psutil.Process]":   # noqa: F821
    import psutil

    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _highest_resident(process: int) -> int:
    """The most memory that a process ever had resident, in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def missing(side: str, python: str) -> str | None:
    """Why a side cannot run, or None."""
    module = {"scdl": "bionemo.scdl", "annbatch": "annbatch"}.get(side)
    if module is None:
        return None
    done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.splitlines()[-1]


def compare(sides: list[str], file: Path, work: Path, args: argparse.Namespace) -> dict[str, dict[str, list[Run]]]:
    """cores -> side -> its runs; sides take turns."""
    results: dict[str, dict[str, list[Run]]] = {}
    for _ in range(args.rounds):
        for cores in args.cores:
            for side in sides:
                out = work / "out"
                python = args.annbatch_python if side == "annbatch" else sys.executable
                command = [python, __file__, "--side", side, str(file), str(out / "corpus"), str(cores)]
                found = measure(command, out, cores)
                shutil.rmtree(out)
                results.setdefault(str(cores), {}).setdefault(side, []).append(found)
                print(f"{cores} {side:15} {found.seconds:8.2f} s {found.cpu_s:8.2f} s CPU {found.told[:80]}",
                      file=sys.stderr)
    return results


def table(results: dict[str, dict[str, list[Run]]], n_cells: int) -> list[str]:
    """Medians of each side, as Markdown."""
    lines = ["| cores | side | cells/s | seconds (range) | CPU s | of decompressing | peak memory | bytes a cell |",
             "|---|---|---|---|---|---|---|---|"]
    for cores, sides in results.items():
        base = statistics.median(run.cpu_s for run in sides["decompress"]) if "decompress" in sides else float("nan")
        for side, runs in sides.items():
            seconds, cpu = [run.seconds for run in runs], statistics.median(run.cpu_s for run in runs)
            peak = statistics.median(run.peak_bytes for run in runs)
            lines.append(f"| {cores} | {side} | {n_cells / statistics.median(seconds):,.0f} | "
                         f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | {cpu:.1f} | "
                         f"{cpu / base:.1f} x | {peak / 2**20:,.0f} MiB | {runs[-1].written_bytes / n_cells:,.0f} |")
    return lines


def write_synthetic(path: Path, n_cells: int, form: str, *, n_genes: int = 2_000, n_values: int = 300) -> None:
    """Seeded counts of some `n_values` genes a cell, as CSR, CSC or dense, gzip at its fastest."""
    import anndata
    import pandas as pd
    from scipy import sparse

    from scgpt.vocab import SPECIAL_TOKENS, GeneVocab

    draw = np.random.default_rng(0)
    pool = sparse.random(2_000, n_genes, n_values / n_genes, "csr", np.float32, draw,
                         lambda size: draw.geometric(0.4, size).astype(np.float32))
    matrix = pool[draw.integers(0, pool.shape[0], n_cells)]
    genes = [token for token in GeneVocab.named("scgpt-human").get_itos() if token not in SPECIAL_TOKENS][:n_genes]
    stored = {"csr": matrix.tocsr, "csc": matrix.tocsc, "dense": matrix.toarray}[form]()
    del matrix
    anndata.AnnData(stored, obs=pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)]),
                    var=pd.DataFrame(index=genes)).write_h5ad(path, compression="gzip", compression_opts=1)


def memory(forms: list[str], n_cells: int, work: Path) -> list[dict[str, object]]:
    """The most memory of a Ray worker of a build on two cores, beside what the plan says."""
    from data_pipeline.plan import make_plan

    rows: list[dict[str, object]] = []
    for form in forms:
        file, out = work / f"{form}.h5ad", work / "out"
        cells = n_cells // 5 if form == "dense" else n_cells
        write_synthetic(file, cells, form)
        plan = make_plan(_config(file, max_bytes=SMALL_SHARD))
        command = [sys.executable, __file__, "--side", "small-shards", str(file), str(out / "corpus"), "2"]
        found = measure(command, out, 2, only="ray::")
        rows.append({"form": form, "cells": cells, "file_bytes": file.stat().st_size, "values": plan.n_values,
                     "worker_bytes": found.worker_bytes, "promised_bytes": plan.worker_bytes,
                     "seconds": round(found.seconds, 1)})
        shutil.rmtree(out)
        file.unlink()
    return rows


def versions() -> str:
    """This machine and the versions of what took part."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("numpy", "h5py", "isal", "ray", "pyarrow", "datasets", "bionemo-scdl"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(found)}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, help="default 100,000; with --memory 500,000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2])
    parser.add_argument("--sides", type=lambda text: text.split(","), default=list(SIDES))
    parser.add_argument("--annbatch-python", default=sys.executable, help="a Python that has annbatch (3.12 or later)")
    parser.add_argument("--memory", type=lambda text: text.split(","), metavar="FORMS", help="csr, csc, dense")
    parser.add_argument("--folder", type=Path, help="where files are written for the time being (default: TMPDIR)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)   # one run, in a process of its own
    args = parser.parse_args()
    if args.side:
        side, file, out, cores = args.side
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        if side not in ("pipeline", "without-ray", "small-shards"):
            Path(out).mkdir()
        {**SIDES, "small-shards": small_shards}[side](Path(file), Path(out), int(cores))
        return
    n_cells = args.cells or (500_000 if args.memory else 100_000)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as folder:
        work = Path(folder)
        if args.memory:
            rows = memory(args.memory, n_cells, work)
            print(json.dumps({"memory": rows}) if args.json else _memory_table(rows))
            return
        reasons = {side: missing(side, args.annbatch_python if side == "annbatch" else sys.executable)
                   for side in args.sides}
        file = work / "cells.h5ad"
        write_cells(file, n_cells)
        results = compare([side for side in args.sides if reasons[side] is None], file, work, args)
        left_out = {side: reason for side, reason in reasons.items() if reason is not None}
        if args.json:
            print(json.dumps({"cells": n_cells, "file_bytes": file.stat().st_size, "machine": versions(),
                              "missing": left_out, "runs": {cores: {side: [asdict(run) for run in runs] for side, runs
                                                                    in sides.items()} for cores, sides in
                                                            results.items()}}))
            return
        print(f"{versions()}\n{n_cells:,} cells, {file.stat().st_size / 1e6:,.0f} MB of gzip h5ad\n")
        print("\n".join(table(results, n_cells)))
        for side, reason in left_out.items():
            print(f"missing: {side} ({reason})")


def _memory_table(rows: list[dict[str, object]]) -> str:
    lines = ["| form | cells | values | file | most memory of a worker | the plan says | seconds |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        mebi = {key: f"{int(str(row[key])) / 2**20:,.0f} MiB" for key in ("file_bytes", "worker_bytes",
                                                                          "promised_bytes")}
        lines.append(f"| {row['form']} | {row['cells']:,} | {row['values']:,} | {mebi['file_bytes']} | "
                     f"{mebi['worker_bytes']} | {mebi['promised_bytes']} | {row['seconds']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
