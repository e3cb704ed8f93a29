import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scgpt
from scgpt.collate import CollateConfig, collate
from scgpt.collate.binning import bin_cell
from scgpt.data import RaggedBatch
from scgpt.errors import ConfigError
from scgpt.rng import PURPOSE_MASK_RATIO, PURPOSE_SAMPLE, PURPOSE_SPLIT, PURPOSE_VALUE, below, bits
from tests.scgpt.collate.cells import CLS_ID, key_of, random_cells

CONFIG = CollateConfig(context_length=128)


def slow_cell(cells, cell, config, seed, epoch):
    """The obvious twin of the compiled loop: one cell, plain Python."""
    span = slice(cells.offsets[cell], cells.offsets[cell + 1])
    genes, expressions, cell_id = cells.genes[span], cells.expressions[span], int(cells.columns["cell_id"][cell])
    if config.input_style == "binned":
        values = bin_cell(expressions, config.n_bins, seed=seed, epoch=epoch, cell_id=cell_id, tie_rule=config.tie_rule)
    else:
        values = np.log1p(expressions.astype(np.float64)) if config.input_style == "log1p" else expressions
    wanted = config.context_length - 1
    chosen = list(range(len(genes)))
    if len(genes) > wanted:
        key, chosen = key_of(seed, epoch, cell_id, PURPOSE_SAMPLE), []
        for i in range(len(genes)):
            if (int(bits(key, i)) >> 32) * (len(genes) - i) >> 32 < wanted - len(chosen):
                chosen.append(i)
    which = below(key_of(seed, epoch, cell_id, PURPOSE_MASK_RATIO), 0, len(config.mask_ratio))
    ratio = config.mask_ratio[which]
    if config.task == "pcpt":
        key = key_of(seed, epoch, cell_id, PURPOSE_VALUE)
        hidden = [int(bits(key, i)) < int(ratio * (1 << 64)) for i in chosen]
    else:
        key, seen, generated = key_of(seed, epoch, cell_id, PURPOSE_SPLIT), [], []
        for i in range(len(chosen)):
            missing, left = int(len(chosen) * ratio) - len(generated), len(chosen) - i
            (generated if (int(bits(key, i)) >> 32) * left >> 32 < missing else seen).append(chosen[i])
        chosen, hidden = seen + generated, [False] * len(seen) + [True] * len(generated)
    targets = [config.cls_value, *(np.float32(values[i]) for i in chosen)]
    shown = [config.mask_value if hide else target for target, hide in zip(targets, [False, *hidden], strict=True)]
    return [CLS_ID, *(int(genes[i]) for i in chosen)], shown, targets, [False, *hidden]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.float32])
@pytest.mark.parametrize("config", [
    CONFIG, CollateConfig(64, n_bins=8, mask_ratio=(0.25, 0.5, 0.75), tie_rule="highest"),
    CollateConfig(400, input_style="log1p", pad_value=51, mask_value=52), CollateConfig(100, input_style="raw"),
    CollateConfig(64, mask_ratio=(0.25, 0.5, 0.75), task="both"), CollateConfig(400, input_style="raw", task="gen"),
], ids=["spread", "highest", "log1p", "raw", "both", "gen"])
def test_agrees_with_the_slow_twin(dtype, config):
    cells = random_cells(20, dtype=dtype)
    epochs = np.arange(20) % 3
    batch = collate(cells, config, cls_id=CLS_ID, seed=5, epochs=epochs)
    np.testing.assert_array_equal(batch.cell_ids, cells.columns["cell_id"])
    for cell in range(len(cells)):
        span = slice(batch.cu_seqlens[cell], batch.cu_seqlens[cell + 1])
        gene_ids, values, targets, target_mask = slow_cell(cells, cell, config, 5, int(epochs[cell]))
        assert batch.gene_ids[span].tolist() == gene_ids
        np.testing.assert_array_equal(batch.values[span], np.array(values, np.float32))
        np.testing.assert_array_equal(batch.targets[span], np.array(targets, np.float32))
        assert batch.target_mask[span].tolist() == target_mask
        if config.task == "pcpt":
            assert batch.perception_lengths is None
        else:
            assert batch.perception_lengths[cell] == target_mask.count(False)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), n_cells=st.integers(0, 12), longest=st.integers(0, 60),
       context_length=st.integers(2, 70))
