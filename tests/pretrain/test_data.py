import dataclasses
import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import data
from pretrain.config import TrainConfig
from pretrain.data import Loader
from pretrain.draw import order_of
from pretrain.labels import Labels
from pretrain.order import Blocks
from pretrain.peek import peek
from scgpt.collate import CollateConfig
from scgpt.config import load_config
from scgpt.data import RaggedBatch, TokenDataset
from scgpt.data.convert import ConvertConfig, convert
from scgpt.errors import ConfigError
from tests.readme import blocks
from tests.scgpt.collate.cells import CLS_ID, CellsInMemory, random_cells
from tests.scgpt.data.cells import in_memory, write_corpus
from tests.scgpt.data.cells import random_cells as corpus_cells

CONFIG = CollateConfig(context_length=40, mask_ratio=(0.25, 0.5))
SMALL = ("batch.global_batch_size=8", "batch.micro_batch_size=2", "objective.context_length=32")
CELLS = CellsInMemory(random_cells(101, longest=60))


def loader_of(rank=0, world_size=1, workers=0, micro_batch_size=2, evaluation=False, cells=CELLS, seed=3, blocks=None):
    return Loader(cells, CONFIG, cls_id=CLS_ID, seed=seed, global_batch_size=48, micro_batch_size=micro_batch_size,
                  rank=rank, world_size=world_size, workers=workers, evaluation=evaluation,
                  order=None if evaluation else order_of(cells, seed=seed, blocks=blocks))


def digests_of(batch):
    """cell_id -> digest of all that the model sees of the cell."""
    digests = {}
    for cell, cell_id in enumerate(batch.cell_ids.tolist()):
        span = slice(batch.cu_seqlens[cell], batch.cu_seqlens[cell + 1])
        arrays = (batch.gene_ids[span], batch.values[span], batch.targets[span], batch.target_mask[span])
        digests[cell_id] = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    return digests


def equal(one, other):
    names = [field.name for field in dataclasses.fields(one)]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def step_of(step, world_size, **settings):
    """Micro-batch number -> PackedBatch, gathered over all ranks."""
    parts = [loader_of(rank, world_size, **settings).load(step) for rank in range(world_size)]
    batches = {number: batch for part in parts for number, batch in zip(part.numbers, part.micro_batches, strict=True)}
    assert len(batches) == sum(len(part.micro_batches) for part in parts) == parts[0].n_micro
    return batches


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("step", [0, 1, 2, 77])   # 101 cells, 48 a step: batch 2 straddles two epochs
def test_a_step_has_the_same_micro_batches_on_any_world_size(step, world_size):
    alone, spread = step_of(step, 1), step_of(step, world_size)
    assert alone.keys() == spread.keys()
    assert all(equal(alone[number], spread[number]) for number in alone)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 6, 16, 48])
def test_a_step_has_the_same_cells_and_tensors_with_any_accumulation(micro_batch_size):
    def merged(size):
        batches = step_of(5, 1, micro_batch_size=size).values()
        return {cell_id: digest for batch in batches for cell_id, digest in digests_of(batch).items()}

    assert merged(micro_batch_size) == merged(2)


@pytest.mark.parametrize("at_once", [1, 5, 20])
def test_a_step_has_the_same_micro_batches_however_many_are_worked_on_together(at_once, monkeypatch):
    together = step_of(5, 1)
    monkeypatch.setattr(data, "_CELLS_AT_ONCE", at_once)
    apart = step_of(5, 1)
    assert together.keys() == apart.keys()
    assert all(equal(together[number], apart[number]) for number in together)


@settings(max_examples=15, deadline=None)
@given(world_size=st.sampled_from([1, 2, 3, 8]), workers=st.integers(0, 3), first_step=st.integers(0, 10_000),
       data=st.data())
def test_a_run_resumed_at_any_step_goes_on_with_the_same_batches(world_size, workers, first_step, data):
    rank = data.draw(st.integers(0, world_size - 1))
    with loader_of(rank, world_size, workers).batches(first_step) as steps:
        for step in range(first_step, first_step + 3):
            got, expected = next(steps), loader_of(rank, world_size).load(step)
            assert (got.step, got.numbers, got.n_cells, got.n_micro) == (step, expected.numbers, 48, 24)
            assert all(equal(one, other) for one, other in zip(got.micro_batches, expected.micro_batches, strict=True))


def test_every_cell_comes_up_exactly_once_an_epoch_over_all_ranks():
    cell_ids = [batch.cell_ids for rank in range(2) for step in range(101)   # 101 steps of 48 cells: 48 epochs
                for batch in loader_of(rank, 2).load(step).micro_batches]
    seen, times = np.unique(np.concatenate(cell_ids), return_counts=True)
    np.testing.assert_array_equal(seen, CELLS.cells.columns["cell_id"])
    assert set(times.tolist()) == {48}


