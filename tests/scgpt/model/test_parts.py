"""Encoders, decoders, norms and gradient reversal: what the golden vectors leave open."""
import pytest
import torch

from scgpt.model.batch_norm import BatchNorm1d
from scgpt.model.decoders import AdversarialDiscriminator, MVCDecoder, Similarity
from scgpt.model.dsbn import DomainSpecificBatchNorm1d, DomainSpecificBatchNorm2d
from scgpt.model.encoders import CategoryValueEncoder, ContinuousValueEncoder, GeneEncoder, PositionalEncoding
from scgpt.model.grad_reverse import grad_reverse
from scgpt.model.heads import gather_cells, pool


def test_padding_row_of_a_bare_encoder_is_zero_and_stays():
    encoder = GeneEncoder(5, 8, padding_idx=2)
    out = encoder(torch.tensor([2, 1]))
    assert not out[0].any()
    out.sum().backward()
    assert not encoder.embedding.weight.grad[2].any()


def test_categories_are_cut_towards_zero():
    encoder = CategoryValueEncoder(5, 8)
    assert torch.equal(encoder(torch.tensor([3.9])), encoder(torch.tensor([3])))


def test_values_are_cut_from_above_only():
    encoder = ContinuousValueEncoder(8, dropout=0.0, max_value=10)
    assert torch.equal(encoder(torch.tensor([11.0])), encoder(torch.tensor([10.0])))
    assert not torch.equal(encoder(torch.tensor([-600.0])), encoder(torch.tensor([-512.0])))


def test_position_encoding_needs_pairs():
    with pytest.raises(ValueError, match="even"):
        PositionalEncoding(7)


@pytest.mark.parametrize("style", ["inner product", "concat query", "sum query"])
def test_packed_mvc_equals_padded(style):
    decoder = MVCDecoder(8, style)
    cells, genes = torch.randn(2, 8), torch.randn(2, 3, 8)
    want = decoder(cells, genes)
    got = decoder(cells.repeat_interleave(3, 0), genes.flatten(0, 1))
    got, want = (x if isinstance(x, torch.Tensor) else x["pred"] for x in (got, want))
    torch.testing.assert_close(got, want.flatten())


def test_similarity_divides_by_the_temperature():
    x = torch.randn(3, 8)
    torch.testing.assert_close(Similarity(0.5)(x, x), torch.full((3,), 2.0))


def test_domains_keep_their_own_statistics():
    norm = DomainSpecificBatchNorm1d(4, 2)
    norm(torch.randn(6, 4) + 5, 1)
    assert norm.cur_domain == 1
    assert not norm.bns[0].running_mean.any()
    assert norm.bns[1].running_mean.min() > 0
    norm.reset_running_stats()
    assert not norm.bns[1].running_mean.any()
    norm.bns[0].weight.data.fill_(3)
    norm.reset_parameters()
    assert torch.equal(norm.bns[0].weight, torch.ones(4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [lambda: BatchNorm1d(4), lambda: DomainSpecificBatchNorm1d(4, 2)])
def test_norms_of_half_precision_keep_float32_statistics(make, training):
    """As DeepSpeed leaves a model: weights of half precision, buffers as they were."""
    half, whole, x = make().train(training), make().train(training), torch.randn(64, 4) * 3 + 1
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    label = (1,) if isinstance(half, DomainSpecificBatchNorm1d) else ()
    found = half(x.bfloat16().requires_grad_(), *label)
    found.float().square().sum().backward()
    torch.testing.assert_close(found.float(), whole(x.bfloat16().float(), *label), atol=0.05, rtol=0.02)
    for ours, theirs in zip(half.buffers(), whole.buffers(), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
    assert any(bool(parameter.grad.any()) for parameter in half.parameters())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_norm_is_torchs_own(momentum):
    ours, theirs = BatchNorm1d(4, momentum=momentum), torch.nn.BatchNorm1d(4, momentum=momentum)
    for training in (True, True, False):
        x = torch.randn(6, 4, 5)
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


@pytest.mark.parametrize(("norm", "shape", "label"), [
    (DomainSpecificBatchNorm1d, (2, 4, 3, 3), 0), (DomainSpecificBatchNorm2d, (2, 4, 3), 0),
    (DomainSpecificBatchNorm1d, (2, 4), 2), (DomainSpecificBatchNorm1d, (2, 4), -1)])
def test_a_wrong_input_or_domain_is_refused(norm, shape, label):
    with pytest.raises(ValueError, match="domain|dimensions"):
        norm(4, 2)(torch.zeros(shape), label)


def test_gradient_is_reversed_and_scaled():
    x = torch.randn(3, requires_grad=True)
    y = grad_reverse(x, lambd=0.5)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), -0.5))


def test_discriminator_reverses_only_what_leaves_through_its_input():
    torch.manual_seed(0)
    plain = AdversarialDiscriminator(4, 2)
    reverse = AdversarialDiscriminator(4, 2, reverse_grad=True)
    reverse.load_state_dict(plain.state_dict())
    x = torch.randn(3, 4, requires_grad=True)
    results = [torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()]) for module in (plain, reverse)]
    assert torch.equal(results[0][0], -results[1][0])
    assert all(torch.equal(one, other) for one, other in zip(results[0][1:], results[1][1:], strict=True))


@pytest.mark.parametrize("weights", [None, torch.ones(2, 2)])
def test_weighted_pooling_needs_a_weight_for_each_token(weights):
    with pytest.raises(ValueError, match="weights"):
        pool(torch.zeros(2, 3, 4), "w-pool", weights, None)


def test_gathered_cells_of_one_rank_are_its_own_with_their_gradient(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        cells = torch.randn(2, 3, requires_grad=True)
        gathered = gather_cells(cells)
        assert torch.equal(gathered, cells)
        gathered.sum().backward()
        assert torch.equal(cells.grad, torch.ones(2, 3))
    finally:
        torch.distributed.destroy_process_group()
