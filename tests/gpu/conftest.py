"""On a CUDA device; fresh memory is NaN, so that a tile left unwritten shows."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def precision_as_torch_has_it():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
