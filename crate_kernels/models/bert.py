"""CRATE-BERT, the published masked language model of CRATE, with its keys and arithmetic.

Published as a port to transformers (models/crate): RoBERTa's embeddings and head, layers of CRATE
between them, on this library's ops, the loss too. Attention runs in plain PyTorch where an
attention_mask hides tokens anywhere, and where dropout is active on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..checks import check_heads, refuse
from ..cross_entropy.op import cross_entropy
from ..ista.op import ista
from ..library import autocast_dtype
from ..mssa.op import tied_attention
from ..mssa.reference import merge_heads, split_heads
from ..nn.layers import (
    log_once,
    reason_against_dtypes,
    reason_against_modules,
)
from ..nn.steps import normed, reason_against_fused_norms
from ..residual_norm.op import residual_norm
from ..tied_embedding.op import tied_embedding

IGNORED = -100  # a label that counts for nothing
ALIGNED = 8  # elements: 16 bytes in half precision


@dataclass(frozen=True)
class Seen:
    """The tokens that others attend to: the first ``lengths`` (B,), or those of ``mask`` (B, T)."""

    lengths: Tensor | None = None
    mask: Tensor | None = None


def attend(w: Tensor, heads: int, seen: Seen, dropout: float) -> Tensor:
    """softmax(s w_h w_h^T) w_h of each head over the tokens seen: (B, T, heads*head_dim)."""
    if seen.mask is None and (dropout == 0 or w.is_cuda):
        return tied_attention(w, heads=heads, lengths=seen.lengths, dropout=dropout)
    mask = seen.mask
    if seen.lengths is not None:
        mask = torch.arange(w.shape[1], device=w.device) < seen.lengths[:, None]
    wh = split_heads(w, heads)
    s = torch.matmul(wh, wh.mT) * wh.shape[-1] ** -0.5
    if mask is not None:
        s = s.masked_fill(~mask[:, None, None], torch.finfo(s.dtype).min)
    return merge_heads(torch.matmul(F.dropout(s.softmax(-1), dropout), wh))


ALL = Seen()


class BERTSelfAttention(nn.Module):
    """``LN(x)`` projected to w, and the heads' attention. Keys ``prenorm.*``, ``qkv.weight``."""

    def __init__(self, dim: int, heads: int, dropout: float, **factory: Any) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.prenorm = nn.LayerNorm(dim, **factory)
        self.qkv = nn.Linear(dim, dim, bias=False, **factory)

    def forward(self, x: Tensor, seen: Seen = ALL) -> Tensor:
        return self.of_normed(self.prenorm(x), seen)

    def of_normed(self, h: Tensor, seen: Seen) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attend(self.qkv(h), self.heads, seen, dropout)


class BERTSelfOutput(nn.Module):
    """``dense(o) + x``. Key ``dense.weight``."""

    def __init__(self, dim: int, dropout: float, **factory: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim, bias=False, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        return self.projected(o) + x

    def projected(self, o: Tensor) -> Tensor:
        p: Tensor = self.dropout(self.dense(o))
        return p


class BERTOutput(nn.Module):
    """``ISTA(LN(x))``, on :func:`crate_kernels.ista`. Keys ``prenorm.*``, ``weight``."""

    def __init__(self, dim: int, step_size: float, lambd: float, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim, **factory))
        nn.init.kaiming_uniform_(self.weight)
        self.step_size, self.lambd = step_size, lambd
        self.prenorm = nn.LayerNorm(dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_normed(self.prenorm(x))

    def of_normed(self, u: Tensor) -> Tensor:
        return ista(u, self.weight, step_size=self.step_size, lambd=self.lambd)


class BERTLayer(nn.Module):
    """``x = x + MSSA(LN(x))``, ``x = ISTA(LN(x))``; x is (B, T, dim).

    The norms and the addition are :func:`crate_kernels.residual_norm`, or its modules run one by
    one where that would pass over something: a hook on all modules or on one that it does not call,
    one of another class, norms and x of several dtypes without autocast. The log names each such
    reason once. The projections and the dropout behind the second are called in any case.

    Keys: ``attention.self.*``, ``attention.output.*``, ``output.*``.
    """

    def __init__(
        self, dim: int, heads: int, dropout: float, step_size: float, lambd: float, **factory: Any
    ) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {
                "self": BERTSelfAttention(dim, heads, dropout, **factory),
                "output": BERTSelfOutput(dim, dropout, **factory),
            }
        )
        self.output = BERTOutput(dim, step_size, lambd, **factory)

    def forward(self, x: Tensor, seen: Seen = ALL) -> Tensor:
        """x (B, T, dim) -> the same, in autocast's dtype where the norms are fused."""
        reason = self._reason_against_fused_norms(x)
        if reason is not None:
            if not torch.compiler.is_compiling():
                log_once(f"a BERTLayer runs unfused: {reason}")
            return self._module_by_module(x, seen)
        attention: Any = self.attention["self"]
        projection: Any = self.attention["output"]
        norm = attention.prenorm
        x, h = residual_norm(x, norm.weight, norm.bias, eps=norm.eps)
        p = projection.projected(attention.of_normed(h, seen))
        norm = self.output.prenorm
        _, u = residual_norm(x, norm.weight, norm.bias, p, eps=norm.eps)
        return self.output.of_normed(u)

    def _module_by_module(self, x: Tensor, seen: Seen) -> Tensor:
        o = self.attention["self"](x, seen)
        return self.output(self.attention["output"](o, x))

    def _reason_against_fused_norms(self, x: Tensor) -> str | None:
        """Why the modules must run one by one (on x) right now; None if they need not."""
        attention: Any = self.attention["self"]
        named: Any = (
            ("attention.self", attention, BERTSelfAttention),
            ("attention.self.prenorm", attention._modules.get("prenorm"), nn.LayerNorm),
            ("attention.output", self.attention["output"], BERTSelfOutput),
            ("output", self.output, BERTOutput),
            ("output.prenorm", self.output._modules.get("prenorm"), nn.LayerNorm),
        )
        return reason_against_fused_norms(x, named)


