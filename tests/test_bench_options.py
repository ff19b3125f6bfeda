"""The benchmarks' options, and the operations and bytes that they count."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crate_kernels import bench
from crate_kernels.__main__ import main
from crate_kernels.bench import masks, options, peers, roofline, workloads
from crate_kernels.bench.peers import build_unfused
from crate_kernels.bench.run import Result
from crate_kernels.bench.workloads import MODELS, Workload

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return parser.parse_args(argv)


# ---- options


@pytest.mark.parametrize("quickly", [False, True])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_without_options_the_named_set_is_run(
    device: torch.device, quickly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    selected = options.select(parse(*["--quick"] * quickly), device)
    assert {k: tuple(v) for k, v in selected.items()} == workloads.named_set(device.type, quickly)


def test_sizes_replace_the_shapes() -> None:
    argv = "--suite core mssa --batch 2 --tokens 5 7 --heads 3 --head-dim 8 --width 9"
    selected = options.select(parse(*argv.split()), CPU)
    both = ("forward", "backward"), ("forward", "forward+backward")
    assert {name: [(w.shape, w.mode) for w in found] for name, found in selected.items()} == {
        "core": [(shape, mode) for shape in ("2x5x3x8", "2x7x3x8") for mode in both[0]],
        "mssa": [(shape, mode) for shape in ("2x5x9x3x8", "2x7x9x3x8") for mode in both[1]],
    }


def test_options_change_every_workload_of_a_suite() -> None:
    argv = "--suite core model --dtype bf16 --causal --autocast --model crate_small --batch 3"
    selected = options.select(parse(*argv.split()), CPU)
    assert {w.label for w in selected["core"]} == {
        f"3x197x6x64 bf16 autocast causal {mode}" for mode in ("forward", "backward")
    }
    assert {w.label for w in selected["model"]} == {
        f"crate_small 3 bf16 {mode}" for mode in ("forward", "train")
    }


@pytest.mark.parametrize(
    ("device_name", "argv", "target"),
    [
        ("NVIDIA H200", "", 2.2),
        ("NVIDIA H200", "--backend reference", 2.2),
        ("NVIDIA H200", "--batch 64", None),
        ("NVIDIA H200", "--dtype fp16", None),
        ("NVIDIA H100", "", None),
    ],
)
def test_a_target_stays_with_its_workload_and_device(
    device_name: str, argv: str, target: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name)
    selected = options.select(parse("--suite", "ista", *argv.split()), CUDA)
    assert selected["ista"][0].target == target
    assert selected["ista"][0].most == (target and 1.15)


@pytest.mark.parametrize("modes", [["train"], ["forward", "train"]])
def test_each_mode_asked_for_is_run_once(modes: list[str]) -> None:
    found = options.select(parse("--suite", "cpu", "--mode", *modes), CPU)["cpu"]
    assert [(w.mode, w.target) for w in found] == [(mode, 1.5) for mode in modes]


@pytest.mark.parametrize(
    "argv",
    [
        "--suite core --mode train",
        "--suite model --mode backward",
        "--suite cpu core",
        "--suite cpu --device cuda",
        "--suite core --device cuda",
        "--suite model --tokens 50",
        "--suite ista --causal",
        "--suite decode --mode backward",
        "--suite decode --width 5",
        "--suite decode --autocast",
        "--suite core --model crate_tiny",
    ],
)
def test_impossible_options_exit_with_2(
    argv: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "run_workload", lambda *a: [Result(a[0], "eager", False)])
    assert main(["bench", *argv.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("bench: ") and printed.out == ""


@pytest.mark.parametrize("argv", ["--tokens 0", "--peers flash", "--suite layers"])
def test_unknown_values_are_a_usage_error(argv: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*argv.split())
    assert ended.value.code == 2


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--suite core ista --mode forward backward --batch 2 3 --head-dim 48 --causal",
        "--quick --no-graph --check-only --seed 0 --rounds 7 --seconds 0.5 --peers sdpa+compile",
        "--device cpu --graph --autocast --versus eager --backend reference --measure-ceilings",
    ],
)
def test_the_command_repeats_the_run(argv: str) -> None:
    args = parse(*argv.split(), "--out", "somewhere", "--commit", "c0ffee")
    words = shlex.split(options.command(args))
    assert words[:4] == ["python", "-m", "crate_kernels", "bench"]
    again = parse(*words[4:])
    assert vars(again) == vars(args) | {"out": None, "commit": ""}


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ("", ("eager", "sdpa", "crate_kernels")),
        ("--peers compile", ("compile", "crate_kernels")),
        ("--peers crate_kernels compile", ("crate_kernels", "compile")),
        ("--versus sdpa-flash", ("sdpa-flash", "eager", "sdpa", "crate_kernels")),
    ],
)
def test_ours_is_always_among_the_candidates(argv: str, names: tuple[str, ...]) -> None:
    found = options.candidates_for(workloads.core(2, 20, 2, 0, 0)[0], "cpu", parse(*argv.split()))
    assert tuple(c.name for c in found) == names
    assert [c.name for c in found if c.ours] == ["crate_kernels"]


@pytest.mark.parametrize("size", ["--batch 3", "--batch 3 --width 24"])
def test_a_suite_of_an_op_and_a_model(size: str) -> None:
    """Options change those that they concern; each has its own peers."""
    found = options.select(parse("--suite", "alpha", *size.split()), CPU)["alpha"]
    width = 24 if "width" in size else 192
    assert [w.label for w in found] == [
        *(f"3x197x{width}x{4 * width} fp32 {mode}" for mode in ("forward", "forward+backward")),
        *(f"crate_alpha_tiny 3 fp32 {mode}" for mode in ("train", "forward")),
    ]
    assert [peers.default_names(w, "cuda") for w in found[1:3]] == [
        ("eager", "compile", "cublas", "crate_kernels"),
        (
            *("eager", "compile", "sdpa+compile"),
            *("crate_kernels", "crate_kernels-low", "crate_kernels+compile"),
        ),
    ]


# ---- the roofline


@pytest.mark.parametrize(
    ("w", "flops", "elements", "exponentials"),
    [
        # 6 tokens, 2 heads of 4, so 2*2*9 = 36 pairs; a product of them is 36 * 4 * 2 operations.
        (("core", "forward", 3), 2 * 288, 2 * 48, 36),
        (("core", "backward", 3), 5 * 288, 4 * 48, 36),
        (("core", "forward+backward", 3), 7 * 288, 6 * 48, 72),
        # Width 5: a projection is 6 * 5 * 8 * 2 operations, a weight 40 elements, x 30.
        (("mssa", "forward", 3), 576 + 2 * 480, 2 * 30 + 80, 36),
        (("mssa", "backward", 3), 1440 + 4 * 480, 3 * 30 + 2 * 80, 36),
        # G and W(M + M^T) are 5 * 5 * 5 * 2 operations, from the 2 tokens below 2 * 5 * 5 * 2.
        (("ista", "forward", 3), 300, 2 * 30 + 25, 0),
        (("ista", "backward", 3), 2 * 300 + 2 * 250, 4 * 30 + 2 * 25, 0),
        # Of 2 * 2 sequences of 3: 12 pairs; the cache of 2 rows, w read and written, and o.
        (("decode", "forward", 3), 2 * 12 * 4 * 2, 2 * 8 * (2 + 3), 12),
        (("ista", "backward", 1), 2 * 100 + 2 * 100, 4 * 10 + 2 * 25, 0),
        # A product with a dictionary, 100 elements, is 6 * 5 * 20 * 2 operations.
        (("overcomplete", "forward", 3), 4 * 1200, 2 * 30 + 2 * 100, 0),
        (("overcomplete", "backward", 3), 8 * 1200, 3 * 30 + 4 * 100, 0),
    ],
)
def test_costs_are_those_counted_by_hand(
    w: tuple[str, str, int], flops: int, elements: int, exponentials: int
) -> None:
    suite, mode, tokens = w
    bf16 = Workload(suite, mode, 2, tokens, 2, 4, 5)
    assert roofline.cost(bf16) == roofline.Cost(flops, 2 * elements, exponentials)
    fp32 = roofline.cost(replace(bf16, dtype="fp32"))
    assert fp32 == roofline.Cost(flops, 4 * elements, exponentials)


def test_a_causal_core_needs_the_lower_triangle() -> None:
    w = Workload("core", "forward", 2, 3, 2, 4, causal=True)
    assert roofline.cost(w) == roofline.Cost(2 * 24 * 4 * 2, 2 * 48 * 2, 24)


def test_masks_count_the_lengths_that_there_are() -> None:
    w = Workload("masks", "forward", 1, 50, 2, 4, sequences="packed", dtype="fp32")
    pairs, rows = 2 * (2 * 50**2 + 8 * 37**2), 2 * 50 + 8 * 37
    assert roofline.cost(w) == roofline.Cost(2 * 2 * pairs * 4, 2 * rows * 8 * 4, pairs)
    padded = replace(w, sequences="padded", batch=20)
    lengths = masks.lengths_of(padded)
    assert len(lengths) == 20 and 1 <= min(lengths) < max(lengths) <= 50
    assert roofline.cost(padded).exponentials == 2 * sum(n * n for n in lengths)


def test_the_floor_is_the_slowest_of_the_three() -> None:
    w = Workload("core", "forward", 2, 3, 2, 4)  # 576 operations, 192 bytes, 36 exponentials
    for busy, floor in (((1, 576, 36), 192e6), ((192, 1, 36), 576e6), ((192, 576, 1), 36e6)):
        assert roofline.floor_us(w, roofline.Ceilings(*busy)) == floor


@pytest.mark.parametrize("name", MODELS)
def test_the_model_table_describes_the_models(name: str) -> None:
    """Against the parameters and multiplications of the model itself."""
    shape = MODELS[name]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_unfused(workloads.model(name, "forward", 2), torch.device("meta"))
        if not shape.context:  # what our ops multiply is not counted
            model(torch.empty(2, 3, 224, 224))
    assert round(sum(p.numel() for p in model.parameters()), -4) == shape.parameters
    if shape.context:
        return
    # The published ISTA has three products where one is needed; the overcomplete one needs all.
    spared = shape.depth * 2 * (2 * 2 * shape.tokens * shape.width**2)
    spared = 0 if shape.overcomplete else spared
    cost = roofline.cost(workloads.model(name, "forward", 2))
    assert counter.get_total_flops() - spared == cost.flops
