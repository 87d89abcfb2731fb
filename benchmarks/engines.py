"""ONNX Runtime and OpenVINO as contestants: the plain network as an ONNX graph, and what each needs to be fair.

Fair is: the same weights, the same number of threads, the precision that was asked for, and no instruction set above
the cap. What cannot be had is a reason to stay away (:class:`vgg_fast.bench.contest.Unsuitable`), never a silent
difference.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vgg_fast.bench.contest import Engine, Unsuitable

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"

# What a cap means to each library; in the environment before the library is loaded. VGG_FAST_ISA's avx512 admits the
# AVX-512 bf16 instructions, so the others get them, too: everything but AMX.
CAPS = {
    "avx2": {
        "VGG_FAST_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OV_CPU_MAX_ISA": "AVX2",  # for the kernels of OpenVINO that are not oneDNN's; older releases ignore it
    },
    "avx512": {
        "VGG_FAST_ISA": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "OV_CPU_MAX_ISA": "AVX512_CORE_FP16",
    },
    "amx": {"VGG_FAST_ISA": "amx"},  # all there is: nothing to be withheld from the others
}


def engines(threads: int, cap: str | None) -> dict[str, Engine]:
    """The contestants of this file by name; each says itself why it cannot take part.

    Args:
        threads: that each may use.
        cap: a key of :data:`CAPS` which the environment was set to, or None.
    """
    return {
        ONNXRUNTIME: lambda network, x: onnxruntime_call(network, x, threads, cap),
        OPENVINO: lambda network, x: openvino_call(network, x, threads, cap),
    }


def versions() -> dict[str, str]:
    """Of the two libraries, as far as they are installed."""
    found = {}
    for name in (ONNXRUNTIME, OPENVINO):
        if importlib.util.find_spec(name):
            found[name] = str(importlib.import_module(name).__version__)
    return found


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Unsuitable(f"{' and '.join(missing)} not installed: pip install 'vgg-fast[peers]'")


# --- the graph ------------------------------------------------------------------------------------------------------


def to_onnx(network: nn.Sequential, x: Tensor) -> bytes:
    """A plain VGG in evaluation mode as a serialized ONNX model in float32, from input ``x`` to output ``y``.

    bf16 and fp16 weights become the same numbers in float32, which is exact.

    Args:
        network: of Conv2d, BatchNorm2d, ReLU, MaxPool2d, AdaptiveAvgPool2d, Flatten, Dropout, Linear and Sequential.
        x: ``[N, C, H, W]``, for its shape, which the graph has fixed.

    Raises:
        Unsuitable: a layer has no counterpart here.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes: list[Any] = []
    constants: list[Any] = []
    with torch.no_grad():
        y = x[:1]
        for i, layer in enumerate(_flat(network)):
            operator, tensors, attributes = _node(layer, y)
            y = layer(y)
            if operator is None:
                continue
            names = [f"{operator}_{i}_{k}" for k in range(len(tensors))]
            constants += [
                numpy_helper.from_array(t.detach().float().numpy(), n) for t, n in zip(tensors, names, strict=True)
            ]
            source = nodes[-1].output[0] if nodes else "x"
            nodes.append(helper.make_node(operator, [source, *names], [f"{operator}_{i}"], **attributes))
    if not nodes:
        raise Unsuitable("the network has no layers")
    nodes[-1].output[0] = "y"
    first, last = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(x), *t.shape[1:]])
        for name, t in (("x", x), ("y", y))
    )
    graph = helper.make_graph(nodes, "vgg", [first], [last], constants)
    # Opset 17 and IR 8 are what every runtime of the last years reads.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    return bytes(model.SerializeToString())


def _flat(network: nn.Module) -> Iterator[nn.Module]:
    for layer in network.children():
        if isinstance(layer, nn.Sequential):
            yield from _flat(layer)
        else:
            yield layer


