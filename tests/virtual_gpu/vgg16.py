"""A whole VGG16 forward on the virtual GPU, layer after layer, each checked against PyTorch in float64.

    python -m tests.virtual_gpu.vgg16                        # 224x224, Triton's kernel for sm_80 and sm_90
    python -m tests.virtual_gpu.vgg16 --size 64 --target 90
    python -m tests.virtual_gpu.vgg16 --batch 1,32,128 --gpu A100,H100,H200    # no forward: see predicted.py
    python -m tests.virtual_gpu.vgg16 --batch 32 --kernel cuda                 # of csrc/cuda: see predict_cuda.py

Prints how fast each layer was simulated and, from the counters, how long the model of counters.py says it would take
the GPUs of that architecture at least, and why. (B200 does not run code for sm_90a; it stands for the same traffic.)
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.virtual_gpu import launch, predict_cuda, predicted, triton_entry
from tests.virtual_gpu.cases import ARCHITECTURES, arguments_of, channels_last
from tests.virtual_gpu.counters import GPUS, Counters, predict
from tests.virtual_gpu.launch import compile_triton
from tests.virtual_gpu.machine_code import rows_of
from tests.virtual_gpu.predicted import layers
from vgg_fast import testing
from vgg_fast.kernels.conv3x3 import launch_of

GPUS_OF = {80: ["A100"], 90: ["H100", "H200", "B200"]}


def first_input(size: int) -> Tensor:
    x = channels_last(1, 3, size, size, dtype=torch.float16)
    return x.copy_(testing.random_tensor(*x.shape))


def run(size: int, target: int, count: int) -> None:
    """Prints one line for each of the first ``count`` layers, and their sum.

    Raises:
        AssertionError: where a layer is wrong; KernelError: where a kernel breaks a rule.
    """
    names, x = GPUS_OF[target], first_input(size)
    print(
        f"VGG16 features, batch 1, {size}x{size}, fp16, Triton for sm_{target}; microseconds of the model for each GPU,"
    )
    print(f"what bounds {names[0]}, the share of its SMs that are busy, and the TFLOP/s this would be")
    print("layer                     GFLOP  seconds  GFLOP/s" + "".join(f"{name:>9}" for name in names))
    sums = [0.0] * (2 + len(names))
    for number, layer in enumerate(itertools.islice(layers(size), count)):
        cin, cout, h, pool = layer.cin, layer.cout, layer.size, layer.pool
        weight = (testing.random_tensor(cout, cin, 3, 3, seed=number) * (2 / (9 * cin)) ** 0.5).half()  # He's
        affine, layout, counters = torch.tensor([[1.0], [0.0]]).repeat(1, cout), weight.permute(0, 2, 3, 1), Counters()
        launched = launch_of(x.dtype, 1, h, h, cin, cout, True, pool, ARCHITECTURES[target])
        arguments = arguments_of(launched, x, layout.contiguous(), affine)
        compiled, _ = compile_triton(launched.kernel, arguments, target)
        entry = triton_entry(launched.kernel, arguments, target)
        scratch = ["partials_ptr", "counters_ptr"] if launched.counters else []
        begin = time.perf_counter()
        launch(entry, launched.grid, arguments, outputs=["out_ptr"], scratch=scratch, observer=counters)
        seconds = time.perf_counter() - begin
        y = arguments["out_ptr"]
        testing.assert_conv_close(y, x, weight, relu=True, pool=pool)
        (row,) = rows_of(compiled.asm["cubin"], "conv3x3", target)
        models = [predict(counters, GPUS[name], row["registers"], compiled.metadata.shared) for name in names]
        numbers = (1e-9 * layer.flops(1), seconds, *(model.seconds for model in models))
        sums = [a + b for a, b in zip(sums, numbers, strict=True)]
        print(line(str(layer), numbers), f" {models[0].bound:6} {models[0].busy:5.2f} {tflops(numbers)}", flush=True)
        x = y
    print(line("all", sums), f"{tflops(sums):>17}")


def tflops(numbers: Sequence[float]) -> str:
    return f"{numbers[0] / numbers[2] / 1e3:4.0f}"


def line(name: str, numbers: Sequence[float]) -> str:
    gflop, seconds, *models = numbers
    simulated = f"{name:24} {gflop:6.2f} {seconds:8.2f} {gflop / seconds:8.2f}"
    return simulated + "".join(f"{model * 1e6:9.1f}" for model in models)


def main() -> None:
    parser = argparse.ArgumentParser(description="A VGG16 forward on the virtual GPU.")
    parser.add_argument("--size", type=int, default=224, help="pixels in a row: a multiple of 32")
    parser.add_argument("--target", type=int, choices=GPUS_OF, help="compute capability; default: both")
    parser.add_argument("--layers", type=int, default=13, help="only the first so many convolutions")
    parser.add_argument("--batch", help="predict these batch sizes from samples instead: 1,32,128")
    parser.add_argument("--gpu", default=",".join(predicted.TARGET_OF), help="on these GPUs; default: %(default)s")
    parser.add_argument("--kernel", choices=("triton", "cuda"), default="triton", help="whose times are predicted")
    options = parser.parse_args()
    if options.size < 32 or options.size % 32:
        parser.error(f"--size {options.size}: VGG16 halves its maps five times, take a multiple of 32")
    torch.set_num_threads(1)
    if options.batch:
        gpus = options.gpu.split(",")
        if unknown := {*gpus} - {*predicted.TARGET_OF}:
            parser.error(f"--gpu {min(unknown)}: it must be one of {', '.join(predicted.TARGET_OF)}")
        of = predict_cuda if options.kernel == "cuda" else predicted
        of.report([int(batch) for batch in options.batch.split(",")], gpus)
        return
    for target in [options.target] if options.target else GPUS_OF:
        run(options.size, target, options.layers)


if __name__ == "__main__":
    main()
