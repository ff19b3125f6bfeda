"""The published CRATE layers, plain (Attention, FeedForward, OvercompleteFeedForward, and AlphaStep
around two of them) and on our ops (MSSA, ISTA, OvercompleteISTA).

Those on our ops are subclasses that only replace ``forward``: same parameters, attributes, keys and
initial values, and the plain forward to fall back on.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..backends import explain
from ..checks import check_heads, check_number, refuse
from ..ista.op import ista
from ..library import autocast_dtype, autocast_is_on
from ..mssa.op import mssa
from ..overcomplete_ista.op import MEMORY, overcomplete_ista

logger = logging.getLogger("crate_kernels")


class Attention(nn.Module):
    r"""Multi-head subspace self-attention of the published CRATE, one child module per step.

    .. math:: y = [o_1, \dots, o_H]\, W_{out}^T + b, \qquad
              o_h = \mathrm{softmax}(s\, w_h w_h^T)\, w_h, \qquad w = x W_{qkv}^T

    Args:
        dim: width D of the tokens.
        heads: number of heads H.
        dim_head: width of one head; :math:`s` = dim_head**-0.5.
        dropout: probability for the attention map and for the output.
        out_bias: whether the output projection has the bias b; not in CRATE-alpha.
        device, dtype: of the parameters.

    Keys: ``qkv.weight`` (H*dim_head, D), ``to_out.0.weight`` (D, H*dim_head), ``to_out.0.bias``
    (D,); ``to_out`` is an Identity when heads == 1 and dim_head == dim.

    Source: arXiv 2311.13110, section 2, MSSA operator.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        *,
        out_bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        check_heads(type(self).__name__, heads, inner)
        self.heads = heads
        self.scale = dim_head**-0.5
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, inner, bias=False, device=device, dtype=dtype)
        self.to_out: nn.Module = nn.Identity()
        if not (heads == 1 and dim_head == dim):
            out = nn.Linear(inner, dim, bias=out_bias, device=device, dtype=dtype)
            self.to_out = nn.Sequential(out, nn.Dropout(dropout))

    def forward(
        self, x: Tensor, return_attention: bool = False, return_key: bool = False
    ) -> Tensor:
        """x (B, N, D) -> y (B, N, D).

        With ``return_attention`` the attention map (B, heads, N, N) instead, with ``return_key``
        the projected tokens w (B, N, heads*dim_head).
        """
        w = self.qkv(x)
        if return_key:
            return w
        w = w.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attn = self.attend(torch.matmul(w, w.transpose(-1, -2)) * self.scale)
        if return_attention:
            return attn
        out = torch.matmul(self.dropout(attn), w)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scale={self.scale:g}"


