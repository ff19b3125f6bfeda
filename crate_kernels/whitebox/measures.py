"""The white-box measures as functions of tokens and weights; all but the zeros differentiable.

Z is (..., N, d) here, a token a row; the papers' Z is its transpose. Derivations and conventions:
docs/whitebox.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import FLOATS, check_number, refuse
from ..library import autocast_off

EPS = 0.01


def coding_rate(z: Tensor, eps: float = EPS, *, normalise: bool = True) -> Tensor:
    r"""Nats that it takes to code N tokens up to a distortion, half a log-determinant.

    .. math:: R(Z) = \tfrac12 \log\det\left(I + \frac{d}{N \varepsilon} Z^T Z\right)

    Args:
        z: tokens (..., N, d), N and d > 0.
        eps: the square of the papers' :math:`\epsilon`, > 0; 0.01 in the published code.
        normalise: scale every token to length 1 first, as the published code does. A token of
            zeros stays one.

    Returns:
        (...,), in float32 or better; nan where z holds nan or inf.

    Of Z^T Z and Z Z^T, which give one value, the smaller is made. Its products are summed in
    float32 or better; on a GPU normalised float16 and bfloat16 tokens enter them as float16.

    Raises:
        ValueError: z of another shape, eps not above 0.
        TypeError: z is no floating tensor.

    Source: arXiv 2306.01129 and 2311.13110, section 2.
    """
    check_number("coding_rate", "eps", eps, above_zero=True)
    products = gram(z, normalise=normalise)
    return half_logdet(products, gram_factor(z, eps))


def compressed_rate(w: Tensor, eps: float = EPS, *, normalise: bool = True) -> Tensor:
    r"""The coding rate against the subspaces of all heads, R^c(Z; U).

    .. math:: R^c(Z; U) = \sum_h R(W_h) = \tfrac12 \sum_h
              \log\det\left(I + \frac{p}{N \varepsilon} W_h^T W_h\right), \qquad W_h = Z U_h

    Args:
        w: projected tokens (..., H, N, p).
        eps, normalise: of :func:`coding_rate`; a token is normalised in each head by itself.

    Returns:
        (...,). The heads' terms are ``coding_rate(w)``, (..., H).

    Source: arXiv 2306.01129 and 2311.13110, section 2; github.com/Ma-Lab-Berkeley/CRATE.
    """
    if w.dim() < 3:
        refuse("compressed_rate", "w of shape (..., H, N, p)", tuple(w.shape))
    return coding_rate(w, eps, normalise=normalise).sum(-1)


def sparsity(z: Tensor) -> Tensor:
    r"""The fraction of exact zeros.

    .. math:: 1 - \frac{\lVert Z \rVert_0}{d N}

    z (..., N, d) -> (...,), float64. nan is not zero.
    """
    if z.dim() < 2 or z.shape[-1] == 0 or z.shape[-2] == 0:
        refuse("sparsity", "z of shape (..., N, d) with N > 0 and d > 0", tuple(z.shape))
    return (z == 0).mean((-2, -1), dtype=torch.float64)


def subspace_coherence(u: Tensor) -> Tensor:
    r"""How far the subspaces of two heads overlap: the RMS cosine of their principal angles.

    .. math:: \mu_{kl} = \frac{\lVert Q_k^T Q_l \rVert_F}{\sqrt{r}}, \qquad
              Q_k \text{ an orthonormal basis of the rows of } U_k, \qquad r = \min(p, D)

    Args:
        u: (H, p, D), one head's projection each, such as ``qkv.weight.unflatten(0, (H, p))``;
            of full rank.

    Returns:
        (H, H), 1 on the diagonal, 0 for orthogonal subspaces; about sqrt(p / D) for random ones.
        In float32 or better.

    The theory takes the subspaces as incoherent: arXiv 2311.13110, section 2.
    """
    if u.dim() != 3 or 0 in u.shape:
        refuse("subspace_coherence", "u of shape (H, p, D)", tuple(u.shape))
    with autocast_off(u.device.type):
        q = torch.linalg.qr(_wide(u).mT).Q  # [H, D, r]
        heads, _, r = q.shape
        q = q.transpose(0, 1).flatten(1)  # [D, H r]
        blocks = (q.mT @ q).view(heads, r, heads, r)
        return torch.linalg.vector_norm(blocks, dim=(1, 3)) / r**0.5


def attention_rows(
    w: Tensor, queries: Sequence[int], *, scale: float | None = None, causal: bool = False
) -> Tensor:
    r"""The rows of the attention maps that belong to chosen tokens; no (N, N) tensor is made.

    .. math:: P_{qn} = \mathrm{softmax}_n(s\, w_q \cdot w_n)

    Args:
        w: projected tokens (B, H, N, p).
        queries: tokens q, -N <= q < N; 0 is the class token of CRATE.
        scale: s, p**-0.5 by default.
        causal: token q sees tokens 0..q only.

    Returns:
        (B, H, len(queries), N), in float32 or better.

    Raises:
        ValueError: w of another shape, a query that is no token.
    """
    if w.dim() != 4:
        refuse("attention_rows", "w of shape (B, H, N, p)", tuple(w.shape))
    n, p = w.shape[-2:]
    for q in queries:
        if not -n <= q < n:
            refuse("attention_rows", f"queries among the {n} tokens", q)
    with autocast_off(w.device.type):
        w = _wide(w)
        # Views instead of an index, which would wait for the device.
        rows = torch.stack([w.select(-2, q) for q in queries], dim=-2)
        scores = rows @ w.mT * (p**-0.5 if scale is None else scale)
        if causal:
            for i, q in enumerate(queries):
                scores[:, :, i, q % n + 1 :] = -torch.inf
        return scores.softmax(-1)


# ---- the parts of coding_rate, for whoever wants many determinants at once


def gram(z: Tensor, *, normalise: bool = True) -> Tensor:
    """Z^T Z or, where N < d, Z Z^T; z as in :func:`coding_rate`."""
    if not isinstance(z, Tensor) or z.dtype not in FLOATS:
        kind = z.dtype if isinstance(z, Tensor) else type(z).__name__
        refuse("coding_rate", "z to be a floating torch.Tensor", kind, TypeError)
    if z.dim() < 2 or z.shape[-1] == 0 or z.shape[-2] == 0:
        refuse("coding_rate", "z of shape (..., N, d) with N > 0 and d > 0", tuple(z.shape))
    n, d = z.shape[-2:]
    wide = torch.promote_types(z.dtype, torch.float32)
    differentiable = torch.is_grad_enabled() and z.requires_grad
    # Entries are at most 1 then: float16 rounds them no coarser than bfloat16 z was.
    narrow = normalise and z.is_cuda and z.element_size() == 2 and not differentiable
    with autocast_off(z.device.type):
        if normalise:
            norms = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=wide)
            z = z / norms.clamp(min=torch.finfo(wide).tiny)
        dtype = torch.float16 if narrow else wide
        rows = z.to(dtype, memory_format=torch.contiguous_format).reshape(-1, n, d)
        left, right = (rows.mT, rows) if d <= n else (rows, rows.mT)
        products = torch.bmm(left, right, wide) if narrow else torch.bmm(left, right)
        if narrow and n < d:  # rounded tokens are not quite of length 1; the diagonal has theirs
            squares = products.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(wide).tiny)
            lengths = squares.sqrt()
            products.div_(lengths.unsqueeze(1)).div_(lengths.unsqueeze(2))
        return products.view(*z.shape[:-2], *products.shape[1:])


def gram_factor(z: Tensor, eps: float) -> float:
    """d / (N eps), by which :func:`coding_rate` multiplies the Gram matrix."""
    return z.shape[-1] / (z.shape[-2] * eps)


def half_logdet(gram: Tensor, factor: float) -> Tensor:
    """1/2 logdet(I + factor gram) for (..., s, s), symmetric, positive semidefinite; by Cholesky.

    nan where the matrix is not positive definite. Does not wait for the device.
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower, info = torch.linalg.cholesky_ex(torch.add(identity, gram, alpha=factor))
    found = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.where(info == 0, found, torch.nan)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
