"""benchmarks/largest_batch.py: the search, on made-up memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def script() -> Any:
    path = Path(__file__).parent.parent / "benchmarks" / "largest_batch.py"
    spec = importlib.util.spec_from_file_location("largest_batch", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("most", [128, 135, 136, 500, 503, 1000, 4000])
@pytest.mark.parametrize("slope", [0.8, 1.0, 1.3])
def test_finds_the_largest_batch_that_fits(script: Any, most: int, slope: float) -> None:
    """Memory that grows faster or slower for large batches than for the two small ones."""
    tried = []

    def fits(batch: int) -> float | None:
        tried.append(batch)
        small = batch <= 2 * script.FIRST
        return None if batch > most else 10.0 + batch * (1 if small else slope)

    found = script.largest(fits, 10.0 + most * slope)
    assert found <= most < found + script.STEP + found // script.PARTS
    assert all(batch % script.STEP == 0 for batch in tried) and len(tried) <= 12


def test_says_so_where_nothing_fits(script: Any) -> None:
    with pytest.raises(RuntimeError, match="expected batches of 128 to fit"):
        script.largest(lambda batch: None, 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_wants_a_gpu(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main([])
    assert "expected a CUDA device, got none" in capsys.readouterr().err
