"""Bad input: ValueError or TypeError that says what was expected and what it got."""

from __future__ import annotations

import re

import pytest
import torch

import crate_kernels
from crate_kernels import (
    cross_entropy,
    ista,
    mssa,
    overcomplete_ista,
    residual_norm,
    tied_attention,
    tied_embedding,
)
from crate_kernels.ista import gram_cache

NAN, INF = float("nan"), float("inf")


def tensors():
    return {
        "x": torch.randn(2, 5, 8),
        "w_qkv": torch.randn(6, 8),
        "w_out": torch.randn(8, 6),
        "b_out": torch.randn(8),
    }


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


# What to change in a call that works, the error, and what it must say was expected and got.
MSSA = {
    "x of rank 2": ({"x": zeros(5, 8)}, ValueError, "x of shape (B, N, D)", "(5, 8)"),
    "x of rank 4": ({"x": zeros(1, 2, 5, 8)}, ValueError, "(B, N, D)", "(1, 2, 5, 8)"),
    "x of another width": ({"x": zeros(2, 5, 7)}, ValueError, "D = 8", "(2, 5, 7)"),
    "no tokens": ({"x": zeros(2, 0, 8)}, ValueError, "N > 0", "(2, 0, 8)"),
    "w_qkv of rank 1": ({"w_qkv": zeros(8)}, ValueError, "(heads*head_dim, D)", "(8,)"),
    "w_qkv transposed": ({"w_qkv": zeros(8, 6)}, ValueError, "D = 6", "(2, 5, 8)"),
    "w_qkv empty": ({"w_qkv": zeros(0, 8), "w_out": zeros(8, 0)}, ValueError, "width 0", "2"),
    "w_out transposed": ({"w_out": zeros(6, 8)}, ValueError, "w_out of shape", "(6, 8)"),
    "w_out of rank 1": ({"w_out": zeros(6)}, ValueError, "(8, 6)", "(6,)"),
    "b_out too short": ({"b_out": zeros(3)}, ValueError, "b_out of shape (D,) = (8,)", "(3,)"),
    "b_out of rank 2": ({"b_out": zeros(1, 8)}, ValueError, "b_out of shape", "(1, 8)"),
    "b_out alone": ({"w_out": None}, ValueError, "b_out only together with w_out", "without w_out"),
    "heads that do not divide": ({"heads": 4}, ValueError, "heads to divide", "4"),
    "no heads": ({"heads": 0}, ValueError, "heads to divide", "0"),
    "negative heads": ({"heads": -2}, ValueError, "heads to divide", "-2"),
    "heads a bool": ({"heads": True}, TypeError, "heads to be an int", "bool"),
    "heads a float": ({"heads": 2.0}, TypeError, "heads to be an int", "float"),
    "heads a str": ({"heads": "2"}, TypeError, "heads to be an int", "str"),
    "heads None": ({"heads": None}, TypeError, "heads to be an int", "NoneType"),
    "scale 0": ({"scale": 0}, ValueError, "scale to be finite and > 0", "0"),
    "negative scale": ({"scale": -0.5}, ValueError, "scale to be finite and > 0", "-0.5"),
    "scale nan": ({"scale": NAN}, ValueError, "scale to be finite", "nan"),
    "scale inf": ({"scale": INF}, ValueError, "scale to be finite", "inf"),
    "scale below float32": ({"scale": 1e-50}, ValueError, "scale between 1.175e-38", "1e-50"),
    "scale above float32": ({"scale": 1e39}, ValueError, "scale between", "1e+39"),
    "scale a str": ({"scale": "1"}, TypeError, "scale to be a float", "str"),
    "scale a bool": ({"scale": True}, TypeError, "scale to be a float", "bool"),
    "scale a tensor": ({"scale": torch.tensor(1.0)}, TypeError, "scale to be a float", "Tensor"),
    "causal a str": ({"causal": "no"}, TypeError, "causal to be a bool", "str"),
    "causal None": ({"causal": None}, TypeError, "causal to be a bool", "NoneType"),
    "x None": ({"x": None}, TypeError, "x to be a torch.Tensor", "NoneType"),
    "w_qkv None": ({"w_qkv": None}, TypeError, "w_qkv to be a torch.Tensor", "NoneType"),
    "x a list": ({"x": [1.0]}, TypeError, "x to be a torch.Tensor", "list"),
    "w_out a list": ({"w_out": [1.0]}, TypeError, "w_out to be a torch.Tensor", "list"),
    "integers": ({"x": zeros(2, 5, 8, dtype=torch.int64)}, TypeError, "float16", "torch.int64"),
    "booleans": ({"x": zeros(2, 5, 8, dtype=torch.bool)}, TypeError, "float16", "torch.bool"),
    "complex": ({"w_qkv": zeros(6, 8, dtype=torch.cfloat)}, TypeError, "w_qkv of dtype", "complex"),
    "mixed dtypes": (
        {"x": zeros(2, 5, 8, dtype=torch.bfloat16)},
        TypeError,
        "w_qkv of the dtype of x, torch.bfloat16, when autocast is off",
        "torch.float32",
    ),
    "a float64 bias": ({"b_out": zeros(8, dtype=torch.float64)}, TypeError, "b_out", "float64"),
    "mixed devices": (
        {"w_qkv": zeros(6, 8, device="meta")},
        ValueError,
        "w_qkv on the device of x, cpu",
        "meta",
    ),
    "a bias elsewhere": ({"b_out": zeros(8, device="meta")}, ValueError, "b_out on the", "meta"),
    "unknown backend": ({"backend": "cudnn"}, ValueError, "backend to be one of", "'cudnn'"),
    "backend None": ({"backend": None}, ValueError, "backend to be one of", "None"),
}

