"""Triton's own side of the kernels: examples, and offsets past 2^31. What they compute is in test_gpu_kernels.py, the
machine code in test_machine_code.py."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from gpu_kernels import Huge, interpreted, sparse_half

from vgg_fast import reference, testing
from vgg_fast.kernels import configs, support


def test_examples() -> None:
    for module in (interpreted("conv3x3"), interpreted("maxpool2x2"), configs, support):
        failed, attempted = doctest.testmod(module)
        assert failed == 0
        assert attempted > 0


@pytest.mark.parametrize(
    ("dtype", "capability", "reasons"),
    [
        (torch.float16, (8, 0), 0),
        (torch.bfloat16, (12, 0), 0),
        (torch.float32, None, 0),
        (torch.float16, (7, 5), 1),
        (torch.float64, (9, 0), 1),
        (torch.int8, (7, 0), 2),
    ],
)
def test_unsupported(dtype: torch.dtype, capability: tuple[int, int] | None, reasons: int) -> None:
    assert len(support.unsupported(dtype, capability)) == reasons


def test_the_package_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import vgg_fast.kernels.support"
    subprocess.run([sys.executable, "-c", code], check=True)


A100, H100, RTX_4090, B200 = (configs.Architecture(*a) for a in ((80, 108), (90, 132), (89, 128), (100, 148)))


@pytest.mark.parametrize(
    ("batch", "size", "cin", "cout", "pool", "architecture", "tile"),
    [
        (32, 112, 128, 128, True, A100, "128x128x64"),
        (32, 112, 128, 128, True, H100, "256x128x64"),  # the L2 decides: as many pixels as the channels leave room for
        (32, 28, 512, 512, False, H100, "128x256x64"),
        (32, 224, 64, 64, True, H100, "512x64x64"),
        (32, 28, 512, 512, False, B200, "256x128x64"),
        (1, 56, 256, 256, False, A100, "128x64x64"),  # as many tiles as multiprocessors
        (1, 28, 512, 512, False, A100, "64x128x64, shared by 2"),
        (1, 14, 512, 512, False, A100, "64x64x64, shared by 3"),
        (1, 14, 512, 512, False, H100, "64x64x64, shared by 4"),
        (32, 224, 3, 64, False, A100, "128x64x32"),  # 27 products in one step of 32
        (1, 5, 20, 24, False, RTX_4090, "64x32x32"),
    ],
    ids=str,
)
def test_the_tile_of_a_problem(
    batch: int, size: int, cin: int, cout: int, pool: bool, architecture: configs.Architecture, tile: str
) -> None:
    c = configs.config("fp16", batch, size, size, cin, cout, pool, architecture)
    assert f"{c.bm}x{c.bn}x{c.bk}" + (f", shared by {c.split}" if c.split > 1 else "") == tile


@pytest.mark.parametrize("tap", [False, True], ids=["", "tap"])
@pytest.mark.parametrize("precision", configs.PRECISIONS)
def test_every_problem_gets_a_tile_that_fits(precision: str, tap: bool) -> None:
    for s in testing.SHAPES:
        for architecture in (A100, H100, RTX_4090, B200, configs.Architecture(121, 48), configs.Architecture(103, 148)):
            c = configs.config(precision, s.n, s.h, s.w, s.cin, s.cout, tap, architecture, tap)
            assert s.cin % c.bk == 0 or s.cin % 16
            assert 16 <= c.bn <= max(16, 2 * s.cout - 1)
            assert c.split <= -(-9 * s.cin // c.bk)
            assert configs.is_lean(c) or not (tap or c.split > 1)


@pytest.mark.parametrize("sm", [75, 80, 86, 87, 89, 90, 100, 103, 110, 120])
def test_tiles_of_a_family_fit_its_shared_memory(sm: int) -> None:
    """bm and bn rows of each stage, 99 KiB for a program where nothing more is known."""
    family = configs.family(sm)
    limit = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_89": 99}[family] * 1024
    for kind, tiles in configs.TILES[family].items():
        for c in tiles:
            stages = c.num_stages - (configs.MACHINES[family].mma)  # mma.sync has its operands in registers by then
            assert stages * (c.bm + c.bn) * c.bk * (2 if kind == "16 bits" else 4) <= limit


def test_a_launch_is_asked_for_what_there_is() -> None:
    size = (1, 8, 8, 16, 16)
    with pytest.raises(ValueError, match="precision is 'tf23'; it must be one of fp16, bf16, ieee, tf32, bf16x3"):
        interpreted("conv3x3").launch_of(torch.float32, *size, True, False, A100, precision="tf23")
    with pytest.raises(ValueError, match=r"precision 'tf32' is for fp32 tensors, x is torch.float16"):
        interpreted("conv3x3").launch_of(torch.float16, *size, True, False, A100, precision="tf32")
    with pytest.raises(ValueError, match="there is no pool"):
        interpreted("conv3x3").launch_of(torch.float16, *size, True, False, A100, tap=True)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "ieee", "tf32", "bf16x3"])
@pytest.mark.parametrize("name", ["rgb_odd", "ragged", "deep", "one_row", "two"])
def test_taps_are_the_values_before_the_pool(name: str, precision: str, split: int) -> None:
    """Windows that hang over at an odd border, in fp32 tensors of every precision; alone and with shared sums."""
    module, s = interpreted("conv3x3"), testing.shape(name)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    x, weight, bias = testing.conv_inputs(s, dtype, integers=True)
    x = x.contiguous(memory_format=torch.channels_last)
    affine = torch.stack([torch.arange(s.cout) % 3, bias]).float()
    size, fp32 = (s.n, s.h, s.w, s.cin, s.cout), precision if dtype == torch.float32 else "ieee"
    config = configs.config(precision, *size, True, A100, True)._replace(split=split)
    launch = module.launch_of(dtype, *size, True, True, A100, True, fp32, config)
    tap = torch.empty(s.n, s.cout, s.h, s.w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    out = torch.empty(launch.out_size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    partials, counters = torch.full([launch.partials], torch.nan), torch.zeros(launch.counters, dtype=torch.int32)
    scratch = (partials, counters) if split > 1 else (None, None)
    launch.kernel[launch.grid](**launch.arguments(x, module.layout(weight), affine, out, tap, *scratch))
    expected = reference.conv3x3_affine(x.float(), weight.float(), affine, relu=True, pool=False)
    if dtype == torch.bfloat16:  # the interpreter drops the lower bits of a float where the hardware rounds
        expected = (expected.view(torch.int32) & -(1 << 16)).view(torch.float32)
    assert torch.equal(tap, expected.to(dtype))
    assert torch.equal(out, reference.maxpool2x2(expected).to(dtype) if min(s.h, s.w) > 1 else out)
    assert not counters.any()


def test_the_order_in_which_programs_arrive_does_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder

    module = interpreted("conv3x3")
    x, weight, bias = testing.conv_inputs(testing.Shape("", 1, 64, 24, 9, 10, ""))
    affine, config = torch.stack([torch.ones_like(bias), bias]), configs.Config(64, 32, 32, 4, 3, split=7)
    launch = module.launch_of(x.dtype, 1, 9, 10, 64, 24, True, False, A100, config=config)
    assert launch.grid == (14,)
    set_grid_idx, results = interpreter_builder.set_grid_idx, []
    for order in (1, -1, 5):  # 5 and 14 have no common factor
        monkeypatch.setattr(
            interpreter_builder, "set_grid_idx", lambda i, j, k, order=order: set_grid_idx(i * order % 14, j, k)
        )
        out = torch.empty(launch.out_size).contiguous(memory_format=torch.channels_last)
        scratch = torch.empty(launch.partials), torch.zeros(launch.counters, dtype=torch.int32)
        x = x.contiguous(memory_format=torch.channels_last)
        launch.kernel[launch.grid](**launch.arguments(x, module.layout(weight), affine, out, None, *scratch))
        results.append(out)
    expected = reference.conv3x3(x.double(), weight.double(), bias.double(), relu=True)
    testing.assert_within(results[0], expected, testing.conv_bound(x, weight, affine))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.fixture
def start_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the interpreter number a grid's programs from a given one on."""
    from triton.runtime.interpreter import interpreter_builder

    def start(first: int) -> None:
        def set_grid_idx(x: int, y: int, z: int) -> None:
            interpreter_builder.grid_idx = (first + x, y, z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)

    return start


