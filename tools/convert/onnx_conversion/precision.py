"""A graph's weights in fewer bits, by rewriting the graph. What each precision costs stands in the command's --help."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_LEAST = 4096
"""Values from which on a tensor is worth storing in fewer bits: smaller ones are biases, scales and codebooks."""

_FLOAT16_LARGEST = 65504.0


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights stored as float16 and computed with in float32: half the file; ONNX Runtime widens them when it loads.

    On a CPU float16 arithmetic would be slower than float32. Tensors with values that float16 cannot hold stay.
    """
    graph = model.graph
    casts = []
    for tensor in _large_weights(graph):
        values = numpy_helper.to_array(tensor)
        if np.abs(values).max() > _FLOAT16_LARGEST:
            continue
        stored = f"{tensor.name}.fp16"
        casts.append(helper.make_node("Cast", [stored], [tensor.name], name=f"{stored}.cast", to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
    _replace_nodes(graph, [*casts, *graph.node])
    return model


def to_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """Matrices in 8 bits, one scale for each column; what they are multiplied with is quantised when it is known.

    Every MatMul and Gemm with a constant matrix becomes integer arithmetic (dynamic quantisation); convolutions and
    everything else stay in float32. The 8 bits are unsigned around 128: signed ones overflow on older CPUs.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in _large_weights(graph)}
    uses = [name for node in graph.node for name in node.input]
    nodes: list[onnx.NodeProto] = []
    inputs: dict[str, tuple[str, str, str]] = {}
    for node in graph.node:
        matrix = _constant_matrix(node, weights)
        if matrix is None or uses.count(node.input[1]) > 1:
            nodes.append(node)
            continue
        if node.input[0] not in inputs:
            inputs[node.input[0]] = _quantize_input(node.input[0], nodes)
        graph.initializer.remove(weights[node.input[1]])
        nodes += _integer_product(node, matrix, inputs[node.input[0]], graph)
    _replace_nodes(graph, nodes)
    return model


def _large_weights(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    return [
        tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1 and np.prod(tensor.dims) >= _LEAST
    ]


def _constant_matrix(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> np.ndarray | None:
    """float32[K, N] of a product with a constant matrix on its right; None for any other node."""
    if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in weights:
        return None
    values = numpy_helper.to_array(weights[node.input[1]])
    if node.op_type == "MatMul":
        return values if values.ndim == 2 else None
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
        return None
    return values.T if attributes.get("transB", 0) else values


def _quantize_input(name: str, nodes: list[onnx.NodeProto]) -> tuple[str, str, str]:
    outputs = (f"{name}.quantized", f"{name}.quantized_scale", f"{name}.quantized_zero_point")
    nodes.append(helper.make_node("DynamicQuantizeLinear", [name], outputs, name=f"{name}.quantize"))
    return outputs


def _integer_product(
    node: onnx.NodeProto, matrix: np.ndarray, quantized: tuple[str, str, str], graph: onnx.GraphProto
) -> list[onnx.NodeProto]:
    """The nodes that take the place of `node`; their weights are added to the graph."""
    values, value_scale, value_zero = quantized
    name = node.input[1]
    scale = np.maximum(np.abs(matrix).max(axis=0), np.finfo(np.float32).tiny) / 127
    stored = (np.rint(matrix / scale) + 128).astype(np.uint8)
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.ascontiguousarray(stored), f"{name}.int8"),
            numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"),
            numpy_helper.from_array(np.array(128, dtype=np.uint8), f"{name}.zero_point"),
        ]
    )
    output = node.output[0]
    bias = node.input[2] if len(node.input) > 2 else ""
    product = f"{output}.product" if bias else output
    # ONNX Runtime knows these four in this order and runs them as one.
    nodes = [
        helper.make_node(
            "MatMulInteger", [values, f"{name}.int8", value_zero, f"{name}.zero_point"], [f"{output}.int"]
        ),
        helper.make_node("Cast", [f"{output}.int"], [f"{output}.float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [value_scale, f"{name}.scale"], [f"{output}.product_scale"]),
        helper.make_node("Mul", [f"{output}.float", f"{output}.product_scale"], [product]),
    ]
    if bias:
        nodes.append(helper.make_node("Add", [product, bias], [output]))
    return nodes


def _replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
