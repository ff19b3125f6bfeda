"""The published CRATE language model (CRATE-GPT, crate-lm), on this library's causal ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_heads
from ..mssa.op import mssa
from ..nn.layers import ISTA

IGNORED = -1  # a target that counts for nothing


class CausalMSSA(nn.Module):
    r"""MSSA in which token i sees tokens 0..i only, on :func:`crate_kernels.mssa`.

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

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, dim) -> y (B, T, dim)."""
        out = self.c_proj
        return mssa(x, self.c_attn.weight, out.weight, out.bias, heads=self.heads, causal=True)


class CausalBlock(nn.Module):
    """``x = x + MSSA(LN(x))``, ``x = ISTA(LN(x))``; x is (B, T, dim).

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

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.prenorm_1(x))
        return self.ista(self.prenorm_2(x))


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
        mean cross-entropy in nats. Without: those of the last token (B, 1, vocab_size), and None.
        """
        if idx.dim() != 2 or not 0 < idx.shape[1] <= self.context:
            raise ValueError(
                f"CRATEGPT: expected tokens of shape (B, T) with 0 < T <= {self.context}, "
                f"got {tuple(idx.shape)}"
            )
        parts: Any = self.transformer
        x = parts["wte"](idx) + parts["wpe"].weight[: idx.shape[1]]
        for block in parts["h"]:
            x = block(x)
        if targets is None:
            x = x[:, -1:]
        if "ln_f" in parts:
            x = parts["ln_f"](x)
        logits = self.lm_head(x)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        return logits, loss


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
