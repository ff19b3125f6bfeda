"""What overcomplete_ista asks of the CUDA kernels, by a stand-in that computes on the host."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
from helpers import (
    HALVES,
    assert_as_close_as_plain,
    off_the_kinks,
    overcomplete_codes,
    overcomplete_inputs,
    published_overcomplete_ista,
    results,
)

from crate_kernels import backends, cuda_extension, overcomplete_ista
from crate_kernels.overcomplete_ista import cuda_kernels
from crate_kernels.overcomplete_ista.op import MEMORY

OPS = torch.ops.crate_kernels
DTYPES = {name: dtype for dtype, name in cuda_extension.DTYPES.items()}


def at(pointer, shape, dtype):
    size = math.prod(shape) * dtype.itemsize
    assert pointer % 16 == 0
    memory = (ctypes.c_char * size).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def bits_at(pointer, rows, m):
    """Of the blocks that the mask comes in: as it is laid out here, row by row."""
    shape = (-(-rows // 128) * 128, -(-m // 64) * 64)
    size = math.prod(shape) // 8
    assert size == cuda_extension.mask_bytes(rows, m)
    return at(pointer, (size,), torch.uint8), shape


class OnHost:
    """An extension whose launchers do what csrc/crate_kernels.h says of them."""

    def __init__(self):
        self.calls = []

    def overcomplete_code(
        self, *, a, dictionary, c, z, mask, rows, d, m, step_size, threshold, dtype, stream
    ):
        self.calls.append(("code", c != 0, mask != 0))
        dtype = DTYPES[dtype]
        total = step_size * (
            at(a, (rows, d), dtype).float() @ at(dictionary, (d, m), dtype).float()
        )
        if c:
            total += at(c, (rows, m), dtype)
        z = at(z, (rows, m), dtype).copy_(torch.relu(total - threshold))
        if mask:
            bits, shape = bits_at(mask, rows, m)
            whole = np.zeros(shape, bool)
            whole[:rows, :m] = (z > 0).numpy()
            bits.copy_(torch.from_numpy(np.packbits(whole)))

    def overcomplete_code_gradient(
        self, *, a, dictionary, c, mask, e, rows, d, m, alpha, dtype, stream
    ):
        self.calls.append(("code gradient", c != 0))
        dtype = DTYPES[dtype]
        total = alpha * (at(a, (rows, d), dtype).float() @ at(dictionary, (d, m), dtype).float())
        if c:
            total += at(c, (rows, m), dtype)
        bits, shape = bits_at(mask, rows, m)
        kept = torch.from_numpy(np.unpackbits(bits.numpy())).view(shape)[:rows, :m].bool()
        at(e, (rows, m), dtype).copy_(total.masked_fill(~kept, 0))

    def overcomplete_decoded_sum(self, *, z, dictionary, c, out, rows, d, m, alpha, dtype, stream):
        self.calls.append(("decoded sum", alpha))
        dtype = DTYPES[dtype]
        total = alpha * (at(z, (rows, m), dtype).float() @ at(dictionary, (d, m), dtype).float().T)
        at(out, (rows, d), dtype).copy_(at(c, (rows, d), dtype) + total)


@pytest.fixture(autouse=True)
def on_host(monkeypatch):
    found = OnHost()
    monkeypatch.setattr(cuda_extension, "load", lambda: found)
    monkeypatch.setattr(cuda_kernels, "stream_of", lambda t: 0)
    monkeypatch.setattr(backends, "_against_cuda_on", lambda *device: ())
    yield found
    monkeypatch.undo()  # before other tests clear the cache of load


def by_cuda(x, dictionary, decoder=None, c_dtype=None, **options):
    with torch.autocast("cpu", c_dtype or torch.bfloat16, enabled=c_dtype is not None):
        return overcomplete_ista(x, dictionary, decoder, **options, backend="cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("x_dtype", ["own", "float32"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("rows", "d", "m"), [(300, 24, 96), (5, 8, 8), (127, 16, 72)])
def test_as_close_as_plain_pytorch(dtype, x_dtype, tied, rows, d, m):
    wide = x_dtype == "float32"
    inputs = overcomplete_inputs(rows, d, tied=tied, width=m)
    inputs = {k: t.to(torch.float32 if wide else dtype) for k, t in inputs.items()}
    c_dtype = dtype if wide else None

    def plain(function):
        def call(**given):
            with torch.autocast("cpu", dtype, enabled=wide):
                return function(**given)

        return call

    xc, unit = inputs["x"].to(dtype), torch.finfo(dtype).eps
    given = (inputs["x"], xc, inputs["dictionary"], None, 0.1, 0.1, "default", "cuda")
    codes = (OPS.overcomplete_ista(*given)[2:4], plain(overcomplete_codes)(**inputs))
    dout = off_the_kinks(torch.randn(rows, d).to(dtype), inputs, codes, unit)
    got = results(by_cuda, inputs, dout, c_dtype=c_dtype)
    assert got["y"].dtype == dtype and got["dx"].dtype == inputs["x"].dtype
    want = results(plain(published_overcomplete_ista), inputs, dout)
    exact = results(published_overcomplete_ista, inputs, dout, torch.float64)
    assert_as_close_as_plain(got, want, exact, unit=unit)
    low = results(by_cuda, inputs, dout, c_dtype=c_dtype, memory="low")
    assert all(torch.equal(low[name], t) for name, t in got.items())


@pytest.mark.parametrize("memory", MEMORY)
def test_what_is_launched(memory, on_host):
    inputs = {k: t.bfloat16().requires_grad_() for k, t in overcomplete_inputs(9, 8).items()}
    y = by_cuda(**inputs, memory=memory)
    kept = memory == "default"
    forward = [("code", False, kept), ("decoded sum", -1.0), ("code", True, kept)]
    assert on_host.calls == forward
    y.sum().backward()
    again = [] if kept else [("code", False, True), ("code", True, True)]
    backward = [("code gradient", False), ("code gradient", True), ("decoded sum", 1.0)]
    assert on_host.calls[3:] == again + backward
    on_host.calls.clear()
    with torch.no_grad():
        by_cuda(**inputs, memory=memory)
    assert on_host.calls == [("code", False, False), ("decoded sum", -1.0), ("code", True, False)]


@pytest.mark.parametrize("memory", ["default", "low", "none"])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
def test_opcheck(memory, x_dtype, tied):
    inputs = {k: t.to(x_dtype) for k, t in overcomplete_inputs(2, 5, 8, tied=tied).items()}
    x, dictionary, decoder = (inputs.get(name) for name in ("x", "dictionary", "decoder"))
    xc, rest = x.to(torch.bfloat16, copy=True), (0.1, 0.2, memory, "cuda")
    torch.library.opcheck(OPS.overcomplete_ista, (x, xc, dictionary, decoder, *rest))
    if memory == "none":
        return
    out, *kept = OPS.overcomplete_ista(x, xc, dictionary, decoder, *rest)
    assert kept[-1].shape == (2, 1024 if memory == "default" else 0)
    saved = (torch.randn_like(out), xc, *kept, dictionary, decoder)
    for wants in ([True, True, not tied], [True, False, False], [False, True, False]):
        options = (wants, 0.1, 0.2, x.dtype, memory, "cuda")
        torch.library.opcheck(OPS.overcomplete_ista_backward, (*saved, *options))


def unaligned(t):
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("change", [unaligned, lambda t: t.mT.contiguous().mT])
def test_what_bulk_copies_cannot_read_is_copied(change):
    inputs = {k: t.bfloat16() for k, t in overcomplete_inputs(19, 16).items()}
    dout = torch.randn(19, 16).bfloat16()
    want = results(by_cuda, inputs, dout)
    leaves = {k: change(t).detach().requires_grad_() for k, t in inputs.items()}
    y = by_cuda(**leaves)
    y.backward(change(dout))
    assert torch.equal(y, want["y"])
    assert all(torch.equal(leaf.grad, want[f"d{k}"]) for k, leaf in leaves.items())


@pytest.mark.parametrize("memory", MEMORY)
def test_an_empty_batch_launches_nothing(memory, on_host):
    inputs = {k: t.bfloat16() for k, t in overcomplete_inputs(0, 3, 8).items()}
    got = results(by_cuda, inputs, torch.empty(0, 3, 8).bfloat16(), memory=memory)
    assert got["y"].shape == got["dx"].shape == (0, 3, 8) and not on_host.calls
    assert not got["ddictionary"].any() and not got["ddecoder"].any()
