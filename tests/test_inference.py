"""prepare_for_inference: weights cast and G made once, and again when they change."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import nn

from crate_kernels import fuse, models, prepare_for_inference, unfuse
from crate_kernels.block.op import chained_block
from crate_kernels.nn import encoder

DEPTH = 2


def model(dtype=torch.float32):
    torch.manual_seed(0)
    size = {"image_size": 8, "patch_size": 4, "dim": 12, "depth": DEPTH, "heads": 3}
    made = models.CRATE(num_classes=5, dim_head=4, **size).to(dtype)
    fuse(made)
    return made


def images(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8, dtype=dtype)


def watched(module, x, dtype=None):
    """The output, and of each layer what it is given: (dtype of w_qkv, whether there is G)."""
    given = []

    def note(*tensors, gram, **options):
        w_qkv = tensors[4]
        given.append((w_qkv.dtype, gram is not None))
        return chained_block(*tensors, gram=gram, **options)

    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with torch.no_grad(), autocast, mock.patch.object(encoder, "chained_block", note):
        y = module(x)
    return y, given


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_are_prepared_once_and_results_stay(dtype):
    plain = model().eval()
    ready = copy.deepcopy(plain)
    prepare_for_inference(ready)
    want, before = watched(plain, images(), dtype)
    first, given = watched(ready, images(), dtype)
    kept = dict(ready.transformer.constants)
    second, again = watched(ready, images(), dtype)
    assert torch.equal(first, want) and torch.equal(second, want)
    assert before == [(torch.float32, False)] * DEPTH
    assert given == again == [(dtype or torch.float32, True)] * DEPTH
    assert all(ready.transformer.constants[key] is held for key, held in kept.items())
    assert ready.state_dict().keys() == plain.state_dict().keys()


def test_gradients_are_of_the_weights_themselves():
    plain = model()
    ready = copy.deepcopy(plain)
    prepare_for_inference(ready)
    plain.eval()
    for m in (plain, ready):
        m(images()).sum().backward()
    for a, b in zip(ready.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def optimizer_step(m):
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    m(images()).square().sum().backward()
    optimizer.step()


def other_weights(m):
    m.load_state_dict({k: 1.1 * t for k, t in m.state_dict().items()})


def another_parameter(m):
    with torch.no_grad():
        layer = m.transformer.layers[1][1].fn
        layer.weight = nn.Parameter(0.5 * layer.weight)


def another_step_size(m):
    m.transformer.layers[0][1].fn.step_size = 0.3


@pytest.mark.parametrize(
    "change", [optimizer_step, other_weights, another_parameter, another_step_size]
)
def test_changed_weights_are_noticed(change):
    plain = model().eval()
    ready = copy.deepcopy(plain)
    prepare_for_inference(ready)
    before, _ = watched(ready, images())
    for m in (plain, ready):
        change(m)
    got, seen = watched(ready, images())
    assert seen == [(torch.float32, True)] * DEPTH
    assert torch.equal(got, watched(plain, images())[0])
    assert not torch.equal(got, before)


def test_writes_that_are_not_noticed_are_taken_up_by_the_next_call_of_it():
    ready = model()
    prepare_for_inference(ready)
    before, _ = watched(ready, images())
    for p in ready.transformer.parameters():
        p.data.mul_(1.2)
    prepare_for_inference(ready)
    want = copy.deepcopy(ready)
    want.train().eval()
    got, _ = watched(ready, images())
    assert torch.equal(got, watched(want, images())[0])
    assert not torch.equal(got, before)


@pytest.mark.parametrize("end", [lambda m: m.train().eval(), fuse])
def test_it_lasts_until_train(end):
    ready = model()
    prepare_for_inference(ready)
    assert not ready.training
    end(ready)
    _, seen = watched(ready, images())
    assert seen == [(torch.float32, ready.transformer.constants is not None)] * DEPTH


def test_copies_and_unfuse():
    ready = model()
    prepare_for_inference(ready)
    want, _ = watched(ready, images())
    for other in (copy.deepcopy(ready), pickle.loads(pickle.dumps(ready))):
        other.load_state_dict({k: 1.1 * t for k, t in ready.state_dict().items()})
        assert not torch.equal(watched(other, images())[0], want)
    unfuse(ready)
    assert "constants" not in vars(ready.transformer)


def test_inference_mode():
    ready = model()
    prepare_for_inference(ready)
    with torch.inference_mode():
        want = ready(images())
    assert torch.equal(watched(ready, images())[0], want)


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"model to be a torch\.nn\.Module, got int"):
        prepare_for_inference(3)
    with pytest.raises(
        ValueError, match=r"a model with a fused Encoder \(fuse\(model\)\), got none"
    ):
        prepare_for_inference(nn.Linear(2, 2))
