"""How the CUDA kernels are found and called, on a machine that has neither them nor a GPU."""

from __future__ import annotations

import pytest
import torch

from crate_kernels import cuda_extension
from crate_kernels.mssa import cuda_kernels

# ---- why the extension cannot be used


@pytest.fixture(autouse=True)
def nothing_known_yet():
    cuda_extension.against.cache_clear()
    cuda_extension.load.cache_clear()
    yield
    cuda_extension.against.cache_clear()
    cuda_extension.load.cache_clear()


@pytest.fixture
def module(monkeypatch, tmp_path):
    """Makes the extension a Python module of the given text, or absent."""

    def make(text=None):
        name = f"extension_of_{tmp_path.name}"
        if text is not None:
            (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(cuda_extension, "MODULE", name)
        monkeypatch.setattr(cuda_extension, "WHY_NOT_BUILT", tmp_path / "why.txt")
        return tmp_path / "why.txt"

    return make


@pytest.fixture
def device_is(monkeypatch):
    def be(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    return be


def test_fits(module, device_is):
    module("answer = 42")
    device_is(9, 0)
    assert cuda_extension.against("cuda", 0) == ()
    assert cuda_extension.load().answer == 42


def test_not_built_in_a_checkout(module, device_is):
    module()
    device_is(9, 0)
    assert cuda_extension.against("cuda", 0) == ("not built: run `make build`",)


def test_not_built_by_the_install(module, device_is):
    module().write_text("nvcc was not found when crate_kernels was installed\n")
    device_is(9, 0)
    expected = "not built: nvcc was not found when crate_kernels was installed"
    assert cuda_extension.against("cuda", 0) == (expected,)


def test_does_not_load(module, device_is):
    module("raise ImportError('libstdc++.so.6: version GLIBCXX_3.4.99 not found')")
    device_is(9, 0)
    (reason,) = cuda_extension.against("cuda", 0)
    assert reason.startswith("built, but cannot be loaded: libstdc++.so.6: version GLIBCXX_3.4.99")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 1)])
def test_another_capability(module, device_is, capability):
    module("")
    device_is(*capability)
    major, minor = capability
    expected = f"built for compute capability 9.0 (sm_90a), this device has {major}.{minor}"
    assert cuda_extension.against("cuda", 0) == (expected,)


def test_nothing_is_loaded_for_other_devices(module):
    module("raise SystemExit('loaded')")
    assert cuda_extension.against("cpu", None) == ("device cpu: CUDA kernels run on CUDA devices",)


def test_every_reason_at_once(module):
    module()
    reasons = cuda_extension.against("cpu", None)
    assert reasons == (
        "not built: run `make build`",
        "device cpu: CUDA kernels run on CUDA devices",
    )


# ---- what the attention kernels are given


class Recorder:
    """An extension that runs nothing and keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def attention_forward(self, **given):
        self.calls.append(given)

    attention_backward = attention_forward

    def attention_backward_scratch(self, *, batch: int, n: int, heads: int) -> int:
        return 64 * batch * heads * n


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(cuda_extension, "load", lambda: found)
    monkeypatch.setattr(cuda_kernels, "stream_of", lambda t: 1234)
    yield found
    monkeypatch.undo()  # before the cache of load is cleared


def run(w, do, heads=2):
    o, lse = cuda_kernels.forward(w, heads, 0.5, True)
    return o, lse, cuda_kernels.backward(do, w, o, lse, heads, 0.5, True)


def test_contiguous_tensors_are_read_in_place(recorder):
    w, do = torch.randn(2, 3, 5, 128).bfloat16()
    o, lse, dw = run(w, do)
    assert o.shape == dw.shape == w.shape and o.dtype == dw.dtype == w.dtype
    assert lse.shape == (3, 2, 5) and lse.dtype == torch.float32
    options = {
        "batch": 3, "n": 5, "heads": 2, "head_dim": 64, "scale": 0.5, "causal": True,
        "dtype": "bfloat16", "stream": 1234,
    }  # fmt: skip
    rows_of_w = {"w": w.data_ptr(), "w_stride_batch": 640, "w_stride_row": 128}
    rows_of_do = {
        "grad_o": do.data_ptr(), "grad_o_stride_batch": 640, "grad_o_stride_row": 128,
    }  # fmt: skip
    forward, backward = recorder.calls
    assert forward == {**rows_of_w, "o": o.data_ptr(), "lse": lse.data_ptr(), **options}
    scratch = backward.pop("scratch")
    assert scratch != lse.data_ptr()
    assert backward == {
        **rows_of_w, **rows_of_do, "o": o.data_ptr(), "lse": lse.data_ptr(), "delta": 0,
        "grad_w": dw.data_ptr(), **options,
    }  # fmt: skip


def wide(dtype=torch.float16):
    return torch.randn(4, 9, 160).to(dtype)


@pytest.mark.parametrize(
    ("t", "in_place"),
    [
        (wide()[:3, :5, :128], True),
        (wide()[1:, 2:7, 8:136], True),
        (wide()[:3, :5, 1:129], False),  # 2 bytes off
        (torch.randn(3, 5, 132).half()[:, :, :128], False),  # rows 264 bytes apart
        (torch.randn(3, 128, 5).half().mT, False),
        (torch.randn(1, 1, 128).half().expand(3, 5, 128), False),
        (torch.randn(3, 1, 128).half().expand(3, 5, 128), False),
        (torch.randn(5, 128).half().as_strided((1, 5, 128), (0, 128, 1)), False),
        (torch.randn(5, 128).half().as_strided((5, 1, 128), (128, 3, 1)), False),
        (torch.randn(641).half()[1:].view(1, 5, 128), False),  # contiguous, 2 bytes off
    ],
)
def test_what_bulk_copies_cannot_read_is_copied(t, in_place, recorder):
    run(t, t)
    for given in recorder.calls:
        assert (given["w"] == t.data_ptr()) == in_place
        for name in ("w",) if "grad_o" not in given else ("w", "grad_o"):
            assert given[name] % 16 == 0
            for step in ("batch", "row"):
                stride = given[f"{name}_stride_{step}"]
                assert stride > 0 and stride % 8 == 0


def test_an_empty_batch_launches_nothing(recorder):
    w = torch.empty(0, 5, 128, dtype=torch.float16)
    o, lse, dw = run(w, w)
    assert o.shape == dw.shape == w.shape and lse.shape == (0, 2, 5)
    assert not recorder.calls
