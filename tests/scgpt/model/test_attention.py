"""Every backend equals a dense masked softmax, forward and backward; what it cannot do it refuses."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt.errors import ConfigError
from scgpt.model.attention import (
    BACKENDS,
    KERNELS,
    PackedLayout,
    PaddedLayout,
    attend,
    choose_backend,
    explain_backends,
    varlen_attention,
)
from scgpt.model.attention_kernels import MathKernel
from tests.scgpt.model.packs import cells, dense_attention, sees

CPU_BACKENDS = [name for name, reason in explain_backends(torch.device("cpu"), torch.float64, 8).items()
                if reason is None]
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
# length 1, a cell of only <cls>, equal lengths, one very long cell
EDGES = [[1], [1, 1, 1], [4, 4, 4], [130, 1, 2], [5, 3, 9, 1]]


def qkv(n_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n_tokens, 2, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def outputs_and_gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * cotangent).sum(), inputs)]


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor], atol: float = 1e-12) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def split_points(lengths: list[int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([int(torch.randint(0, length + 1, (), generator=generator)) for length in lengths])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("lengths", EDGES, ids=str)
def test_cells_attend_to_themselves_only(backend, lengths):
    packed, inputs = cells(lengths), qkv(sum(lengths))
    got = varlen_attention(*inputs, packed.cu_seqlens, packed.max_seqlen, backend=backend)
    want = dense_attention(*inputs, sees(packed))
    assert_equal(outputs_and_gradients(got, inputs), outputs_and_gradients(want, inputs))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_generation_tokens_attend_to_perception_and_themselves(backend, lengths, seed):
    packed = cells(lengths).split(split_points(lengths, seed))
    inputs = qkv(sum(lengths), seed)
    got = attend(*inputs, packed.layout(), backend=backend)
    want = dense_attention(*inputs, sees(packed))
    assert_equal(outputs_and_gradients(got, inputs), outputs_and_gradients(want, inputs))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99), all_queries=st.booleans())
def test_padded_rows_equal_packed_cells(backend, lengths, seed, all_queries):
    packed = cells(lengths).split(split_points(lengths, seed))
    inputs = qkv(sum(lengths), seed)
    order = torch.randperm(packed.max_seqlen, generator=torch.Generator().manual_seed(seed))  # padding anywhere
    generation, padding = packed.pad(packed.is_generation)
    layout = PaddedLayout((~padding & ~generation)[:, order], generation[:, order])
    rows = [packed.pad(x)[0][:, order] for x in inputs]
    out = attend(*rows, layout, backend=backend, all_queries=all_queries)[:, order.argsort()]
    got = outputs_and_gradients(out[~padding], inputs)
    assert_equal(got, outputs_and_gradients(attend(*inputs, packed.layout(), backend=backend), inputs))
    if not all_queries:
        assert not out[padding].any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_padding_that_attends_looks_at_the_tokens_of_its_row(backend):
    is_key = torch.tensor([[True, True, False], [False, True, False]])
    q, k, v = (x.unflatten(0, (2, 3)) for x in qkv(6))
    out = attend(q, k, v, PaddedLayout(is_key), backend=backend, all_queries=True)
    rows = torch.arange(2).repeat_interleave(3)
    allowed = (rows[:, None] == rows) & is_key.flatten()
    torch.testing.assert_close(out.flatten(0, 1), dense_attention(*(x.flatten(0, 1) for x in (q, k, v)), allowed))


@pytest.mark.parametrize(("change", "says"), [
    ({"k": torch.zeros(4, 2, 8)}, "of one shape"), ({"k": torch.zeros(6, 1, 8)}, "of one shape"),
    ({"v": torch.zeros(6, 2, 8, dtype=torch.float64)}, "dtype"), ({"max_seqlen": 2}, "max_seqlen"),
    ({"cu_seqlens": torch.tensor([0, 9])}, "number of tokens")], ids=str)
def test_inputs_that_kernels_would_read_past_are_refused(change, says):
    """Without the check the first of these ends the process: torch's kernel divides by its zero keys."""
    q, cu_seqlens = torch.zeros(6, 2, 8), torch.tensor([0, 3, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=says):
        varlen_attention(**{"q": q, "k": q, "v": q, "cu_seqlens": cu_seqlens, "max_seqlen": 3} | change)


def test_an_empty_batch_gives_an_empty_result():
    layout = PaddedLayout(torch.zeros(0, 4, dtype=torch.bool))
    q = torch.zeros(0, 4, 2, 8)
    assert attend(q, q, q, layout).shape == q.shape


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_lower_precision_agrees_with_the_float64_reference(dtype, atol):
    packed, inputs = cells([7, 30, 2]).split(torch.tensor([3, 11, 2])), qkv(39)
    want = attend(*inputs, packed.layout(), backend="reference")
    for backend in CPU_BACKENDS:
        got = attend(*(x.detach().to(dtype) for x in inputs), packed.layout(), backend=backend)
        torch.testing.assert_close(got.double(), want.detach(), rtol=0, atol=atol)


def test_dropout_keeps_probabilities_with_their_probability():
    """Mean of many draws is the attention without dropout; a dropped own key is drawn like the others."""
    packed, inputs = cells([6, 4]).split(torch.tensor([4, 2])), qkv(10)
    torch.manual_seed(0)
    draws = torch.stack([attend(*inputs, packed.layout(), dropout_p=0.3) for _ in range(3000)]).detach()
    want = attend(*inputs, packed.layout()).detach()
    error = (draws.mean(0) - want).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert error.max() < 5
    assert draws.std(0).min() > 0.01


@pytest.mark.parametrize("packed_form", [True, False])
def test_gradient_with_dropout_is_that_of_the_draw(packed_form):
    """Central differences under one seed: forward and backward drop the same probabilities."""
    packed = cells([5, 3]).split(torch.tensor([3, 2]))
    generation, padding = packed.pad(packed.is_generation)
    layout = packed.layout() if packed_form else PaddedLayout(~padding & ~generation, generation)
    inputs = [x.detach() if packed_form else packed.pad(x.detach())[0] for x in qkv(8)]

    def seeded(*x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return attend(*x, layout, dropout_p=0.4)

    assert torch.autograd.gradcheck(seeded, [x.requires_grad_() for x in inputs], fast_mode=True)


def test_dropout_zero_draws_nothing():
    packed, inputs = cells([4]), qkv(4)
    before = torch.get_rng_state()
    attend(*inputs, packed.layout())
    assert torch.equal(before, torch.get_rng_state())


def test_automatic_choice_is_the_first_that_can():
    cpu = torch.device("cpu")
    assert choose_backend(cpu, torch.float32, 64) == "sdpa"
    assert choose_backend(cpu, torch.float32, 64, 0.2) == "math"
    reasons = explain_backends(cpu, torch.float32, 64, 0.2)
    assert set(reasons) == set(KERNELS)
    assert "drop" in reasons["sdpa"]
    assert "CUDA" in reasons["torch"]


@pytest.mark.parametrize(("backend", "word"),
                         [("sdpa", "drop"), ("torch", "CUDA"), ("flash", "CUDA"), ("cuda", "auto")])
def test_what_cannot_be_done_is_refused_with_the_reason(backend, word):
    packed, inputs = cells([4]), qkv(4)
    with pytest.raises(ConfigError, match=word):
        attend(*inputs, packed.layout(), dropout_p=0.2, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("auto", "flash", "sdpa", "reference")])
def test_gpu_backends_agree_with_the_reference(backend, dropout_p):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    reason = explain_backends(torch.device("cuda"), torch.bfloat16, 64, dropout_p)[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    packed = cells([300, 1, 90]).split(torch.tensor([120, 1, 90])).to("cuda")
    inputs = [torch.randn(391, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    if dropout_p == 0.0:
        got = outputs_and_gradients_cuda(attend(*inputs, packed.layout(), backend=backend), inputs)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        want = outputs_and_gradients_cuda(attend(*exact, packed.layout(), backend="reference"), exact)
        for one, other in zip(got, want, strict=True):
            assert (one.double() - other).norm() < 0.02 * other.norm()
    else:
        torch.manual_seed(0)
        draws = torch.stack([attend(*inputs, packed.layout(), dropout_p=dropout_p, backend=backend)
                             for _ in range(400)])
        want = attend(*inputs, packed.layout(), backend="math")
        assert (draws.double().mean(0) - want.double()).norm() < 0.1 * want.double().norm()


def outputs_and_gradients_cuda(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad((out * cotangent).sum(), inputs)]


def test_reference_computes_in_float64():
    packed, inputs = cells([40]), qkv(40, dtype=torch.float32)
    exact = dense_attention(*(x.double() for x in inputs), sees(packed)).float()
    layout = PackedLayout(packed.cu_seqlens, torch.tensor(40), packed.cu_seqlens, torch.tensor(40))
    assert torch.equal(attend(*inputs, layout, backend="reference"), exact)
    assert isinstance(KERNELS["reference"], MathKernel)
