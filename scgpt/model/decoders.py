"""From hidden vectors to predictions: expression, class, expression from the cell (MVC), affine, domain, similarity.

Decoders take any leading shape: (batch, seq, d_model) padded, (tokens, d_model) packed or chosen positions only.
`zero_probs` is, despite its name, the probability that the value is *not* zero (upstream's convention).
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scgpt.model.grad_reverse import grad_reverse


def _three_layers(d_in: int, d_model: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d_model), nn.LeakyReLU(), nn.Linear(d_model, d_model), nn.LeakyReLU(),
                         nn.Linear(d_model, 1))


class ExprDecoder(nn.Module):
    """Expression of a token: {"pred"} and, with `explicit_zero_prob`, {"zero_probs"}.

    With `use_batch_labels` the input is 2 x d_model wide: token, then batch embedding.
    """

    def __init__(self, d_model: int, explicit_zero_prob: bool = False, use_batch_labels: bool = False) -> None:  # noqa: FBT001, FBT002 upstream
        super().__init__()
        d_in = d_model * 2 if use_batch_labels else d_model
        self.fc = _three_layers(d_in, d_model)
        self.explicit_zero_prob = explicit_zero_prob
        if explicit_zero_prob:
            self.zero_logit = _three_layers(d_in, d_model)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(..., d_in) -> values of shape (...)."""
        output = {"pred": self.fc(x).squeeze(-1)}
        if self.explicit_zero_prob:
            output["zero_probs"] = self.zero_logit(x).squeeze(-1).sigmoid()
        return output


class AffineExprDecoder(nn.Module):
    """Expression as coefficient x input value + bias, both decoded from the token.

    `adaptive_bias` multiplies the bias with the mean of the row's non-zero values; a row without any gets a bias of 0
    (upstream: NaN). `tanh_coeff` does nothing, as upstream. `activation` names a class of torch.nn.
    """

    def __init__(self, d_model: int, explicit_zero_prob: bool = False, activation: str | None = None,  # noqa: FBT001, FBT002 upstream
                 tanh_coeff: bool = False, adaptive_bias: bool = False) -> None:  # noqa: FBT001, FBT002 upstream
        super().__init__()
        self.explicit_zero_prob, self.tanh_coeff, self.adaptive_bias = explicit_zero_prob, tanh_coeff, adaptive_bias
        self.coeff_decoder = ExprDecoder(d_model, explicit_zero_prob=explicit_zero_prob)
        self.bias_decoder = ExprDecoder(d_model, explicit_zero_prob=explicit_zero_prob)
        self.activation = None if activation is None else _activation(activation)

    def forward(self, x: Tensor, values: Tensor, *, mean_nonzero: Tensor | None = None) -> dict[str, Tensor]:
        """(batch, seq, d_model) and values (batch, seq) -> values of shape (batch, seq).

        Packed tokens (tokens, d_model) come with `mean_nonzero` (tokens,), the mean of their cell, for `adaptive_bias`.
        """
        coeff, bias = self.coeff_decoder(x), self.bias_decoder(x)["pred"]
        scale = coeff["pred"]
        if self.activation is not None:
            scale, bias = self.activation(scale), self.activation(bias)
        if self.adaptive_bias:
            bias = bias * (_mean_nonzero(values) if mean_nonzero is None else mean_nonzero)
        output = {"pred": scale * values + bias}
        if self.explicit_zero_prob:
            output["zero_probs"] = coeff["zero_probs"]
        return output


def _activation(name: str) -> nn.Module:
    try:
        made: nn.Module = getattr(nn, name)()
    except (AttributeError, TypeError) as error:   # no such class, or one that asks for sizes
        raise ValueError(f"unknown activation '{name}': name a class of torch.nn without sizes, for example "
                         "'Softplus'") from error
    return made


def _mean_nonzero(values: Tensor) -> Tensor:
    """(batch, seq) -> (batch, 1)."""
    return values.sum(1, keepdim=True) / (values != 0).sum(1, keepdim=True).clamp(min=1)


