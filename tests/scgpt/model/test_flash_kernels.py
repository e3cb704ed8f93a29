"""The adapters of flash-attn packages speak the packages' interfaces; stand-ins compute on the CPU what kernels would.

Where a GPU and a package are at hand, test_attention.py runs the real ones.
"""
import sys
import types

import pytest
import torch

from scgpt.model import flash_kernels
from scgpt.model.attention import KERNELS, attend
from scgpt.model.attention_kernels import MathKernel, Saved, Segments
from tests.scgpt.model.packs import cells

EXACT = MathKernel("exact")


def forward(q, k, v, cu_q, cu_k, softmax_scale):
    """What every version returns first: output and log-sum-exp (heads, queries), +inf where there is no key."""
    assert softmax_scale == q.shape[-1] ** -0.5
    cells_ = Segments(cu_q, cu_k, 0, 0)
    out, lse, _ = EXACT.forward(q, k, v, cells_, 0.0, torch.zeros((), dtype=torch.int64))
    return out, lse.masked_fill(lse == -torch.inf, torch.inf).t().contiguous()


def backward(grad, q, k, v, out, lse, cu_q, cu_k):
    seed = torch.zeros((), dtype=torch.int64)
    return EXACT.backward(grad, Saved(q, k, v, out, lse.t(), seed, seed), Segments(cu_q, cu_k, 0, 0), 0.0,
                          deterministic=False)


def version_2():
    """Signatures of flash_attn.flash_attn_interface, 2.8."""
    def _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                   softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
                                   alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None,
                                   seqused_k=None, zero_tensors=False):
        assert not causal
        assert isinstance(max_seqlen_q, int)
        return *forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), torch.empty(0), torch.zeros(2).long()

    def _flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
                                    max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,
                                    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
                                    zero_tensors=False):
        grads = backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)
        return torch.empty(0)

    return "flash-2", "flash_attn.flash_attn_interface", locals()


def version_3():
    """Signatures of flash_attn_interface (hopper), as far as they are used."""
    def _flash_attn_forward(q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
                            cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
                            max_seqlen_k=None, softmax_scale=None, causal=False):
        return *forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
                             sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
                             softmax_scale=None, is_causal=False, deterministic=False):
        grads = backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)
        return torch.empty(0)

    return "flash-3", "flash_attn_interface", locals()


def version_4():
    """Signatures of flash_attn.cute.interface, as far as they are used."""
    def _flash_attn_fwd(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False,
                        return_lse=False):
        assert return_lse
        return forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, cu_seqlens_q=None,
                        cu_seqlens_k=None, deterministic=False):
        return backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)

    return "flash-4", "flash_attn.cute.interface", locals()


@pytest.mark.parametrize("version", [version_2, version_3, version_4])
def test_adapter_gives_the_generative_attention_and_its_gradients(monkeypatch, version):
    name, module, functions = version()
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**functions))
    monkeypatch.setattr(type(KERNELS[name]), "refusal", lambda *_: None)
    packed = cells([5, 3, 4]).split(torch.tensor([3, 0, 4]))
    results = []
    for backend in (name, "reference"):
        # a view with strided heads, as the projection gives it
        qkv = torch.randn(12, 3, 2, 8, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        out = attend(*qkv.unbind(1), packed.layout(), backend=backend, deterministic=True)
        results.append([out.detach(), *torch.autograd.grad(out.pow(3).sum(), qkv)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("device", "dtype", "head_size", "dropout", "word"), [
    ("cpu", torch.bfloat16, 64, 0.0, "CUDA"), ("cuda", torch.float32, 64, 0.0, "float32"),
    ("cuda", torch.float16, 36, 0.0, "multiple of 8"), ("cuda", torch.float16, 512, 0.0, "256"),
    ("cuda", torch.float16, 64, 0.1, "drop")])
def test_a_kernel_says_why_it_cannot(device, dtype, head_size, dropout, word):
    assert word in KERNELS["flash-3"].refusal(torch.device(device), dtype, head_size, dropout)


def test_a_package_that_is_absent_is_said_to_be(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    device = torch.device("cuda")
    assert "9.x" in KERNELS["flash-3"].refusal(device, torch.float16, 64, 0.0)
    assert "not installed" in KERNELS["flash-4"].refusal(device, torch.float16, 64, 0.0)
    assert KERNELS["torch"].refusal(device, torch.float16, 64, 0.2) is None


def test_version_4_alone_is_not_taken_for_version_2(tmp_path, monkeypatch):
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (cute / "interface.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    flash_kernels.is_installed.cache_clear()
    try:
        assert flash_kernels.is_installed("flash_attn.cute.interface")
        assert not flash_kernels.is_installed("flash_attn.flash_attn_interface")
        assert not flash_kernels.is_installed("flash_attn_interface")
    finally:
        flash_kernels.is_installed.cache_clear()
        sys.modules.pop("flash_attn", None)
        sys.modules.pop("flash_attn.cute", None)
