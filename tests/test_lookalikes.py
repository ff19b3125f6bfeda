"""What only looks like a published layer is left alone and reported, each with its reason."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from layers_of_others import DIM, Attn, Sparse, Wide, like, stack, types_of
from torch import nn

from crate_kernels.nn import fuse


class SubAttn(Attn):
    pass


class SubSparse(Sparse):
    def forward(self, x):
        return super().forward(x)


class AttnThatScales(Attn):
    def forward(self, x):
        b, n, _ = x.shape
        w = self.qkv(x).view(b, n, self.heads, -1).permute(0, 2, 1, 3)
        p = self.dropout(self.attend(w @ w.transpose(-1, -2) * self.scale))
        return self.to_out((p @ w).transpose(1, 2).reshape(b, n, -1)) * 0.5


def stored_map(self, x):
    b, n, _ = x.shape
    w = self.qkv(x).view(b, n, self.heads, -1).permute(0, 2, 1, 3)
    self.last_map = p = self.dropout(self.attend(w @ w.transpose(-1, -2) * self.scale))
    return self.to_out((p @ w).transpose(1, 2).reshape(b, n, -1))


def counted_in_scale(self, x):
    self.scale = self.scale + 0.0
    b, n, _ = x.shape
    w = self.qkv(x).view(b, n, self.heads, -1).permute(0, 2, 1, 3)
    p = self.dropout(self.attend(w @ w.transpose(-1, -2) * self.scale))
    return self.to_out((p @ w).transpose(1, 2).reshape(b, n, -1))


def masked(self, x, mask=None):
    return Attn.forward(self, x)


def causal(self, x):
    b, n, _ = x.shape
    w = self.qkv(x).view(b, n, self.heads, -1).permute(0, 2, 1, 3)
    s = w @ w.transpose(-1, -2) * self.scale
    s = s + torch.full((n, n), float("-inf")).triu(1)
    return self.to_out((self.dropout(self.attend(s)) @ w).transpose(1, 2).reshape(b, n, -1))


def windowed_when_long(self, x):
    if x.shape[1] > 4096:
        x = x * 2
    b, n, _ = x.shape
    w = self.qkv(x).view(b, n, self.heads, -1).permute(0, 2, 1, 3)
    p = self.dropout(self.attend(w @ w.transpose(-1, -2) * self.scale))
    return self.to_out((p @ w).transpose(1, 2).reshape(b, n, -1))


def sliced(self, x):
    b, n, _ = x.shape
    w = self.qkv(x)[:, :4096].view(b, n, self.heads, -1).permute(0, 2, 1, 3)
    p = self.dropout(self.attend(w @ w.transpose(-1, -2) * self.scale))
    return self.to_out((p @ w).transpose(1, 2).reshape(b, n, -1))


def without_dropout(self, x):
    b, n, _ = x.shape
    w = self.qkv(x).view(b, n, self.heads, -1).permute(0, 2, 1, 3)
    p = self.attend(w @ w.transpose(-1, -2) * self.scale)
    return self.to_out((p @ w).transpose(1, 2).reshape(b, n, -1))


def own_scale(self, x):
    b, n, _ = x.shape
    w = self.qkv(x).view(b, n, self.heads, -1).permute(0, 2, 1, 3)
    p = self.dropout(self.attend(w @ w.transpose(-1, -2) * w.shape[-1] ** -0.5))
    return self.to_out((p @ w).transpose(1, 2).reshape(b, n, -1))


def heads_mixed_up(self, x):
    b, n, _ = x.shape
    w = self.qkv(x).view(b, n, -1, self.heads).permute(0, 3, 1, 2)
    p = self.dropout(self.attend(w @ w.transpose(-1, -2) * self.scale))
    return self.to_out((p @ w).transpose(1, 2).reshape(b, n, -1))


def attended_twice(self, x):
    b, n, _ = x.shape
    w = self.qkv(x).view(b, n, self.heads, -1).permute(0, 2, 1, 3)
    p = self.dropout(self.attend(self.attend(w @ w.transpose(-1, -2) * self.scale)))
    return self.to_out((p @ w).transpose(1, 2).reshape(b, n, -1))


def keys_only_swapped_flag(self, x, return_attention=False, return_key=False):
    w = self.qkv(x)
    if return_attention:
        return w
    return self.to_out(w)


def logged(self, x):
    print("attention")
    return self.to_out(self.qkv(x))


ATTENTION = {
    "stored_map": (stored_map, "uses last_map"),
    "counted_in_scale": (counted_in_scale, "does more than compute .STORE_ATTR"),
    "masked": (masked, "takes other arguments"),
    "causal": (causal, "uses float, full, triu"),
    "windowed_when_long": (windowed_when_long, "does more than compute"),
    "sliced": (sliced, "does more than compute"),
    "without_dropout": (without_dropout, "computes something else"),
    "own_scale": (own_scale, "does more than compute"),
    "heads_mixed_up": (heads_mixed_up, "computes something else"),
    "attended_twice": (attended_twice, "computes something else"),
    "flags": (keys_only_swapped_flag, "computes something else"),
    "logged": (logged, "uses print"),
    "no_grad": (torch.no_grad()(Attn.forward), "decorated|other arguments"),
    "keyword_only": (lambda self, x, *, scale=1.0: x, "takes other arguments"),
    "fails": (lambda self, x: self.qkv(x) @ x, "fails on a trial input: RuntimeError"),
}


def linear_map(self, x):
    return F.linear(x, self.weight)


def leaky(self, x):
    step = F.linear(x - F.linear(x, self.weight), self.weight.t())
    return F.leaky_relu(x + self.step_size * step - self.step_size * self.lambd)


def no_threshold(self, x):
    step = F.linear(x - F.linear(x, self.weight), self.weight.t())
    return F.relu(x + self.step_size * step)


def fixed_step(self, x):
    step = F.linear(x - F.linear(x, self.weight), self.weight.t())
    return F.relu(x + 0.1 * step - 0.1 * self.lambd)


def transposed(self, x):
    step = F.linear(x - F.linear(x, self.weight.t()), self.weight)
    return F.relu(x + self.step_size * step - self.step_size * self.lambd)


def in_place(self, x):
    step = F.linear(x - F.linear(x, self.weight), self.weight.t())
    x += self.step_size * step - self.step_size * self.lambd
    return F.relu(x)


def when_training(self, x):
    step = F.linear(x - F.linear(x, self.weight), self.weight.t())
    if self.training:
        return F.relu(x + self.step_size * step)
    return F.relu(x + self.step_size * step - self.step_size * self.lambd)


FEED_FORWARD = {
    "decoder": (linear_map, "computes something else than the published ISTA"),
    "leaky": (leaky, "uses leaky_relu"),
    "no_threshold": (no_threshold, "computes something else"),
    "fixed_step": (fixed_step, "computes something else"),
    "transposed": (transposed, "computes something else"),
    "in_place": (in_place, "writes into its input"),
    "when_training": (when_training, "uses training"),
}


def tied(self, x):
    z = F.relu(self.eta * (x @ self.D - self.lmbda))
    z = F.relu(z + self.eta * ((x - F.linear(z, self.D)) @ self.D) - self.eta * self.lmbda)
    return F.linear(z, self.D)


def one_step(self, x):
    return F.linear(F.relu(self.eta * (x @ self.D - self.lmbda)), self.D1)


def three_steps(self, x):
    z = F.relu(self.eta * (x @ self.D - self.lmbda))
    z = F.relu(z + self.eta * ((x - F.linear(z, self.D)) @ self.D) - self.eta * self.lmbda)
    z = F.relu(z + self.eta * ((x - F.linear(z, self.D)) @ self.D) - self.eta * self.lmbda)
    return F.linear(z, self.D1)


def decoupled(self, x):
    z = F.relu(self.eta * (x @ self.D - self.lmbda))
    z = F.relu(z + self.eta * ((x - F.linear(z, self.D1)) @ self.D) - self.eta * self.lmbda)
    return F.linear(z, self.D1)


def with_residual(self, x):
    z = F.relu(self.eta * (x @ self.D - self.lmbda))
    z = F.relu(z + self.eta * ((x - F.linear(z, self.D)) @ self.D) - self.eta * self.lmbda)
    return x + F.linear(z, self.D1)


def thresholded_once(self, x):
    z = F.relu(self.eta * (x @ self.D - self.lmbda))
    z = F.relu(z + self.eta * ((x - F.linear(z, self.D)) @ self.D))
    return F.linear(z, self.D1)


def fixed_eta(self, x):
    z = F.relu(0.1 * (x @ self.D - self.lmbda))
    z = F.relu(z + 0.1 * ((x - F.linear(z, self.D)) @ self.D) - 0.1 * self.lmbda)
    return F.linear(z, self.D1)


def kept_code(self, x):
    self.code = F.relu(self.eta * (x @ self.D - self.lmbda))
    return F.linear(self.code, self.D1)


OVERCOMPLETE = {
    "tied": (tied, "computes something else than the published OvercompleteISTA"),
    "one_step": (one_step, "computes something else"),
    "three_steps": (three_steps, "computes something else"),
    "decoupled": (decoupled, "computes something else"),
    "with_residual": (with_residual, "computes something else"),
    "thresholded_once": (thresholded_once, "computes something else"),
    "fixed_eta": (fixed_eta, "computes something else"),
    "kept_code": (kept_code, "uses code"),
}


def refused(model, words):
    """Fusing leaves this model exactly as it was, and says so in these words."""
    before = types_of(model)
    report = fuse(model)
    assert not report
    assert len(report.skipped) == 1
    assert re.search(words, report.skipped[0].reason), report.skipped[0].reason
    assert report.skipped[0].reason in str(report)
    assert types_of(model) == before


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_lookalikes_are_left_alone(name):
    forward, words = ATTENTION[name]
    refused(like(Attn, forward=forward)(), words)


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_feed_forward_lookalikes_are_left_alone(name):
    forward, words = FEED_FORWARD[name]
    refused(like(Sparse, forward=forward)(), words)


@pytest.mark.parametrize("name", OVERCOMPLETE)
def test_overcomplete_lookalikes_are_left_alone(name):
    forward, words = OVERCOMPLETE[name]
    refused(like(Wide, forward=forward)(), words)


def test_subclasses_are_left_alone():
    refused(SubAttn(), "SubAttn is a subclass of Attn")
    refused(SubSparse(), "SubSparse is a subclass of Sparse")
    refused(AttnThatScales(), "AttnThatScales is a subclass of Attn")


def test_instances_with_their_own_forward_are_left_alone():
    for layer in (Attn(), Sparse()):
        forward = layer.forward
        layer.forward = lambda x, forward=forward: forward(x) * 2
        refused(layer, "the forward of this instance was replaced")
        want = forward(torch.ones(1, 2, DIM)) * 2
        assert torch.equal(layer(torch.ones(1, 2, DIM)), want)


def test_classes_that_do_more_are_left_alone():
    refused(like(Attn, train=lambda self, mode=True: self)(), "Lookalike defines .*train")
    refused(like(Sparse, __call__=lambda self, x: x)(), "Lookalike defines .*__call__")
    refused(like(Sparse, reset=lambda self: None)(), "Lookalike defines .*reset")


def altered(layer, **changes):
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


ALTERED = {
    "attend": (lambda: altered(Attn(), attend=nn.Identity()), "expected attend to be nn.Softmax"),
    "attend dim": (lambda: altered(Attn(), attend=nn.Softmax(dim=-2)), "along dim -1, got dim -2"),
    "qkv bias": (lambda: altered(Attn(), qkv=nn.Linear(DIM, DIM)), "expected qkv without bias"),
    "lora": (lambda: altered(Attn(), qkv=nn.Sequential(nn.Linear(DIM, DIM))), "got Sequential"),
    "width": (lambda: altered(Attn(), qkv=nn.Linear(DIM, 24, bias=False)), "to map 24 to 12"),
    "heads": (lambda: altered(Attn(), heads=5), "expected heads to divide .*12, got 5"),
    "scale": (lambda: altered(Attn(), scale=torch.ones(())), "scale to be a float > 0, got Tensor"),
    "sign": (lambda: altered(Attn(), scale=-1.0), "scale to be a float > 0, got -1.0"),
    "child": (lambda: altered(Attn(), norm=nn.LayerNorm(4)), "got .*norm"),
    "parameter": (lambda: altered(Attn(), temperature=nn.Parameter(torch.ones(3))), "temperature"),
    "out": (lambda: altered(Attn(), to_out=nn.Linear(DIM, DIM)), "to be nn.Sequential, got Linear"),
    "long out": (
        lambda: altered(Attn(), to_out=nn.Sequential(nn.Linear(DIM, DIM))),
        "expected to_out of 2 modules",
    ),
    "not square": (
        lambda: altered(Sparse(), weight=nn.Parameter(torch.ones(4, 8))),
        r"weight of shape \(D, D\), got \(4, 8\)",
    ),
    "learned step": (
        lambda: altered(like(Sparse)(), step_size=torch.tensor(0.1)),
        "step_size to be a float >= 0, got Tensor",
    ),
    "dictionaries apart": (
        lambda: altered(Wide(), D1=nn.Parameter(torch.ones(4, 8))),
        r"D and D1 of one shape \(d, m\), got \(12, 48\) and \(4, 8\)",
    ),
    "another child": (lambda: altered(Wide(), more=nn.Linear(2, 2)), "got .'D', 'D1', 'more"),
    "learned eta": (lambda: altered(Wide(), eta=nn.Parameter(torch.ones(1))), "'D', 'D1', 'eta'"),
    "negative eta": (lambda: altered(Wide(), eta=-0.1), "eta to be a float >= 0, got -0.1"),
    "negative lambd": (lambda: altered(Sparse(), lambd=-0.1), "lambd to be a float >= 0, got -0.1"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_altered_instances_are_left_alone(name):
    build, words = ALTERED[name]
    refused(build(), words)


def test_lookalikes_beside_the_real_ones():
    decoder = like(Sparse, forward=linear_map)
    model = nn.ModuleList([stack(), nn.ModuleList(decoder() for _ in range(3)), nn.Linear(2, 2)])
    report = fuse(model)
    assert (len(report.replaced), len(report.skipped)) == (4, 3)
    assert str(report).splitlines() == [
        "replaced 2 MSSA, 2 ISTA; skipped 3",
        "  skipped: 3 ISTA: its forward computes something else than the published ISTA "
        "(1.0 and 2 more)",
    ]
    assert str(report.skipped[0]).startswith("1.0 (ISTA): its forward computes")
