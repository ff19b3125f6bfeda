"""The published CRATE language model (CRATE-GPT, crate-lm), on this library's causal ops.

Training and evaluation run each layer as one op, generation with a cache of one tensor a layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..block.op import crate_block
from ..checks import check_heads, check_number, refuse
from ..cross_entropy.op import cross_entropy
from ..decode.op import tied_attention_decode
from ..library import autocast_dtype
from ..mssa.op import tied_attention
from ..nn.layers import ISTA, log_once, reason_against_dtypes, reason_against_modules
from ..tied_embedding.op import tied_embedding

IGNORED = -1  # a target that counts for nothing


class KVCache:
    """What generation keeps of past tokens: w of each layer, which is key and value at once.

    Attributes:
        layers: (depth, B, capacity, dim); half of a transformer's keys and values.
        lengths: tokens in use of each item, (B,), int32, on the device. As soon as a prompt is
            in, they may be set apart: shorter items go on from there.

    docs/decode.md has the layout; :func:`crate_kernels.tied_attention_decode` what happens to
    tokens beyond the capacity.
    """

    def __init__(
        self,
        depth: int,
        batch: int,
        capacity: int,
        dim: int,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self.layers = torch.empty(depth, batch, capacity, dim, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)


class CausalMSSA(nn.Module):
    r"""MSSA in which token i sees tokens 0..i only, on :func:`crate_kernels.tied_attention`.

    .. math:: y = [o_1, \dots, o_H]\, W_{proj}^T + b, \qquad
              o_h = \mathrm{softmax}(s\, w_h w_h^T + \mathrm{mask})\, w_h, \qquad w = x W_{attn}^T

    Keys: ``c_attn.weight`` (dim, dim), ``c_proj.weight`` (dim, dim), ``c_proj.bias`` (dim,).
    """

    def __init__(self, dim: int, heads: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check_heads(type(self).__name__, heads, dim)
        self.heads = heads
        self.c_attn = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.c_proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, cache: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """x (B, T, dim) -> y (B, T, dim).

        With a cache (B, capacity, dim), w goes into its first rows, or after ``lengths`` (B,) of
        them, to which the tokens then attend as well. Without gradient.
        """
        w = self.c_attn(x)
        if cache is not None and lengths is not None:
            return self.c_proj(tied_attention_decode(w, cache, lengths, heads=self.heads))
        if cache is not None:
            cache[:, : x.shape[1]] = w
        return self.c_proj(tied_attention(w, heads=self.heads, causal=True))


class CausalBlock(nn.Module):
    """``x = x + MSSA(LN(x))``, ``x = ISTA(LN(x))``; x is (B, T, dim).

    One :func:`crate_kernels.crate_block`, or its modules one by one where that would pass over
    something: a hook on one of them or on all, a module of another class, parameters of several
    dtypes without autocast. The log names each such reason once.

    Keys: ``prenorm_1.*``, ``attn.*``, ``prenorm_2.*``, ``ista.weight``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        step_size: float = 0.1,
        lambd: float = 0.1,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.prenorm_1 = nn.LayerNorm(dim, **factory)
        self.attn = CausalMSSA(dim, heads, **factory)
        self.prenorm_2 = nn.LayerNorm(dim, **factory)
        self.ista = ISTA(dim, step_size, lambd, **factory)

    def forward(
        self, x: Tensor, cache: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """x (B, T, dim) -> the same, in autocast's dtype where a layer is one op; the rest as in
        :class:`CausalMSSA`."""
        reason = "" if cache is not None else self._reason_against_one_op(x)
        if reason is None:
            return self._as_one_op(x)
        if reason and not torch.compiler.is_compiling():
            log_once(f"a CausalBlock runs unfused: {reason}")
        x = x + self.attn(self.prenorm_1(x), cache, lengths)
        return self.ista(self.prenorm_2(x))

    def _as_one_op(self, x: Tensor) -> Tensor:
        ista: Any = self.ista
        return crate_block(
            x,
            *self._in_order(),
            heads=self.attn.heads,
            causal=True,
            eps=self.prenorm_1.eps,
            step_size=ista.step_size,
            lambd=ista.lambd,
        )

    def _in_order(self) -> tuple[Tensor, ...]:
        """Parameters, in the order of crate_block's arguments."""
        first, second, attn = self.prenorm_1, self.prenorm_2, self.attn
        projections = (attn.c_attn.weight, attn.c_proj.weight, attn.c_proj.bias)
        norms = (first.weight, first.bias), (second.weight, second.bias)
        return *norms[0], *projections, *norms[1], self.ista.weight

    def _reason_against_one_op(self, x: Tensor) -> str | None:
        """Why the modules must run one by one (on x) right now; None if they need not."""
        if _has_any_global_hook():
            return "hooks on all modules are registered"
        attn: Any = self.attn
        named: Any = (
            ("prenorm_1", self.prenorm_1, nn.LayerNorm),
            ("attn", attn, CausalMSSA),
            ("attn.c_attn", attn._modules.get("c_attn"), nn.Linear),
            ("attn.c_proj", attn._modules.get("c_proj"), nn.Linear),
            ("prenorm_2", self.prenorm_2, nn.LayerNorm),
            ("ista", self.ista, ISTA),
        )
        reason = reason_against_modules(named)
        if reason is not None:
            return reason
        if any(isinstance(t, Tensor) for t in (self.ista.step_size, self.ista.lambd)):
            return "the step size or lambda of ista is a tensor"
        if attn.c_attn.bias is not None or self.prenorm_1.eps != self.prenorm_2.eps:
            return "c_attn has a bias, or the eps of its norms differ"
        parameters = self._in_order()
        if any(t is None for t in parameters):
            return "a norm or c_proj has no bias"
        return reason_against_dtypes(x, *parameters)


class CRATEGPT(nn.Module):
    r"""Decoder-only CRATE: :math:`p(\mathrm{token}_{t+1} \mid \mathrm{token}_{0..t})`.

    .. math:: x_0 = E_{idx} + P, \qquad x_{l+1} = \mathrm{block}_l(x_l), \qquad
              \mathrm{logits} = x_L E^T

    Args:
        vocab_size: number of tokens; 256 for bytes, 50304 in the published models.
        context: the longest sequence T.
        dim, depth, heads: width, number of blocks, heads of dim / heads.
        final_norm: a LayerNorm ``transformer.ln_f`` before the logits, as nanoGPT and the
            overcomplete crate-lm have it; the published (dim, dim) models have none.
        step_size, lambd: of ISTA.
        device, dtype: of the parameters; "meta" makes none.

    Raises:
        ValueError: heads that do not divide dim, a negative step_size or lambd; in forward,
            sequences of another rank, empty or longer than context.

    Keys: ``transformer.wte.weight``, tied to ``lm_head.weight``, ``transformer.wpe.weight``,
    ``transformer.h.{i}.{prenorm_1,attn,prenorm_2,ista}.*``. One seed gives the published initial
    values. Without dropout.
    """

    # The causal mask that published checkpoints carry; load_checkpoint passes over it.
    ignored_keys = r"transformer\.h\.\d+\.attn\.bias"

    def __init__(
        self,
        *,
        vocab_size: int,
        context: int = 1024,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        final_norm: bool = False,
        step_size: float = 0.1,
        lambd: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.context = context
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, dim, **factory),
                "wpe": nn.Embedding(context, dim, **factory),
                "h": nn.ModuleList(
                    CausalBlock(dim, heads, step_size, lambd, **factory) for _ in range(depth)
                ),
            }
        )
        if final_norm:
            self.transformer["ln_f"] = nn.LayerNorm(dim, **factory)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False, **factory)
        self.transformer["wte"].weight = self.lm_head.weight
        # In the published order; the tied weight is drawn twice there.
        self.apply(_initialise)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 * (2 * depth) ** -0.5)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T), integers -> logits and loss.

        With ``targets`` (B, T), where -1 counts for nothing: logits (B, T, vocab_size) and their
        mean cross-entropy in nats, on :func:`crate_kernels.cross_entropy`. Without: those of the
        last token (B, 1, vocab_size), and None.
        """
        self._check_tokens(idx)
        parts: Any = self.transformer
        x, words = self._embed(idx, targets is not None)
        for block in parts["h"]:
            x = block(x)
        if targets is None:
            return self._logits(x[:, -1:]), None
        return self._with_loss(x, targets, words)

    def _embed(self, idx: Tensor, for_loss: bool) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, dim), and the weight that the head is to multiply with, or None."""
        parts: Any = self.transformer
        places = parts["wpe"].weight[: idx.shape[1]]
        reason = self._reason_against_tied_embedding() if for_loss else ""
        if reason is None:
            padding: Any = parts["wte"].padding_idx
            return tied_embedding(idx, self.lm_head.weight, places, padding_idx=padding)
        if reason and not torch.compiler.is_compiling():
            log_once(f"the embeddings of CRATEGPT run unfused: {reason}")
        return parts["wte"](idx) + places, None

    def _reason_against_tied_embedding(self) -> str | None:
        """Why embeddings and head must be called right now; None if they need not."""
        if _has_any_global_hook():
            return "hooks on all modules are registered"
        parts: Any = self.transformer
        head: Any = self.lm_head
        words = parts["wte"]
        named = (("wte", words, nn.Embedding), ("lm_head", head, nn.Linear))
        reason = reason_against_modules(named)
        if reason is not None:
            return reason
        if words.weight is not head.weight or head.bias is not None:
            return "lm_head has a bias, or a weight of its own"
        if (words.max_norm, words.scale_grad_by_freq, words.sparse) != (None, False, False):
            return "wte has max_norm, scale_grad_by_freq or sparse set"
        return reason_against_dtypes(words.weight, parts["wpe"].weight)

    def _with_loss(self, x: Tensor, targets: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = self._logits(x, words)
        return logits, cross_entropy(logits, targets.view(logits.shape[:-1]), ignore_index=IGNORED)

    def _logits(self, x: Tensor, words: Tensor | None = None) -> Tensor:
        parts: Any = self.transformer
        x = parts["ln_f"](x) if "ln_f" in parts else x
        return self.lm_head(x) if words is None else F.linear(x, words)

    def _check_tokens(self, idx: Tensor) -> None:
        if idx.dim() != 2 or not 0 < idx.shape[1] <= self.context:
            raise ValueError(
                f"CRATEGPT: expected tokens of shape (B, T) with 0 < T <= {self.context}, "
                f"got {tuple(idx.shape)}"
            )

    def new_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache for ``batch`` items of up to ``capacity`` tokens (context by default)."""
        capacity = self.context if capacity is None else capacity
        if not 0 < capacity <= self.context:
            refuse("CRATEGPT.new_cache", f"capacity from 1 to {self.context}", capacity)
        parts: Any = self.transformer
        weight = self.lm_head.weight
        options: dict[str, Any] = {"device": weight.device, "dtype": autocast_dtype(weight)}
        return KVCache(len(parts["h"]), batch, capacity, weight.shape[1], **options)

    @torch.no_grad()
    def prefill(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Tokens (B, T) into an empty cache -> the logits of the last (B, 1, vocab_size)."""
        self._check_tokens(idx)
        _, batch, capacity, _ = cache.layers.shape
        if idx.shape[0] != batch or idx.shape[1] > capacity:
            wanted = f"tokens of shape ({batch}, T) with T <= {capacity}, as the cache has room for"
            refuse("CRATEGPT.prefill", wanted, tuple(idx.shape))
        parts: Any = self.transformer
        x = parts["wte"](idx) + parts["wpe"].weight[: idx.shape[1]]
        for block, layer in zip(parts["h"], cache.layers, strict=True):
            x = block(x, layer)
        cache.lengths.fill_(idx.shape[1])
        return self._logits(x[:, -1:])

    @torch.no_grad()
    def step(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Tokens (B, T), mostly T = 1, that go on from the cache -> logits (B, T, vocab_size).

        Launches the same whatever cache.lengths holds, without a host sync: a step on a GPU can
        be captured in a CUDA graph. Logits of a token beyond the capacity are NaN.
        """
        self._check_tokens(idx)
        parts: Any = self.transformer
        position = cache.lengths[:, None] + torch.arange(idx.shape[1], device=idx.device)
        x = parts["wte"](idx) + parts["wpe"](position.clamp(0, self.context - 1))
        for block, layer in zip(parts["h"], cache.layers, strict=True):
            x = block(x, layer, cache.lengths)
        cache.lengths += idx.shape[1]
        return self._logits(x)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens (B, T) and ``max_new_tokens`` more, each drawn from softmax(logits / temperature).

        With a cache while all tokens fit into ``context``. Beyond it the last ``context`` tokens
        are read again at every step, as published: their positions move, so that nothing of what
        was cached holds.

        Args:
            idx: integers (B, T), T > 0.
            temperature: >= 0; 0 takes the most likely token.
            top_k: draw from this many of the most likely tokens only (more where some are equal).
            generator: of the draws, on the device of idx.

        Returns:
            (B, T + max_new_tokens), idx first.
        """
        check_number("CRATEGPT.generate", "temperature", temperature)
        if top_k is not None and top_k < 1:
            refuse("CRATEGPT.generate", "top_k of at least 1, or None", top_k)
        if idx.dim() != 2 or idx.shape[1] == 0:
            refuse("CRATEGPT.generate", "tokens of shape (B, T) with T > 0", tuple(idx.shape))
        batch, start = idx.shape
        cache = self.new_cache(batch, min(self.context, start + max_new_tokens))
        for length in range(start, start + max_new_tokens):
            if length > self.context:
                logits, _ = self(idx[:, -self.context :])
            elif length == start:
                logits = self.prefill(idx, cache)
            else:
                logits = self.step(idx[:, -1:], cache)
            new = draw(logits[:, -1], temperature, top_k, generator)
            idx = torch.cat((idx, new.to(idx.dtype)), dim=1)
        return idx


def draw(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """A token each (B, 1) of softmax(logits / temperature), logits (B, vocab_size)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def crate_gpt(vocab_size: int = 50304, **overrides: Any) -> CRATEGPT:
    """CRATE-GPT base: width 768, depth 12, 12 heads of 64, context 1024; 60.7 M parameters.

    ``overrides`` are arguments of :class:`CRATEGPT`.
    """
    return CRATEGPT(vocab_size=vocab_size, **overrides)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
