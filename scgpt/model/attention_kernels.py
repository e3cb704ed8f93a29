"""Kernels of variable-length attention: a forward that also returns its log-sum-exp, a backward that is handed both.

The backward takes output and log-sum-exp from its caller, because the generative rule merges one more key into them
after the forward; with the merged values an ordinary flash backward gives the gradients of the merged attention. Query
cell i owns rows [cu_q[i], cu_q[i + 1]) of the queries and sees key cell i, rows [cu_k[i], cu_k[i + 1]), whole and
unmasked. A query without any key gets zeros and a log-sum-exp of -inf. Logits are scaled by head_size ** -0.5.

Shapes: q (queries, heads, head_size); k, v (keys, heads, head_size); lse (queries, heads), float64 for float64 inputs
and else float32.
"""
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Which rows belong to which cell."""

    cu_q: Tensor  # (cells + 1,) int32
    cu_k: Tensor  # (cells + 1,) int32
    max_q: int    # queries of the longest cell
    max_k: int    # keys of the longest cell


class Saved(NamedTuple):
    """What a backward needs of its forward."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor  # (queries, heads, head_size), merged
    lse: Tensor  # (queries, heads), merged
    rng: Tensor   # (2,) int64: the forward's third result
    seed: Tensor  # () int64, CPU: the forward's seed


class Kernel(Protocol):
    """One way to compute attention."""

    name: str

    def refusal(self, device: torch.device, dtype: torch.dtype, head_size: int, dropout_p: float) -> str | None:
        """Why this kernel cannot attend with such queries and dropout, or None when it can."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cells: Segments, dropout_p: float,
                seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, log-sum-exp, and the kernel's own note (2,) of how to drop the same probabilities again."""
        ...

    def backward(self, grad: Tensor, saved: Saved, cells: Segments, dropout_p: float, *,
                 deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        ...


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-sum-exps for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_rng(q: Tensor) -> Tensor:
    """The note of a kernel that remembers nothing but its seed."""
    return q.new_zeros(2, dtype=torch.int64)


def spans(cells: Segments) -> list[tuple[slice, slice]]:
    """Query rows and key rows of each cell that has both."""
    cu_q, cu_k = cells.cu_q.tolist(), cells.cu_k.tolist()
    bounds = zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)
    return [(slice(q0, q1), slice(k0, k1)) for q0, q1, k0, k1 in bounds if q1 > q0 and k1 > k0]