CORE = {
    "w of rank 2": ({"w": zeros(5, 8)}, ValueError, "w of shape (B, N, heads*head_dim)", "(5, 8)"),
    "no tokens": ({"w": zeros(2, 0, 8)}, ValueError, "N > 0", "(2, 0, 8)"),
    "no columns": ({"w": zeros(2, 5, 0)}, ValueError, "heads to divide", "2"),
    "heads that do not divide": ({"heads": 3}, ValueError, "projected width 8", "3"),
    "w None": ({"w": None}, TypeError, "w to be a torch.Tensor", "NoneType"),
    "integers": ({"w": zeros(2, 5, 8, dtype=torch.int32)}, TypeError, "w of dtype", "torch.int32"),
    "scale 0": ({"scale": 0.0}, ValueError, "scale to be finite and > 0", "0.0"),
    "causal a str": ({"causal": "no"}, TypeError, "causal to be a bool", "str"),
    "unknown backend": ({"backend": "cudnn"}, ValueError, "backend to be one of", "'cudnn'"),
}

ISTA = {
    "weight not square": ({"weight": zeros(6, 8)}, ValueError, "weight of shape (D, D)", "(6, 8)"),
    "weight of rank 1": ({"weight": zeros(8)}, ValueError, "weight of shape (D, D)", "(8,)"),
    "x of another width": ({"x": zeros(2, 5, 7)}, ValueError, "D = 8", "(2, 5, 7)"),
    "x a scalar": ({"x": torch.tensor(1.0)}, ValueError, "x of shape (..., D)", "()"),
    "no tokens": ({"x": zeros(2, 0, 8)}, ValueError, "N > 0", "(2, 0, 8)"),
    "no columns": ({"x": zeros(2, 0), "weight": zeros(0, 0)}, ValueError, "D > 0", "0"),
    "negative step": ({"step_size": -0.1}, ValueError, "step_size to be finite and >= 0", "-0.1"),
    "negative lambda": ({"lambd": -0.1}, ValueError, "lambd to be finite and >= 0", "-0.1"),
    "step nan": ({"step_size": NAN}, ValueError, "step_size to be finite", "nan"),
    "lambda inf": ({"lambd": INF}, ValueError, "lambd to be finite", "inf"),
    "step a str": ({"step_size": "0.1"}, TypeError, "step_size to be a float", "str"),
    "lambda a bool": ({"lambd": True}, TypeError, "lambd to be a float", "bool"),
    "lambda None": ({"lambd": None}, TypeError, "lambd to be a float", "NoneType"),
    "x None": ({"x": None}, TypeError, "x to be a torch.Tensor", "NoneType"),
    "weight None": ({"weight": None}, TypeError, "weight to be a torch.Tensor", "NoneType"),
    "integers": ({"x": zeros(2, 8, dtype=torch.uint8)}, TypeError, "x of dtype", "torch.uint8"),
    "mixed dtypes": (
        {"weight": zeros(8, 8, dtype=torch.float64)},
        TypeError,
        "weight of the dtype of x, torch.float32, when autocast is off",
        "torch.float64",
    ),
    "mixed devices": ({"weight": zeros(8, 8, device="meta")}, ValueError, "weight on the", "meta"),
    "unknown backend": ({"backend": "tritn"}, ValueError, "backend to be one of", "'tritn'"),
}

