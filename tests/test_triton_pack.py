"""Packed weights that keep themselves current on a GPU: the same launch in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import copy
import gc
import weakref
from types import ModuleType

import pytest
import torch
from gpu_kernels import interpreted
from torch import Tensor, nn

from vgg_fast import testing
from vgg_fast.accelerate import accelerate, refresh, restore
from vgg_fast.container.chains import Plan
from vgg_fast.container.packs import Pack, PackCache, _versions
from vgg_fast.container.sequential import _STATE
from vgg_fast.ops.pack import _python as packed_by_torch

POISON = 7.0


@pytest.fixture
def kernels() -> ModuleType:
    return interpreted("pack")


class Layers:
    """Two layers with their sources, and packed weights that a repacker keeps: fewer filters than ranges, and more."""

    def __init__(
        self, kernels: ModuleType, dtype: torch.dtype = torch.float16, weight_dtype: torch.dtype | None = None
    ) -> None:
        self.dtype, kept = dtype, weight_dtype or dtype
        self.sources = []
        for cin, cout, normalised in ((2, 3, True), (3, 6, False)):
            weight = testing.random_tensor(cout, cin, 3, 3, seed=cin).to(kept)
            bias, mean, var, gamma, beta = (testing.random_tensor(cout, seed=cin + j) for j in range(5))
            gamma[:3] = torch.tensor([0.0, -0.0, -1.0])
            norm = [mean, var.abs(), gamma, beta] if normalised else [None] * 4
            self.sources.append(kernels.Source(weight, [bias.to(kept), *norm], 1e-5))
        self.sources[1] = self.sources[1]._replace(
            weight=self.sources[1].weight.contiguous(memory_format=torch.channels_last)
        )
        self.packed = [
            torch.full((s.weight.shape[0], 3, 3, s.weight.shape[1]), POISON, dtype=dtype) for s in self.sources
        ]
        self.affines = [torch.full((2, s.weight.shape[0]), POISON) for s in self.sources]
        self.repack = kernels.Repacker(self.sources, self.packed, self.affines, parts=4)

    def expected(self) -> list[tuple[Tensor, Tensor]]:
        packs = []
        for source in self.sources:
            bias, *norm = source.vectors
            packs.append(
                packed_by_torch(source.weight.to(self.dtype), bias.to(self.dtype), *norm, source.eps, "triton")
            )
        return packs

    def check(self) -> None:
        for packed, affine, expected in zip(self.packed, self.affines, self.expected(), strict=True):
            assert torch.equal(packed, expected[0])
            assert torch.equal(affine, expected[1])

    def repacked(self) -> list[set[int]]:
        """Per layer, the filters that a launch packs again, which then are right."""
        for packed in self.packed:
            packed.fill_(POISON)
        self.repack(salt=1)
        found = []
        for packed, (expected, _) in zip(self.packed, self.expected(), strict=True):
            found.append({i for i, filter in enumerate(packed) if not (filter == POISON).all()})
            assert all(torch.equal(packed[i], expected[i]) for i in found[-1])
        assert all(torch.equal(a, e[1]) for a, e in zip(self.affines, self.expected(), strict=True))
        return found


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, None), (torch.float16, None), (torch.float16, torch.float32)],
    ids=["fp32", "fp16", "autocast"],
)
def test_it_packs_as_pytorch_does(kernels, dtype, weight_dtype):
    layers = Layers(kernels, dtype, weight_dtype)
    layers.repack(salt=1)
    layers.check()
    assert layers.repacked() == [set(), set()]


def test_bf16_packs_as_pytorch_does(kernels):
    layers = Layers(kernels, torch.bfloat16)  # no rounding on the way, which the interpreter would get wrong
    layers.repack(salt=1)
    layers.check()


def test_what_changed_is_packed_again_and_nothing_else(kernels):
    """Edits that PyTorch's version counters do not show, one after the other."""
    layers = Layers(kernels)
    layers.repack(salt=1)
    first, second = layers.sources
    first.weight.data[2].mul_(1.5)
    assert layers.repacked() == [{2}, set()]
    second.weight.data[:, 2].add_(1.0)  # the last input channel, of all filters
    assert layers.repacked() == [set(), set(range(6))]
    second.vectors[0].data[5].add_(1.0)  # the bias; ranges are 0, 1 and 2, 3, 4 and 5
    assert layers.repacked() == [set(), {4, 5}]
    for j, edit in enumerate((Tensor.neg_, Tensor.exp_, Tensor.exp_, Tensor.neg_), 1):  # mean, variance, gamma, beta
        edit(first.vectors[j].data[j % 3 :][:1])
        assert layers.repacked() == [{j % 3}, set()]
    assert layers.repacked() == [set(), set()]


def test_the_salt_packs_everything_again(kernels):
    layers = Layers(kernels)
    layers.repack(salt=1)
    layers.packed[0].zero_()
    layers.repack(salt=1)
    assert not layers.packed[0].any()
    layers.repack(salt=-2)
    layers.check()