class MathKernel:
    """Softmax written out, cell by cell: any device, dtype and dropout; O(queries x keys) memory for one cell.

    `compute` is the dtype of the arithmetic: None keeps the inputs' (at least float32), float64 makes the reference.
    """

    def __init__(self, name: str, compute: torch.dtype | None = None) -> None:
        self.name, self._compute = name, compute

    def refusal(self, device: torch.device, dtype: torch.dtype, head_size: int, dropout_p: float) -> str | None:
        """Refuses nothing."""
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cells: Segments, dropout_p: float,
                seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`. Dropout is drawn cell by cell from a generator of `seed`."""
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=lse_dtype(q.dtype))
        generator = self._generator(q, seed)
        for rows, keys in spans(cells):
            logits, values = self._logits(q[rows], k[keys]), self._cast(v[keys])
            cell_lse = logits.logsumexp(-1)                                     # (heads, queries)
            kept = self._kept(logits, dropout_p, generator) * (logits - cell_lse.unsqueeze(-1)).exp()
            out[rows] = torch.einsum("hqk,khd->qhd", kept, values).to(q.dtype)
            lse[rows] = cell_lse.t().to(lse.dtype)
        return out, lse, no_rng(q)

    def backward(self, grad: Tensor, saved: Saved, cells: Segments, dropout_p: float, *,
                 deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`; always deterministic."""
        q, k, v, out, lse, _, seed = saved
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        generator = self._generator(q, seed)
        scale = q.shape[-1] ** -0.5
        for rows, keys in spans(cells):
            logits, cell_grad = self._logits(q[rows], k[keys]), self._cast(grad[rows])
            probabilities = (logits - self._cast(lse[rows]).t().unsqueeze(-1)).exp()    # (heads, queries, keys)
            kept = self._kept(logits, dropout_p, generator)
            grad_v[keys] = torch.einsum("hqk,qhd->khd", kept * probabilities, cell_grad).to(v.dtype)
            grad_kept = kept * torch.einsum("qhd,khd->hqk", cell_grad, self._cast(v[keys]))
            row_sum = (cell_grad * self._cast(out[rows])).sum(-1).t().unsqueeze(-1)
            grad_logits = probabilities * (grad_kept - row_sum) * scale
            grad_q[rows] = torch.einsum("hqk,khd->qhd", grad_logits, self._cast(k[keys])).to(q.dtype)
            grad_k[keys] = torch.einsum("hqk,qhd->khd", grad_logits, self._cast(q[rows])).to(k.dtype)
        return grad_q, grad_k, grad_v

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self._compute or lse_dtype(x.dtype))

    def _logits(self, q: Tensor, k: Tensor) -> Tensor:
        logits: Tensor = torch.einsum("qhd,khd->hqk", self._cast(q), self._cast(k)) * q.shape[-1] ** -0.5
        return logits

    @staticmethod
    def _generator(q: Tensor, seed: Tensor) -> torch.Generator:
        return torch.Generator(q.device).manual_seed(int(seed))

    @staticmethod
    def _kept(logits: Tensor, dropout_p: float, generator: torch.Generator) -> Tensor | float:
        """What each probability is multiplied with: 0 or 1 / (1 - p)."""
        if dropout_p == 0.0:
            return 1.0
        draws = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
        return (draws >= dropout_p).to(logits.dtype) / (1.0 - dropout_p)


class SdpaKernel:
    """torch's fused CPU attention, called once a cell on views of the packed rows: the fastest exact path measured.

    Cells of equal lengths go through one call. Measured for 16 cells of 361 to 1,048 tokens, 8 heads of 64, 2 cores:
    forward 122 ms, against 241 ms for one padded call with a key mask; a softmax written out with batched products took
    3 to 10 times as long.
    """

    name = "sdpa"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_size: int, dropout_p: float) -> str | None:
        """CPU only, no dropout."""
        if device.type != "cpu":
            return "it is torch's CPU kernel"
        return "it cannot drop attention probabilities" if dropout_p > 0 else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cells: Segments, dropout_p: float,
                seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        n_cells = self._equal_cells(q, k, cells)
        if n_cells:
            out, lse = attend(*(_batched(x, n_cells) for x in (q, k, v)))
            return _unbatched(out), lse.transpose(1, 2).reshape(q.shape[:2]), no_rng(q)
        pairs = spans(cells)
        out = self._rows_like(q, pairs, cells)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=lse_dtype(q.dtype))
        for rows, keys in pairs:
            cell_out, cell_lse = attend(_batched(q[rows]), _batched(k[keys]), _batched(v[keys]))
            out[rows], lse[rows] = cell_out[0].transpose(0, 1), cell_lse[0].t()
        return out, lse, no_rng(q)

    def backward(self, grad: Tensor, saved: Saved, cells: Segments, dropout_p: float, *,
                 deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`; always deterministic."""
        q, k, v, out, lse, _, _ = saved
        n_cells = self._equal_cells(q, k, cells)
        if n_cells:
            grads = self._cell_backward(grad, q, k, v, out, lse, n_cells)
            return _unbatched(grads[0]), _unbatched(grads[1]), _unbatched(grads[2])
        pairs = spans(cells)
        grad_q, grad_k, grad_v = (self._rows_like(x, pairs, cells) for x in (q, k, v))
        for rows, keys in pairs:
            grads = self._cell_backward(grad[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], 1)
            for whole, span, part in zip((grad_q, grad_k, grad_v), (rows, keys, keys), grads, strict=True):
                whole[span] = part[0].transpose(0, 1)
        return grad_q, grad_k, grad_v

    @staticmethod
    def _rows_like(x: Tensor, pairs: list[tuple[slice, slice]], cells: Segments) -> Tensor:
        """Room for rows as `x` has them; zeros where a cell without queries or keys leaves some unwritten."""
        return torch.empty_like(x) if len(pairs) == len(cells.cu_q) - 1 else torch.zeros_like(x)

    @staticmethod
    def _cell_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                       n_cells: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = tuple(_batched(x, n_cells) for x in (grad, q, k, v, out))
        cell_lse = lse.unflatten(0, (n_cells, -1)).transpose(1, 2)
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *rows, cell_lse, 0.0, is_causal=False)
        return grads

    @staticmethod
    def _equal_cells(q: Tensor, k: Tensor, cells: Segments) -> int:
        """The number of cells when all have the same number of queries and of keys, neither zero; else 0."""
        n_cells = len(cells.cu_q) - 1
        equal = q.shape[0] and k.shape[0] and (n_cells * cells.max_q, n_cells * cells.max_k) == (q.shape[0], k.shape[0])
        return n_cells if equal else 0


def _batched(x: Tensor, n_cells: int = 1) -> Tensor:
    """(cells x rows, heads, head_size) as (cells, heads, rows, head_size), a view."""
    view: Tensor = x.unflatten(0, (n_cells, -1)).transpose(1, 2)
    return view


def _unbatched(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)
