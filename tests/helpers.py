"""What the tests of the ops share: the published formulas, the error criterion, kernel cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HALVES = (torch.float16, torch.bfloat16)

# ---- the published layers, written out


def published_attention(
    w: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    q = torch.stack(w.chunk(heads, dim=-1), dim=1)
    dots = torch.matmul(q, q.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        n = w.shape[1]
        dots = dots + torch.full((n, n), float("-inf"), device=w.device, dtype=dots.dtype).triu(1)
    if window is not None:
        n = w.shape[1]
        near = torch.ones(n, n, device=w.device, dtype=torch.bool).triu(-window).tril(window)
        dots = dots.masked_fill(~near, float("-inf"))
    p = torch.softmax(dots, dim=-1)
    return torch.cat(torch.matmul(p if keep is None else p * keep, q).unbind(1), dim=-1)


def attention_by_sequence(
    w: Tensor,
    *,
    heads: int,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    **options: Any,
) -> Tensor:
    """published_attention of each sequence by itself; zeros past the lengths."""
    if cu_seqlens is not None:
        parts = w.split(cu_seqlens.diff().tolist())
        done = [published_attention(part[None], heads=heads, **options)[0] for part in parts]
        return torch.cat(done)
    n = w.shape[1]
    counts = [n] * w.shape[0] if lengths is None else lengths.tolist()
    done = []
    for item, count in zip(w, counts, strict=True):
        o = published_attention(item[None, :count], heads=heads, **options)[0]
        done.append(F.pad(o, (0, 0, 0, n - count)))
    return torch.stack(done) if done else w.clone()


def mssa_by_sequence(
    x: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """published_mssa of each sequence by itself; zeros past the lengths."""
    o = attention_by_sequence(F.linear(x, w_qkv), lengths=lengths, **options)
    y = o if w_out is None else F.linear(o, w_out, b_out)
    if lengths is None:
        return y
    present = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return torch.where(present[..., None], y, 0.0)


def published_mssa(
    x: Tensor,
    w_qkv: Tensor,
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    o = published_attention(F.linear(x, w_qkv), heads=heads, scale=scale, causal=causal)
    return o if w_out is None else F.linear(o, w_out, b_out)


def published_rotary(
    w: Tensor, cos: Tensor, sin: Tensor, *, heads: int, norm_eps: float | None = None
) -> Tensor:
    """Rotation, then norm, as nanochat-crate has them; its tables are (1, N, 1, head_dim/2)."""
    x = w.unflatten(-1, (heads, -1))
    half = x.shape[-1] // 2
    cos, sin = (t[None, :, None].to(w.dtype) for t in (cos, sin))
    a, b = x[..., :half], x[..., half:]
    y = torch.cat([a * cos + b * sin, a * -sin + b * cos], -1).view(x.shape)
    if norm_eps is not None:
        y = F.rms_norm(y, (y.shape[-1],), eps=norm_eps)
    return y.flatten(-2)


def angles(n: int, head_dim: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin (n, head_dim/2) in float64 of the usual frequencies."""
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turned = torch.outer(torch.arange(start, start + n, dtype=torch.float64), frequencies)
    return turned.cos(), turned.sin()


def published_ista(
    x: Tensor, weight: Tensor, *, step_size: float = 0.1, lambd: float = 0.1
) -> Tensor:
    return torch.relu(_before_relu(x, weight, step_size, lambd))


def _before_relu(x: Tensor, weight: Tensor, step_size: float, lambd: float) -> Tensor:
    pull, push = F.linear(x, weight.T), F.linear(F.linear(x, weight), weight.T)
    return x + (step_size * (pull - push) - step_size * lambd)


def published_overcomplete_ista(
    x: Tensor,
    dictionary: Tensor,
    decoder: Tensor | None = None,
    *,
    step_size: float = 0.1,
    lambd: float = 0.1,
) -> Tensor:
    _, second = _before_relus(x, dictionary, step_size, lambd)
    return F.linear(torch.relu(second), dictionary if decoder is None else decoder)


def _before_relus(
    x: Tensor, dictionary: Tensor, step_size: float, lambd: float
) -> tuple[Tensor, Tensor]:
    first = step_size * F.linear(x, dictionary.T) - step_size * lambd
    z = torch.relu(first)
    lasso = F.linear(F.linear(z, dictionary) - x, dictionary.T)
    return first, z - step_size * lasso - step_size * lambd