class _LayeredClassifier(nn.Module):
    """nlayers - 1 times linear, activation, norm; then the output layer."""

    def __init__(self, d_model: int, n_cls: int, nlayers: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self._decoder = nn.ModuleList()
        for _ in range(nlayers - 1):
            self._decoder.extend([nn.Linear(d_model, d_model), activation(), nn.LayerNorm(d_model)])
        self.out_layer = nn.Linear(d_model, n_cls)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) -> logits (..., n_cls)."""
        for layer in self._decoder:
            x = layer(x)
        logits: Tensor = self.out_layer(x)
        return logits


class ClsDecoder(_LayeredClassifier):
    """Class of a cell."""

    def __init__(self, d_model: int, n_cls: int, nlayers: int = 3,
                 activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__(d_model, n_cls, nlayers, activation)


class AdversarialDiscriminator(_LayeredClassifier):
    """Domain of a cell; `reverse_grad` turns the gradient that leaves through the input."""

    def __init__(self, d_model: int, n_cls: int, nlayers: int = 3,
                 activation: Callable[[], nn.Module] = nn.LeakyReLU, reverse_grad: bool = False) -> None:  # noqa: FBT001, FBT002 upstream
        super().__init__(d_model, n_cls, nlayers, activation)
        self.reverse_grad = reverse_grad

    def forward(self, x: Tensor) -> Tensor:
        """(batch, d_model) -> logits (batch, n_cls)."""
        return super().forward(grad_reverse(x, lambd=1.0) if self.reverse_grad else x)


class MVCDecoder(nn.Module):
    """Expression of a gene predicted from the cell embedding and the gene's own embedding.

    "inner product" (with ", detach": no gradient to the gene embeddings) returns {"pred"} and, with
    `explicit_zero_prob`, {"zero_probs"}; "concat query" and "sum query" return a bare tensor, as upstream. Those two
    can be built with zero probabilities and batch labels, but not called: NotImplementedError for zero probabilities,
    ValueError for a `cell_emb` that is not d_model wide. With "inner product" and `use_batch_labels`, `cell_emb` is
    2 x d_model wide: cell, then batch embedding.
    """

    def __init__(self, d_model: int, arch_style: str = "inner product",
                 query_activation: Callable[[], nn.Module] = nn.Sigmoid,
                 hidden_activation: Callable[[], nn.Module] = nn.PReLU, explicit_zero_prob: bool = False,  # noqa: FBT001, FBT002 upstream
                 use_batch_labels: bool = False) -> None:  # noqa: FBT001, FBT002 upstream
        super().__init__()
        d_in = d_model * 2 if use_batch_labels else d_model
        if arch_style in ("inner product", "inner product, detach"):
            self.gene2query = nn.Linear(d_model, d_model)
            self.query_activation = query_activation()
            self.W = nn.Linear(d_model, d_in, bias=False)
            if explicit_zero_prob:
                self.W_zero_logit = nn.Linear(d_model, d_in)
        elif arch_style in ("concat query", "sum query"):
            concat = arch_style == "concat query"
            self.gene2query = nn.Linear(d_model, 64 if concat else d_model)
            self.query_activation = query_activation()
            self.fc1 = nn.Linear(d_model + 64 if concat else d_model, 64)
            self.hidden_activation = hidden_activation()
            self.fc2 = nn.Linear(64, 1)
        else:
            raise ValueError(f"unknown MVC decoder style '{arch_style}': use 'inner product', 'inner product, detach', "
                             "'concat query' or 'sum query'")
        self.arch_style, self.do_detach = arch_style, "detach" in arch_style
        self.explicit_zero_prob, self.use_batch_labels = explicit_zero_prob, use_batch_labels

    def forward(self, cell_emb: Tensor, gene_embs: Tensor) -> dict[str, Tensor] | Tensor:
        """Cells (batch, d_in) and genes (batch, seq, d_model) -> (batch, seq).

        Packed tokens: genes (tokens, d_model) and, for each token, its cell (tokens, d_in) -> (tokens,).
        """
        if gene_embs.dim() == 3:
            cell_emb = cell_emb.unsqueeze(1)
        query = self.query_activation(self.gene2query(gene_embs.detach() if self.do_detach else gene_embs))
        if self.arch_style.startswith("inner product"):
            output = {"pred": _inner(self.W(query), cell_emb)}
            if self.explicit_zero_prob:
                output["zero_probs"] = _inner(self.W_zero_logit(query), cell_emb).sigmoid()
            return output
        if self.explicit_zero_prob:
            raise NotImplementedError(f"'{self.arch_style}' predicts no zero probabilities: use 'inner product'")
        if cell_emb.shape[-1] != gene_embs.shape[-1]:
            raise ValueError(f"'{self.arch_style}' takes a cell embedding as wide as the genes' "
                             f"({gene_embs.shape[-1]}), not {cell_emb.shape[-1]}: it has no room for batch labels")
        if self.arch_style == "concat query":
            joined = torch.cat([cell_emb.expand(*query.shape[:-1], -1), query], dim=-1)
        else:
            joined = cell_emb + query
        pred: Tensor = self.fc2(self.hidden_activation(self.fc1(joined))).squeeze(-1)
        return pred


def _inner(query: Tensor, cell_emb: Tensor) -> Tensor:
    """(batch, seq, d) with (batch, 1, d), or (tokens, d) with (tokens, d); summed over d."""
    if query.dim() == 3:
        return torch.bmm(query, cell_emb.transpose(1, 2)).squeeze(2)
    return (query * cell_emb).sum(-1)


class Similarity(nn.Module):
    """Cosine similarity over the last dimension, divided by a temperature."""

    def __init__(self, temp: float) -> None:
        super().__init__()
        self.temp = temp
        self.cos = nn.CosineSimilarity(dim=-1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(..., d) and (..., d), broadcast -> (...)."""
        similarity: Tensor = self.cos(x, y) / self.temp
        return similarity
