"""How is a top-k code trained at the price of the few features that are on?

With u = E x + e, the k largest entries of u at i_1 .. i_k and f = max(u[i], 0), the reconstruction is
x^ = sum_j f_j D[i_j] + d. For a loss with gradient g by x^ the gradients are

    by f_j     g . D[i_j]                 (0 where u[i_j] <= 0)
    by D[n]    sum of f g over the rows where feature n is on
    by E[n]    sum of (gradient by f) x over the same rows,     by e[n] the same without x

so that, once the features are chosen, only k of them are touched in each row: Gao et al. 2024 (appendix D) do so in
Triton kernels. Here all three sums are `embedding_bag`, the last two over the rows sorted by feature, and the products
are one sampled matrix product. Choosing needs the full product E x; it may be computed in bfloat16, the values of the
chosen ones are then computed anew in float32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1 << 22  # numbers gathered at once where there is no sampled matrix product


@dataclass(frozen=True, eq=False)
class Code:
    """Features chosen for each row, in rising order: index [rows, k], u [rows, k] what the encoder reads there."""

    index: Tensor
    u: Tensor

    @property
    def f(self) -> Tensor:
        """[rows, k] activations."""
        return self.u.relu()


def encode(
    x: Tensor, encoder: Tensor, bias: Tensor, k: int, *, scan: torch.dtype = torch.float32, among: Tensor | None = None
) -> Code:
    """The k features that read the most in each row of x [rows, d]; encoder [features, d], bias [features].

    `scan` is the dtype of the product that finds them; `among` are the features to choose from (default: all).
    """
    rows, biases = (encoder, bias) if among is None else (encoder[among], bias[among])
    scores = torch.addmm(biases.to(scan), x.to(scan), rows.to(scan).T)
    u, index = scores.topk(min(k, len(rows)), sorted=False)
    index, order = index.sort(1)
    if among is not None:
        index = among[index]
    u = u.gather(1, order) if scan == x.dtype else dots(index, x, encoder) + bias[index]
    return Code(index, u)


def decode(code: Code, decoder: Tensor) -> Tensor:
    """sum_j f_j decoder[i_j], [rows, d]; decoder [features, d]."""
    return F.embedding_bag(code.index, decoder, per_sample_weights=code.f, mode="sum")


def gradients(code: Code, x: Tensor, g: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by encoder [features, d_in], its bias [features] and decoder [features, d_out], g that by `decode`."""
    by_u = dots(code.index, g, decoder) * (code.u > 0)
    flat = code.index.flatten()
    order = flat.argsort()
    rows = order // code.index.shape[1]
    starts = torch.searchsorted(flat[order], torch.arange(len(decoder), device=flat.device))

    def summed(values: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(rows, values, starts, per_sample_weights=weights.flatten()[order], mode="sum")

    by_bias = torch.zeros(len(decoder), dtype=g.dtype, device=g.device).index_add_(0, flat, by_u.flatten())
    return summed(x, by_u), by_bias, summed(g, code.f)


def dots(index: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a[row] . b[index[row, j]], [rows, k]; index rising in each row."""
    rows, k = index.shape
    if a.is_cuda or (a.device.type == "cpu" and torch.backends.mkl.is_available()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls its sparse formats a beta
            where = torch.sparse_csr_tensor(
                torch.arange(0, rows * k + 1, k, device=a.device), index.flatten(), torch.zeros_like(a[:, :1]).expand(rows, k).flatten(),
                (rows, len(b)), check_invariants=False,
            )  # fmt: skip
            return torch.sparse.sampled_addmm(where, a, b.T, beta=0.0).values().reshape(rows, k)
    step = max(1, CHUNK // (k * a.shape[1]))
    return torch.cat(
        [torch.einsum("bd,bkd->bk", a[i : i + step], b[index[i : i + step]]) for i in range(0, rows, step)]
    )
