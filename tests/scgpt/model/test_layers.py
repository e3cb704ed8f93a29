"""Layers: torch's own layer is the reference; compiling and recomputing change nothing."""
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from scgpt.model.attention import PaddedLayout
from scgpt.model.layers import (
    FlashTransformerEncoderLayer,
    TorchTransformerEncoderLayer,
    TransformerEncoder,
    build_encoder,
)
from scgpt.model.weights import rename
from tests.scgpt.model.packs import cells


def layer_and_reference(dropout: float = 0.0, **options):
    """Ours and torch's with the same weights, as attention dropout and all."""
    torch.manual_seed(0)
    ours = TorchTransformerEncoderLayer(16, 2, 12, dropout, **options)
    torchs = torch.nn.TransformerEncoderLayer(16, 2, 12, dropout, batch_first=True, **options)
    torchs.load_state_dict(ours.state_dict())
    return ours.double(), torchs.double()


@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "layer_norm_eps": 0.01}], ids=str)
def test_torch_named_layer_is_torchs_layer_at_padding_too(options):
    ours, torchs = layer_and_reference(**options)
    x = torch.randn(3, 5, 16).double()
    mask = torch.tensor([[False] * 5, [False] * 2 + [True] * 3, [True, False] * 2 + [True]])
    torch.testing.assert_close(ours(x, src_key_padding_mask=mask), torchs(x, src_key_padding_mask=mask))


def test_both_namings_give_the_same_numbers():
    flash, torchs = FlashTransformerEncoderLayer(16, 2, 12, 0.0), TorchTransformerEncoderLayer(16, 2, 12, 0.0)
    torchs.load_state_dict({rename(name, "torch"): x for name, x in flash.state_dict().items()})
    x = torch.randn(2, 4, 16)
    torch.testing.assert_close(flash(x), torchs(x))


def test_no_mask_means_no_padding():
    layer, x = FlashTransformerEncoderLayer(16, 2, 12, 0.0), torch.randn(2, 4, 16)
    assert torch.equal(layer(x), layer(x, src_key_padding_mask=torch.zeros(2, 4, dtype=torch.bool)))


@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (4, 2)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="src_key_padding_mask"):
        FlashTransformerEncoderLayer(16, 2)(torch.randn(2, 4, 16), src_key_padding_mask=torch.zeros(shape).bool())


def test_initialisation_draws_what_torch_draws():
    torch.manual_seed(5)
    want = torch.nn.TransformerEncoderLayer(16, 2, 12, batch_first=True).state_dict()
    torch.manual_seed(5)
    got = TorchTransformerEncoderLayer(16, 2, 12).state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(("arguments", "error"), [
    ({"batch_first": False}, ValueError), ({"activation": "tanh"}, RuntimeError), ({"norm_scheme": "mid"}, ValueError),
    ({"nhead": 3}, ValueError)])
def test_an_option_that_cannot_be_is_refused(arguments, error):
    with pytest.raises(error):
        FlashTransformerEncoderLayer(**{"d_model": 16, "nhead": 2} | arguments)


def test_attention_dropout_is_its_own_setting():
    assert FlashTransformerEncoderLayer(16, 2, dropout=0.3).self_attn.dropout == 0.3
    layer = FlashTransformerEncoderLayer(16, 2, dropout=0.3, attention_dropout=0.0)
    assert (layer.self_attn.dropout, layer.dropout1.p) == (0.0, 0.3)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputed_layers_give_the_same_gradients(dropout):
    torch.manual_seed(0)
    encoder, packed = TransformerEncoder(FlashTransformerEncoderLayer(16, 2, 12, dropout), 2), cells([5, 3])
    x = torch.randn(8, 16, requires_grad=True)
    results = []
    for encoder.recompute in (False, True):
        torch.manual_seed(3)
        out = encoder(x, layout=packed.layout())
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, *encoder.parameters()])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


