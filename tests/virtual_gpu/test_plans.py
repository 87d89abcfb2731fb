"""The table of how layers are cut: what it says is what the planners say, for GPUs nobody here has."""

from __future__ import annotations

import math

import pytest
import torch

from tests.virtual_gpu.plans import GPUS, VGG16, chain_of, cuda_rows, gpu_named, main, triton_rows
from vgg_fast.kernels.configs import Architecture

CHAIN = chain_of(VGG16, 224, 224)


def test_the_layers_of_vgg16():
    assert len(CHAIN.couts) == 13
    assert (CHAIN.inputs[0], CHAIN.inputs[-1]) == ((3, 224, 224), (512, 14, 14))
    assert [step for step in CHAIN.program if step != 1] == [3] * 5


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_every_layer_has_a_cut_that_covers_it(gpu, batch):
    pytest.importorskip("triton", reason="Triton is not installed")
    triton = triton_rows(CHAIN, batch, torch.float16, "triton", gpu)
    mma = cuda_rows(CHAIN, batch, torch.float16, "cuda", gpu)
    assert [row.kernel for row in mma] == ["block1"] * 2 + ["conv3x3_mma"] * 11
    for (_, h, w), cout, *rows in list(zip(CHAIN.inputs, CHAIN.couts, triton, mma, strict=True))[1:]:
        for row in rows:
            bm, bn = map(int, row.tile.partition(",")[0].split("x")[:2])
            needed = math.ceil(batch * h * w / bm) * math.ceil(cout / bn)
            assert needed <= row.grid // row.split <= 1.2 * needed, "a fifth more is the last strip of each image"
            # Every part of a shared sum writes its tile, behind them there is a counter for each tile.
            parts = row.grid * bm * bn * 4 + row.grid // row.split * 4
            assert row.workspace == (parts if row.split > 1 else 0)


@pytest.mark.parametrize("batch", [1, 32])
def test_hoppers_own_kernel_takes_what_it_supports(batch):
    rows = cuda_rows(CHAIN, batch, torch.bfloat16, "cuda_wgmma", GPUS["H100"])
    assert [row.kernel for row in rows] == ["block1"] * 2 + ["conv3x3_sm90"] * 11
    assert all(0 < row.grid <= 132 for row in rows[2:])
    assert batch > 1 or any(row.split > 1 for row in rows)
    assert all((row.workspace > 0) == (row.split > 1) for row in rows)


def test_what_is_printed(capsys):
    pytest.importorskip("triton", reason="Triton is not installed")
    main(["--gpu", "H100,sm_89:128", "--batch", "2", "--chain", "64,128,pool,20", "--size", "8x6"])
    hopper, other = capsys.readouterr().out.split("\n\nsm_89:128 (sm_89, 128 multiprocessors), batch 2, fp16\n")
    assert "| 64->128 8x6 pool |" in hopper
    assert "| conv3x3_sm90 " in hopper
    assert "| conv3x3_mma " in other
    assert "conv3x3_sm90" not in other
    main(["--gpu", "A100", "--batch", "1", "--dtype", "fp32", "--chain", "64,128", "--size", "8x6"])
    assert "| conv3x3    | 2x2 pixels x 4 a thread |        | 1     | 4    |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "TPU"], "there is no GPU 'TPU' here; take one of A100,"),
        (["--gpu", "A100", "--kernel", "cuda_wgmma"], "kernel 'cuda_wgmma' is for sm_90 alone, this GPU is sm_80"),
        (["--chain", "3"], "a chain is the channels of its input and of a convolution at least"),
        (["--chain", "3,pool"], "a pool needs a convolution before it"),
        (["--chain", "3,-1"], "-1 in a chain"),
    ],
)
def test_what_is_wrong_is_named(capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert words in capsys.readouterr().err


def test_gpus_by_their_numbers():
    assert gpu_named("sm_86:84") == Architecture(86, 84)
    assert gpu_named("H100") == Architecture(90, 132)