def test_a_cell_is_drawn_anew_in_each_epoch():
    loader = loader_of()
    digests = {}
    for step in range(9):   # four epochs
        for batch in loader.load(step).micro_batches:
            for cell_id, digest in digests_of(batch).items():
                digests.setdefault(cell_id, []).append(digest)
    long_cells = CELLS.cells.columns["cell_id"][CELLS.cells.lengths > 20].tolist()
    assert all(len(set(digests[cell_id])) == len(digests[cell_id]) >= 4 for cell_id in long_cells)


def test_the_token_counts_of_a_step_are_balanced_after_cutting_to_the_context():
    tokens = [batch.n_tokens for batch in loader_of(micro_batch_size=12).load(0).micro_batches]
    lengths = np.minimum(CELLS.cells.lengths + 1, 40)
    assert max(tokens) - min(tokens) <= lengths.max() - lengths.min()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_cell_once_with_the_same_masks_every_time(world_size):
    def evaluate(ranks, workers):
        digests = {}
        for rank in range(ranks):
            with loader_of(rank, ranks, workers, micro_batch_size=10, evaluation=True).batches() as steps:
                for step in steps:
                    for batch in step.micro_batches:
                        assert not digests.keys() & digests_of(batch).keys()
                        digests |= digests_of(batch)
        return digests

    assert evaluate(world_size, 2) == evaluate(1, 0)
    assert len(evaluate(world_size, 0)) == len(CELLS)


def test_a_corpus_on_disk_gives_the_batches_of_the_same_cells_in_memory(tmp_path):
    shards = [corpus_cells(list(range(1, 40)), source="a"), corpus_cells(list(range(60)), seed=1, source="b")]
    write_corpus(tmp_path / "corpus", {"train": shards})
    on_disk, in_memory = TokenDataset.open(tmp_path / "corpus"), CellsInMemory(RaggedBatch.concatenate(shards))
    for step in range(3):
        read, expected = (loader_of(cells=cells).load(step) for cells in (on_disk, in_memory))
        assert all(equal(one, other) for one, other in zip(read.micro_batches, expected.micro_batches, strict=True))


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """One corpus in every form, in folders and behind URLs: name -> where it is."""
    folder = tmp_path_factory.mktemp("forms")
    shards = [corpus_cells(list(range(1, 40)), source="a"), corpus_cells(list(range(60)), seed=1, source="b")]
    write_corpus(folder / "arrow-none", {"train": shards, "valid": [corpus_cells([5, 6], seed=2, source="v")]})
    places = {"arrow-none": str(folder / "arrow-none")}
    for form, compression in (("arrow", "zstd"), ("zarr", "none"), ("zarr", "lz4")):
        made = folder / f"{form}-{compression}"
        convert(folder / "arrow-none", made, ConvertConfig(form=form, compression=compression))
        places[made.name] = str(made)
    return places | {f"{name} behind a URL": in_memory(place) for name, place in places.items()}


@pytest.mark.parametrize("blocks", [None, Blocks(4, 3)])
def test_batches_are_the_same_to_the_bit_in_every_form_and_place(forms, blocks):
    cells = {name: TokenDataset.open(place) for name, place in forms.items()}
    for step in range(3):
        expected = loader_of(cells=cells["arrow-none"], blocks=blocks).load(step).micro_batches
        for name, dataset in cells.items():
            found = loader_of(cells=dataset, blocks=blocks).load(step).micro_batches
            assert all(equal(one, other) for one, other in zip(found, expected, strict=True)), name


@settings(max_examples=12, deadline=None)
@given(data=st.data(), step=st.integers(0, 10**7), workers=st.sampled_from([0, 1, 3]),
       worlds=st.tuples(*[st.sampled_from([1, 2, 3, 8])] * 2), blocks=st.sampled_from([None, Blocks(4, 3)]),
       full_genes=st.sampled_from([None, 35]), one_domain=st.booleans())
def test_a_resume_on_other_ranks_workers_and_storage_goes_on_with_the_same_micro_batches(
        forms, data, step, workers, worlds, blocks, full_genes, one_domain):
    """Every tensor of every cell, and which cells are computed together, with every option of the order."""
    labels = Labels(batches=np.random.default_rng(0).integers(0, 3, 99).astype(np.int32))

    def gathered(world_size, place, workers):
        cells = TokenDataset.open(place)
        order = order_of(cells, seed=3, blocks=blocks, full_genes=full_genes, group=2,
                         domains=labels.batches if one_domain else None)
        found = {}
        for rank in range(world_size):
            loader = Loader(cells, CONFIG, cls_id=CLS_ID, seed=3, global_batch_size=48, micro_batch_size=2, rank=rank,
                            world_size=world_size, workers=workers, order=order, labels=labels, one_domain=one_domain)
            with loader.batches(step) as steps:
                for _ in range(2):
                    part = next(steps)
                    found |= {(part.step, j): batch for j, batch in zip(part.numbers, part.micro_batches, strict=True)}
        return found

    places = [forms[data.draw(st.sampled_from(sorted(forms)))] for _ in range(2)]
    before, after = (gathered(*which, workers if i else 0) for i, which in enumerate(zip(worlds, places, strict=True)))
    assert before.keys() == after.keys() == {(step + i, j) for i in range(2) for j in range(24)}
    assert all(equal(before[key], after[key]) for key in before)
    if one_domain:
        assert all(len(set(batch.batch_labels.tolist())) == 1 for batch in before.values())


