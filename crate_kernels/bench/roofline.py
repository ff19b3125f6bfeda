"""How fast a workload could be: its operations and bytes, over what the device can do.

floor = max(flops / matmul rate, bytes / bandwidth, exponentials / exponential rate)

T = batch*tokens rows, D = width, I = heads*head_dim, pairs = batch*heads*tokens^2 (causal:
tokens*(tokens+1)/2). A product of an m x k and a k x n matrix is 2 m k n operations.

    tied attention   forward   2 products of pairs*head_dim, one exponential a pair; w, o
                     backward  5 products, one exponential a pair; w, o, do, dw
    masks            the same with pairs and rows of the sequences' own lengths
    mssa             forward   attention + 2 GEMMs of T*D*I; x, y, weights
                     backward  attention + 4 GEMMs; x, dy, dx, weights, their gradients
    ista             forward   1 GEMM of T*D*D (G is constant without a gradient); x, y, W
                     backward  2 GEMMs + G and W(M + M^T), each min(T, D)*D*D; x, y, dy, dx, W, dW
    overcomplete     forward   4 GEMMs of T*D*4D; x, y, D, D1
                     backward  8 GEMMs; x, dy, dx, D, D1, their gradients
    decode           2 products of pairs*head_dim, pairs = batch*heads*tokens; the cache, w twice, o
    encoder          a few layers of mssa + ista; x, y, weights, their gradients
    model            depth * (mssa + ista or overcomplete, or a decoder's GEMM) + stem + head;
                     images, parameters, logits; a training step: AdamW reads 4 and writes 3
                     float32 tensors a parameter

Bytes count each tensor once: what stays inside an op need never leave the chip.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .masks import lengths_of
from .workloads import CLASSES, ENCODER_DEPTH, MODELS, RATIO, Workload


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float
    exponentials: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.exponentials + other.exponentials,
        )

    def times(self, n: int) -> Cost:
        return Cost(n * self.flops, n * self.bytes, n * self.exponentials)


def cost(w: Workload) -> Cost:
    forward, backward = _PARTS[w.suite](w)
    if w.mode == "forward":
        return forward
    return backward if w.mode == "backward" else forward + backward


def _attention(w: Workload) -> tuple[Cost, Cost]:
    lengths = lengths_of(w) if w.sequences else (w.tokens,) * w.batch
    pairs = w.heads * sum(n * (n + 1) / 2 if w.causal else n**2 for n in lengths)
    tensor = sum(lengths) * w.heads * w.head_dim * w.storage_dtype.itemsize
    product = 2 * pairs * w.head_dim
    return Cost(2 * product, 2 * tensor, pairs), Cost(5 * product, 4 * tensor, pairs)


def _mssa(w: Workload) -> tuple[Cost, Cost]:
    attention = [replace_bytes(part, 0) for part in _attention(w)]
    rows, inner, size = w.batch * w.tokens, w.heads * w.head_dim, w.storage_dtype.itemsize
    gemm = 2 * rows * w.width * inner
    x, weights = rows * w.width * size, 2 * w.width * inner * size
    y = rows * w.width * w.torch_dtype.itemsize
    return (
        attention[0] + Cost(2 * gemm, x + y + weights),
        attention[1] + Cost(4 * gemm, 2 * x + y + 2 * weights),
    )


def _ista(w: Workload) -> tuple[Cost, Cost]:
    rows, size = w.batch * w.tokens, w.storage_dtype.itemsize
    gemm = 2 * rows * w.width**2
    square = 2 * min(rows, w.width) * w.width**2
    x, weight = rows * w.width * size, w.width**2 * size
    return Cost(gemm, 2 * x + weight), Cost(2 * gemm + 2 * square, 4 * x + 2 * weight)


def _overcomplete(w: Workload) -> tuple[Cost, Cost]:
    rows, size = w.batch * w.tokens, w.storage_dtype.itemsize
    gemm = 2 * rows * w.width * RATIO * w.width
    x, weights = rows * w.width * size, 2 * RATIO * w.width**2 * size
    y = rows * w.width * w.torch_dtype.itemsize
    return Cost(4 * gemm, x + y + weights), Cost(8 * gemm, 2 * x + y + 2 * weights)


def _decode(w: Workload) -> tuple[Cost, Cost]:
    pairs, row = w.batch * w.heads * w.tokens, w.batch * w.heads * w.head_dim
    moved = (w.tokens - 1 + 3) * row * w.torch_dtype.itemsize  # w is read and written to the cache
    return Cost(2 * 2 * pairs * w.head_dim, moved, pairs), Cost(0, 0)


def _model(w: Workload) -> tuple[Cost, Cost]:
    shape = MODELS[w.model]
    dictionary = _overcomplete if shape.overcomplete else _ista
    head_dim = shape.width // shape.heads
    layer = replace(w, width=shape.width, heads=shape.heads, head_dim=head_dim, tokens=shape.tokens)
    rows, patch_width = w.batch * (shape.tokens - 1), 3 * shape.patch**2
    columns = rows * patch_width + w.batch * CLASSES
    if shape.decoder:
        columns = (rows + w.batch * shape.tokens) * patch_width
    if shape.context:
        causal = w.model == "crate_gpt"  # of BERT as if there were no padding
        layer, rows, patch_width = replace(layer, causal=causal), w.batch * shape.context, 2
        columns = rows * shape.vocabulary
    stem_and_head = 2 * columns * shape.width
    parameters, images = 4.0 * shape.parameters, 4 * rows * patch_width
    parts = []
    for i, (gemms, traffic) in enumerate(((1, 1), (2, 7))):
        layers = (_mssa(layer)[i] + dictionary(layer)[i]).times(shape.depth + shape.decoder)
        ends = Cost(gemms * stem_and_head, traffic * parameters + images)
        parts.append(replace_bytes(layers, 0) + ends)
    return parts[0], parts[1]


def _encoder(w: Workload) -> tuple[Cost, Cost]:
    """x, y, the weights and their gradients, once."""
    weights = 4.0 * ENCODER_DEPTH * w.width * (2 * w.heads * w.head_dim + w.width)
    x = w.batch * w.tokens * w.width * w.storage_dtype.itemsize
    parts = [(_mssa(w)[i] + _ista(w)[i]).times(ENCODER_DEPTH) for i in range(2)]
    return replace_bytes(parts[0], 2 * x + weights), replace_bytes(parts[1], 3 * x + 2 * weights)


def replace_bytes(part: Cost, count: float) -> Cost:
    return Cost(part.flops, count, part.exponentials)


_PARTS = {
    "core": _attention,
    "mssa": _mssa,
    "ista": _ista,
    "masks": _attention,
    "overcomplete": _overcomplete,
    "decode": _decode,
    "model": _model,
    "encoder": _encoder,
}


@dataclass(frozen=True)
class Ceilings:
    """What a device can do per second: bytes copied (read + written), matmul flops, exponentials.

    exponentials is inf where they are not counted.
    """

    bandwidth: float
    flops: float
    exponentials: float = float("inf")
    source: str = "table"


# Measured rates; exponentials computed: 16 a clock on each multiprocessor.
KNOWN = {
    ("NVIDIA H200", torch.bfloat16): Ceilings(4.25e12, 790e12, 3.7e12),
    ("NVIDIA H200", torch.float16): Ceilings(4.25e12, 790e12, 3.7e12),
}


def floor_us(w: Workload, ceilings: Ceilings) -> float:
    c = cost(w)
    return 1e6 * max(
        c.flops / ceilings.flops,
        c.bytes / ceilings.bandwidth,
        c.exponentials / ceilings.exponentials,
    )


def ceilings_for(device: torch.device, dtype: torch.dtype, measure: bool = False) -> Ceilings:
    """From the table, or measured here by a copy and a GEMM."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if not measure and (name, dtype) in KNOWN:
        return KNOWN[name, dtype]
    cuda = device.type == "cuda"
    source = torch.empty(1 << (29 if cuda else 25), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if cuda else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return Ceilings(
        bandwidth=2 * source.numel() / _seconds(lambda: target.copy_(source), device),
        flops=2 * size**3 / _seconds(lambda: a @ b, device),
        exponentials=_exponential_rate(device),
        source="measured",
    )


def _exponential_rate(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    properties = torch.cuda.get_device_properties(device)
    clock_khz = getattr(properties, "clock_rate", 0)
    return 16e3 * properties.multi_processor_count * clock_khz or float("inf")


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The fastest of a few, after a warm-up."""
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])
