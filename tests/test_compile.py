"""torch.compile and opcheck: the ops have honest shapes, no graph breaks and no surprises."""

from __future__ import annotations

import shutil

import pytest
import torch
from cross_entropies import cross_entropy_inputs
from embeddings import embedding_inputs
from helpers import (
    assert_equal_results,
    block_inputs,
    decode_inputs,
    ista_inputs,
    mssa_inputs,
    overcomplete_inputs,
    patch_embedding_inputs,
    results,
)
from maskeds import loss_inputs, tokens_inputs
from residuals import FORMS, cast, residual_inputs
from thresholds import threshold_inputs
from torch._dynamo.testing import CompileCounterWithBackend

from crate_kernels import (
    cross_entropy,
    ista,
    mssa,
    overcomplete_ista,
    residual_norm,
    tied_attention,
)
from crate_kernels.block.op import PARAMETERS
from crate_kernels.mssa import torch_kernels

OPS = torch.ops.crate_kernels

SMALL_MSSA = (2, 6, 2, 4)
# ista by G, and by the weight itself.
SMALL_ISTA = {"gram": (2, 6, 8), "weight": (1, 6, 8)}


@pytest.fixture(autouse=True)
def no_compiled_code_left():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ---- opcheck


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_opcheck_tied_attention(dtype, causal):
    w, do = torch.randn(2, 2, 6, 8).to(dtype)
    o, lse = torch_kernels.forward(w, 2, 0.5, causal)
    for requires_grad in (False, True):
        leaf = w.clone().requires_grad_(requires_grad)
        torch.library.opcheck(OPS.tied_attention, (leaf, 2, 0.5, causal, "reference"))
    saved = (do, w, o, lse, 2, 0.5, causal, "reference")
    torch.library.opcheck(OPS.tied_attention_backward, saved)
    torch.library.opcheck(
        OPS.tied_attention, (w.transpose(0, 1).contiguous().transpose(0, 1), 2, 0.5, causal, "auto")
    )


@pytest.mark.parametrize(("w_dtype", "dtype"), [("float64",) * 2, ("bfloat16", "float32")])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck_attention_projected(w_dtype, dtype, with_bias):
    w, dtype = torch.randn(2, 6, 8).to(getattr(torch, w_dtype)), getattr(torch, dtype)
    weight, bias = torch.randn(5, 8).to(dtype), torch.randn(5).to(dtype) if with_bias else None
    rest = (2, 0.5, False, "reference")
    for wants in ([False] * 3, [True, False, False], [False, True, with_bias]):
        leaves = [
            None if t is None else t.clone().requires_grad_(want)
            for t, want in zip((w, weight, bias), wants, strict=True)
        ]
        torch.library.opcheck(OPS.attention_projected, (*leaves, *rest))
        y, o, lse = OPS.attention_projected(w, weight, bias, *rest)
        saved = (torch.randn_like(y), w, o, lse, weight, wants)
        torch.library.opcheck(OPS.attention_projected_backward, (*saved, *rest))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_tied_attention_masked(dtype):
    for shape, sequences in [((2, 6, 8), [6, 0]), ((2, 6, 8), None), ((9, 8), [0, 2, 2, 9])]:
        w, do = torch.randn(2, *shape).to(dtype)
        given = None if sequences is None else torch.tensor(sequences, dtype=torch.int32)
        seed = torch.tensor([5]) if given is None else None
        rest = (seed, 2, 0.5, True, 7, 3, 0.0 if seed is None else 0.3, "reference")
        for requires_grad in (False, True):
            leaf = w.clone().requires_grad_(requires_grad)
            torch.library.opcheck(OPS.tied_attention_masked, (leaf, given, *rest))
        saved = (do, w, *OPS.tied_attention_masked(w, given, *rest), given)
        torch.library.opcheck(OPS.tied_attention_masked_backward, (*saved, *rest))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_opcheck_tied_rotary(dtype, norm_eps):
    cos, sin = torch.randn(2, 6, 2).to(torch.bfloat16)
    for shape in [(2, 6, 8), (6, 8)]:
        w, dy = torch.randn(2, *shape).to(dtype)
        torch.library.opcheck(
            OPS.tied_rotary, (w.clone().requires_grad_(), cos, sin, 2, norm_eps, "reference")
        )
        y, rstd = OPS.tied_rotary(w, cos, sin, 2, norm_eps, "reference")
        saved = (dy, None if norm_eps is None else y, rstd, cos, sin, 2, "reference")
        torch.library.opcheck(OPS.tied_rotary_backward, saved)