@pytest.mark.parametrize(("pool", "tap"), [(False, False), (True, False), (True, True)], ids=["", "pool", "tap"])
def test_conv3x3_past_2_31_elements(start_at: Callable[[int], None], pool: bool, tap: bool) -> None:
    module, huge = interpreted("conv3x3"), Huge()
    c = huge.channels
    weight = testing.integer_tensor(c, c, 3, 3, limit=2, dtype=torch.float16)
    affine = torch.stack([torch.ones(c), torch.zeros(c)])
    size, tile = (1, huge.height, huge.width, c, c), configs.Config(128, 64, 64, 4, 3)
    launch = module.launch_of(torch.float16, *size, False, pool, A100, tap, config=tile)
    assert launch.options["WIDE"]
    start_at(launch.grid[0] - 2)
    before = sparse_half(huge.x.numel()).view(1, huge.height, huge.width, c).permute(0, 3, 1, 2) if tap else None
    launch.kernel[(2,)](**launch.arguments(huge.x, module.layout(weight), affine, huge.out, before))
    expected = reference.conv3x3(huge.last.float(), weight.float()).half()
    if before is not None:
        assert torch.equal(before[..., -2:, -80:], expected[..., -2:, -80:])
    if pool:
        actual, expected = huge.out_pixels(huge.height // 2, huge.width // 2), reference.maxpool2x2(expected)
    else:
        actual = huge.out_pixels(huge.height, huge.width)
    last = 40 if pool else 128  # the last program has 12 of 32 windows, or 48 of 128 pixels
    assert torch.equal(actual[:, :, -1, -last:], expected[:, :, -1, -last:])


def test_taps_and_precisions_of_the_function() -> None:
    module = interpreted("conv3x3")
    x, weight, bias = testing.conv_inputs(testing.shape("rgb_odd"), integers=True)
    affine = torch.stack([torch.ones_like(bias), bias])
    tap, pooled = module.conv3x3(x, module.layout(weight), affine, relu=True, pool=True, tap=True, precision="tf32")
    assert torch.equal(tap, reference.conv3x3(x, weight, bias, relu=True))
    assert torch.equal(pooled, reference.maxpool2x2(tap))
    tap, pooled = module.conv3x3(x[:0], module.layout(weight), affine, pool=True, tap=True)
    assert (tap.shape, pooled.shape) == ((0, 40, 17, 23), (0, 40, 8, 11))


def test_maxpool2x2_past_2_31_elements(start_at: Callable[[int], None]) -> None:
    module, huge = interpreted("maxpool2x2"), Huge()
    constants = module.constants(huge.channels)
    height, width = huge.height // 2, huge.width // 2
    start_at(-(-height * width // constants["BR"]) - 2)
    module._maxpool2x2_kernel[(2,)](huge.x, huge.out, height * width, huge.height, huge.width, **constants)
    expected = reference.maxpool2x2(huge.last)
    assert torch.equal(huge.out_pixels(height, width)[:, :, -1, -16:], expected[:, :, -1, -16:])
