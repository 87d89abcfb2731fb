"""A network's layers at their real size, one by one and as a chain: what small shapes cannot show.

Large grids, several images per tile, split sums and scratch memory only come with real sizes. A batch consists of two
images in an order without a period, so that two answers in float64 judge it whole: every other place must have the bits
of the first place with the same image, and a kernel that takes a row from a neighbour is found out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vgg_fast import testing
from vgg_fast.bench.peers import Layer
from vgg_fast.reference import Step
from vgg_fast.verify.verdicts import Problem, Row

if TYPE_CHECKING:
    from vgg_fast.verify.checks import Ops


def order(batch: int) -> list[int]:
    """Which of the two images stands at each place: the Thue-Morse sequence, which repeats nothing three times.

    Example:
        >>> order(8)
        [0, 1, 1, 0, 1, 0, 0, 1]
    """
    return [i.bit_count() % 2 for i in range(batch)]


class Network:
    """The layers of a network in one dtype on one device; weights and answers of one layer at a time."""

    def __init__(self, checked: Ops, layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> None:
        self.checked, self.layers, self.dtype, self.device = checked, layers, dtype, device
        self.images = torch.empty(0)
        self.problem: Problem | None = None

    def prepare(self, position: int) -> None:
        """Makes the inputs and answers of a layer, for all kernels and batches."""
        self.problem = Problem(self._shape(position), self.dtype, integers=False)
        self.images = self.problem.inputs[torch.channels_last]

    def _shape(self, position: int) -> testing.Shape:
        layer = self.layers[position]
        return testing.Shape(layer.name, 2, layer.cin, layer.cout, layer.size, layer.size, "a layer at its real size")

    def check_layer(self, position: int, batch: int, row: Row) -> None:
        """conv3x3 and conv_stack with the layer's own epilogue, with and without a tap, judged by float64 and bits."""
        layer, problem, kernel = self.layers[position], self.problem, row.kernel
        assert problem is not None
        what = f"{layer.name}, batch {batch}"
        step = Step.RELU | (Step.POOL if layer.pool else Step.NONE)
        with row.attempt(what):
            x = self._batch(self.images, batch)
            weight, bias, *norm = (t.to(self.device) for t in (problem.weight, problem.bias, *problem.norm))
            for pool in dict.fromkeys((layer.pool, False)):
                y = self.checked.conv3x3(x, weight, bias, True, pool, kernel)
                self._judge(row, y, "conv", pool, batch, f"{what}, conv3x3, pool={pool}")
            packed, affine = self.checked.pack(weight, bias, *norm, problem.bn_eps, kernel)
            arguments = [packed], [affine]
            y = self.checked.conv_stack(x, *arguments, [step], kernel, True)
            self._judge(row, y, "step", layer.pool, batch, what)
            again = self.checked.conv_stack(x, *arguments, [step], kernel, True)
            row.true(torch.equal(y, again), f"{what}: other bits when run again")
            tap, y = self.checked.conv_stack_taps(x, *arguments, [step | Step.TAP], kernel, True)
            self._judge(row, tap, "step", False, batch, f"{what}, tap")
            self._judge(row, y, "step", layer.pool, batch, f"{what}, behind the tap")

    def _judge(self, row: Row, actual: Tensor, op: str, pool: bool, batch: int, what: str) -> None:
        assert self.problem is not None
        expected, bound = self.problem.answers(op, row.kernel).by_epilogue[True, pool]
        first = min(batch, 2)
        row.within(actual[:first], expected[:first], bound[:first], what)
        error = testing.relative_error(actual[:first].cpu(), expected[:first])
        limit = testing.norm_bound(row.kernel, self.dtype, self.problem.weight.shape[1])
        row.true(error <= limit, f"{what}: relative error {error:.2e}, allowed {limit:.2e}")
        if batch > 2:
            # Image by image: all at once would take the memory of the whole batch once more.
            other = [i for i, image in enumerate(order(batch)) if not torch.equal(actual[i], actual[image])]
            row.true(not other, f"{what}: images {other} have not the bits of the same images at the first two places")

    def check_chain(self, batch: int, row: Row) -> None:
        """All layers in one call have the bits of one call per layer."""
        what = f"the chain of {len(self.layers)}, batch {batch}"
        with row.attempt(what):
            weights, affines, program = [], [], []
            for position, layer in enumerate(self.layers):
                x, weight, bias = testing.conv_inputs(self._shape(position), self.dtype)
                if not position:
                    first = self._batch(x, batch)
                weight, bias = weight.to(self.device), bias.to(self.device)
                packed, affine = self.checked.pack(weight, bias, None, None, None, None, 0.0, row.kernel)
                weights.append(packed)
                affines.append(affine)
                program.append(Step.RELU | (Step.POOL if layer.pool else Step.NONE))
            chain = self.checked.conv_stack(first, weights, affines, program, row.kernel, True)
            y = first
            for i, step in enumerate(program):
                y = self.checked.conv_stack(y, weights[i : i + 1], affines[i : i + 1], [step], row.kernel, True)
            row.true(torch.equal(chain, y), f"{what}: not the bits of its steps")

    def _batch(self, images: Tensor, batch: int) -> Tensor:
        x = images[order(batch)].to(self.device)
        return x.contiguous(memory_format=torch.channels_last)
