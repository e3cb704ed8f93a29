"""Shuffle quality of the loader's orders, beside true random batches: indices only, nothing is read.

    python benchmarks/shuffle.py            # 1,048,576 cells of 512 donors, batches of 512
    python benchmarks/shuffle.py --json

"by donor" is storage in which the cells of a donor lie together, as in a corpus that nobody shuffled; "shuffled" is
what `scgpt data build` writes. Travel, spread and mixing are 1 for true random batches (pretrain/shuffle_quality.py).
"""
import argparse
import json
from dataclasses import asdict

import numpy as np

from pretrain.order import Blocks, permuted
from pretrain.shuffle_quality import ShuffleQuality, shuffle_quality

ORDERS = {"as stored": None, "blocks 1,024 x 64": Blocks(1_024, 64), "blocks 256 x 64": Blocks(256, 64),
          "blocks 1,024 x 512": Blocks(1_024, 512), "shuffled": "shuffled"}


def measure(n_cells: int, n_donors: int, batch: int, n_batches: int, seed: int = 0) -> dict[str, ShuffleQuality]:
    """Storage and order -> quality of evenly spaced batches of an epoch."""
    by_donor = np.sort(np.random.default_rng(seed).geometric(2 / n_donors, n_cells).clip(max=n_donors) - 1)
    storages = {"by donor": by_donor, "shuffled": np.random.default_rng(seed + 1).permutation(by_donor)}
    firsts = np.linspace(0, n_cells // batch - 1, n_batches).astype(np.int64) * batch
    places = firsts[:, None] + np.arange(batch)
    flat = places.ravel()
    found = {}
    for storage, donors in storages.items():
        for name, order in ORDERS.items():
            blocks = order if isinstance(order, Blocks) else None
            cells = flat if order is None else permuted(flat, np.zeros_like(flat), n_cells, seed, blocks)
            found[f"{storage}, read {name}"] = shuffle_quality(cells.reshape(places.shape), places, donors)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1 << 20)
    parser.add_argument("--donors", type=int, default=512)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--batches", type=int, default=256, help="of an epoch, evenly spaced")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    found = measure(args.cells, args.donors, args.batch, args.batches)
    if args.json:
        print(json.dumps({name: asdict(quality) | {"mixing": quality.mixing} for name, quality in found.items()}))
        return
    print("| storage, order | travel | spread | donors a batch, bits | at random, bits | mixing |")
    print("|---|---|---|---|---|---|")
    for name, quality in found.items():
        print(f"| {name} | {quality.travel:.3f} | {quality.spread:.3f} | {quality.entropy_bits:.3f} "
              f"| {quality.ideal_bits:.3f} | {quality.mixing:.3f} |")


if __name__ == "__main__":
    main()