def test_equal_edits_in_two_places_do_not_cancel_out(kernels):
    layers = Layers(kernels)
    weight = layers.sources[1].weight
    weight[1], weight[2] = 1.0, 2.0  # of one range of filters
    layers.repack(salt=1)
    weight.data[1], weight.data[2] = 2.0, 1.0
    assert layers.repacked() == [set(), {1, 2}]


# --- in the container's cache ---------------------------------------------------------------------------------------


class Cache:
    """The cache of packed weights as on a GPU, over a model on the CPU."""

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels
        self.model = nn.Sequential(nn.Conv2d(8, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()).eval()
        self.plan = Plan(tuple(self.model))
        self.chain, self.sources = self.plan.parts[0], self.plan.sources[0]
        self.is_captured = False
        self.cache, self.made = PackCache(capturing=lambda device: self.is_captured), 0

    def lookup(self) -> Pack | str:
        tensors = self.sources.read()
        return self.cache.lookup("key", tensors, (), 2, lambda: self.make(tensors), on_device=True)

    def get(self) -> tuple[Tensor, Tensor]:
        pack = self.lookup()
        return pack.weights[0], pack.affines[0]

    def make(self, tensors: list[Tensor]) -> Pack:
        self.made += 1
        weight, *vectors = tensors
        packed, affine = self.expected()
        packed, affine = packed.clone(), affine.clone()
        repacker = self.kernels.Repacker([self.kernels.Source(weight, vectors, 1e-5)], [packed], [affine], parts=2)
        repacker(hash(tuple(_versions(tensors))))
        return Pack([packed], [affine], [8, 5], [False], weight.device, repacker)

    def expected(self) -> tuple[Tensor, Tensor]:
        conv, norm = self.model[0], self.model[1]
        vectors = norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data
        return packed_by_torch(conv.weight.data, conv.bias.data, *vectors, 1e-5, "triton")

    def check(self, made: int) -> None:
        packed, affine = self.get()
        expected, expected_affine = self.expected()
        assert torch.equal(packed, expected)
        assert torch.equal(affine, expected_affine)
        assert self.made == made


def test_the_cache_follows_on_the_device_and_packs_on_the_host_once(kernels):
    cache = Cache(kernels)
    cache.check(made=1)
    optimizer = torch.optim.SGD(cache.model.parameters(), lr=0.5, fused=True)
    cache.model(torch.ones(1, 8, 4, 4)).sum().backward()
    optimizer.step()  # no version is raised
    cache.check(made=1)
    cache.model.train()(torch.ones(1, 8, 4, 4))  # nor by the statistics of batch norm
    cache.model.eval()
    cache.check(made=1)
    with torch.no_grad():
        cache.model[0].weight[3, 1, 2, 2] += 1.0  # one element that no sample holds, but a version that tells
    cache.check(made=1)


def test_the_cache_packs_on_the_host_where_the_sources_lie_elsewhere(kernels):
    cache = Cache(kernels)
    cache.check(made=1)
    cache.model[0].weight.data = cache.model[0].weight.data.clone()
    cache.check(made=2)
    cache.model[0].weight.data = cache.model[0].weight.data.transpose(2, 3)  # where they were, in another order
    cache.check(made=3)


def test_a_captured_graph_keeps_its_packed_weights(kernels):
    """It holds their addresses: they have to outlive edits that give the cache new ones, and refresh."""
    cache = Cache(kernels)
    cache.is_captured = True
    assert "not packed: run the model once before" in cache.lookup()  # packing would wait for the device
    assert cache.made == 0
    cache.is_captured = False
    kept = weakref.ref(cache.get()[0])
    cache.is_captured = True
    assert cache.get()[0] is kept()
    cache.is_captured = False
    cache.model[0].weight.data = cache.model[0].weight.data.clone()
    cache.check(made=2)
    gc.collect()
    assert kept() is not None
    cache.cache = PackCache(captured=cache.cache.captured)
    gc.collect()
    assert kept() is not None
    container = accelerate(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)))
    with torch.no_grad():
        container(torch.ones(1, 3, 4, 4))
    packs = container.__dict__[_STATE].packs
    packs.captured += [next(iter(packs)).content]
    refresh(container)
    assert container.__dict__[_STATE].packs.captured == packs.captured
    assert len(container.__dict__[_STATE].packs) == 0
    assert copy.deepcopy(restore(container)).__dict__[_STATE].packs.captured == []


def test_without_a_repacker_nothing_is_trusted():
    """A GPU without Triton: packed at every forward."""
    cache = PackCache()
    weight, packs = torch.ones(2, 3, 3, 3), []

    def make() -> Pack:
        packs.append(Pack([weight.clone()], [torch.ones(2, 2)], [3, 2], [False], weight.device))
        return packs[-1]

    for _ in range(2):
        assert cache.lookup("key", [weight], (), 2, make, on_device=True) is packs[-1]
    assert len(packs) == 2