class FeedForward(nn.Module):
    r"""ISTA step of the published CRATE, three GEMMs as published.

    .. math:: y = \mathrm{relu}(x + \eta (x W - x W^T W) - \eta \lambda)

    Args:
        dim: width D of the tokens; ``weight`` is (D, D).
        step_size: eta, a number >= 0; or, to be learned, an ``nn.Parameter`` of shape () or (1,),
            or of (D,) with an eta_c for each column.
        lambd: lambda, as eta; 0.1 in CRATE, 0.5 in the encoder of CRATE-MAE.
        device, dtype: of ``weight``.

    Keys: ``weight``, and ``step_size`` and ``lambd`` where they are parameters.

    Source: arXiv 2311.13110, section 2, ISTA block.
    """

    def __init__(
        self,
        dim: int,
        step_size: float | nn.Parameter = 0.1,
        lambd: float | nn.Parameter = 0.1,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check_number_or_parameter(type(self).__name__, "step_size", step_size, dim)
        _check_number_or_parameter(type(self).__name__, "lambd", lambd, dim)
        self.weight = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        self.step_size = step_size
        self.lambd = lambd
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        # In the published order, so that rounding agrees to the last bit, gradients included.
        predicted = F.linear(F.linear(x, self.weight), self.weight.t())
        step = self.step_size * (F.linear(x, self.weight.t()) - predicted)
        return F.relu(x + (step - self.step_size * self.lambd))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {_numbers(step_size=self.step_size, lambd=self.lambd)}"


class OvercompleteFeedForward(nn.Module):
    r"""The two ISTA steps of CRATE-alpha and their decoder, four GEMMs as published.

    .. math:: z_1 = \mathrm{relu}(\eta\, x D - \eta \lambda), \qquad
              z_2 = \mathrm{relu}(z_1 + \eta\, (x - z_1 D^T) D - \eta \lambda), \qquad
              y = z_2 D_1^T

    Args:
        dim: width d of the tokens.
        overcomplete_ratio: the dictionaries ``D`` and ``D1`` are (d, overcomplete_ratio * d).
        eta: step size >= 0.
        lmbda: sparsity penalty lambda >= 0.
        device, dtype: of the parameters.

    Source: arXiv 2405.20299, ODL block.
    """

    def __init__(
        self,
        dim: int,
        overcomplete_ratio: int = 4,
        eta: float = 0.1,
        lmbda: float = 0.1,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_number(type(self).__name__, "eta", eta)
        check_number(type(self).__name__, "lmbda", lmbda)
        shape = (dim, overcomplete_ratio * dim)
        self.eta, self.lmbda = eta, lmbda
        self.D = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.D1 = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        for dictionary in (self.D, self.D1):
            nn.init.kaiming_uniform_(dictionary)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> y (..., d)."""
        # In the published order, so that rounding agrees to the last bit, gradients included.
        threshold = self.eta * self.lmbda
        z1 = F.relu(self.eta * torch.einsum("pd,...p->...d", self.D, x) - threshold)
        error = torch.einsum("dp,...p->...d", self.D, z1) - x
        z2 = F.relu(z1 - self.eta * torch.einsum("pd,...p->...d", self.D, error) - threshold)
        return torch.einsum("dp,...p->...d", self.D1, z2)

    def extra_repr(self) -> str:
        d, m = self.D.shape
        return f"{d}, {m}, eta={self.eta:g}, lmbda={self.lmbda:g}"


class AlphaStep(nn.Module):
    r"""One step of CRATE-alpha, to be added to its input.

    .. math:: y = \gamma \cdot \mathrm{fn}(\mathrm{LN}(x))

    Args:
        dim: width of the tokens.
        fn: the step.
        layer_scale: initial value of gamma (dim,); None: there is no gamma.
        drop_path: probability that a whole item of the batch is left out while training; the
            others are scaled up.
        device, dtype: of the parameters.

    Keys: ``norm.*``, ``fn.*`` and, where there is one, ``layer_scale``.

    Source: arXiv 2405.20299.
    """

    def __init__(
        self,
        dim: int,
        fn: nn.Module,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.fn = fn
        self.drop_path = drop_path
        scale = None
        if layer_scale is not None:
            scale = nn.Parameter(torch.full((dim,), layer_scale, device=device, dtype=dtype))
        self.register_parameter("layer_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, dim) -> the same."""
        y = self.fn(self.norm(x))
        if self.layer_scale is not None:
            y = y * self.layer_scale
        if self.training and self.drop_path > 0:
            kept = 1 - self.drop_path
            y = y * y.new_empty(len(y), 1, 1).bernoulli_(kept).div_(kept)
        return y

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path:g}" if self.drop_path else ""


class MSSA(Attention):
    """:class:`Attention` on :func:`crate_kernels.mssa`: formula, arguments and keys are its own.

    Runs its children one by one, as Attention does, whenever the op would pass over something:
    ``return_attention``; a hook on ``qkv``, ``attend``, ``dropout``, ``to_out`` or its children, or
    on all modules; a child that is parametrized, or no longer the plain ``torch.nn`` layer it was
    built as (LoRA, quantised); an active dropout where no kernel has it, as on the CPU. The log
    names each such reason once. ``torch.compile`` sees the hooks there are when it compiles, as in
    any module.

    Dtypes and errors: as in :func:`crate_kernels.mssa`.
    """

    def forward(
        self, x: Tensor, return_attention: bool = False, return_key: bool = False
    ) -> Tensor:
        if return_attention or return_key:
            return super().forward(x, return_attention, return_key)
        reason = unfused_reason(self) or dropout_reason(self, x)
        if reason is not None:
            if not torch.compiler.is_compiling():
                log_once(f"MSSA runs unfused: {reason}")
            return super().forward(x)
        weight, heads, scale = self.qkv.weight, self.heads, self.scale
        inside, outside = _active_dropouts(self)
        to_out: Any = self.to_out
        if type(to_out) is nn.Identity:
            return mssa(x, weight, heads=heads, scale=scale, dropout=inside)
        out = to_out[0]
        y = mssa(x, weight, out.weight, out.bias, heads=heads, scale=scale, dropout=inside)
        return F.dropout(y, outside) if outside > 0 else y


class ISTA(FeedForward):
    """:class:`FeedForward` on :func:`crate_kernels.ista`: formula, arguments and keys are its own.

    A layer that :func:`crate_kernels.fuse` swapped learns a step size or lambda from when a
    parameter takes its place: ``layer.lambd = nn.Parameter(torch.full((dim,), 0.1))``.

    Dtypes and errors: as in :func:`crate_kernels.ista`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ista(x, self.weight, step_size=self.step_size, lambd=self.lambd)


class OvercompleteISTA(OvercompleteFeedForward):
    """:class:`OvercompleteFeedForward` on :func:`crate_kernels.overcomplete_ista`; formula,
    arguments and keys are its own.

    Dtypes and errors: as in :func:`crate_kernels.overcomplete_ista`.
    """

    _memory = "default"

    @property
    def memory(self) -> str:
        """What is kept for the backward pass, "default" or "low"; may be set."""
        return self._memory

    @memory.setter
    def memory(self, value: str) -> None:
        if value not in MEMORY:
            refuse(type(self).__name__, f"memory to be one of {MEMORY}", repr(value))
        self._memory = value

    def forward(self, x: Tensor) -> Tensor:
        return overcomplete_ista(
            x, self.D, self.D1, step_size=self.eta, lambd=self.lmbda, memory=self.memory
        )


def unfused_reason(layer: MSSA) -> str | None:
    """Why ``layer`` must run its children one by one right now; None if it need not.

    Active dropout is dropout_reason's.
    """
    if _has_any_global_hook():
        return "hooks on all modules are registered"
    children: dict[str, Any] = layer._modules
    to_out = children["to_out"]
    reason = (
        _not_plain("qkv", children["qkv"], nn.Linear)
        or _not_plain("attend", children["attend"], nn.Softmax)
        or _not_plain("dropout", children["dropout"], nn.Dropout)
    )
    if reason is not None:
        return reason
    if children["qkv"].bias is not None:
        return "qkv has a bias"
    if children["attend"].dim != -1:
        return f"attend works along dim {children['attend'].dim}, not -1"
    if type(to_out) is nn.Identity:
        return _not_plain("to_out", to_out, nn.Identity)
    reason = _not_plain("to_out", to_out, nn.Sequential)
    if reason is not None:
        return reason
    if len(to_out._modules) != 2:
        return f"to_out holds {len(to_out._modules)} modules, not Linear and Dropout"
    out, dropout = to_out._modules.values()
    return _not_plain("to_out.0", out, nn.Linear) or _not_plain("to_out.1", dropout, nn.Dropout)


def dropout_reason(layer: MSSA, x: Tensor | None = None) -> str | None:
    """The active dropout for which ``layer``, of plain children, must run them one by one.

    On ``x`` that of the attention map alone, and where no kernel has it: the reference would be
    slower than torch.
    """
    inside, outside = _active_dropouts(layer)
    rate = inside if x is not None else max(inside, outside)
    if rate == 0:
        return None
    if x is not None and rate < 1:
        head_dim = layer.qkv.weight.shape[0] // layer.heads
        if explain("mssa", x, autocast_dtype(x), head_dim, ("dropout",)).chosen != "reference":
            return None
    return f"dropout {rate:g} is active while training"


def _active_dropouts(layer: MSSA) -> tuple[float, float]:
    """The rates at which plain children drop right now: of the attention map, of the output."""
    children: dict[str, Any] = layer._modules
    dropout, to_out = children["dropout"], children["to_out"]
    inside = dropout.p if dropout.training else 0.0
    if type(to_out) is nn.Identity:
        return inside, 0.0
    _, dropout = to_out._modules.values()
    return inside, dropout.p if dropout.training else 0.0


def _not_plain(
    name: str, child: Any, expected: type[nn.Module], article: str = "a plain nn."
) -> str | None:
    """Why calling ``child`` could do other than ``expected.forward`` does."""
    if type(child) is not expected:
        return f"{name} is {type(child).__name__}, not {article}{expected.__name__}"
    if "forward" in child.__dict__:
        return f"the forward of {name} was replaced"
    if has_hooks(child):
        return f"{name} has hooks"
    return None


def has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any((*hooks, module._backward_hooks, module._backward_pre_hooks))


def is_called_plainly(module: nn.Module) -> bool:
    """Whether calling it comes to its class's forward and nothing else."""
    return not (has_hooks(module) or _has_any_global_hook() or "forward" in module.__dict__)


def reason_against_modules(named: Iterable[tuple[str, Any, type[nn.Module]]]) -> str | None:
    """Why calling one of the modules could do other than its kind's forward does."""
    reasons = (_not_plain(name, module, kind, "") for name, module, kind in named)
    return next((reason for reason in reasons if reason is not None), None)


def reason_against_dtypes(x: Tensor, *parameters: Tensor | None) -> str | None:
    """Why an op cannot take them where modules, one by one, might; None if it can."""
    dtypes = {t.dtype for t in (x, *parameters) if t is not None}
    if len(dtypes) > 1 and (torch.float64 in dtypes or not autocast_is_on(x.device.type)):
        return f"x and its parameters are of {len(dtypes)} dtypes that autocast does not unite"
    return None


def _check_number_or_parameter(owner: str, name: str, value: Any, dim: int) -> None:
    """A number >= 0, or a parameter of one element or of (dim,)."""
    if not isinstance(value, nn.Parameter):
        check_number(owner, name, value)
    elif value.shape not in ((), (1,), (dim,)):
        expected = f"{name} a number or a Parameter of shape (), (1,) or (D,) = ({dim},)"
        refuse(owner, expected, tuple(value.shape))


def _numbers(**values: Any) -> str:
    """A number by its value, a tensor by its shape."""
    shown = {k: tuple(v.shape) if isinstance(v, Tensor) else f"{v:g}" for k, v in values.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


@functools.cache
def log_once(message: str) -> None:
    logger.warning("%s", message)