def published_decode(
    w: Tensor, cache: Tensor, lengths: Tensor, *, heads: int, scale: float | None = None
) -> Tensor:
    """The last rows of causal attention over each item's whole sequence; NaN for what has no room
    in the cache, which is left alone."""
    o = torch.full_like(w, float("nan"))
    for b, length in enumerate(lengths.tolist()):
        n_new = min(w.shape[1], cache.shape[1] - length)
        if length < 0 or n_new <= 0:
            continue
        whole = torch.cat([cache[b, :length], w[b, :n_new]])[None]
        o[b, :n_new] = published_attention(whole, heads=heads, scale=scale, causal=True)[0, length:]
    return o


# ---- inputs

# Standard deviation of nn.Linear's initial weights times the square root of its inputs.
INITIAL = 3**-0.5


def mssa_inputs(
    batch: int, n: int, heads: int, head_dim: int, width: int | None = None, *, bias: bool = True
) -> dict[str, Tensor]:
    """Arguments of mssa in float64 under its own names: normed tokens, nn.Linear's initial scale.

    (With sharper attention float32 is the exception to the criterion: plain PyTorch subtracts the
    row's largest score before it rounds, every fused backward its log-sum-exp.)
    """
    inner = heads * head_dim
    width = inner if width is None else width
    inputs = {
        "x": torch.randn(batch, n, width, dtype=torch.float64),
        "w_qkv": torch.randn(inner, width, dtype=torch.float64) * INITIAL * width**-0.5,
        "w_out": torch.randn(width, inner, dtype=torch.float64) * INITIAL * inner**-0.5,
    }
    if bias:
        inputs["b_out"] = torch.randn(width, dtype=torch.float64)
    return inputs