def test_threads_read_one_corpus_of_any_form_together(forms):
    for name, place in forms.items():
        alone = loader_of(cells=TokenDataset.open(place))
        with loader_of(cells=TokenDataset.open(place), workers=4).batches() as steps:
            for number, found in zip(range(6), steps, strict=False):
                expected = alone.load(number).micro_batches
                assert all(equal(one, other) for one, other in zip(found.micro_batches, expected, strict=True)), name


def test_a_configuration_may_name_a_corpus_of_any_form_behind_a_url(forms):
    digests = {peek(load_config(TrainConfig, "demo", [f"data.corpus={place}", *SMALL], kind="pretrain"), step=1).digest
               for place in forms.values()}
    assert len(digests) == 1


def test_target_counts_add_up():
    step = loader_of().load(0)
    assert step.n_targets == sum(int(batch.target_mask.sum()) for batch in step.micro_batches) > 0
    assert step.n_tokens == sum(len(batch.gene_ids) for batch in step.micro_batches)


def test_sizes_that_do_not_fit_are_refused_with_one_that_does():
    with pytest.raises(ConfigError, match=r"batch_size 48 is no multiple of .*batch_size 7 x 2 ranks.*make it 42"):
        loader_of(0, 2, micro_batch_size=7)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tensors_hold_the_batch(device):
    torch = pytest.importorskip("torch")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    from pretrain.data import to_tensors

    batch = loader_of(micro_batch_size=12).load(0).micro_batches[0]
    tensors = to_tensors(batch, device)
    for tensor, array, dtype in (
        (tensors.inputs.gene_ids, batch.gene_ids, torch.int64), (tensors.inputs.values, batch.values, torch.float32),
        (tensors.inputs.cu_seqlens, batch.cu_seqlens, torch.int32), (tensors.targets, batch.targets, torch.float32),
        (tensors.target_mask, batch.target_mask, torch.bool),
        (tensors.positions, np.flatnonzero(batch.target_mask), torch.int64),
    ):
        assert tensor.dtype == dtype
        assert tensor.device.type == device
        np.testing.assert_array_equal(tensor.cpu().numpy(), array)
    assert tensors.inputs.max_seqlen == batch.max_seqlen


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_threads_that_prepare_steps_make_the_tensors_too(device, monkeypatch):
    torch = pytest.importorskip("torch")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    threads, make = set(), data.host_tensors

    def noted(*arguments):
        threads.add(threading.current_thread())
        return make(*arguments)

    monkeypatch.setattr(data, "host_tensors", noted)
    labels = Labels(*np.arange(202, dtype=np.int32).reshape(2, 101))
    config = dataclasses.replace(CONFIG, task="both")   # so that a batch has every tensor it can have
    loader = Loader(CELLS, config, cls_id=CLS_ID, seed=3, global_batch_size=48, micro_batch_size=12, workers=1,
                    labels=labels, device=torch.device(device))
    with loader.batches() as steps:
        step = next(steps)
    assert threads
    assert threading.current_thread() not in threads
    assert len(step.tensors) == len(step.micro_batches) == 4
    for on_host, batch in zip(step.tensors, step.micro_batches, strict=True):
        assert {tensor.device.type for tensor in tensors_of(on_host)} == {"cpu"}
        assert all(tensor.is_pinned() for tensor in tensors_of(on_host)) == (device == "cuda")
        moved, expected = tensors_of(on_host.to(device)), tensors_of(data.to_tensors(batch, device))
        assert len(moved) == 10
        for tensor, other in zip(moved, expected, strict=True):
            assert tensor.device.type == device
            assert tensor.dtype == other.dtype
            assert torch.equal(tensor, other)


def tensors_of(batch):
    import torch

    parts = [getattr(part, field.name) for part in (batch, batch.inputs) for field in dataclasses.fields(part)]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def test_without_a_device_no_tensor_is_made():
    assert loader_of().load(0).tensors == []


def test_the_page_of_the_loader_shows_code_that_gives_upstreams_batch(tmp_path):
    shard = corpus_cells([3 + i % 40 for i in range(60)])
    write_corpus(tmp_path / "corpus", {"train": [shard], "valid": [shard]})
    page = Path(__file__).resolve().parents[2] / "docs" / "loader.md"
    code, = (block.code for block in blocks(page) if block.language == "python")
    assert "out/my-corpus" in code
    seen = {}
    exec(code.replace("out/my-corpus", str(tmp_path / "corpus")), seen)
    assert seen["step"].step == 7
    assert set(seen["batch"]) == {"gene", "expr", "masked_expr"}
    assert seen["batch"]["gene"].shape[0] == seen["config"].batch.micro_batch_size