@pytest.mark.parametrize(("x_dtype", "c_dtype"), [("float32",) * 2, ("float32", "bfloat16")])
@pytest.mark.parametrize("form", SMALL_ISTA)
def test_opcheck_ista(x_dtype, c_dtype, form):
    x_dtype, c_dtype = getattr(torch, x_dtype), getattr(torch, c_dtype)
    x, weight = (t.to(x_dtype) for t in ista_inputs(*SMALL_ISTA[form]).values())
    for x_grad, w_grad in [(False, False), (True, False), (False, True), (True, True)]:
        leaf, w = x.clone().requires_grad_(x_grad), weight.clone().requires_grad_(w_grad)
        xc = leaf.detach().to(c_dtype)
        torch.library.opcheck(OPS.ista, (leaf, xc, w, 0.1, 0.2, "reference"))
    y, gram, _ = OPS.ista(x, xc, weight, 0.1, 0.2, "reference")
    for wants_x, wants_weight in [(False, False), (True, False), (False, True), (True, True)]:
        saved = (torch.randn_like(y), y, xc, weight, gram)
        torch.library.opcheck(
            OPS.ista_backward, (*saved, 0.1, x_dtype, wants_x, wants_weight, "reference")
        )
    ready = torch.randn(8, 8).to(c_dtype)
    torch.library.opcheck(OPS.ista_apply, (x, xc, ready, 0.01, "reference"))