OVERCOMPLETE = {
    "dictionary of rank 1": ({"dictionary": zeros(8)}, ValueError, "dictionary of shape", "(8,)"),
    "dictionary transposed": ({"dictionary": zeros(12, 8)}, ValueError, "decoder of", "(8, 12)"),
    "dictionary empty": ({"dictionary": zeros(8, 0)}, ValueError, "M > 0", "(8, 0)"),
    "decoder transposed": ({"decoder": zeros(12, 8)}, ValueError, "decoder of", "(12, 8)"),
    "x of another width": ({"x": zeros(2, 5, 7)}, ValueError, "D = 8", "(2, 5, 7)"),
    "x a scalar": ({"x": torch.tensor(1.0)}, ValueError, "x of shape (..., D)", "()"),
    "no tokens": ({"x": zeros(2, 0, 8)}, ValueError, "N > 0", "(2, 0, 8)"),
    "negative step": ({"step_size": -0.1}, ValueError, "step_size to be finite and >= 0", "-0.1"),
    "lambda inf": ({"lambd": INF}, ValueError, "lambd to be finite", "inf"),
    "lambda a bool": ({"lambd": True}, TypeError, "lambd to be a float", "bool"),
    "memory": ({"memory": "none"}, ValueError, "memory to be one of ('default', 'low')", "'none'"),
    "x None": ({"x": None}, TypeError, "x to be a torch.Tensor", "NoneType"),
    "dictionary None": ({"dictionary": None}, TypeError, "dictionary to be", "NoneType"),
    "integers": ({"x": zeros(2, 8, dtype=torch.uint8)}, TypeError, "x of dtype", "torch.uint8"),
    "mixed dtypes": (
        {"decoder": zeros(8, 12, dtype=torch.float64)},
        TypeError,
        "decoder of the dtype of x, torch.float32, when autocast is off",
        "torch.float64",
    ),
    "mixed devices": ({"decoder": zeros(8, 12, device="meta")}, ValueError, "decoder on", "meta"),
    "unknown backend": ({"backend": "tritn"}, ValueError, "backend to be one of", "'tritn'"),
}

RESIDUAL = {
    "weight of rank 2": ({"weight": zeros(1, 8)}, ValueError, "weight of shape (D,)", "(1, 8)"),
    "weight empty": ({"weight": zeros(0)}, ValueError, "D > 0", "(0,)"),
    "bias too short": ({"bias": zeros(7)}, ValueError, "bias of shape (D,) = (8,)", "(7,)"),
    "x of another width": ({"x": zeros(2, 5, 7)}, ValueError, "D = 8", "(2, 5, 7)"),
    "x a scalar": ({"x": torch.tensor(1.0)}, ValueError, "x of shape (..., D)", "()"),
    "y of another shape": ({"y": zeros(1, 5, 8)}, ValueError, "y of the shape of x", "(1, 5, 8)"),
    "scale too long": ({"scale": zeros(9)}, ValueError, "scale of shape (D,) = (8,)", "(9,)"),
    "scale alone": ({"y": None}, ValueError, "scale only together with y", "scale without y"),
    "number alone": ({"y": None, "scale": -1}, ValueError, "scale only together with y", "without"),
    "scale inf": ({"scale": -INF}, ValueError, "scale to be finite", "-inf"),
    "scale nan": ({"scale": NAN}, ValueError, "scale to be finite", "nan"),
    "scale a bool": ({"scale": True}, TypeError, "scale to be a torch.Tensor", "bool"),
    "eps 0": ({"eps": 0.0}, ValueError, "eps to be finite and > 0", "0.0"),
    "eps a tensor": ({"eps": torch.tensor(1.0)}, TypeError, "eps to be a float", "Tensor"),
    "x None": ({"x": None}, TypeError, "x to be a torch.Tensor", "NoneType"),
    "bias None": ({"bias": None}, TypeError, "bias to be a torch.Tensor", "NoneType"),
    "y a list": ({"y": [1.0]}, TypeError, "y to be a torch.Tensor", "list"),
    "integers": ({"x": zeros(2, 5, 8, dtype=torch.int64)}, TypeError, "x of dtype", "torch.int64"),
    "mixed dtypes": (
        {"y": zeros(2, 5, 8, dtype=torch.bfloat16)},
        TypeError,
        "y of the dtype of x, torch.float32, when autocast is off",
        "torch.bfloat16",
    ),
    "mixed devices": ({"scale": zeros(8, device="meta")}, ValueError, "scale on the", "meta"),
    "unknown backend": ({"backend": "tritn"}, ValueError, "backend to be one of", "'tritn'"),
}

