"""Flash attention on CUDA: what is built into torch, and whichever flash-attn packages are installed (2, 3, 4).

Each package is looked for when a backend is chosen, never at import. Only version 2 and torch's own can drop attention
probabilities; 3 and 4 refuse, with the reason. The forward and backward functions called here are the packages' own
low-level pair, because the backward must take a merged output and log-sum-exp; their signatures were read from
flash-attn 2.8, 3 (hopper) and 4 (cute), whose arguments are named throughout.
"""
import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from scgpt.model.attention_kernels import Saved, Segments, no_rng

HALF = (torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 256


class FlashKernel:
    """What all flash kernels have in common: where they run, and the layout of the log-sum-exp.

    Args:
        name: of the backend.
        module: that holds the low-level functions; None: torch itself.
        capability: major compute capabilities of the devices that it serves; None: any.
    """

    drops = False  # whether it can drop attention probabilities

    def __init__(self, name: str, module: str | None, capability: tuple[int, ...] | None = None) -> None:
        self.name, self._module_name, self._capability = name, module, capability

    def refusal(self, device: torch.device, dtype: torch.dtype, head_size: int, dropout_p: float) -> str | None:
        """CUDA, half precision, head sizes that are multiples of 8, and a package that is installed."""
        if device.type != "cuda":
            return "it needs a CUDA device"
        if dtype not in HALF:
            return f"it needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
        if head_size % 8 or head_size > MAX_HEAD_SIZE:
            return f"it needs a head size that is a multiple of 8, at most {MAX_HEAD_SIZE}, not {head_size}"
        if dropout_p > 0 and not self.drops:
            return "it cannot drop attention probabilities"
        if self._capability and torch.cuda.get_device_capability(device)[0] not in self._capability:
            return f"it needs a device of compute capability {' or '.join(f'{n}.x' for n in self._capability)}"
        if self._module_name is not None and not is_installed(self._module_name):
            return f"the module {self._module_name} is not installed"
        return None

    @property
    def _module(self) -> ModuleType:
        return importlib.import_module(self._module_name or "torch")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cells: Segments, dropout_p: float,
                seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        with seeded(q.device, seed, dropout_p):
            out, lse, rng = self._forward(_dense(q), _dense(k), _dense(v), cells, dropout_p)
        # A query without keys has +inf there; as the logarithm of an empty sum it is -inf, which merges rightly.
        lse = lse.transpose(0, 1).masked_fill(lse.transpose(0, 1) == torch.inf, -torch.inf).contiguous()
        return out, lse, no_rng(q) if rng is None else rng.view(torch.int64)

    def backward(self, grad: Tensor, saved: Saved, cells: Segments, dropout_p: float, *,
                 deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        dense = saved._replace(q=_dense(saved.q), k=_dense(saved.k), v=_dense(saved.v), out=_dense(saved.out),
                               lse=saved.lse.transpose(0, 1).contiguous())
        return self._backward(_dense(grad), dense, cells, dropout_p, deterministic=deterministic)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cells: Segments,
                 dropout_p: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output, log-sum-exp (heads, queries), state of the random numbers."""
        raise NotImplementedError

    def _backward(self, grad: Tensor, saved: Saved, cells: Segments, dropout_p: float, *,
                  deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class TorchFlashKernel(FlashKernel):
    """The one built into torch; deterministic when `torch.use_deterministic_algorithms` is on."""

    drops = True

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cells: Segments,
                 dropout_p: float) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse, rng, _, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, cells.cu_q, cells.cu_k, cells.max_q, cells.max_k, dropout_p, is_causal=False,
            return_debug_mask=False)
        return out, lse, rng

    def _backward(self, grad: Tensor, saved: Saved, cells: Segments, dropout_p: float, *,
                  deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad, saved.q, saved.k, saved.v, saved.out, saved.lse, cells.cu_q, cells.cu_k, cells.max_q, cells.max_k,
            dropout_p, is_causal=False, rng_state=saved.rng.view(torch.uint64),
            unused=torch.empty(0, device=grad.device))
        return grads


class Flash2Kernel(FlashKernel):
    """Package flash-attn 2."""

    drops = True

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cells: Segments,
                 dropout_p: float) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse, _, rng = self._module._flash_attn_varlen_forward(
            q, k, v, cells.cu_q, cells.cu_k, cells.max_q, cells.max_k, dropout_p=dropout_p,
            softmax_scale=q.shape[-1] ** -0.5, causal=False)
        return out, lse, rng

    def _backward(self, grad: Tensor, saved: Saved, cells: Segments, dropout_p: float, *,
                  deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        grads = _empty_like(saved)
        self._module._flash_attn_varlen_backward(
            grad, saved.q, saved.k, saved.v, saved.out, saved.lse, *grads, cells.cu_q, cells.cu_k, cells.max_q,
            cells.max_k, dropout_p=dropout_p, softmax_scale=grad.shape[-1] ** -0.5, causal=False, window_size_left=-1,
            window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=deterministic, rng_state=saved.rng)
        return grads


class Flash3Kernel(FlashKernel):
    """Package flash-attn 3, for Hopper."""

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cells: Segments,
                 dropout_p: float) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse, *_ = self._module._flash_attn_forward(q, k, v, softmax_scale=q.shape[-1] ** -0.5, **_lengths(cells))
        return out, lse, None

    def _backward(self, grad: Tensor, saved: Saved, cells: Segments, dropout_p: float, *,
                  deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        grads = _empty_like(saved)
        self._module._flash_attn_backward(
            grad, saved.q, saved.k, saved.v, saved.out, saved.lse, dq=grads[0], dk=grads[1], dv=grads[2],
            softmax_scale=grad.shape[-1] ** -0.5, deterministic=deterministic, **_lengths(cells))
        return grads


class Flash4Kernel(FlashKernel):
    """Package flash-attn 4 (CuTe DSL), for Hopper and Blackwell."""

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, cells: Segments,
                 dropout_p: float) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse, *_ = self._module._flash_attn_fwd(q, k, v, cu_seqlens_q=cells.cu_q, cu_seqlens_k=cells.cu_k,
                                                    softmax_scale=q.shape[-1] ** -0.5, return_lse=True)
        return out, lse, None

    def _backward(self, grad: Tensor, saved: Saved, cells: Segments, dropout_p: float, *,
                  deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        options: dict[str, Any] = {"deterministic": True} if deterministic else {}
        dq, dk, dv, *_ = self._module._flash_attn_bwd(
            saved.q, saved.k, saved.v, saved.out, grad, saved.lse, softmax_scale=grad.shape[-1] ** -0.5,
            cu_seqlens_q=cells.cu_q, cu_seqlens_k=cells.cu_k, **options)
        return dq, dk, dv


# In the order of preference.
FLASH_KERNELS: tuple[FlashKernel, ...] = (
    Flash3Kernel("flash-3", "flash_attn_interface", (9,)),
    Flash4Kernel("flash-4", "flash_attn.cute.interface", (9, 10)),
    Flash2Kernel("flash-2", "flash_attn.flash_attn_interface"), TorchFlashKernel("torch", None))


@functools.cache
def is_installed(module: str) -> bool:
    """Whether `module` can be found, its parents imported (flash-attn 4 alone has a `flash_attn` without version 2)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class seeded:  # noqa: N801 a context manager
    """Start the CUDA generator of `device` at `seed` for the block, then put it back; nothing when nothing is dropped.

    Flash kernels draw dropout from that generator; a seed of our own makes recomputation under checkpointing and under
    torch.compile draw the same. The generator's state lives on the host: no synchronisation.
    """

    def __init__(self, device: torch.device, seed: Tensor, dropout_p: float) -> None:
        self._generator = torch.cuda.default_generators[device.index or 0] if dropout_p > 0 else None
        self._seed = seed

    def __enter__(self) -> None:
        if self._generator is not None:
            self._state = self._generator.get_state()
            self._generator.manual_seed(int(self._seed))

    def __exit__(self, *_: object) -> None:
        if self._generator is not None:
            self._generator.set_state(self._state)


def _dense(x: Tensor) -> Tensor:
    """The kernels take any strides but in the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like(saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.empty_like(saved.q, memory_format=torch.contiguous_format),
            torch.empty_like(saved.k, memory_format=torch.contiguous_format),
            torch.empty_like(saved.v, memory_format=torch.contiguous_format))


def _lengths(cells: Segments) -> dict[str, Any]:
    return {"cu_seqlens_q": cells.cu_q, "cu_seqlens_k": cells.cu_k, "max_seqlen_q": cells.max_q,
            "max_seqlen_k": cells.max_k}
