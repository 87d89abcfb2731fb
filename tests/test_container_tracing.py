"""An accelerated model under PyTorch's own machinery: compile, export, tracing, torch.func, modes, autocast."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import stacks
import torch
from stacks import check_equal, check_plain, conv, fused_copy, image, kernel, layout, run, stack
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from vgg_fast import testing
from vgg_fast.accelerate import accelerate

# Tracing with torch.jit and parts of torch.compile say that torch.jit is deprecated; people use it all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

# --- compilers and tracers ------------------------------------------------------------------------------------------


class Looping(nn.Module):
    """Indexes, slices and loops, as perceptual losses do."""

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        taps = [self.features[:3](x), self.features[0](x)]
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in (1, 4):
                taps.append(x.clone())
        return [*taps, x]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("grad", [False, True])
def test_compile_without_graph_breaks(backend, grad):
    torch._dynamo.reset()
    plain = stack(bn=True)
    fused = torch.compile(fused_copy(plain), backend=backend, fullgraph=True)
    with torch.set_grad_enabled(grad):
        for x in (image(), image(1, 3, 8, 8)):
            assert torch.equal(fused(x), plain(x))


def test_compile_of_a_model_that_loops_and_slices():
    torch._dynamo.reset()
    plain = stack()[:7]
    fused = torch.compile(Looping(fused_copy(plain)), backend="eager", fullgraph=True)
    with torch.no_grad():
        for a, b in zip(fused(image()), Looping(plain)(image()), strict=True):
            assert torch.equal(a, b)


def test_compile_with_inductor():
    torch._dynamo.reset()
    plain = nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2))
    fused = torch.compile(fused_copy(plain), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(fused(image()), plain(image()))


def test_compile_after_it_ran_fused_and_fused_after_it_was_compiled():
    torch._dynamo.reset()
    plain = stack()
    fused = fused_copy(plain)
    check_equal(plain, fused, image(), kernel())
    with torch.no_grad():
        assert torch.equal(torch.compile(fused, backend="eager", fullgraph=True)(image()), plain(image()))
    check_equal(plain, fused, image(), kernel())


def test_a_compiled_child_runs_by_itself():
    torch._dynamo.reset()
    plain = stack()
    fused = fused_copy(plain)
    fused[2] = torch.compile(fused[2], backend="eager")
    segments = check_equal(plain, fused, image())
    assert stacks.fused_names(segments) == ["0", "1", "5", "6", "7"]


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    plain = stack(bn=True)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fused_copy(plain), (image(),), dynamic_shapes=({0: batch},), strict=strict)
    with torch.no_grad():
        for n in (1, 5):
            assert torch.equal(program.module()(image(n, 3, 12, 10)), plain(image(n, 3, 12, 10)))


def test_fx_symbolic_trace():
    plain = stack(bn=True)
    traced = torch.fx.symbolic_trace(fused_copy(plain))
    assert sum(node.op == "call_module" for node in traced.graph.nodes) == len(plain)
    with torch.no_grad():
        assert torch.equal(traced(image()), plain(image()))


def test_torchscript():
    plain = stack(bn=True)
    with torch.no_grad():
        traced = torch.jit.trace(fused_copy(plain), image())
        scripted = torch.jit.script(fused_copy(plain))
        for module in (traced, scripted):
            assert "aten::batch_norm" in str(module.inlined_graph)
            assert torch.equal(module(image()), plain(image()))


# --- modes and transforms -------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_every_operation():
    fused = fused_copy(stack())
    with Recorder() as mode:
        check_plain(stack(), fused, image(), "a TorchDispatchMode is active")
    assert mode.seen.count("aten.convolution.default") == 6


def test_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in (stack(), fused_copy(stack())):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class FunctionRecorder(torch.overrides.TorchFunctionMode):
    seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        FunctionRecorder.seen += func is torch.conv2d
        return func(*args, **(kwargs or {}))


def test_a_function_mode_sees_every_function_but_a_default_device_does_not_matter():
    with FunctionRecorder():
        check_plain(stack(), fused_copy(stack()), image(), "a TorchFunctionMode is active")
    assert FunctionRecorder.seen == 6
    with torch.device("cpu"):
        check_equal(stack(), fused_copy(stack()), image(), kernel())


class Tagged(torch.Tensor):
    pass


def test_tensor_subclasses_keep_their_type():
    fused = fused_copy(stack())
    out, segments = run(fused, image().as_subclass(Tagged))
    assert type(out) is Tagged
    assert "the input is a Tagged" in segments[0].reason
    fused[2].weight = nn.Parameter(fused[2].weight.detach().as_subclass(Tagged))
    out, segments = run(fused, image())
    assert type(out) is Tagged
    assert "a parameter is a Tagged" in segments[0].reason


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    fused = fused_copy(stack())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        out = fused(mode.from_tensor(image()))
    assert out.shape == (2, 16, 3, 2)
    check_equal(stack(), fused, image(), kernel())


def test_functional_call():
    plain = stack(bn=True)
    fused = fused_copy(plain)
    others = {name: value * 2 for name, value in plain.state_dict().items() if name.startswith("0.")}
    with torch.no_grad():
        for parameters in ({}, others, {}, others):
            with stacks.record() as segments:
                actual = torch.func.functional_call(fused, parameters, image())
            assert [s.kernel for s in segments] == [kernel()]
            assert torch.equal(actual, torch.func.functional_call(plain, parameters, image()))


def loss_of(model: nn.Module):
    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    return loss


def test_func_grad_and_vmap():
    plain = stack(bn=True, inplace=False)
    fused = fused_copy(plain)
    results = []
    for model in (plain, fused):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        grads = torch.func.grad(loss_of(model))(parameters, image())
        per_sample = torch.func.vmap(lambda x, m=model: m(x))(image(4, 2, 3, 8, 8))
        two = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
        ensemble = torch.func.vmap(loss_of(model), in_dims=(0, None))(two, image())
        results.append([*grads.values(), per_sample, ensemble])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    check_equal(plain, fused, image(), kernel())


def test_func_linearize_and_jvp():
    plain = stack(inplace=False)
    values = [torch.func.jvp(model, (image(),), (torch.ones(2, 3, 12, 10),)) for model in (plain, fused_copy(plain))]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_forward_mode_differentiation():
    plain = stack(inplace=False)
    tangents = []
    for model in (plain, fused_copy(plain)):
        with torch.no_grad(), forward_ad.dual_level(), forward_ad._set_fwd_grad_enabled(True):
            dual = forward_ad.make_dual(image(), torch.ones(2, 3, 12, 10))
            tangents.append(forward_ad.unpack_dual(model(dual)).tangent)
    assert tangents[0] is not None
    assert torch.equal(*tangents)


def test_gradient_checkpointing():
    plain, x = stack(), image()
    results = []
    for model in (plain, fused_copy(plain)):
        leaf = x.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(model, leaf, use_reentrant=True).sum().backward()
        results.append([leaf.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- inference mode and autocast ------------------------------------------------------------------------------------


def test_inference_mode_and_out_of_it():
    plain = stack(bn=True)
    fused = fused_copy(plain)
    with torch.inference_mode():
        actual = fused(image())  # packs its weights here, to be used outside as well
        assert actual.is_inference()
        assert torch.equal(actual, plain(image()))
    check_equal(plain, fused, image(), kernel())
    outside = stack(bn=True).requires_grad_(False)
    out = accelerate(outside)(image())
    assert not out.is_inference()


def test_weights_that_are_inference_tensors():
    with torch.inference_mode():
        plain = stack(bn=True)
        fused = fused_copy(plain)
        check_equal(plain, fused, image(), kernel())
        for model in (plain, fused):
            model[0].weight.mul_(-1)
        check_equal(plain, fused, image(), kernel())
    with torch.no_grad():
        assert torch.equal(fused(image()), plain(image()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bn", [False, True])
def test_autocast(dtype, x_dtype, bn):
    plain = stack(bn)[:6]
    fused, x = fused_copy(plain), testing.random_tensor(2, 3, 12, 10, dtype=x_dtype)
    with torch.autocast("cpu", dtype=dtype), contextlib.suppress(RuntimeError):
        expected = None
        expected, _ = run(plain, x)
    with torch.autocast("cpu", dtype=dtype):
        if expected is None:  # float64 with fp32 weights: an error of PyTorch, under autocast as well
            assert stacks.error_of(fused, x) == stacks.error_of(plain, x)
            return
        actual, segments = run(fused, x)
    assert layout(actual) == layout(expected)
    assert segments[0].kernel == kernel(dtype)
    exact, _ = run(plain.double(), x.to(dtype).double())
    assert testing.relative_error(actual, exact) <= testing.relative_error(expected, exact)


def test_autocast_on_and_off_does_not_mix_up_the_packed_weights():
    plain = stack()
    plain[0].weight.data += 2.0**-12  # lost in bf16
    fused, x = fused_copy(plain), image()
    for _ in range(2):
        expected, _ = run(plain, x)
        actual, _ = run(fused, x)
        torch.testing.assert_close(actual, expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_equal(plain, fused, x, kernel(torch.bfloat16))
        with torch.autocast("cpu", enabled=False):
            assert run(fused, x)[0].dtype is torch.float32


def test_autocast_with_bf16_weights_and_fp32_input_is_legal_only_there():
    plain = stack().bfloat16()
    fused = fused_copy(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_equal(plain, fused, image(), kernel(torch.bfloat16))
    assert stacks.error_of(fused, image()) == stacks.error_of(plain, image())


def test_no_warning_on_the_way():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_equal(stack(bn=True), fused_copy(stack(bn=True)), image(), kernel())