@pytest.mark.parametrize("memory", ["default", "low", "none"])
@pytest.mark.parametrize("c_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("out", "follows"), [(True, True), (False, False)])
def test_opcheck_crate_block(memory, c_dtype, out, follows):
    inputs = {k: t.float() for k, t in block_inputs(2, 5, 2, 4, out=out).items()}
    given = [inputs.get(name) for name in ("x", *PARAMETERS)]
    dtype = getattr(torch, c_dtype)
    end = (follows, False, memory, "reference", "reference")
    rest = (None, None, [], [], dtype, 2, 0.5, False, 1e-5, 0.1, 0.1, *end)
    torch.library.opcheck(OPS.crate_block, (*given, *rest))
    if memory == "none":
        return
    leaves = [None if t is None else t.clone().requires_grad_() for t in given]
    torch.library.opcheck(OPS.crate_block, (*leaves, *rest))
    y, moments, xc, *kept, mask = OPS.crate_block(*given, *rest)
    assert mask.numel() == moments.numel() == 0
    saved = (torch.randn_like(y), given[0] if xc.numel() == 0 else xc, *kept, y, *given[1:])
    for wants in ([True] * 9, [name in ("x", "w_qkv") for name in ("x", *PARAMETERS)]):
        wants = [want and t is not None for want, t in zip(wants, given, strict=True)]
        options = (wants, 2, 0.5, False, 1e-5, 0.1, *end)
        torch.library.opcheck(OPS.crate_block_backward, (*saved, *options))


def test_opcheck_encoder_of_few():
    x = torch.randn(2, 5, 8)
    layers = [torch.randn(8, 8) if i in (0, 3, 5) else torch.randn(8) for i in range(9)] * 2
    torch.library.opcheck(OPS.encoder_of_few, (x, layers, [0.01, 0.02], 2, 0.5, 1e-5))


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("c_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck_decoder_block(memory, c_dtype, with_bias):
    inputs = {k: t.float() for k, t in block_inputs(2, 5, 2, 4).items()}
    if not with_bias:
        del inputs["b_out"]
    given = [inputs.get(name) for name in ("x", *PARAMETERS)]
    rest = (None, c_dtype, 2, 0.5, 1e-5, memory, "reference")
    torch.library.opcheck(OPS.decoder_block, (*given, *rest))
    leaves = [None if t is None else t.clone().requires_grad_() for t in given]
    torch.library.opcheck(OPS.decoder_block, (*leaves, *rest))
    y, moments, xc, *kept = OPS.decoder_block(*given, *rest)
    assert moments.numel() == 0
    saved = (torch.randn_like(y), given[0] if xc.numel() == 0 else xc, *kept, *given[1:])
    for wants in ([True] * 9, [name in ("x", "w_qkv") for name in ("x", *PARAMETERS)]):
        wants = [want and t is not None for want, t in zip(wants, given, strict=True)]
        torch.library.opcheck(OPS.decoder_block_backward, (*saved, wants, *rest[2:]))


@pytest.mark.parametrize("c_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SMALL_ISTA.values(), ids=SMALL_ISTA)
def test_opcheck_ista_learned(shape, c_dtype):
    x, *given = (t.float() for t in threshold_inputs(*shape).values())
    xc, rest = x.to(c_dtype), (True, "reference")
    torch.library.opcheck(OPS.ista_learned, (x, xc, *given, *rest))
    leaves = [t.clone().requires_grad_() for t in (x, *given)]
    torch.library.opcheck(OPS.ista_learned, (leaves[0], xc, *leaves[1:], *rest))
    y, gram = OPS.ista_learned(x, xc, *given, *rest)
    weight, *numbers = given
    for wants in ([True] * 4, [False, False, True, False], [True, False, False, True]):
        saved = (torch.randn_like(y), y, xc, weight, gram, *numbers, x.dtype, wants, "reference")
        torch.library.opcheck(OPS.ista_learned_backward, saved)
    if gram.numel():
        torch.library.opcheck(OPS.ista_learned_apply, (x, xc, gram, *numbers, *rest))


@pytest.mark.parametrize("memory", ["default", "low", "none"])
@pytest.mark.parametrize("c_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_opcheck_overcomplete_ista(memory, c_dtype, tied):
    inputs = {k: t.float() for k, t in overcomplete_inputs(2, 5, 8, tied=tied).items()}
    x, dictionary, decoder = (inputs.get(name) for name in ("x", "dictionary", "decoder"))
    xc, rest = x.to(getattr(torch, c_dtype)), (0.1, 0.2, memory, "reference")
    torch.library.opcheck(OPS.overcomplete_ista, (x, xc, dictionary, decoder, *rest))
    if memory == "none":
        return
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, dictionary, decoder)]
    torch.library.opcheck(OPS.overcomplete_ista, (leaves[0], xc, *leaves[1:], *rest))
    out, *kept = OPS.overcomplete_ista(x, xc, dictionary, decoder, *rest)
    saved = (torch.randn_like(out), xc, *kept, dictionary, decoder)
    for wants in ([True, True, not tied], [True, False, False], [False, True, False]):
        options = (wants, 0.1, 0.2, x.dtype, memory, "reference")
        torch.library.opcheck(OPS.overcomplete_ista_backward, (*saved, *options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("x_dtype", "c_dtype"), [("float64",) * 2, ("float32", "bfloat16"), ("float16",) * 2]
)
def test_opcheck_residual_norm(form, x_dtype, c_dtype):
    x_dtype, c_dtype = getattr(torch, x_dtype), getattr(torch, c_dtype)
    for shape in ((2, 5, 8), (6,)):
        inputs = cast(residual_inputs(*shape, form=form), x_dtype, c_dtype)
        given = [inputs.get(name) for name in ("x", "weight", "bias", "y", "scale")]
        rest = (1.0 if form != "residual" else -1.0, 1e-5, c_dtype, "reference")
        torch.library.opcheck(OPS.residual_norm, (*given, *rest))
        leaves = [None if t is None else t.clone().requires_grad_() for t in given]
        torch.library.opcheck(OPS.residual_norm, (*leaves, *rest))
        z, h, stats = OPS.residual_norm(*given, *rest)
        x, weight, _, y, scale = given
        z = x if y is None else z
        kept = (torch.randn_like(h), z, stats, weight, y if scale is not None else None, scale)
        for dz, y_dtype in ((None, None), (torch.randn_like(z), None if y is None else c_dtype)):
            options = (rest[0], x_dtype, y_dtype, "reference")
            torch.library.opcheck(OPS.residual_norm_backward, (dz, *kept, *options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [None, 7])
def test_opcheck_cross_entropy(dtype, vocab_size):
    for rows in ((2, 5), (6,)):
        logits, labels = cross_entropy_inputs(*rows, v=8)
        logits, labels = logits.to(dtype), labels.clamp(max=6)
        rest, bias = (vocab_size, -100, "reference"), torch.zeros(vocab_size or 8)
        for given in (logits, torch.cat((logits, logits), -1)[..., :8]):
            for b in (None, bias.requires_grad_()):
                torch.library.opcheck(OPS.cross_entropy, (given.detach(), labels, b, *rest))
                leaf = given.detach().requires_grad_()
                torch.library.opcheck(OPS.cross_entropy, (leaf, labels, b, *rest))
            loss, count, stats = OPS.cross_entropy(given, labels, None, *rest)
            for wants_sums in (False, True):
                saved = (torch.randn_like(loss), given, labels, stats, count, wants_sums)
                torch.library.opcheck(OPS.cross_entropy_backward, (*saved, *rest))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("places", [None, 7])
def test_opcheck_tied_embedding(dtype, places):
    idx, weight, position_weight, *positions = embedding_inputs(2, 5, 6, 4, places=places).values()
    weight, position_weight = weight.to(dtype), position_weight.to(dtype)
    c_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    rest = (positions[0] if positions else None, 2, c_dtype, "reference")
    leaves = [t.clone().requires_grad_() for t in (weight, position_weight)]
    for given in ((weight, position_weight), leaves, (leaves[0], position_weight)):
        torch.library.opcheck(OPS.tied_embedding, (idx, *given, *rest))
    x, _ = OPS.tied_embedding(idx, weight, position_weight, *rest)
    for dhead in (None, torch.randn(6, 4).to(c_dtype)):
        for wants in ([True, True], [False, True], [True, False]):
            sizes = (6, len(position_weight), 2, dtype, wants, "reference")
            saved = (torch.randn_like(x), dhead, idx, rest[0], *sizes)
            torch.library.opcheck(OPS.tied_embedding_backward, saved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_masked_tokens(dtype):
    x, mask, *given = tokens_inputs(2, 3, 8).values()
    rest = (mask, *given, dtype, "reference")
    torch.library.opcheck(OPS.masked_tokens, (x.to(dtype), *rest))
    leaf, *learned = (t.clone().requires_grad_() for t in (x.to(dtype), *given[:2]))
    torch.library.opcheck(OPS.masked_tokens, (leaf, mask, *learned, *rest[3:]))
    dy = torch.randn_like(OPS.masked_tokens(x.to(dtype), *rest))
    torch.library.opcheck(OPS.masked_tokens_backward, (dy, mask, dtype, "reference"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_masked_loss(dtype):
    predicted, img, mask = (t.to(dtype) for t in loss_inputs(2, 3, (1, 2), 2).values())
    rest = (img, mask, 2, True, "reference")
    torch.library.opcheck(OPS.masked_loss, (predicted, *rest))
    torch.library.opcheck(OPS.masked_loss, (predicted.detach().requires_grad_(), *rest))
    loss, count = OPS.masked_loss(predicted, *rest)
    saved = (torch.randn_like(loss), predicted, img, mask, count, *rest[2:])
    torch.library.opcheck(OPS.masked_loss_backward, saved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_tied_attention_decode(dtype):
    w, cache, lengths = decode_inputs(2, 2, 4, 9, (4, 7))
    given = (w.to(dtype), cache.to(dtype), lengths, 2, 0.5, "reference")
    torch.library.opcheck(OPS.tied_attention_decode, given)


@pytest.mark.parametrize("c_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_class_token", [False, True])
def test_opcheck_patch_embedding(with_class_token, c_dtype):
    inputs = patch_embedding_inputs(2, 3, (1, 2), (2, 2), 8)
    given = [t.float() for t in inputs.values()]
    given[-2:] = given[-2:] if with_class_token else [None, None]
    options = ([2, 2], 1e-5)
    for keeps in (False, True):
        rest = (*options, c_dtype, torch.float32, keeps, "reference")
        torch.library.opcheck(OPS.patch_embedding, (*given, *rest))
    leaves = [None if t is None else t.clone().requires_grad_() for t in given]
    torch.library.opcheck(OPS.patch_embedding, (*leaves, *rest))
    x, *kept = OPS.patch_embedding(*given, *rest)
    for wants in ([True] * 9, [False, True, False] * 3):
        saved = (torch.randn_like(x), *kept, *given)
        wants = wants[:7] + [w and with_class_token for w in wants[7:]]
        torch.library.opcheck(OPS.patch_embedding_backward, (*saved, *options, wants, "reference"))


def test_every_registered_op_is_checked_above():
    names = {name for name in torch._C._dispatch_get_all_op_names() if "crate_kernels::" in name}
    assert names == {
        f"crate_kernels::{name}"
        for name in (
            "tied_attention",
            "tied_attention_backward",
            "attention_projected",
            "attention_projected_backward",
            "tied_attention_masked",
            "tied_attention_masked_backward",
            "tied_attention_decode",
            "tied_embedding",
            "tied_embedding_backward",
            "tied_rotary",
            "tied_rotary_backward",
            "ista",
            "ista_backward",
            "ista_apply",
            "ista_learned",
            "ista_learned_backward",
            "ista_learned_apply",
            "crate_block",
            "encoder_of_few",
            "crate_block_backward",
            "cross_entropy",
            "cross_entropy_backward",
            "decoder_block",
            "decoder_block_backward",
            "masked_loss",
            "masked_loss_backward",
            "masked_tokens",
            "masked_tokens_backward",
            "overcomplete_ista",
            "overcomplete_ista_backward",
            "patch_embedding",
            "patch_embedding_backward",
            "residual_norm",
            "residual_norm_backward",
        )
    }


# ---- torch.compile


def sum_and_norm(**inputs):
    z, h = residual_norm(**inputs)
    return z + 2 * h


def difference_and_norm(**inputs):
    return sum_and_norm(**inputs, scale=-1.0)


LABELS = torch.tensor([[3, -100, 0], [6, 2, -100]])


def loss_of(logits, **options):
    return cross_entropy(logits, LABELS, **options)


def samples():
    """name: (function, tensors in float64, options)."""
    m = mssa_inputs(*SMALL_MSSA)
    cases = {
        "mssa": (mssa, m, {"heads": 2}),
        "mssa causal": (mssa, m, {"heads": 2, "causal": True, "scale": 0.3}),
        "mssa without w_out": (mssa, {k: m[k] for k in ("x", "w_qkv")}, {"heads": 2}),
        "tied_attention": (tied_attention, {"w": m["x"]}, {"heads": 2}),
    }
    for form, shape in SMALL_ISTA.items():
        cases[f"ista by {form}"] = (ista, ista_inputs(*shape), {"step_size": 0.2})
        cases[f"signed ista by {form}"] = (ista, threshold_inputs(*shape), {"signed": True})
    for memory, tied in (("default", False), ("low", True)):
        given = overcomplete_inputs(2, 6, 8, tied=tied)
        cases[f"overcomplete {memory}"] = (overcomplete_ista, given, {"memory": memory})
    for form in FORMS:
        cases[f"residual_norm {form}"] = (sum_and_norm, residual_inputs(2, 6, 8, form=form), {})
    given = residual_inputs(2, 6, 8, form="residual")
    cases["residual_norm minus"] = (difference_and_norm, given, {})
    logits, _ = cross_entropy_inputs(2, 3, v=8)
    cases["cross_entropy"] = (loss_of, {"logits": logits}, {})
    cases["cross_entropy padded"] = (loss_of, {"logits": logits}, {"vocab_size": 7})
    given = {"logits": logits, "added_bias": torch.zeros(8, dtype=torch.float64)}
    cases["cross_entropy with a bias"] = (loss_of, given, {})
    return cases


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_forward_and_backward(name, dynamic):
    function, inputs, options = samples()[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    dy = torch.randn_like(function(**inputs, **options))
    want = results(function, inputs, dy, **options)
    assert_equal_results(results(compiled, inputs, dy, **options), want, name)
    with torch.no_grad():
        y = compiled(**inputs, **options)
    assert_equal_results({"y": y}, {"y": want["y"]}, (name, "inference"))


@pytest.mark.parametrize("name", samples())
def test_fullgraph_under_autocast(name):
    function, inputs, options = samples()[name]
    inputs = {k: t.float() for k, t in inputs.items()}

    def step(**kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return function(**kwargs)

    dy = torch.randn_like(step(**inputs, **options))
    want = results(step, inputs, dy, **options)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = results(compiled, inputs, dy, **options)
    for key in want:
        assert got[key].dtype == want[key].dtype, key
        torch.testing.assert_close(got[key], want[key], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("how", ["mark_dynamic", "dynamic=True"])
@pytest.mark.parametrize(
    "name",
    ["mssa", "tied_attention", "ista by gram", "ista by weight", "overcomplete default"],
)
def test_any_number_of_tokens_with_one_graph(name, how):
    function, inputs, options = samples()[name]
    first = next(iter(inputs))  # x or w
    # By weight is right for fewer tokens than D = 8 only: beyond it another graph is.
    counts = (2, 3, 5, 7) if name == "ista by weight" else (9, 10, 17, 31)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        function, fullgraph=True, backend=counter, dynamic=True if how == "dynamic=True" else None
    )
    graphs = []
    for n in counts:
        x = torch.randn(inputs[first].shape[0], n, 8, dtype=torch.float64)
        given = {**inputs, first: x}

        def marked(**kwargs):
            if how == "mark_dynamic":
                torch._dynamo.mark_dynamic(kwargs[first], 1)
            return compiled(**kwargs)

        dy = torch.randn_like(x)
        got = results(marked, given, dy, **options)
        assert_equal_results(got, results(function, given, dy, **options), n)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, f"recompiled: {graphs}"


def test_ista_changes_form_where_tokens_become_many():
    compiled = torch.compile(ista, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 12, 5, 30):
        inputs, dy = ista_inputs(n, 8), torch.randn(n, 8, dtype=torch.float64)
        assert_equal_results(results(compiled, inputs, dy), results(ista, inputs, dy), n)


def test_compiled_inference_sees_a_changed_weight():
    x, weight = ista_inputs(20, 8).values()
    compiled = torch.compile(ista, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for change in (1.0, 1.5, 0.5):
            weight.data.mul_(change)
            torch.testing.assert_close(compiled(x, weight), ista(x, weight))


def test_bad_input_raises_the_same_error_when_compiled():
    compiled = torch.compile(tied_attention, backend="aot_eager")
    with pytest.raises(ValueError, match="tied_attention: expected heads to divide"):
        compiled(torch.randn(1, 3, 8), heads=3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    m = {k: t.float() for k, t in mssa_inputs(*SMALL_MSSA).items()}
    weight = ista_inputs(6, 8)["weight"].float()

    def layer(weight, **kwargs):
        return ista(kwargs["x"] + mssa(**kwargs, heads=2), weight)

    inputs, dy = {"weight": weight, **m}, torch.randn(2, 6, 8)
    want = results(layer, inputs, dy)
    got = results(torch.compile(layer, fullgraph=True), inputs, dy)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5)