def decode_inputs(
    n_new: int, heads: int, head_dim: int, capacity: int, lengths: Iterable[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """w, cache and lengths in float64; rows of the cache that are not in use yet are NaN."""
    counts = torch.tensor(list(lengths), dtype=torch.int32)
    width = heads * head_dim
    w = torch.randn(len(counts), n_new, width, dtype=torch.float64) * INITIAL
    cache = torch.randn(len(counts), capacity, width, dtype=torch.float64) * INITIAL
    cache[torch.arange(capacity) >= counts[:, None]] = float("nan")
    return w, cache, counts


def check_decode(
    decode: Callable[..., Tensor], w: Tensor, cache: Tensor, lengths: Tensor, **options: Any
) -> Tensor:
    """o of ``decode``, which is as close to float64 as plain PyTorch and writes what it should."""
    before, capacity = cache.clone(), cache.shape[1]
    o = decode(w, cache, lengths, **options)
    plain = published_decode(w, before, lengths, **options)
    exact = published_decode(w.double(), before.double(), lengths, **options)
    what = (tuple(w.shape), capacity, w.dtype, options)
    assert torch.equal(o.isnan(), exact.isnan()), what
    assert o.is_contiguous() and o.shape == w.shape, what
    outputs = [{"y": t.nan_to_num()} for t in (o, plain, exact)]
    assert_as_close_as_plain(*outputs, what)
    for b, length in enumerate(lengths.tolist()):
        if 0 <= length < capacity:
            n_new = min(w.shape[1], capacity - length)
            before[b, length : length + n_new] = w[b, :n_new]
    assert torch.equal(cache.nan_to_num(9.0), before.nan_to_num(9.0)), what
    return o


def ista_inputs(*shape: int) -> dict[str, Tensor]:
    """Arguments of ista in float64 under its own names: x of that shape."""
    width = shape[-1]
    return {
        "x": torch.randn(shape, dtype=torch.float64),
        "weight": torch.randn(width, width, dtype=torch.float64) * width**-0.5,
    }


def off_the_kink(
    dy: Tensor, x: Tensor, weight: Tensor, step_size: float = 0.1, lambd: float = 0.1
) -> Tensor:
    """``dy`` without its entries where rounding may decide whether ista's relu passes them."""
    before = _before_relu(x.double(), weight.double(), step_size, lambd)
    return dy.masked_fill(before.abs() < 16 * torch.finfo(x.dtype).eps, 0.0)


def overcomplete_inputs(
    *shape: int, ratio: int = 4, tied: bool = False, width: int | None = None
) -> dict[str, Tensor]:
    """Arguments of overcomplete_ista in float64 under its own names, at its initial scale."""
    d = shape[-1]
    m = ratio * d if width is None else width
    names = ("dictionary",) if tied else ("dictionary", "decoder")
    weights = {name: torch.randn(d, m, dtype=torch.float64) * (2 / m) ** 0.5 for name in names}
    return {"x": torch.randn(shape, dtype=torch.float64), **weights}


def overcomplete_codes(
    x: Tensor, dictionary: Tensor, step_size: float = 0.1, lambd: float = 0.1, **_: Any
) -> list[Tensor]:
    """The published z1 and z2."""
    return [torch.relu(t) for t in _before_relus(x, dictionary, step_size, lambd)]


def on_exact_sides(
    inputs: Mapping[str, Tensor],
    codes: Sequence[Tensor],
    unit: float,
    step_size: float = 0.1,
    lambd: float = 0.1,
) -> Tensor:
    """The tokens whose ``codes``, z1 and z2, are all on the side of their relu that float64 has.

    Only what is within rounding of 0 may be on the other.
    """
    x, dictionary = (inputs[name].double() for name in ("x", "dictionary"))
    same = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    for z, before in zip(codes, _before_relus(x, dictionary, step_size, lambd), strict=True):
        other = (z.view(before.shape) > 0) != (before > 0)
        assert (before.abs()[other] < 16 * unit).all()
        same &= ~other.any(-1)
    return same


def off_the_kinks(
    dout: Tensor, inputs: Mapping[str, Tensor], several: Iterable[Sequence[Tensor]], unit: float
) -> Tensor:
    """``dout`` without the tokens for which rounding decides whether a relu passes some code.

    ``several`` are pairs of z1 and z2: ours and the published.
    """
    kept = torch.stack([on_exact_sides(inputs, codes, unit) for codes in several]).all(0)
    assert kept.any()
    return dout.masked_fill(~kept.unsqueeze(-1), 0.0)


def published_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    w_qkv: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    w_out: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    eps: float = 1e-5,
    step_size: float = 0.1,
    lambd: float = 0.1,
) -> Tensor:
    """A layer as published: two norms, the steps, one residual; the tokens stay in x's dtype."""
    d = (x.shape[-1],)
    h = F.layer_norm(x, d, norm1_weight.to(x.dtype), norm1_bias.to(x.dtype), eps)
    z = x + published_mssa(h, w_qkv, w_out, b_out, heads=heads, scale=scale, causal=causal)
    u = F.layer_norm(z, d, norm2_weight.to(x.dtype), norm2_bias.to(x.dtype), eps)
    return published_ista(u, weight, step_size=step_size, lambd=lambd)


def block_inputs(
    batch: int, n: int, heads: int, head_dim: int, width: int | None = None, *, out: bool = True
) -> dict[str, Tensor]:
    """Arguments of crate_block in float64 under its own names, norms a little off their start."""
    inputs = mssa_inputs(batch, n, heads, head_dim, width)
    d = inputs["x"].shape[-1]
    for i in (1, 2):
        inputs[f"norm{i}_weight"] = 1 + 0.1 * torch.randn(d, dtype=torch.float64)
        inputs[f"norm{i}_bias"] = 0.1 * torch.randn(d, dtype=torch.float64)
    inputs["weight"] = ista_inputs(1, d)["weight"]
    if not out:
        del inputs["w_out"], inputs["b_out"]
    return inputs


# What chained_block asks for and crate_block has as defaults.
OF_A_CHAIN: Mapping[str, Any] = {
    "scale": None, "causal": False, "eps": 1e-5, "step_size": 0.1, "lambd": 0.1,
    "memory": "default", "gram": None, "backend": "auto",
}  # fmt: skip


def off_the_blocks_kink(dy: Tensor, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    """``dy`` without its entries where rounding may decide whether the block's relu passes them."""
    exact = {name: t.double() for name, t in inputs.items()}
    unit = torch.finfo(inputs["w_qkv"].dtype).eps
    near = [
        published_block(**exact, **{**options, "lambd": options.get("lambd", 0.1) + d}) > 0
        for d in (-160 * unit, 160 * unit)  # 16 units of the relu's input, for a step of 0.1
    ]
    return dy.masked_fill(near[0] != near[1], 0.0)


def published_patch_embedding(
    img: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    cls_token: Tensor | None = None,
    pos_embedding: Tensor | None = None,
    *,
    patch_size: tuple[int, int],
    eps: float = 1e-5,
) -> Tensor:
    """The stem as published, patch by patch."""
    ph, pw = patch_size
    rows = [
        img[:, :, y : y + ph, x : x + pw].permute(0, 2, 3, 1).flatten(1)
        for y in range(0, img.shape[2], ph)
        for x in range(0, img.shape[3], pw)
    ]
    p = torch.stack(rows, 1)
    e = F.linear(F.layer_norm(p, p.shape[-1:], norm1_weight, norm1_bias, eps), weight, bias)
    t = F.layer_norm(e, e.shape[-1:], norm2_weight, norm2_bias, eps)
    if cls_token is None:
        return t
    return torch.cat((cls_token.expand(len(t), -1, -1), t), dim=1) + pos_embedding


def patch_embedding_inputs(
    batch: int, channels: int, grid: tuple[int, int], patch_size: tuple[int, int], d: int
) -> dict[str, Tensor]:
    """Arguments of patch_embedding in float64 under its own names; grid: patches up and across."""
    patch = channels * patch_size[0] * patch_size[1]
    size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    inputs = {"img": torch.randn(batch, channels, *size, dtype=torch.float64)}
    inputs["norm1_weight"] = 1 + 0.1 * torch.randn(patch, dtype=torch.float64)
    inputs["norm1_bias"] = 0.1 * torch.randn(patch, dtype=torch.float64)
    inputs["weight"] = torch.randn(d, patch, dtype=torch.float64) * INITIAL * patch**-0.5
    inputs["bias"] = 0.1 * torch.randn(d, dtype=torch.float64)
    inputs["norm2_weight"] = 1 + 0.1 * torch.randn(d, dtype=torch.float64)
    inputs["norm2_bias"] = 0.1 * torch.randn(d, dtype=torch.float64)
    inputs["cls_token"] = torch.randn(1, 1, d, dtype=torch.float64)
    inputs["pos_embedding"] = torch.randn(1, 1 + grid[0] * grid[1], d, dtype=torch.float64)
    return inputs


def without_class_token(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: t for k, t in inputs.items() if k not in ("cls_token", "pos_embedding")}


# ---- running


def results(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    dy: Tensor,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The output "y" and every gradient "d<name>" of ``function``, inputs cast to ``dtype``."""
    leaves = {
        name: t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
        for name, t in inputs.items()
    }
    y = function(**leaves, **options)
    y.backward(dy.to(y.dtype))
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y.detach(), **grads}


class Calls(TorchDispatchMode):
    """How often each op of this package is called."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "crate_kernels":
            self.count[op._opname] = self.count.get(op._opname, 0) + 1
        return op(*args, **(kwargs or {}))


def calls(model: Callable[..., Any], x: Tensor) -> tuple[Any, dict[str, int]]:
    """model(x), and how often it calls which op."""
    with Calls() as seen:
        y = model(x)
    return y, seen.count


def assert_equal_results(got: Mapping[str, Tensor], want: Mapping[str, Tensor], what: Any) -> None:
    """The same names, shapes and dtypes, and values up to float64 rounding."""
    assert got.keys() == want.keys(), what
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


# ---- the error criterion


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root mean square difference."""
    difference = got.detach().double() - exact.detach().double()
    if difference.numel() == 0:
        return 0.0, 0.0
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


def beyond_plain(
    got: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    unit: float | None = None,
) -> list[str]:
    """Every way in which ``got`` is worse than the criterion allows; [] where there is none.

    Outputs at most 2 times, gradients 3 times as far from the float64 results ``exact`` as plain
    PyTorch in the same dtype, largest and RMS. Where plain is nearly exact, ``unit`` counts
    instead (half of it for RMS), relative to the result: by default one in the last place, and
    four for float32, where nothing is rounded on the way and the order of a sum shows.
    """
    assert got.keys() == plain.keys() == exact.keys()
    complaints = []
    for name, want in exact.items():
        if got[name].shape != want.shape or got[name].dtype != plain[name].dtype:
            complaints.append(
                f"{name}: {got[name].dtype} {tuple(got[name].shape)}, plain "
                f"{plain[name].dtype} {tuple(plain[name].shape)}"
            )
            continue
        dtype = plain[name].dtype
        relative = unit or torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
        magnitude = errors(want, torch.zeros_like(want))
        floors = (relative * magnitude[0], relative / 2 * magnitude[1])
        factor = 3.0 if name.startswith("d") else 2.0
        for kind, ours, theirs, floor in zip(
            ("max", "rms"), errors(got[name], want), errors(plain[name], want), floors, strict=True
        ):
            if not ours <= factor * max(theirs, floor):  # NaN never is
                complaints.append(
                    f"{name}: {kind} error {ours:.3g}, plain {theirs:.3g} (floor {floor:.3g}), "
                    f"allowed {factor:g}x"
                )
    return complaints


def assert_as_close_as_plain(
    got: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    what: Any = "",
    unit: float | None = None,
) -> None:
    complaints = beyond_plain(got, plain, exact, unit)
    assert not complaints, f"{what}: " + "; ".join(complaints)


# ---- kernel configurations, as the launchers' own tables give them


def distinct(configs: Iterator[tuple[Any, Any]]) -> list[Any]:
    """The first case of each configuration in (configuration, case) pairs."""
    seen: dict[Any, Any] = {}
    for config, case in configs:
        seen.setdefault(config, case)
    return list(seen.values())
