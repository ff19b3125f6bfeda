"""Triton's kernels run by its interpreter: needs TRITON_INTERPRET=1 before triton is imported."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from crate_kernels import backends

if not backends.interpreted():
    collect_ignore_glob = ["test_*.py"]  # make test runs them in a process of their own


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """A kernel that leaves a gap in its output, or reads one, is found out."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """The interpreter keeps bfloat16 as bits and would multiply those."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def decoded(t):
        if t.dtype.scalar != tl.bfloat16:
            return t
        return TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot_of_values(self, a, b, *rest):
        return create_dot(self, decoded(a), decoded(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot_of_values)


@pytest.fixture(autouse=True)
def integers_of_one_element_arrays(monkeypatch):
    """The interpreter keeps scalars as arrays of one element, whose int() NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_replace_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_replace_index)


@pytest.fixture(params=["small tiles", "as chosen", "described"])
def tiles(request, monkeypatch):
    """Of ISTA's GEMM: small, so that small matrices have many; and described, as on sm_90."""
    if request.param == "as chosen":
        return
    from crate_kernels.ista import triton_kernels

    chosen = triton_kernels.gemm_config

    def small(dtype, n_rows, d, can_describe):
        return dataclasses.replace(
            chosen(dtype, n_rows, d, can_describe),
            block_m=16,
            block_n=32,
            block_k=16,
            described=can_describe and dtype != torch.float32,
        )

    monkeypatch.setattr(triton_kernels, "gemm_config", small)
    if request.param == "described":
        monkeypatch.setattr(triton_kernels, "has_bulk_copy", lambda t: True)
        monkeypatch.setattr(triton_kernels, "multiprocessors", lambda t: 1)