def _node(layer: nn.Module, x: Tensor) -> tuple[str | None, list[Tensor], dict[str, Any]]:
    """(operator, its constants, its attributes); the operator is None for a layer that does nothing to ``x``."""
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and isinstance(layer.padding, tuple):
        tensors = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        attributes = {"pads": [*layer.padding] * 2, "strides": [*layer.stride], "dilations": [*layer.dilation]}
        return "Conv", tensors, attributes
    if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
        tensors = [layer.weight, layer.bias, layer.running_mean, layer.running_var]
        return "BatchNormalization", tensors, {"epsilon": layer.eps}
    if isinstance(layer, nn.ReLU):
        return "Relu", [], {}
    if isinstance(layer, nn.MaxPool2d) and (layer.kernel_size, layer.stride, layer.padding) == (2, 2, 0):
        return "MaxPool", [], {"kernel_shape": [2, 2], "strides": [2, 2]}
    if isinstance(layer, nn.AdaptiveAvgPool2d) and x.shape[2:] == layer(x).shape[2:]:
        return None, [], {}
    if isinstance(layer, nn.Flatten):
        return "Flatten", [], {}
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        return "Gemm", [layer.weight, layer.bias], {"transB": 1}
    if isinstance(layer, nn.Dropout) and not layer.training:
        return None, [], {}
    raise Unsuitable(f"{layer} on {[*x.shape[2:]]} pixels is not in the ONNX graph that benchmarks/engines.py builds")


# --- ONNX Runtime ---------------------------------------------------------------------------------------------------


def onnxruntime_call(network: nn.Sequential, x: Tensor, threads: int, cap: str | None = None) -> Callable[[], Tensor]:
    """``network`` on ``x`` in ONNX Runtime's CPU provider, with all its graph optimisations.

    Raises:
        Unsuitable: not installed; not float32; or a cap that it does not know.
    """
    _require("onnx", "onnxruntime")
    if x.dtype != torch.float32:
        raise Unsuitable(f"its CPU provider has no convolution in {str(x.dtype).removeprefix('torch.')}")
    # MLAS asks the processor itself and reads no setting. In fp32 it uses AVX-512 and never AMX (which it has for int8
    # only), so that a cap at AVX-512 or above takes nothing away from it.
    if cap == "avx2" and torch.cpu._is_avx512_supported():
        raise Unsuitable("it has no setting that keeps it from using AVX-512")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Its threads spin while it works, as it is meant to; after that they would spin in the next contestant's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(to_onnx(network, x), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


# --- OpenVINO -------------------------------------------------------------------------------------------------------


def openvino_call(network: nn.Sequential, x: Tensor, threads: int, cap: str | None = None) -> Callable[[], Tensor]:
    """``network`` on ``x`` in OpenVINO's CPU plugin, in one stream; input and output are float32 numbers.

    Raises:
        Unsuitable: not installed; or what it compiled to runs in another precision, with another number of threads or
            above the cap.
    """
    _require("onnx", "openvino")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}.get(x.dtype)
    if precision is None:
        raise Unsuitable(f"no {x.dtype} here")
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,  # without it, fp32 models run in bf16 where the processor has AMX
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(to_onnx(network, x), b""), "CPU", settings)
    if (actual := compiled.get_property("INFERENCE_NUM_THREADS")) != threads:
        raise Unsuitable(f"it takes {actual} threads, not {threads}")
    for reason in openvino_objections(_primitives(compiled), precision, cap):
        raise Unsuitable(reason)
    request = compiled.create_infer_request()
    feed = [x.float().contiguous().numpy()]

    def call() -> Tensor:
        return torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])

    return call


def _primitives(compiled: Any) -> list[tuple[str, str, str]]:
    """(layer type, implementation, precision) of every node of a compiled OpenVINO model that computes something."""
    nodes = (op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops())
    keys = ("layerType", "primitiveType", "runtimePrecision")
    named = [tuple(node[key].astype(str) for key in keys) for node in nodes]
    return [(a, b, c) for a, b, c in named if a not in ("Input", "Output", "Const", "Reshape")]


def openvino_objections(primitives: list[tuple[str, str, str]], precision: str, cap: str | None) -> Iterator[str]:
    """What is unfair about the implementations that OpenVINO chose, as it reports them itself.

    Its oneDNN obeys ``ONEDNN_MAX_CPU_ISA``, its own kernels do not in all releases, and its copy of MLAS never does.

    Example:
        >>> list(openvino_objections([("Convolution", "brgconv_avx512_f32", "f32")], "f32", "avx2"))
        ['it runs Convolution as brgconv_avx512_f32, above the cap avx2']
    """
    for layer, implementation, actual in primitives:
        if layer in ("Convolution", "FullyConnected") and actual != precision:
            yield f"it runs {layer} in {actual}, not in {precision}, on this processor or under this cap"
        above = {"avx2": r"avx512|avx10|amx|mlas", "avx512": r"amx"}.get(cap or "")
        if above and re.search(above, implementation):
            yield f"it runs {layer} as {implementation}, above the cap {cap}"