LOSS = {
    "no logits": ({"logits": None}, TypeError, "logits to be a torch.Tensor", "NoneType"),
    "logits a scalar": ({"logits": torch.tensor(1.0)}, ValueError, "shape (..., W)", "()"),
    "no columns": ({"logits": zeros(2, 5, 0)}, ValueError, "W > 0", "(2, 5, 0)"),
    "integers": ({"logits": zeros(2, 5, 8).long()}, TypeError, "logits of dtype", "torch.int64"),
    "labels a list": ({"labels": [1]}, TypeError, "labels to be a torch.Tensor", "list"),
    "labels of floats": ({"labels": zeros(2, 5)}, TypeError, "int64 or int32", "torch.float32"),
    "labels of another shape": (
        {"labels": zeros(5, 2).long()},
        ValueError,
        "labels of shape (2, 5)",
        "(5, 2)",
    ),
    "labels elsewhere": (
        {"labels": zeros(2, 5, device="meta").long()},
        ValueError,
        "labels on the device of logits",
        "meta",
    ),
    "no word": ({"vocab_size": 0}, ValueError, "vocab_size from 1 to W = 8", "0"),
    "more words than columns": ({"vocab_size": 9}, ValueError, "from 1 to W = 8", "9"),
    "vocab_size a float": ({"vocab_size": 8.0}, TypeError, "vocab_size to be an int", "float"),
    "bias of another shape": (
        {"added_bias": zeros(7)},
        ValueError,
        "added_bias of shape (V,) = (8,)",
        "(7,)",
    ),
    "bias of integers": (
        {"added_bias": zeros(8).long()},
        TypeError,
        "added_bias of dtype",
        "int64",
    ),
    "bias no tensor": ({"added_bias": 0.0}, TypeError, "added_bias to be a torch.T", "float"),
    "bias elsewhere": (
        {"added_bias": zeros(8, device="meta")},
        ValueError,
        "added_bias on the device of logits",
        "meta",
    ),
    "ignore_index None": ({"ignore_index": None}, TypeError, "ignore_index to be an int", "NoneT"),
    "unknown backend": ({"backend": "tritn"}, ValueError, "backend to be one of", "'tritn'"),
}

WORDS = {
    "words no tensor": ({"idx": [[1]]}, TypeError, "idx to be a torch.Tensor", "list"),
    "words of floats": ({"idx": zeros(2, 5)}, TypeError, "idx of dtype int64 or int32", "float32"),
    "words in a row": ({"idx": zeros(5).long()}, ValueError, "idx of shape (B, T)", "(5,)"),
    "no words": ({"idx": zeros(2, 0).long()}, ValueError, "T > 0", "(2, 0)"),
    "words elsewhere": (
        {"idx": zeros(2, 5, device="meta").long()},
        ValueError,
        "idx on the device of weight",
        "meta",
    ),
    "weight of 3 dimensions": (
        {"weight": zeros(1, 8, 8)},
        ValueError,
        "weight of shape (V, D)",
        "8",
    ),
    "places of another length": (
        {"position_weight": zeros(6, 8)},
        ValueError,
        "position_weight of shape (5, D = 8)",
        "(6, 8)",
    ),
    "places of another width": (
        {"position_weight": zeros(6, 7), "positions": zeros(2, 5).long()},
        ValueError,
        "position_weight of shape (R, D = 8)",
        "(6, 7)",
    ),
    "positions of another shape": (
        {"positions": zeros(5, 2).long()},
        ValueError,
        "positions of the shape of idx, (2, 5)",
        "(5, 2)",
    ),
    "padding no word": ({"padding_idx": 8}, ValueError, "padding_idx from 0 to V - 1 = 7", "8"),
    "padding a float": ({"padding_idx": 1.0}, TypeError, "padding_idx to be an int", "float"),
    "another dtype": (
        {"position_weight": zeros(5, 8).double()},
        TypeError,
        "position_weight of the dtype of weight",
        "float64",
    ),
    "unknown backend": ({"backend": "tritn"}, ValueError, "backend to be one of", "'tritn'"),
}

