"""One training step of a model on real cells: packed beside padded beside the public package, same weights, same cells.

    python benchmarks/model.py                         # scgpt-10m with 64 cells, scgpt-base with 16
    python benchmarks/model.py --models scgpt-10m --rounds 5
    python benchmarks/model.py --out docs/benchmarks/model.md

A step is forward, masked-expression and MVC loss at the hidden positions, backward, Adam. Each side runs in a process
of its own, so that its peak memory is its own; the sides take turns, a step each. All must report one loss.
The public package (scgpt on PyPI, without its dependencies) is installed below --work on first use; without a package
index its rows are left out. Cells are the example atlas: a small padding waste in one library, a large one in the mix.
"""
import argparse
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ATLAS = ROOT / "examples" / "atlas"
PUBLIC = "scgpt==0.2.4"
SIDES = ("packed", "padded", "public")
CELLS = {"scgpt-10m": 64, "scgpt-base": 16}
# As ranks of a training do (pretrain/world.py), glibc keeps freed buffers of up to 32 MiB: no page faults each step.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
MASK_VALUE, PAD_VALUE, MASK_RATIO = -1.0, -2.0, 0.4
Batch = dict[str, np.ndarray]


def read_cells(paths: list[Path], n_cells: int, context: int, vocab: dict[str, int], *, seed: int) -> Batch:
    """Padded arrays (cells, longest): genes, values (bins, hidden ones -1), targets, hidden, padding."""
    import anndata

    from scgpt.model.row_bins import bin_row

    rng, rows = np.random.default_rng(seed), []
    share = np.array_split(np.arange(n_cells), len(paths))
    for path, part in zip(paths, share, strict=True):
        atlas = anndata.read_h5ad(path)
        ids = np.array([vocab.get(name, -1) for name in atlas.var_names])
        for row in rng.choice(atlas.n_obs, len(part), replace=False):
            counts = atlas.X[row]
            counts = np.asarray(counts.todense() if hasattr(counts, "todense") else counts).ravel() * (ids >= 0)
            bins = bin_row(counts, 51)
            chosen = rng.permutation(np.flatnonzero(bins))[: context - 1]
            rows.append((np.r_[vocab["<cls>"], ids[chosen]], np.r_[PAD_VALUE, bins[chosen]]))
    longest = max(len(genes) for genes, _ in rows)
    padding = np.arange(longest) >= np.array([[len(genes)] for genes, _ in rows])
    genes, targets = np.full(padding.shape, vocab["<pad>"]), np.full(padding.shape, PAD_VALUE, np.float32)
    for i, (row_genes, row_bins) in enumerate(rows):
        genes[i, : len(row_genes)], targets[i, : len(row_bins)] = row_genes, row_bins
    hidden = (rng.random(padding.shape) < MASK_RATIO) & ~padding
    hidden[:, 0] = False
    return {"genes": genes, "values": np.where(hidden, MASK_VALUE, targets).astype(np.float32), "targets": targets,
            "hidden": hidden, "padding": padding}


def run_side(side: str, folder: Path) -> None:
    """In a process of its own: build and load; then do what each line of stdin asks for, see Side."""
    import torch

    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    batch = {name: torch.from_numpy(x) for name, x in np.load(folder / "batch.npz").items()}
    model = build_side(side, folder, settings)
    step = packed_step(model, batch) if side == "packed" else padded_step(model, batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)   # what the engine takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in sys.stdin:
        if line.strip() == "end":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(json.dumps({"peak_mib": peak / 1024, "step_mib": (peak - before) / 1024}), flush=True)
            return
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = step()
        loss.backward()
        optimizer.step()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": float(loss.detach())}), flush=True)


def build_side(side: str, folder: Path, settings: dict[str, Any]) -> Any:
    """The model of one side with the shared weights; the public one is imported without its package's dependencies."""
    import torch

    if side == "public":
        package, utils = types.ModuleType("scgpt"), types.ModuleType("scgpt.utils")
        package.__path__, package.logger = [str(folder.parent / "public" / "scgpt")], logging.getLogger("public")
        utils.map_raw_id_to_vocab_id = None  # only the perturbation model's helper needs it
        sys.modules |= {"scgpt": package, "scgpt.utils": utils}
    from scgpt.model.model import TransformerModel

    fast = {} if side == "public" else {"use_fast_transformer": True}
    model = TransformerModel(**settings["model"], dropout=settings["dropout"], pad_value=PAD_VALUE, do_mvc=True, **fast)
    model.load_state_dict(torch.load(folder / ("torch.pt" if side == "public" else "flash.pt"), weights_only=True))
    return model.train()


