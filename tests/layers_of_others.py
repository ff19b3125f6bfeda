"""The published layers as somebody else would have written them, for the tests of fuse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

DIM, HEADS, DIM_HEAD = 12, 3, 4


class Attn(nn.Module):
    """The attributes of the published attention; forward with views instead of einops."""

    def __init__(self, dim=DIM, heads=HEADS, dim_head=DIM_HEAD, dropout=0.0):
        super().__init__()
        inner = heads * dim_head
        self.heads, self.scale = heads, dim_head**-0.5
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, inner, bias=False)
        out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))
        self.to_out = nn.Identity() if heads == 1 and dim_head == dim else out

    def forward(self, x):
        b, n, _ = x.shape
        w = self.qkv(x).view(b, n, self.heads, -1).permute(0, 2, 1, 3)
        p = self.dropout(self.attend(w @ w.transpose(-1, -2) * self.scale))
        return self.to_out((p @ w).transpose(1, 2).reshape(b, n, -1))


class Sparse(nn.Module):
    """The attributes of the published FeedForward."""

    def __init__(self, dim=DIM, step_size=0.1, lambd=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim) / dim**0.5)
        self.step_size, self.lambd = step_size, lambd

    def forward(self, x):
        rest = x - F.linear(x, self.weight)
        step = F.linear(rest, self.weight.t())
        return F.relu(x + self.step_size * step - self.step_size * self.lambd)


def like(base, **members):
    """A class of its own (no subclass) with the __init__ and forward of ``base`` but for these."""

    def init(self, *args, **kwargs):
        nn.Module.__init__(self)
        self.__dict__.update(base(*args, **kwargs).__dict__)

    defaults = {"__init__": init, "forward": base.forward, "__module__": __name__}
    return type("Lookalike", (nn.Module,), {**defaults, **members})


class Block(nn.Module):
    def __init__(self, attn=Attn, ff=Sparse, **kwargs):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(DIM), attn(**kwargs)
        self.norm2, self.ff = nn.LayerNorm(DIM), ff()

    def forward(self, x):
        return self.ff(self.norm2(x + self.attn(self.norm1(x))))


def stack(depth=2, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(**kwargs) for _ in range(depth))).to(dtype)


def tokens(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(2, 5, DIM, dtype=dtype)


def types_of(model):
    return [type(m) for m in model.modules()]


class Wide(nn.Module):
    """The attributes of the published overcomplete block; forward without einsum."""

    def __init__(self, dim=DIM, eta=0.1, lmbda=0.1):
        super().__init__()
        self.D = nn.Parameter(torch.randn(dim, 4 * dim) / (2 * dim) ** 0.5)
        self.D1 = nn.Parameter(torch.randn(dim, 4 * dim) / (2 * dim) ** 0.5)
        self.eta, self.lmbda = eta, lmbda

    def forward(self, x):
        z = F.relu(self.eta * (x @ self.D - self.lmbda))
        rest = x - F.linear(z, self.D)
        z = F.relu(z + self.eta * (rest @ self.D) - self.eta * self.lmbda)
        return F.linear(z, self.D1)