PACKED_LENGTHS = ([5, 3, 9], [4, 4, 7, 2, 8], [11, 2], [30, 1], [6, 6, 6], [50, 3, 3, 3])


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_layer_compiles_once_for_all_lengths(fresh_compiler, dropout, recompute):
    """No graph break (fullgraph), one compilation for the first shape and one for all others."""
    layer, counter = FlashTransformerEncoderLayer(16, 2, 12, dropout), CompileCounterWithBackend("aot_eager")

    def run(x, layout):
        return checkpoint(layer, x, layout=layout, use_reentrant=False) if recompute else layer(x, layout=layout)

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for lengths in PACKED_LENGTHS:
        x, layout = torch.randn(sum(lengths), 16, requires_grad=True), cells(lengths).layout()
        got, want = gradient_of(compiled, x, layout, layer), gradient_of(run, x, layout, layer)
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(got, want, strict=True))
    assert counter.frame_count <= 2


def gradient_of(run, x, layout, layer):
    torch.manual_seed(1)
    out = run(x, layout)
    return [out.detach(), *torch.autograd.grad(out.pow(3).sum(), [x, *layer.parameters()])]


def test_generative_layer_compiles_once_for_all_lengths(fresh_compiler):
    layer, counter = FlashTransformerEncoderLayer(16, 2, 12, 0.0), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, layout: layer(x, layout=layout), backend=counter, fullgraph=True)
    for lengths in PACKED_LENGTHS:
        layout = cells(lengths).split(torch.tensor(lengths) // 2 + 1).layout()
        x = torch.randn(sum(lengths), 16)
        torch.testing.assert_close(compiled(x, layout), layer(x, layout=layout))
    assert counter.frame_count <= 2


def test_padded_layer_compiles_once_for_all_shapes(fresh_compiler):
    layer, counter = FlashTransformerEncoderLayer(16, 2, 12, 0.0), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for shape in ((3, 9), (4, 7), (2, 20), (5, 11)):
        x, mask = torch.randn(*shape, 16, requires_grad=True), torch.rand(shape) < 0.4
        out = compiled(x, src_key_padding_mask=mask)
        torch.testing.assert_close(out, layer(x, src_key_padding_mask=mask))
        out.sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it loads its compiler
def test_compiled_code_of_inductor_gives_the_same_gradients(fresh_compiler):
    layer = FlashTransformerEncoderLayer(16, 2, 12, 0.0)
    compiled = torch.compile(lambda x, layout: layer(x, layout=layout), fullgraph=True)
    for lengths in PACKED_LENGTHS[:3]:
        x, layout = torch.randn(sum(lengths), 16, requires_grad=True), cells(lengths).layout()
        got = gradient_of(compiled, x, layout, layer)
        want = gradient_of(lambda x, layout: layer(x, layout=layout), x, layout, layer)
        assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("layer_type", [FlashTransformerEncoderLayer, TorchTransformerEncoderLayer])
def test_attention_can_be_called_as_the_module_whose_names_it_bears(layer_type):
    attention, x = layer_type(16, 2, 12, 0.0).self_attn, torch.randn(2, 4, 16)
    padding = torch.tensor([[False, False, False, False], [False, False, True, True]])
    want = attention(x, PaddedLayout(~padding))
    if layer_type is FlashTransformerEncoderLayer:
        got, weights = attention(x, key_padding_mask=~padding)
        assert weights is None
        with pytest.raises(ValueError, match="weights"):
            attention(x, need_weights=True)
    else:
        got, weights = attention(x, x, x, key_padding_mask=padding)
        assert not weights[1, :, 2:].any()
        assert isinstance(attention, torch.nn.MultiheadAttention)
    torch.testing.assert_close(got[~padding], want[~padding])
    assert (attention.embed_dim, attention.num_heads, attention.head_dim) == (16, 2, 8)


def test_encoder_takes_torchs_positions_and_refuses_a_mask_between_tokens():
    encoder, x = TransformerEncoder(TorchTransformerEncoderLayer(16, 2, 12, 0.0), 2), torch.randn(2, 4, 16)
    padding = torch.tensor([[False, False, False, False], [False, False, True, True]])
    assert torch.equal(encoder(x, None, padding), encoder(x, src_key_padding_mask=padding))
    with pytest.raises(ValueError, match="no mask"):
        encoder(x, torch.zeros(4, 4))


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="linear"):
        build_encoder(16, 2, 12, 1, 0.0, backend="other", norm_scheme="post", attention_dropout=None,
                      attention_backend="auto")
