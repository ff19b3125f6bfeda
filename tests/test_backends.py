"""Which backend runs, the reasons given, the log line, and an import that touches nothing."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from helpers import ista_inputs, mssa_inputs, overcomplete_inputs
from residuals import residual_inputs

import crate_kernels
from crate_kernels import backends, ista, mssa, overcomplete_ista, tied_attention
from crate_kernels.triton_common import dot_precision

pytestmark = pytest.mark.skipif(backends.interpreted(), reason="Triton fits the CPU there")


MANY = 40_000  # tokens enough for the CUDA kernel of ista at any width here


def calls(dtype=torch.float32):
    """Every op with arguments that work, without a backend."""
    m = {k: t.to(dtype) for k, t in mssa_inputs(2, 5, 2, 4).items()}
    i = {k: t.to(dtype) for k, t in ista_inputs(2, 5, 8).items()}
    wide = {k: t.to(dtype) for k, t in overcomplete_inputs(2, 5, 8).items()}
    return {
        "mssa": (mssa, {**m, "heads": 2}),
        "tied_attention": (tied_attention, {"w": m["x"], "heads": 2}),
        "ista": (ista, i),
        "overcomplete_ista": (overcomplete_ista, wide),
    }


OPS = ("mssa", "tied_attention", "ista", "overcomplete_ista")


@pytest.fixture
def fresh(monkeypatch):
    """Nothing logged yet, no variable set."""
    monkeypatch.delenv(backends.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_logged", set())


@pytest.mark.parametrize("op", OPS)
def test_explain_on_the_cpu(op):
    _, given = calls()[op]
    found = crate_kernels.explain(op, **given)
    assert isinstance(found, crate_kernels.Explanation)
    assert (found.op, found.chosen) == (op, "reference")
    assert tuple(found.reasons) == backends.BACKENDS
    assert found.reasons["reference"] == ()
    lines = str(found).splitlines()
    assert lines[0] == f"{op}: auto takes reference"
    for backend in ("cuda", "triton"):
        assert any("device cpu" in reason for reason in found.reasons[backend])
        assert any(backend in line and "device cpu" in line for line in lines)
    assert any("reference" in line and "fits" in line for line in lines[1:])


def test_explain_lists_every_reason():
    w = torch.zeros(1, 2, 600, dtype=torch.float64)
    reasons = crate_kernels.explain("tied_attention", w, heads=1).reasons["triton"]
    assert len(reasons) == 3
    for part in ("device cpu", "float64", "head_dim 600"):
        assert any(part in reason for reason in reasons), part


def test_explain_follows_autocast():
    w = torch.zeros(1, 2, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        reasons = crate_kernels.explain("tied_attention", w, heads=1).reasons["triton"]
    assert not any("dtype" in reason for reason in reasons)


def test_explain_does_not_compute():
    big = torch.empty(10**6, 197, 768, device="meta")
    found = crate_kernels.explain("ista", big, torch.empty(768, 768, device="meta"))
    assert any("device meta" in reason for reason in found.reasons["triton"])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_a_gpu_backend_on_the_cpu_raises_with_every_reason(op, backend):
    function, given = calls(torch.float64)[op]
    with pytest.raises(ValueError, match=f"{op}: .*'{backend}'.*device cpu.*float64"):
        function(**given, backend=backend)


@pytest.fixture
def on_hopper(monkeypatch):
    """As if the tensors were on a device that takes the CUDA kernels, and these were built."""
    for name in ("_against_cuda_on", "_against_triton_on"):
        monkeypatch.setattr(backends, name, lambda *device: ())


@pytest.mark.parametrize(
    ("dtype", "head_dim", "against"),
    [
        (torch.float16, 48, []),
        (torch.bfloat16, 128, []),
        (torch.bfloat16, 72, ["head_dim 72: CUDA kernels are built for (48, 64, 80, 128)"]),
        (torch.float32, 64, ["dtype torch.float32: CUDA kernels compute in float16 and bfloat16"]),
        (torch.float32, 32, ["dtype torch.float32", "head_dim 32"]),
    ],
)
def test_attention_that_the_cuda_kernels_take(dtype, head_dim, against, on_hopper, fresh):
    w = torch.zeros(2, 5, 2 * head_dim, dtype=dtype)
    found = crate_kernels.explain("tied_attention", w, heads=2)
    assert found.chosen == ("triton" if against else "cuda")
    assert len(found.reasons["cuda"]) == len(against)
    for reason, start in zip(found.reasons["cuda"], against, strict=True):
        assert reason.startswith(start)


@pytest.mark.parametrize(
    ("dtype", "d", "against"),
    [
        (torch.bfloat16, 768, []),
        (torch.bfloat16, 20, ["D = 20: CUDA kernels take multiples of 8"]),
        (torch.float32, 64, ["dtype torch.float32"]),
    ],
)
def test_ista_that_the_cuda_kernels_take(dtype, d, against, on_hopper, fresh):
    x, weight = torch.empty(MANY, d, dtype=dtype), torch.zeros(d, d, dtype=dtype)
    found = crate_kernels.explain("ista", x, weight)
    assert found.chosen == ("triton" if against else "cuda")
    for reason, start in zip(found.reasons["cuda"], against, strict=True):
        assert reason.startswith(start)


@pytest.mark.parametrize(
    ("dtype", "rows", "d", "m", "chosen", "against"),
    [
        (torch.bfloat16, 25216, 768, 3072, "cuda", []),
        (torch.float16, 25216, 384, 1152, "cuda", []),
        (torch.bfloat16, 1576, 768, 3072, "triton", []),  # few tokens
        (torch.bfloat16, 25216, 192, 768, "triton", []),  # narrow
        (torch.bfloat16, 25216, 772, 3088, "triton", ["D = 772: CUDA kernels take multiples of 8"]),
        (torch.bfloat16, 25216, 768, 100, "triton", ["M = 100: CUDA kernels take multiples of 8"]),
        (torch.float32, 25216, 20, 41, "triton", ["dtype torch.float32", "D = 20", "M = 41"]),
    ],
)
def test_overcomplete_ista_that_the_cuda_kernels_take(
    dtype, rows, d, m, chosen, against, on_hopper, fresh, monkeypatch
):
    given = (torch.empty(rows, d, dtype=dtype), torch.empty(d, m, dtype=dtype))
    found = crate_kernels.explain("overcomplete_ista", *given)
    assert found.chosen == chosen
    assert len(found.reasons["cuda"]) == len(against)
    for reason, start in zip(found.reasons["cuda"], against, strict=True):
        assert reason.startswith(start)
    if against:
        with pytest.raises(ValueError, match=f"overcomplete_ista: .*'cuda'.*{against[-1]}"):
            overcomplete_ista(*given, backend="cuda")
    else:
        monkeypatch.setattr(backends, "_against_triton_on", lambda *device: ("not installed",))
        assert crate_kernels.explain("overcomplete_ista", *given).chosen == "cuda"


def test_residual_norm_is_tritons(on_hopper, fresh):
    given = {k: t.bfloat16() for k, t in residual_inputs(5, 64).items()}
    found = crate_kernels.explain("residual_norm", **given)
    assert found.chosen == "triton"
    assert found.reasons["cuda"] == ("residual_norm: no CUDA kernels are built for it",)
    with pytest.raises(ValueError, match="no CUDA kernels are built for it"):
        crate_kernels.residual_norm(**given, backend="cuda")


def test_cross_entropy_is_tritons(on_hopper, fresh):
    given = torch.zeros(5, 64).bfloat16(), torch.zeros(5).long()
    found = crate_kernels.explain("cross_entropy", *given)
    assert found.chosen == "triton"
    assert found.reasons["cuda"] == ("cross_entropy: no CUDA kernels are built for it",)
    assert crate_kernels.explain("cross_entropy", given[0].double(), given[1]).chosen == "reference"


def test_learned_and_signed_thresholds_are_tritons(on_hopper, fresh, monkeypatch):
    x, weight = torch.empty(MANY, 64).bfloat16(), torch.zeros(64, 64).bfloat16()
    lacking = "the CUDA kernels do not have it"
    for options, against in [
        ({"step_size": weight[0]}, ["a tensor for step_size"]),
        ({"lambd": weight[0, 0], "signed": True}, ["a tensor for lambd", "signed"]),
        ({"signed": False}, []),
    ]:
        found = crate_kernels.explain("ista", x, weight, **options)
        assert found.reasons["cuda"] == tuple(f"{option}: {lacking}" for option in against)
        assert found.chosen == ("triton" if against else "cuda")
        if against:
            with pytest.raises(ValueError, match=f"'cuda'.*{against[0]}: {lacking}"):
                ista(x, weight, **options, backend="cuda")
            monkeypatch.setenv(backends.BACKEND_VARIABLE, "cuda")
            with pytest.raises(ValueError, match=f"'cuda'.*{against[-1]}: {lacking}"):
                ista(x, weight, **options)
            monkeypatch.delenv(backends.BACKEND_VARIABLE)


def test_ista_of_few_tokens_stays_with_triton(on_hopper, fresh, monkeypatch):
    x, weight = torch.empty(1576, 768).bfloat16(), torch.empty(768, 768).bfloat16()
    found = crate_kernels.explain("ista", x, weight)
    assert found.chosen == "triton" and not found.reasons["cuda"]
    assert (
        crate_kernels.explain("ista", torch.empty(25216, 768).bfloat16(), weight).chosen == "cuda"
    )
    monkeypatch.setattr(backends, "_against_triton_on", lambda *device: ("not installed",))
    assert crate_kernels.explain("ista", x, weight).chosen == "cuda"


def test_autocast_decides_what_the_cuda_kernels_compute_in(on_hopper, fresh):
    x, weight = torch.empty(MANY, 64), torch.zeros(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert crate_kernels.explain("ista", x, weight).chosen == "cuda"
        assert crate_kernels.explain("mssa", x[None, :3], weight, heads=1).chosen == "cuda"


@pytest.mark.parametrize("op", OPS)
def test_auto_equals_reference(op, fresh):
    function, given = calls()[op]
    assert torch.equal(function(**given), function(**given, backend="reference"))
    assert torch.equal(function(**given), function(**given, backend="auto"))


@pytest.mark.parametrize("op", ["tied_attention", "ista", "overcomplete_ista"])
def test_auto_says_so_once(op, fresh, caplog):
    function, given = calls()[op]
    with caplog.at_level(logging.INFO, logger="crate_kernels"):
        for _ in range(3):
            function(**given)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.name == "crate_kernels"
    assert f"{op}: auto takes reference" in record.getMessage()
    assert "device cpu" in record.getMessage()


def test_a_backend_by_name_is_not_logged(fresh, caplog):
    with caplog.at_level(logging.DEBUG, logger="crate_kernels"):
        for function, given in calls().values():
            function(**given, backend="reference")
    assert not caplog.records


@pytest.mark.parametrize("op", OPS)
def test_variable_replaces_auto_only(op, fresh, monkeypatch):
    function, given = calls()[op]
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "triton")
    with pytest.raises(ValueError, match=r"'triton'.*device cpu"):
        function(**given)
    function(**given, backend="reference")
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "cuda")
    if op in backends.WITHOUT_CUDA:  # which layers call of themselves
        function(**given)
    else:
        with pytest.raises(ValueError, match=r"'cuda'.*device cpu"):
            function(**given)
    with pytest.raises(ValueError, match=r"'cuda'.*device cpu"):
        function(**given, backend="cuda")
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "reference")
    function(**given)
    with pytest.raises(ValueError, match="device cpu"):
        function(**given, backend="triton")
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "auto")
    function(**given)
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "fastest")
    with pytest.raises(ValueError, match=r"expected backend to be one of .*got 'fastest'"):
        function(**given)


def test_a_refusal_leaves_inference_cache_and_autograd_clean(fresh):
    function, given = calls()["ista"]
    leaf = given["weight"].requires_grad_()
    with pytest.raises(ValueError):
        function(given["x"], leaf, backend="triton")
    function(given["x"], leaf).sum().backward()
    assert leaf.grad.isfinite().all()


def test_import_is_lazy_and_leaves_the_device_alone():
    code = (
        "import sys, torch, crate_kernels\n"
        "assert 'triton' not in sys.modules, 'triton was imported'\n"
        "assert not torch.cuda.is_initialized(), 'CUDA was initialised'\n"
        "x = torch.randn(1, 3, 8)\n"
        "crate_kernels.ista(x, torch.eye(8)), crate_kernels.tied_attention(x, heads=2)\n"
        "assert 'crate_kernels.mssa.triton_kernels' not in sys.modules\n"
        "assert 'crate_kernels.mssa.cuda_kernels' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("precision", "want"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")]
)
def test_float32_products_honour_torchs_setting(precision, want):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert dot_precision(torch.float32) == want
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="comes with torch 2.9"
)
@pytest.mark.parametrize(("precision", "want"), [("ieee", "ieee"), ("tf32", "tf32")])
def test_float32_products_honour_torchs_newer_setting(precision, want):
    code = (
        "import torch\n"
        "from crate_kernels.triton_common import dot_precision\n"
        f"torch.backends.cuda.matmul.fp32_precision = {precision!r}\n"
        "print(dot_precision(torch.float32))"
    )  # in a process of its own: torch cannot go back to its older setting
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == want, done.stderr