TABLES = {
    "mssa": (mssa, MSSA),
    "tied_attention": (tied_attention, CORE),
    "ista": (ista, ISTA),
    "overcomplete_ista": (overcomplete_ista, OVERCOMPLETE),
    "residual_norm": (residual_norm, RESIDUAL),
    "cross_entropy": (cross_entropy, LOSS),
    "tied_embedding": (tied_embedding, WORDS),
}


def working_call(op):
    x = torch.randn(2, 5, 8)
    if op == "mssa":
        return {**tensors(), "heads": 2}
    if op == "overcomplete_ista":
        return {"x": x, "dictionary": torch.randn(8, 12), "decoder": torch.randn(8, 12)}
    if op == "residual_norm":
        weight, bias, scale = torch.randn(3, 8)
        return {"x": x, "weight": weight, "bias": bias, "y": torch.randn(2, 5, 8), "scale": scale}
    if op == "cross_entropy":
        return {"logits": x, "labels": torch.randint(8, (2, 5))}
    if op == "tied_embedding":
        weight, places = torch.randn(8, 8), torch.randn(5, 8)
        return {"idx": torch.randint(8, (2, 5)), "weight": weight, "position_weight": places}
    return {"w": x, "heads": 2} if op == "tied_attention" else {"x": x, "weight": torch.eye(8)}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in TABLES for name in TABLES[op][1]])
def test_bad_input(op, name):
    function, table = TABLES[op]
    change, error, expected, got = table[name]
    call = {**working_call(op), **change}
    before = {k: v.clone() for k, v in call.items() if isinstance(v, torch.Tensor)}
    grams = len(gram_cache._entries)
    with pytest.raises((ValueError, TypeError)) as caught:
        function(**call)
    assert caught.type is error
    says = re.fullmatch(rf"{op}: expected (.+), got (.+)", str(caught.value), re.DOTALL)
    assert says, caught.value
    assert expected in says[1] and got in says[2], caught.value
    for k, v in before.items():
        assert v.is_meta or torch.equal(call[k], v), k
    assert len(gram_cache._entries) == grams


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in TABLES for name in TABLES[op][1]])
def test_explain_refuses_what_the_op_refuses(op, name):
    change, error, expected, _ = TABLES[op][1][name]
    if "backend" in change:
        return
    with pytest.raises(error, match=re.escape(expected)):
        crate_kernels.explain(op, **{**working_call(op), **change})


def test_the_calls_work_without_the_change():
    for op, (function, _) in TABLES.items():
        results = function(**working_call(op))
        results = results[:1] if op == "tied_embedding" else results
        for t in results if isinstance(results, tuple) else (results,):
            assert t.shape == (() if op == "cross_entropy" else (2, 5, 8))
        assert crate_kernels.explain(op, **working_call(op)).op == op


@pytest.mark.parametrize("op", TABLES)
def test_mixed_dtypes_are_welcome_under_autocast_but_for_float64(op):
    call = working_call(op)
    name = {"mssa": "w_qkv", "ista": "weight", "overcomplete_ista": "decoder"}
    name = {**name, "residual_norm": "y", "tied_embedding": "position_weight"}.get(op)
    if name is None:
        return
    with torch.autocast("cpu", torch.bfloat16):
        TABLES[op][0](**{**call, name: call[name].bfloat16()})
        with pytest.raises(TypeError, match=r"expected .*got torch.float64"):
            TABLES[op][0](**{**call, name: call[name].double()})


def test_explain_of_an_unknown_op():
    with pytest.raises(ValueError, match=r"explain: expected op to be one of .*'mssa'.*got 'mlp'"):
        crate_kernels.explain("mlp", torch.randn(2, 2))
