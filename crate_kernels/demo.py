"""From an existing CRATE model to a trained one: swap, check, train on real images, time.

``python -m crate_kernels demo`` runs it all on whatever device there is; the exit status is 1
where parity fails or the accuracy stays below ACCURACY_TARGET.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bench.timing import interleave, prepare
from .models import CRATE, crate_base, crate_tiny
from .nn import fuse, unfuse

ACCURACY_TARGET = 0.95
# How far ours may be from float64, in units of the error that plain PyTorch makes.
LIMITS = {"outputs": 2.0, "gradients": 3.0}
PARITY_IMAGES = 512
BATCH, LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 64, 2e-3, 0.05, 0.1
SHIFT = 2  # pixels, in images of 16
SECONDS = 15.0  # for each of the two timings
NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}

Split = tuple[Tensor, Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="cuda or cpu (default: cuda if there)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="where demo.png goes")
    parser.add_argument("--no-bench", action="store_true", help="stop after training")


def main(args: argparse.Namespace) -> int:
    missing = [package for module, package in NEEDS.items() if not _installed(module)]
    if missing:
        print(
            f"demo: needs {', '.join(missing)}; pip install {' '.join(missing)} "
            "(or install crate_kernels[demo])"
        )
        return 1
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(args.seed)
    print(f"device: {_device_name(device)}; torch {torch.__version__}\n")

    print("1. A CRATE model as published, and the same with its layers swapped")
    plain = build().to(device)
    fused = copy.deepcopy(plain)
    report = fuse(fused)
    print(report)
    if not report:
        return 1

    print("\n2. Is it still the same model? Relative errors against float64:")
    train_set, test_set = digits(args.seed, device)
    if not parity(plain, fused, *(t[:PARITY_IMAGES] for t in train_set)):
        print("Parity failed: no training, no timings.")
        return 1

    print(
        f"\n3. Training the swapped model on {len(train_set[0])} images of handwritten digits, "
        f"{len(test_set[0])} held out"
    )
    start = time.perf_counter()
    train(fused, train_set, test_set, args.epochs)
    accuracy = evaluate(fused, test_set)
    print(f"held-out accuracy {accuracy:.2%} after {time.perf_counter() - start:.0f} s")
    unfuse(fused)
    print(f"swapped back to the published layers: {evaluate(fused, test_set):.2%}")
    if accuracy < ACCURACY_TARGET:
        print(f"That is below the {ACCURACY_TARGET:.0%} that this demo has to reach.")
        return 1

    if not args.no_bench:
        compare_speed(device, args.out)
    return 0


def build() -> CRATE:
    """The published architecture at the size of small images: 17 tokens of width 128."""
    return CRATE(
        image_size=16,
        patch_size=4,
        channels=1,
        num_classes=10,
        dim=128,
        depth=4,
        heads=4,
        dim_head=32,
        pool="mean",
    )


def digits(seed: int, device: torch.device) -> tuple[Split, Split]:
    """scikit-learn's 1797 digits, enlarged from 8x8 to 16x16: a training and a held-out set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    labels = torch.as_tensor(data.target, dtype=torch.long)
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    splits = train_test_split(
        range(len(labels)), test_size=0.25, stratify=data.target, random_state=seed
    )
    train_set, test_set = ((images[i].to(device), labels[i].to(device)) for i in splits)
    return train_set, test_set


def parity(plain: nn.Module, fused: nn.Module, images: Tensor, labels: Tensor) -> bool:
    """Print how far both are from a float64 copy of ``plain``; whether fused is close enough.

    Medians over batches: where rounding moves one value across the threshold of ISTA, which
    happens to either model in a few batches of a hundred, the gradient jumps.
    """
    exact = copy.deepcopy(plain).double()
    dtypes = [torch.float32] + [torch.bfloat16] * images.is_cuda
    passed = True
    print(f"{'':<20}{'unfused max':>14}{'rms':>10}{'fused max':>14}{'rms':>10}")
    for dtype in dtypes:
        errors = []
        for batch in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            true = _outputs_and_gradients(exact, batch[0].double(), batch[1])
            with _autocast(images.device, dtype):
                both = [_outputs_and_gradients(model, *batch) for model in (plain, fused)]
            errors.append([[_errors(f, t) for f, t in zip(b, true, strict=True)] for b in both])
        medians = torch.tensor(errors).median(dim=0).values  # [unfused or fused, kind, max or rms]
        for i, (kind, factor) in enumerate(LIMITS.items()):
            theirs, ours = medians[:, i]
            ok = bool((ours <= factor * theirs).all())
            passed = passed and ok
            numbers = "{:>14.1e}{:>10.1e}{:>14.1e}{:>10.1e}".format(*theirs, *ours)
            verdict = f"{'passed' if ok else 'FAILED'} (at most {factor:g}x)"
            print(f"{kind + ', ' + str(dtype).removeprefix('torch.'):<20}{numbers}  {verdict}")
    return passed