def test_a_packed_batch_keeps_its_invariants(seed, n_cells, longest, context_length):
    cells = random_cells(n_cells, seed=seed, longest=longest)
    config = CollateConfig(context_length)
    batch = collate(cells, config, cls_id=CLS_ID, seed=seed, epochs=0)
    lengths = np.diff(batch.cu_seqlens)
    np.testing.assert_array_equal(lengths, np.minimum(cells.lengths + 1, context_length))
    assert batch.max_seqlen == lengths.max(initial=0)
    assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, batch.n_tokens)
    opens = batch.cu_seqlens[:-1]
    np.testing.assert_array_equal(np.flatnonzero(batch.gene_ids == CLS_ID), opens)
    assert (batch.values[opens] == -2).all()
    assert not batch.target_mask[opens].any()
    np.testing.assert_array_equal(batch.values, np.where(batch.target_mask, np.float32(-1), batch.targets))
    assert (batch.gene_ids.dtype, batch.values.dtype, batch.targets.dtype) == (np.int32, np.float32, np.float32)
    for cell in range(n_cells):
        kept = batch.gene_ids[opens[cell] + 1:batch.cu_seqlens[cell + 1]]
        assert np.isin(kept, cells.genes[cells.offsets[cell]:cells.offsets[cell + 1]]).all()
        assert (np.diff(kept) > 0).all()


def test_a_context_that_no_memory_holds_is_that_of_the_longest_cell():
    cells = random_cells(5, longest=60)
    fits, vast = (collate(cells, CollateConfig(n), cls_id=CLS_ID, seed=0, epochs=0) for n in (61, 1 << 50))
    np.testing.assert_array_equal(vast.gene_ids, fits.gene_ids)
    np.testing.assert_array_equal(vast.values, fits.values)


def test_which_bin_a_tie_gets_has_no_part_in_whether_it_is_hidden():
    """One word decides both: of 60,000 values that are all alike, bins and masks are independent.

    A bin that is hidden 13 % more or less often than the others would be found in 99 of 100 such tests.
    """
    n_cells, n_values = 300, 200
    cells = RaggedBatch(np.tile(np.arange(3, 3 + n_values, dtype=np.uint16), n_cells),
                        np.full(n_cells * n_values, 7, np.uint16), np.arange(n_cells + 1) * n_values,
                        {"cell_id": np.arange(n_cells, dtype=np.uint64)})
    batch = collate(cells, CollateConfig(n_values + 1, n_bins=11), cls_id=CLS_ID, seed=0, epochs=0)
    genes = np.flatnonzero(batch.gene_ids != CLS_ID)
    table = np.zeros((10, 2))
    np.add.at(table, (batch.targets[genes].astype(int) - 1, batch.target_mask[genes].astype(int)), 1)
    expected = np.outer(np.full(10, 0.1), [0.6, 0.4]) * len(genes)
    assert ((table - expected) ** 2 / expected).sum() < 43.8   # 19 degrees of freedom, p = 0.001


def test_a_cell_does_not_depend_on_its_neighbours():
    cells = random_cells(30)
    together = collate(cells, CONFIG, cls_id=CLS_ID, seed=1, epochs=2)
    for cell in (0, 7, 29):
        alone = collate(cells.take(np.array([cell])), CONFIG, cls_id=CLS_ID, seed=1, epochs=2)
        span = slice(together.cu_seqlens[cell], together.cu_seqlens[cell + 1])
        for name in ("gene_ids", "values", "targets", "target_mask"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(together, name)[span])


def test_no_task_changes_the_sample_or_the_bins():
    cells = random_cells(20)
    masked = collate(cells, CONFIG, cls_id=CLS_ID, seed=0, epochs=0)
    generative = collate(cells, CollateConfig(128, task="gen"), cls_id=CLS_ID, seed=0, epochs=0)
    for cell in range(len(cells)):
        span = slice(masked.cu_seqlens[cell], masked.cu_seqlens[cell + 1])
        pairs = [sorted(zip(batch.gene_ids[span].tolist(), batch.targets[span].tolist(), strict=True))
                 for batch in (masked, generative)]
        assert pairs[0] == pairs[1]


def test_epoch_and_seed_change_sample_bins_and_masks():
    cells = random_cells(30, shortest=200)
    first = collate(cells, CONFIG, cls_id=CLS_ID, seed=1, epochs=0)
    for other in (collate(cells, CONFIG, cls_id=CLS_ID, seed=1, epochs=1),
                  collate(cells, CONFIG, cls_id=CLS_ID, seed=2, epochs=0)):
        for name in ("gene_ids", "targets", "target_mask"):
            assert (getattr(first, name) != getattr(other, name)).any()


def test_bins_are_those_of_the_whole_cell_not_of_the_sample():
    cells = random_cells(5, shortest=290)
    batch = collate(cells, CollateConfig(20, tie_rule="highest"), cls_id=CLS_ID, seed=0, epochs=0)
    for cell in range(5):
        span = slice(cells.offsets[cell], cells.offsets[cell + 1])
        bins = bin_cell(cells.expressions[span], 51, seed=0, epoch=0, cell_id=0, tie_rule="highest")
        whole = dict(zip(cells.genes[span].tolist(), bins, strict=True))
        tokens = slice(batch.cu_seqlens[cell] + 1, batch.cu_seqlens[cell + 1])
        assert [whole[gene] for gene in batch.gene_ids[tokens].tolist()] == batch.targets[tokens].tolist()


