"""CRATE-DINO: keys, the loss and its center, crops of several sizes, the slow teacher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import crate_kernels
from crate_kernels import models
from crate_kernels.models import dino, patches

SIZE = {"image_size": 8, "patch_size": 2, "dim": 12, "depth": 2, "heads": 3}


def tiny(ncrops=4, out_dim=7, **options):
    torch.manual_seed(0)
    backbone = models.DINOBackbone(**{**SIZE, **options}).double()
    head = models.DINOHead(12, out_dim, hidden_dim=10, bottleneck_dim=6).double()
    loss = models.DINOLoss(out_dim, ncrops).double()
    return models.DINO(models.MultiCropWrapper(backbone, head), loss)


def crops(*sides, batch=3):
    torch.manual_seed(1)
    return [torch.randn(batch, 3, side, side, dtype=torch.float64) for side in sides]


def test_keys_and_shapes():
    state = {k: tuple(v.shape) for k, v in tiny(depth=1).state_dict().items()}
    student = {k.split(".", 1)[1]: v for k, v in state.items() if k.startswith("student.")}
    teacher = {k.split(".", 1)[1]: v for k, v in state.items() if k.startswith("teacher.")}
    assert student == teacher and len(state) == 2 * len(student) + 1
    assert state["dino_loss.center"] == (1, 7)
    assert {k: v for k, v in student.items() if ".layers." not in k} == {
        "backbone.cls_token": (1, 1, 12),
        "backbone.pos_embed": (1, 17, 12),
        "backbone.patch_embed.proj.weight": (12, 3, 2, 2),
        "backbone.patch_embed.proj.bias": (12,),
        "backbone.norm.weight": (12,),
        "backbone.norm.bias": (12,),
        "head.mlp.0.weight": (10, 12),
        "head.mlp.0.bias": (10,),
        "head.mlp.2.weight": (10, 10),
        "head.mlp.2.bias": (10,),
        "head.mlp.4.weight": (6, 10),
        "head.mlp.4.bias": (6,),
        "head.last_layer.weight_g": (7, 1),
        "head.last_layer.weight_v": (7, 6),
    }
    assert student["backbone.blocks.0.layers.0.1.fn.weight"] == (12, 12)


def test_sizes():
    small, base = models.crate_dino_small(device="meta"), models.crate_dino_base(device="meta")
    for model, dim in ((small, 576), (base, 768)):
        assert all(p.is_meta for p in model.parameters())
        assert model.student.backbone.norm.weight.shape == (dim,)
        assert model.student.head.last_layer.weight_v.shape == (65536, 256)
        assert model.student.backbone.blocks[0].layers[0][1].fn.lambd == 0.1
        assert not any(p.requires_grad for p in model.teacher.parameters())
    free = models.crate_dino_small(
        11, 2, norm_last_layer=False, depth=1, device="meta"
    ).student.head
    assert free.last_layer.weight_g.requires_grad
    assert not small.student.head.last_layer.weight_g.requires_grad


def test_backbone_and_head_by_hand():
    model = tiny().student
    backbone, head = model.backbone, model.head
    for side in (8, 4):
        (img,) = crops(side)
        x = backbone.patch_embed.proj(img).flatten(2).mT
        n = side // 2
        positions = patches.interpolate_positions(backbone.pos_embed, n, n)
        x = torch.cat((backbone.cls_token.expand(3, 1, 12), x), 1) + positions
        attention = None
        for layer in backbone.blocks:
            attn, ff = layer.layers[0]
            attention = attn(x, return_attention=True)
            x = ff(x + attn(x))
        torch.testing.assert_close(backbone.get_last_selfattention(img), attention)
        x = F.layer_norm(x, (12,), backbone.norm.weight, backbone.norm.bias, 1e-6)[:, 0]
        x = F.normalize(head.mlp(x), dim=-1)
        v = head.last_layer.weight_v
        torch.testing.assert_close(model(img), x @ (v / v.norm(dim=1, keepdim=True)).T)


def test_crops_of_one_size_share_a_pass():
    model = tiny(6).student
    seen = []
    model.backbone.register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape)))
    given = crops(8, 8, 4, 4, 4, 6)
    got = model(given)
    assert seen == [(6, 3, 8, 8), (9, 3, 4, 4), (3, 3, 6, 6)]
    torch.testing.assert_close(got, torch.cat([model(crop) for crop in given]))


@pytest.mark.parametrize("epoch", [0, 1, 2, 9])
def test_loss_and_center_by_hand(epoch):
    loss = models.DINOLoss(5, 3, 0.02, 0.06, 3, student_temp=0.2, center_momentum=0.7).double()
    torch.manual_seed(0)
    loss.center.normal_()
    center = loss.center.clone()
    student = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    got = loss(student, teacher, epoch)
    got.backward()
    assert teacher.grad is None
    temperature = {0: 0.02, 1: 0.04}.get(epoch, 0.06)
    total = 0.0
    for i in range(2):
        for j in range(3):
            for b in range(2):
                q = ((teacher[2 * i + b] - center[0]) / temperature).softmax(0).detach()
                log_p = (student[2 * j + b] / 0.2).log_softmax(0)
                total = total - (i != j) * (q * log_p).sum() / 2 / 4
    torch.testing.assert_close(got, total)
    torch.testing.assert_close(student.grad, torch.autograd.grad(total, student)[0])
    torch.testing.assert_close(loss.center, 0.7 * center + 0.3 * teacher.detach().mean(0))


def test_the_teacher_follows_without_gradient():
    model = tiny()
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.student.parameters(), model.teacher.parameters(), strict=True)
    )
    model(crops(8, 8, 4, 4)).backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    before = {n: p.clone() for n, p in model.teacher.named_parameters()}
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1)
    model.update_teacher(0.75)
    for name, p in model.teacher.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.25)
    momenta = [dino.teacher_momentum(step, 100, 0.9) for step in (0, 50, 100)]
    assert momenta == pytest.approx([0.9, 0.95, 1.0])


def test_fuse_takes_student_and_teacher():
    model, given = tiny(), crops(8, 8, 4, 4)
    want = model(given)
    model.dino_loss.center.zero_()
    report = crate_kernels.fuse(model)
    assert sorted({layer.name.split(".")[0] for layer in report.replaced}) == ["student", "teacher"]
    assert [layer.kind for layer in report.replaced].count("Encoder") == 4
    torch.testing.assert_close(model(given), want)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tiny(heads=5), "heads to divide dim = 12, got 5"),
        (lambda: tiny(image_size=9), "multiple of patch_size 2, got 9"),
        (lambda: tiny(ncrops=1), "at least the 2 crops of the teacher, got 1"),
        (lambda: tiny()(crops(8, 8, 4)), r"outputs of 4 crops and of 2.*\(9, 7\) and \(6, 7\)"),
        (lambda: tiny()(crops(8, 8, 5, 5)), "multiples of 2"),
    ],
)
def test_bad_input(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_learns_from_digits():
    """The loss falls, and not because every image gets one answer."""
    data = torch.tensor(pytest.importorskip("sklearn.datasets").load_digits().images / 8 - 1)
    digits = data.float()[:, None]
    torch.manual_seed(0)
    backbone = models.DINOBackbone(**{**SIZE, "channels": 1, "dim": 32, "depth": 1, "heads": 2})
    student = models.MultiCropWrapper(backbone, models.DINOHead(32, 32, True, 64, 16))
    for module in student.modules():
        if isinstance(module, nn.Linear):  # 0.02 is little in layers so narrow
            module.reset_parameters()
    model = models.DINO(student, models.DINOLoss(32, 4, 0.01, 0.01))
    crate_kernels.fuse(model)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def crops_of_some():
        """The whole twice and two windows, each with noise of its own."""
        img = digits[torch.randint(len(digits), (32,))]
        given = []
        for side in (8, 8, 6, 6):
            y, x = torch.randint(9 - side, (2,)).tolist()
            window = img[..., y : y + side, x : x + side]
            given.append(window + 0.1 * torch.randn_like(window))
        return given

    with torch.no_grad():
        for _ in range(30):  # a center to begin with
            model(crops_of_some())
    losses = []
    for step in range(100):
        loss = model(crops_of_some())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_teacher(dino.teacher_momentum(step, 100, 0.99))
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    with torch.no_grad():
        answers = model.teacher(digits) - model.dino_loss.center
    assert len(answers.argmax(-1).unique()) >= 6