class BERTEmbeddings(nn.Module):
    """Word, position and token type, summed and normed. Positions pass over padding.

    In autocast's dtype, unless the norm is called as a module (:func:`normed`).

    Keys: ``word_embeddings.weight``, ``position_embeddings.weight``,
    ``token_type_embeddings.weight``, ``LayerNorm.*``.
    """

    def __init__(
        self,
        vocab_size: int,
        positions: int,
        dim: int,
        padding: int,
        dropout: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.word_embeddings = nn.Embedding(vocab_size, dim, padding_idx=padding, **factory)
        self.position_embeddings = nn.Embedding(positions, dim, padding_idx=padding, **factory)
        self.token_type_embeddings = nn.Embedding(2, dim, **factory)
        self.LayerNorm = nn.LayerNorm(dim, eps=1e-12, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(self, idx: Tensor, token_types: Tensor | None = None) -> Tensor:
        x = self.word_embeddings(idx)
        if token_types is None:
            x = x + self.token_type_embeddings.weight[0]
        else:
            x = x + self.token_type_embeddings(token_types)
        return self.dropout(self.normed(x, self.position_embeddings(self.positions(idx))))

    def positions(self, idx: Tensor) -> Tensor:
        counts = idx != self.padding
        return counts.cumsum(1) * counts + self.padding

    def tied(self, idx: Tensor, token_types: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same by :func:`tied_embedding`, and the words' weight for the head."""
        p, rows = self.padding, self.position_embeddings.weight
        rows = torch.cat((rows[:p], rows[p : p + 1].detach(), rows[p + 1 :]))  # as padding_idx has
        types, positions = self.token_type_embeddings.weight, self.positions(idx)
        if token_types is None:
            types = types[:1]
        else:
            positions = positions + len(rows) * token_types
        table = (rows + types[:, None]).flatten(0, 1)
        words = self.word_embeddings.weight
        x, head = tied_embedding(idx, words, table, positions, padding_idx=p)
        return self.dropout(self.normed(x, None)), head

    def normed(self, x: Tensor, y: Tensor | None) -> Tensor:
        return normed("CRATEBERT", "embeddings.LayerNorm", self.LayerNorm, x, y)


class BERTHead(nn.Module):
    """``decoder(LN(gelu(dense(x))))``. Keys ``dense.*``, ``layer_norm.*``, ``decoder.*`` and
    ``bias``, which is the decoder's."""

    def __init__(self, vocab_size: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim, **factory)
        self.layer_norm = nn.LayerNorm(dim, eps=1e-12, **factory)
        self.decoder = nn.Linear(dim, vocab_size, **factory)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> logits (..., vocab_size)."""
        x = self.normed(F.gelu(self.dense(x)))
        n = len(self.decoder.weight)
        if needs_whole_steps(x, n):
            return linear_in_whole_steps(x, self.decoder.weight, self.decoder.bias)[..., :n]
        return self.decoder(x)

    def for_loss(self, x: Tensor, words: Tensor | None) -> Tensor:
        """Logits in whole steps, whose bias has its gradient from the loss alone; ``words``: the
        decoder's weight as its GEMM takes it, if that is there already."""
        x = self.normed(F.gelu(self.dense(x)))
        weight = self.decoder.weight if words is None else words
        linear = linear_in_whole_steps if needs_whole_steps(x, len(weight)) else F.linear
        return linear(x, weight, self.decoder.bias.detach())

    def normed(self, x: Tensor) -> Tensor:
        return normed("CRATEBERT", "lm_head.layer_norm", self.layer_norm, x)


class OfBias(torch.autograd.Function):
    """Logits with a detached bias in them -> the same with its gradient, for losses of others."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor, Tensor]:
        return dlogits, dlogits.flatten(0, -2).sum(0, dtype=ctx.dtype)


def needs_whole_steps(x: Tensor, n: int) -> bool:
    return x.is_cuda and n % ALIGNED != 0


def linear_in_whole_steps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias by ALIGNED rows of weight at a time, zeros after the last of them.

    With rows at odd addresses, as RoBERTa's vocabulary has logits, cuBLAS takes five to eight times
    as long for the product and for its gradients.
    """
    rows = (0, -len(weight) % ALIGNED)
    weight = weight.to(autocast_dtype(weight))
    return F.linear(x, F.pad(weight, (0, 0, *rows)), F.pad(bias, rows))


class CRATEBERT(nn.Module):
    r"""Bidirectional CRATE: :math:`p(\mathrm{token}_t \mid \mathrm{all\ that\ is\ not\ masked})`.

    Args:
        vocab_size: number of tokens; RoBERTa's 50265 as published.
        positions: rows of the table of positions, of which the first ``pad_token_id + 1`` go
            unused: sequences may be ``positions - pad_token_id - 1`` long.
        dim, depth, heads: width, number of layers, heads of dim / heads.
        dropout: on the embeddings, attention maps and projections.
        pad_token_id: the token of padding.
        step_size, lambd: of ISTA.
        device, dtype: of the parameters; "meta" makes none.

    Raises:
        ValueError: heads that do not divide dim; in forward, sequences of another rank or too
            long, a mask or lengths of another shape, or both.

    Source: arXiv 2311.13110. Keys: ``crate.embeddings.*``, ``crate.encoder.layer.{i}.*``,
    ``lm_head.*``; ``lm_head.decoder.weight`` is the word embeddings. Initial values are from the
    published distributions.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 50265,
        positions: int = 512,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        dropout: float = 0.1,
        pad_token_id: int = 1,
        step_size: float = 0.1,
        lambd: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_heads("CRATEBERT", heads, dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.context = positions - pad_token_id - 1
        layers = [BERTLayer(dim, heads, dropout, step_size, lambd, **factory) for _ in range(depth)]
        self.crate = nn.ModuleDict(
            {
                "embeddings": BERTEmbeddings(
                    vocab_size, positions, dim, pad_token_id, dropout, **factory
                ),
                "encoder": nn.ModuleDict({"layer": nn.ModuleList(layers)}),
            }
        )
        self.lm_head = BERTHead(vocab_size, dim, **factory)
        self.apply(_initialise)
        embeddings: Any = self.crate["embeddings"]
        self.lm_head.decoder.weight = embeddings.word_embeddings.weight

    def forward(
        self,
        idx: Tensor,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T), integers -> logits (B, T, vocab_size) and loss.

        Args:
            labels: (B, T); the loss is their mean cross-entropy in nats without those of -100,
                None where no labels are.
            attention_mask: (B, T), 0 for padding, wherever it lies.
            lengths: (B,) instead, int32 or int64: the first lengths[b] tokens of item b are no
                padding. Faster: attention spares what lies past them.
            token_types: (B, T), 0 or 1; 0 where None.

        No token sees padding. Logits of padding mean nothing.
        """
        if idx.dim() != 2 or not 0 < idx.shape[1] <= self.context:
            wanted = f"tokens of shape (B, T) with 0 < T <= {self.context}"
            refuse("CRATEBERT", wanted, tuple(idx.shape))
        seen = _seen(idx, attention_mask, lengths)
        parts: Any = self.crate
        x, words = self._embed(idx, token_types, labels is not None)
        for layer in parts["encoder"]["layer"]:
            x = layer(x, seen)
        if labels is None:
            return self.lm_head(x), None
        return self._with_loss(x, labels, words)

    def _embed(
        self, idx: Tensor, token_types: Tensor | None, for_loss: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, dim), and the weight that the head is to multiply with, or None."""
        embeddings: Any = self.crate["embeddings"]
        reason = self._reason_against_tied_embedding() if for_loss else ""
        if reason is None:
            return embeddings.tied(idx, token_types)
        if reason and not torch.compiler.is_compiling():
            log_once(f"the embeddings of CRATEBERT run unfused: {reason}")
        return embeddings(idx, token_types), None

    def _reason_against_tied_embedding(self) -> str | None:
        """Why embeddings and head must be called right now; None if they need not."""
        embeddings: Any = self.crate["embeddings"]
        reason = self._reason_against_loss_of_head()
        if reason is None:
            reason = reason_against_modules((("embeddings", embeddings, BERTEmbeddings),))
        if reason is not None:
            return reason
        kinds = ("word", "position", "token_type")
        tables: Any = [embeddings._modules.get(f"{kind}_embeddings") for kind in kinds]
        named = [(f"{k}_embeddings", t, nn.Embedding) for k, t in zip(kinds, tables, strict=True)]
        reason = reason_against_modules(named)
        if reason is not None:
            return reason
        head: Any = self.lm_head
        if tables[0].weight is not head.decoder.weight:
            return "the decoder has a weight of its own"
        if any(
            (t.max_norm, t.scale_grad_by_freq, t.sparse) != (None, False, False) for t in tables
        ):
            return "an embedding has max_norm, scale_grad_by_freq or sparse set"
        return reason_against_dtypes(*(t.weight for t in tables))

    def _reason_against_loss_of_head(self) -> str | None:
        """Why the head must be called as it is; None if the loss may take what it likes of it."""
        if _has_any_global_hook():
            return "hooks on all modules are registered"
        head: Any = self.lm_head
        decoder = head._modules.get("decoder")
        named = (("lm_head", head, BERTHead), ("lm_head.decoder", decoder, nn.Linear))
        reason = reason_against_modules(named)
        if reason is None and decoder.bias is None:
            return "lm_head.decoder has no bias"
        return reason

    def _with_loss(self, x: Tensor, labels: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor]:
        head: Any = self.lm_head
        labels = labels.view(x.shape[:-1])
        if self._reason_against_loss_of_head() is not None:
            logits = head(x)
            return logits, cross_entropy(logits, labels, ignore_index=IGNORED)
        # Not narrowed before the loss: that gradient would be copied into a wider one.
        logits, bias = head.for_loss(x, words), head.decoder.bias
        n = len(bias)
        options: dict[str, Any] = {"ignore_index": IGNORED, "vocab_size": n, "added_bias": bias}
        loss = cross_entropy(logits, labels, **options)
        narrowed = logits if logits.shape[-1] == n else logits[..., :n]
        return OfBias.apply(narrowed, bias), loss


def _seen(idx: Tensor, attention_mask: Tensor | None, lengths: Tensor | None) -> Seen:
    if attention_mask is not None and lengths is not None:
        refuse("CRATEBERT", "attention_mask or lengths", "both")
    if attention_mask is not None:
        if attention_mask.shape != idx.shape:
            wanted = f"attention_mask of shape {tuple(idx.shape)}"
            refuse("CRATEBERT", wanted, tuple(attention_mask.shape))
        return Seen(mask=attention_mask > 0)
    if lengths is not None and lengths.shape != idx.shape[:1]:
        refuse("CRATEBERT", f"lengths of shape ({len(idx)},)", tuple(lengths.shape))
    return Seen(lengths)


def mask_tokens(
    idx: Tensor,
    vocab_size: int,
    mask_token_id: int,
    *,
    maskable: Tensor | None = None,
    probability: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """What a masked language model reads and has to say: (inputs, labels), shaped as idx (B, T).

    BERT's: of ``probability`` of the tokens (of those that are ``maskable``, (B, T)), 80 % become
    the mask token, 10 % another at random, 10 % stay; labels are -100 elsewhere.
    """
    options: dict[str, Any] = {"device": idx.device, "generator": generator}
    asked = torch.rand(idx.shape, **options) < probability
    if maskable is not None:
        asked &= maskable
    labels = idx.masked_fill(~asked, IGNORED)
    fate = torch.rand(idx.shape, **options)
    other = torch.randint(vocab_size, idx.shape, **options)
    inputs = torch.where(asked & (fate < 0.8), mask_token_id, idx)
    return torch.where(asked & (fate >= 0.9), other, inputs), labels


def crate_bert(vocab_size: int = 50265, **overrides: Any) -> CRATEBERT:
    """CRATE-BERT base: width 768, depth 12, 12 heads of 64; 61.0 M parameters.

    ``overrides`` are arguments of :class:`CRATEBERT`.
    """
    return CRATEBERT(vocab_size=vocab_size, **overrides)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        module.weight[module.padding_idx].zero_()
