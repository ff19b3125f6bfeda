"""Overcomplete ISTA by the CUDA kernels of csrc/overcomplete_ista: float16 and bfloat16, compute
capability 9.0.

    forward   z1 = relu(eta x D - t), the bits of z1 > 0          overcomplete_code
              r  = x - z1 D^T                                     overcomplete_decoded_sum
              z2 = relu(z1 + eta r D - t), the bits of z2 > 0     overcomplete_code
    backward  e2 = eta dout D1 where z2's bits are set            overcomplete_code_gradient
              e1 = e2 - eta dr D where z1's bits are set          overcomplete_code_gradient
              dx = dr + e1 D^T                                    overcomplete_decoded_sum

The contracts are those of torch_kernels.py, but for three. The dictionaries are ``readable``. The
bits are made where they are wanted (not empty) and read instead of the codes. And all matrices are
in the dtype of the GEMMs: the residual is taken from x as rounded for them (op.py), and dx is
rounded before it becomes float32. The products with nothing around them are the library's: op.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cuda_extension
from ..cuda_extension import readable
from ..library import on_device_of, stream_of


def encode(
    x: Tensor, dictionary: Tensor, step_size: float, threshold: float, bits: Tensor
) -> Tensor:
    return _code(x, None, dictionary, step_size, threshold, bits)


def residual(x: Tensor, z1: Tensor, dictionary: Tensor) -> Tensor:
    return _decoded_sum(x, z1, dictionary, -1.0)


def refine(
    z1: Tensor, r: Tensor, dictionary: Tensor, step_size: float, threshold: float, bits: Tensor
) -> Tensor:
    return _code(r, z1, dictionary, step_size, threshold, bits)


def refine_backward(
    dout: Tensor, decoder: Tensor, z2: Tensor, step_size: float, bits: Tensor
) -> Tensor:
    return _code_gradient(dout, None, decoder, step_size, bits)


def encode_backward(
    e2: Tensor, dr: Tensor, dictionary: Tensor, z1: Tensor, step_size: float, bits: Tensor
) -> Tensor:
    return _code_gradient(dr, e2, dictionary, -step_size, bits)


def input_gradient(dr: Tensor, e1: Tensor, dictionary: Tensor, dtype: torch.dtype) -> Tensor:
    return _decoded_sum(dr, e1, dictionary, 1.0).to(dtype)


# ---- the launchers


def _code(
    a: Tensor,
    c: Tensor | None,
    dictionary: Tensor,
    step_size: float,
    threshold: float,
    bits: Tensor,
) -> Tensor:
    """relu(c + step_size a D - threshold)"""
    z = a.new_empty(a.shape[0], dictionary.shape[1])
    _launch(
        "overcomplete_code", z, dictionary,
        a=readable(a), c=c, z=z, mask=bits, step_size=step_size, threshold=threshold,
    )  # fmt: skip
    return z


def _code_gradient(
    a: Tensor, c: Tensor | None, dictionary: Tensor, alpha: float, bits: Tensor
) -> Tensor:
    """c + alpha a D where the bits are set, else 0"""
    e = a.new_empty(a.shape[0], dictionary.shape[1])
    _launch(
        "overcomplete_code_gradient", e, dictionary,
        a=readable(a), c=c, mask=bits, e=e, alpha=alpha,
    )  # fmt: skip
    return e


def _decoded_sum(c: Tensor, z: Tensor, dictionary: Tensor, alpha: float) -> Tensor:
    """c + alpha z D^T"""
    out = torch.empty_like(c)
    _launch(
        "overcomplete_decoded_sum", out, dictionary,
        z=z, c=readable(c), out=out, alpha=alpha,
    )  # fmt: skip
    return out


def _launch(name: str, rows: Tensor, dictionary: Tensor, **arguments: Any) -> None:
    """Call the launcher on as many rows, if there are any: tensors by address."""
    if rows.numel() == 0:
        return

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.data_ptr() if value.numel() > 0 else 0
        return 0 if value is None else value

    d, m = dictionary.shape
    with on_device_of(rows):
        getattr(cuda_extension.load(), name)(
            **{key: plain(value) for key, value in arguments.items()},
            dictionary=dictionary.data_ptr(),
            rows=rows.shape[0],
            d=d,
            m=m,
            dtype=cuda_extension.DTYPES[rows.dtype],
            stream=stream_of(rows),
        )