def train(model: nn.Module, train_set: Split, test_set: Split, epochs: int) -> None:
    """AdamW with a warm-up and a cosine, label smoothing, and shifts by up to SHIFT pixels."""
    from tqdm import tqdm

    images, labels = train_set
    device = images.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    steps = epochs * -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for _ in range(epochs):
            model.train()
            for batch in torch.randperm(len(labels), device=device).split(BATCH):
                with _autocast(device, dtype):
                    logits = model(shifted(images[batch]))
                    loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", held_out=f"{evaluate(model, test_set):.1%}")


def shifted(images: Tensor) -> Tensor:
    """Each image moved by its own whole number of pixels, at most SHIFT, in both directions."""
    b, _, h, w = images.shape
    crops = F.pad(images, (SHIFT,) * 4).unfold(2, h, 1).unfold(3, w, 1)
    down, right = torch.randint(2 * SHIFT + 1, (2, b), device=images.device)
    return crops[torch.arange(b, device=images.device), :, down, right]


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Split) -> float:
    """The fraction of images that the model, in fp32, puts into the right class."""
    images, labels = held_out
    model.eval()
    return (model(images).argmax(-1) == labels).float().mean().item()


def compare_speed(device: torch.device, out: Path) -> None:
    """Print and plot images per second, unfused and fused, in inference and in training."""
    cuda = device.type == "cuda"
    name, model, batch, dtype = (
        ("CRATE-B", crate_base, 64, torch.bfloat16)
        if cuda
        else ("CRATE-T", crate_tiny, 8, torch.float32)
    )
    setting = f"{name}, batch {batch}, {'bf16 autocast' if cuda else 'fp32'}, 224x224"
    print(f"\n4. Speed: {setting}, images per second (medians of interleaved runs)")
    plain = model().to(device)
    fused = copy.deepcopy(plain)
    fuse(fused)
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    rates = {}
    print(f"{'':<12}{'unfused':>10}{'fused':>10}{'speedup':>10}")
    for kind, step in (("inference", _inference_step), ("training", _training_step)):
        runs = {
            side: prepare([step(net, images, labels, dtype)], device, graph=False)
            for side, net in (("unfused", plain), ("fused", fused))
        }
        timings = interleave(runs, device, rounds=20, seconds=SECONDS)
        rates[kind] = {side: 1e6 * batch / timing.median_us for side, timing in timings.items()}
        unfused, ours = rates[kind].values()
        print(f"{kind:<12}{unfused:>10.1f}{ours:>10.1f}{ours / unfused:>9.2f}x")
    out.mkdir(parents=True, exist_ok=True)
    plot(rates, f"{setting}\n{_device_name(device)}", out / "demo.png")
    print(f"plotted in {out / 'demo.png'}")


def plot(rates: dict[str, dict[str, float]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(rates), figsize=(7, 3.5), layout="constrained")
    for ax, (kind, sides) in zip(axes, rates.items(), strict=True):
        bars = ax.bar(list(sides), list(sides.values()), color=["#9aa0a6", "#1a73e8"], width=0.6)
        ax.bar_label(bars, fmt="{:,.1f}", padding=2)
        ax.set_title(f"{kind}: {sides['fused'] / sides['unfused']:.2f}x")
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(y=0.12)
    axes[0].set_ylabel("images per second")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _outputs_and_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    model.train()
    logits = model(images)
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
    return logits.detach().double(), torch.cat([g.flatten().double() for g in gradients])


def _errors(found: Tensor, true: Tensor) -> tuple[float, float]:
    """Largest and RMS error, as fractions of the largest and RMS value."""
    error = found - true
    return (
        (error.abs().max() / true.abs().max()).item(),
        (error.norm() / true.norm()).item(),
    )


def _inference_step(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> Callable[[], Any]:
    @torch.inference_mode()
    def step() -> None:
        model.eval()
        with _autocast(images.device, dtype):
            model(images)

    return step


def _training_step(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model.train()
        with _autocast(images.device, dtype):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