def test_nothing_is_hidden_without_masks():
    cells = random_cells(10)
    shown = collate(cells, CONFIG, cls_id=CLS_ID, seed=0, epochs=0, mask=False)
    hidden = collate(cells, CONFIG, cls_id=CLS_ID, seed=0, epochs=0)
    assert not shown.target_mask.any()
    np.testing.assert_array_equal(shown.values, shown.targets)
    np.testing.assert_array_equal(shown.targets, hidden.targets)
    whole = collate(cells, CollateConfig(128, task="both"), cls_id=CLS_ID, seed=0, epochs=0, mask=False)
    np.testing.assert_array_equal(whole.gene_ids, shown.gene_ids)
    np.testing.assert_array_equal(whole.perception_lengths, np.diff(whole.cu_seqlens))


def test_the_input_is_left_as_it_was():
    cells = random_cells(10)
    for array in (cells.genes, cells.expressions, cells.offsets):
        array.flags.writeable = False
    before = cells.expressions.copy()
    collate(cells, CONFIG, cls_id=CLS_ID, seed=0, epochs=0)
    np.testing.assert_array_equal(cells.expressions, before)


def test_threads_give_equal_batches():
    cells = random_cells(200)
    expected = collate(cells, CONFIG, cls_id=CLS_ID, seed=0, epochs=0)
    results = [None] * 4

    def work(index):
        results[index] = collate(cells, CONFIG, cls_id=CLS_ID, seed=0, epochs=0)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        np.testing.assert_array_equal(result.values, expected.values)
        np.testing.assert_array_equal(result.targets, expected.targets)


@pytest.mark.parametrize("wrong", [
    {"context_length": 1}, {"context_length": 8, "n_bins": 1}, {"context_length": 8, "mask_ratio": ()},
    {"context_length": 8, "mask_ratio": (0.4, 1.0)}, {"context_length": 8, "tie_rule": "lowest"},
    {"context_length": 8, "input_style": "rank"}, {"context_length": 8, "task": "mlm"}], ids=repr)
def test_a_setting_that_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=f"wrong value of '{list(wrong)[-1]}'"):
        CollateConfig(**wrong)


def test_empty_cells_are_their_cls_alone():
    cells = RaggedBatch(np.empty(0, np.uint16), np.empty(0, np.uint16), np.zeros(3, np.int64),
                        {"cell_id": np.arange(2, dtype=np.uint64)})
    batch = collate(cells, CONFIG, cls_id=CLS_ID, seed=0, epochs=0)
    assert batch.gene_ids.tolist() == [CLS_ID, CLS_ID]
    assert (batch.n_targets, batch.max_seqlen) == (0, 1)


def test_importing_needs_no_torch():
    code = "import sys, scgpt.collate; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'deepspeed', 'wandb')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_an_edit_of_a_step_is_noticed_although_machine_code_is_cached(tmp_path):
    shutil.copytree(Path(scgpt.__file__).parent, tmp_path / "scgpt",
                    ignore=shutil.ignore_patterns("__pycache__", "model", "tables"))
    code = ("import numpy as np; from scgpt.collate import CollateConfig, collate; from scgpt.data import RaggedBatch\n"
            "cells = RaggedBatch(np.arange(5, dtype=np.uint16), np.ones(5, np.uint16), np.array([0, 5]),"
            " {'cell_id': np.zeros(1, np.uint64)})\n"
            "print(collate(cells, CollateConfig(9), cls_id=7, seed=0, epochs=0).gene_ids.tolist())\n"
            "more = CollateConfig(9, unexpressed_genes=3, gene_ids=np.arange(90, dtype=np.int32))\n"
            "print(collate(cells, more, cls_id=7, seed=0, epochs=0).gene_ids[6:].tolist())")

    def run():
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        return subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.splitlines()

    first, drawn = run()
    assert first == "[7, 0, 1, 2, 3, 4]"
    constants = tmp_path / "scgpt" / "rng.py"
    constants.write_text(constants.read_text().replace("PURPOSE_UNEXPRESSED = np.uint64(14)",
                                                       "PURPOSE_UNEXPRESSED = np.uint64(140)"))
    assert run()[1] != drawn
    step = tmp_path / "scgpt" / "collate" / "sampling.py"
    step.write_text(step.read_text().replace("out[t] = values[t]", "out[t] = values[0]"))
    assert run()[0] == "[7, 0, 0, 0, 0, 0]"