def padded_step(model: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    """Loss of the padded rows: decoders compute every position, padding too."""
    hidden, targets = batch["hidden"], batch["targets"][batch["hidden"]]

    def step() -> Any:
        out = model(batch["genes"], batch["values"], batch["padding"], MVC=True)
        return sum((out[key][hidden] - targets).square().mean() for key in ("mlm_output", "mvc_output"))

    return step


def packed_step(model: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    """Loss of the packed cells: decoders compute the hidden positions only."""
    import torch

    from scgpt.model import PackedTensors

    real = ~batch["padding"]
    lengths = real.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed = PackedTensors(batch["genes"][real], batch["values"][real], cu_seqlens, int(lengths.max()))
    positions = batch["hidden"][real].nonzero().squeeze(1)
    targets = batch["targets"][real][positions]

    def step() -> Any:
        out = model(packed, MVC=True, positions=positions)
        return sum((out[key] - targets).square().mean() for key in ("mlm_output", "mvc_output"))

    return step


def prepare(folder: Path, name: str, libraries: list[str], n_cells: int, options: argparse.Namespace) -> Batch:
    """Write settings, cells and weights (both namings) for the sides."""
    import torch
    import yaml

    from scgpt.model import TransformerModel
    from scgpt.model.weights import rename
    from scgpt.vocab import PUBLISHED, GeneVocab

    shape = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())
    vocab, sizes = GeneVocab.named(PUBLISHED).get_stoi(), shape["model"]
    folder.mkdir(parents=True, exist_ok=True)
    batch = read_cells([ATLAS / library for library in libraries], n_cells, shape["objective"]["context_length"], vocab,
                       seed=options.seed)
    model = {"ntoken": len(vocab), "d_model": sizes["d_model"], "nhead": sizes["n_heads"], "d_hid": sizes["d_hid"],
             "nlayers": sizes["n_layers"], "vocab": {"<pad>": vocab["<pad>"]}}
    torch.manual_seed(options.seed)
    state = TransformerModel(**model, do_mvc=True, use_fast_transformer=True).state_dict()
    torch.save(state, folder / "flash.pt")
    torch.save({rename(key, "torch"): x for key, x in state.items()}, folder / "torch.pt")
    np.savez(folder / "batch.npz", **batch)
    (folder / "settings.json").write_text(json.dumps({"model": model, "dropout": options.dropout,
                                                      "threads": options.threads}))
    return batch


class Side:
    """One side in a process of its own, which holds its model and waits between its turns."""

    def __init__(self, side: str, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--side", side, "--folder", str(folder)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
            env=os.environ | KEEP_MEMORY | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"})

    def ask(self, word: str) -> dict[str, float]:
        """`step`: do one, its seconds and loss; `end`: peak memory, and the process ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):   # packages print other lines
                return dict(json.loads(line))
        raise SystemExit(f"a side ended with code {self._process.wait()}: see above")


def measure(folder: Path, sides: list[str], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The sides take turns, a step each, after one that warms up; medians. Raises when losses differ.

    `ratio` is the median over the rounds of a side's seconds by those of `packed` in the same round: what slows the
    machine down slows both.
    """
    processes = {side: Side(side, folder) for side in sides}
    losses = {side: process.ask("step")["loss"] for side, process in processes.items()}
    if max(losses.values()) - min(losses.values()) > 1e-3 * max(losses.values()):
        raise SystemExit(f"the sides do not compute the same: {losses}")
    rounds = [{side: process.ask("step")["seconds"] for side, process in processes.items()}
              for _ in range(options.rounds)]
    return {side: {"seconds": statistics.median(one[side] for one in rounds),
                   "ratio": statistics.median(one[side] / one["packed"] for one in rounds), **process.ask("end")}
            for side, process in processes.items()}


def has_public(work: Path) -> bool:
    """Install the public package below `work` unless it is there; False where that is not possible."""
    site = work / "public"
    if not (site / "scgpt").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), PUBLIC]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            print(f"the public package {PUBLIC} could not be installed: its rows are left out", file=sys.stderr)
    return (site / "scgpt").is_dir()


LIBRARIES = {"one library": ["pancreas-baron2016.h5ad"],
             "mixed atlas": ["pancreas-baron2016.h5ad", "blood-pbmc68k.h5ad"]}


def table(options: argparse.Namespace) -> str:
    """Run everything; the result as Markdown."""
    sides = [side for side in SIDES if side != "public" or has_public(options.work)]
    lines = ["| model | cells | tokens | padding | side | s a step | cells/s | packed is | peak memory | of it step |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for name in options.models:
        for mix, libraries in LIBRARIES.items():
            folder = options.work / f"{name}-{mix.replace(' ', '-')}"
            batch = prepare(folder, name, libraries, options.cells or CELLS[name], options)
            results = measure(folder, sides, options)
            n_cells, n_tokens = len(batch["genes"]), int((~batch["padding"]).sum())
            for side, result in results.items():
                faster = "" if side == "packed" else f"{result['ratio']:.2f} x as fast"
                lines.append(f"| {name} | {n_cells}, {mix} | {n_tokens:,} | {batch['padding'].mean():.0%} | {side} "
                             f"| {result['seconds']:.2f} | {n_cells / result['seconds']:.2f} | {faster} "
                             f"| {result['peak_mib']:,.0f} MiB | {result['step_mib']:,.0f} MiB |")
                print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def page(rows: str, options: argparse.Namespace) -> str:
    """The table with what it was measured on."""
    import torch

    command = " ".join(["python benchmarks/model.py", *sys.argv[1:]])
    return (f"# One training step, packed beside padded\n\n`{command}` ({platform.machine()}, {options.threads} "
            f"threads, torch {torch.__version__}, float32, dropout {options.dropout}, 60,697 genes; medians of "
            f"{options.rounds} rounds in which each side does one step). A step is forward, masked-expression and MVC "
            f"loss at the hidden 40 %, backward, Adam. Same weights and cells on every side, equal losses; \"public\" "
            f"is {PUBLIC} with torch's layers, as it runs on a CPU. Cells of the example atlas: pancreas alone, or "
            f"half of them PBMC.\n\n{rows}\n")


def main() -> None:
    """Parse, run, print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--cells", type=int, help="cells a step (default: 64 for scgpt-10m, 16 for scgpt-base)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench-model")
    parser.add_argument("--out", type=Path, help="also write the page there")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options.side, options.folder)
        return
    text = page(table(options), options)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
