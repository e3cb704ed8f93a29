"""DataCollator: sampling, masking, splitting as distributions; inputs unchanged; keys of every style."""
import numpy as np
import pytest
import torch

from scgpt.data_collator import DataCollator

BASE = {"pad_token_id": 0, "pad_value": -2, "max_length": 12, "do_binning": False}


def examples(*lengths):
    """Cells whose expressions equal their gene ids, so that a pair can be recognised."""
    return [{"genes": torch.cat([torch.tensor([1]), torch.arange(2, n + 1)]), "id": torch.tensor(i),
             "expressions": torch.cat([torch.tensor([-2.0]), torch.arange(2.0, n + 1)])} for i, n in enumerate(lengths)]


def test_a_long_cell_is_sampled_without_replacement_and_keeps_its_first():
    torch.manual_seed(0)
    counts = torch.zeros(31)
    for _ in range(300):
        batch = DataCollator(**BASE, do_mlm=False)(examples(30))
        genes = batch["gene"][0]
        assert genes[0] == 1
        assert len(genes.unique()) == 12
        assert torch.equal(batch["expr"][0, 1:], genes[1:].float())
        counts[genes] += 1
    expected = 300 * 11 / 29
    assert (counts[2:] - expected).abs().max() < 5 * expected**0.5


def test_masking_is_independent_and_leaves_first_and_padding():
    torch.manual_seed(0)
    collate, masked = DataCollator(**BASE, mlm_probability=0.4), []
    for _ in range(400):
        batch = collate(examples(10, 5))
        hidden = batch["masked_expr"] == -1
        assert torch.equal(batch["masked_expr"][~hidden], batch["expr"][~hidden])
        masked.append(hidden)
    share = torch.stack(masked).double().mean(0)
    assert not share[:, 0].any()
    assert not share[1, 5:].any()
    assert (torch.cat([share[0, 1:], share[1, 1:5]]) - 0.4).abs().max() < 5 * (0.24 / 400) ** 0.5


def test_a_value_that_equals_the_pad_value_is_never_masked_as_upstream():
    cell = {"genes": torch.arange(1, 9), "expressions": torch.tensor([0.0, 1, 0, 2, 0, 3, 0, 4])}
    torch.manual_seed(0)
    collate = DataCollator(**BASE | {"pad_value": 0}, mlm_probability=0.9)
    hidden = torch.stack([collate([cell])["masked_expr"][0] == -1 for _ in range(30)])
    assert torch.equal(hidden.any(0), cell["expressions"] > 0)


def test_a_share_is_drawn_once_a_batch_from_a_list():
    torch.manual_seed(0)
    collate = DataCollator(**BASE | {"max_length": 400}, mlm_probability=[0.25, 0.75])
    shares = torch.stack([(collate(examples(400, 400))["masked_expr"] == -1).double().mean(1) for _ in range(40)])
    near = (shares[:, :, None] - torch.tensor([0.25, 0.75])).abs() < 0.12
    assert torch.equal(near[:, 0], near[:, 1])
    assert near.any(-1).all()
    assert 8 < int(near[:, 0, 0].sum()) < 32


@pytest.mark.parametrize("sampling", [True, False])
def test_split_gives_each_gene_to_one_part(sampling):
    torch.manual_seed(0)
    collate = DataCollator(**BASE | {"max_length": 40}, data_style="both", mlm_probability=0.5, sampling=sampling)
    batch = collate(examples(21, 9))
    assert set(batch) == {"pcpt_gene", "pcpt_expr", "pcpt_key_padding_mask", "gen_gene", "gen_expr_target",
                          "gen_key_padding_mask"}
    assert batch["gen_gene"].shape == (2, 10)
    assert batch["pcpt_gene"].shape == (2, 11)
    for row, n_genes in enumerate((21, 9)):
        seen = batch["pcpt_gene"][row][~batch["pcpt_key_padding_mask"][row]]
        generated = batch["gen_gene"][row][~batch["gen_key_padding_mask"][row]]
        assert seen[0] == 1
        assert sorted([*seen.tolist(), *generated.tolist()]) == list(range(1, n_genes + 1))
        assert len(generated) == (n_genes - 1) // 2
    assert torch.equal(batch["gen_expr_target"][~batch["gen_key_padding_mask"]],
                       batch["gen_gene"][~batch["gen_key_padding_mask"]].float())
    assert (batch["gen_expr_target"][batch["gen_key_padding_mask"]] == -2).all()


def test_bins_are_as_many_as_asked_and_the_example_is_left_as_it_was():
    cells = examples(40)
    before = cells[0]["expressions"].clone()
    batch = DataCollator(**BASE | {"do_binning": True, "max_length": 40}, do_mlm=False, n_bins=7)(cells)
    assert set(batch["expr"][0, 1:].tolist()) == set(range(1, 7))
    assert batch["expr"][0, 0] == -2
    assert torch.equal(cells[0]["expressions"], before)


def test_reserved_keys_are_stacked():
    batch = DataCollator(**BASE, do_mlm=False, reserve_keys=["id"])(examples(3, 4))
    assert batch["id"].tolist() == [0, 1]


def test_without_padding_cells_must_be_equally_long():
    collate = DataCollator(do_padding=False, do_mlm=False, do_binning=False)
    assert collate(examples(4, 4))["gene"].shape == (2, 4)
    with pytest.raises(ValueError, match="length"):
        collate(examples(4, 5))
    padding = DataCollator(**BASE | {"do_padding": False}, do_mlm=False)   # upstream pads wherever it can
    assert padding(examples(4, 5))["gene"].tolist() == [[1, 2, 3, 4, 0], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize(("options", "word"), [
    ({"pad_token_id": None}, "pad_token_id"), ({"max_length": None}, "max_length"),
    ({"keep_first_n_tokens": 13}, "keep_first"), ({"mlm_probability": 1.0}, "mlm_probability"),
    ({"mlm_probability": [0.5, 0.0]}, "mlm_probability"), ({"data_style": "other"}, "data_style")])
def test_what_does_not_fit_is_refused(options, word):
    with pytest.raises(ValueError, match=word):
        DataCollator(**BASE | options)


def test_seeds_govern_every_draw():
    batches = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 binning draws from it
        batches.append(DataCollator(**BASE | {"do_binning": True})(examples(30, 20)))
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
