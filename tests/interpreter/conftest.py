"""Triton's kernels run by its interpreter: needs TRITON_INTERPRET=1 before triton is imported."""

from __future__ import annotations

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
