"""The language model as an ONNX graph of standard operators (opset 21), with its keys and values in pages.

The cache never passes through the graph. Its pages come in as inputs, one array of keys and one of values per layer,
and only the keys and values of the new positions go out. Pages may belong to different rows: every page is attended to
by its owner's queries alone, and the parts are put together as in flash decoding (Dao et al. 2023), scaled by the
row's largest score. So rows of any lengths share one run, and no key is copied, padded or concatenated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gpa_engines.lm_config import LMConfig

OPSET = 21
IR_VERSION = 10

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class Graph:
    """A graph that grows node by node. Names of values are the operator's, numbered."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output and return the output's name."""
        return self.add_many(operator, 1, *inputs, **attributes)[0]

    def add_many(self, operator: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """Append a node with `count` outputs and return their names."""
        stem = f"{operator}.{len(self.nodes)}"
        outputs = [stem] if count == 1 else [f"{stem}.{index}" for index in range(count)]
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=stem, **attributes))
        return outputs

    def rename_last(self, name: str) -> None:
        """Give the only output of the last node a name of its own."""
        self.nodes[-1].output[0] = name

    def constant(self, values: object, dtype: type = np.float32) -> str:
        """The name of a small array that is kept inside the graph; equal ones are kept once."""
        array = np.asarray(values, dtype)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = f"constant.{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def external(self, name: str, kind: int, shape: tuple[int, ...], location: str, offset: int, size: int) -> str:
        """A weight that lies at `offset` of the file `location` beside the graph, `size` bytes long."""
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": location, "offset": offset, "length": size}.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def input(self, name: str, kind: int, shape: tuple[int | str, ...]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: tuple[int | str, ...]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="gpa-engines")
        helper.set_model_props(model, dict(metadata))
        path.write_bytes(model.SerializeToString())


class Linears(Protocol):
    """How the graph multiplies by a weight; `lm_weights` has one per kind of weight."""

    def product(self, graph: Graph, x: str, name: str, residual: str | None = None) -> str:
        """x: [M, K] times the weight `name` [N, K], plus `residual` [M, N] -> [M, N]."""
        ...


def build_body(
    config: LMConfig, linears: Linears, norms: Mapping[str, NDArray[np.float32]], rotary: NDArray[np.float32]
) -> Graph:
    """Everything between the embedding and the head.

    norms: float32 weights by their names in the checkpoint, without "model." and ".weight". rotary: float32[D / 2], the
    angle of one position. Of R rows with S new positions each, P pages and W positions whose state is wanted:

    inputs: embeddings float32[R, S, hidden]; positions int64[R, S]; causal float32[S, S], 0 or -inf; owner int64[P],
    the row of each page; ownership float32[R, P], 1 where it is, 0 elsewhere; page_mask float32[P, 1, 1, 1, page], 0
    where a position is filled, else -inf; keys.I float32[P, kv_heads, 1, D, page] and values.I
    float32[P, kv_heads, 1, page, D] for each layer I; wanted int64[W], places in the R · S new positions.
    outputs: hidden float32[W, hidden], normalised, for the head; new_keys float32[R, kv_heads, layers, D, S];
    new_values float32[R, kv_heads, layers, S, D].
    """
    return _Body(config, linears, norms, rotary).build()


def build_float_head(hidden: int) -> Graph:
    """hidden float32[W, hidden] times weight float32[V, hidden], any rows of the head -> logits float32[W, V]."""
    graph = Graph("gpa-lm-head")
    x = graph.input("hidden", FLOAT, ("W", hidden))
    graph.add("Gemm", x, graph.input("weight", FLOAT, ("V", hidden)), transB=1)
    graph.rename_last("logits")
    graph.output("logits", FLOAT, ("W", "V"))
    return graph


def build_head(config: LMConfig, linears: Linears, name: str) -> Graph:
    """hidden float32[W, hidden] -> logits float32[W, vocabulary], with the weight in the graph."""
    graph = Graph("gpa-lm-head")
    linears.product(graph, graph.input("hidden", FLOAT, ("W", config.hidden_size)), name)
    graph.rename_last("logits")
    graph.output("logits", FLOAT, ("W", config.vocab_size))
    return graph


class _Body:
    def __init__(
        self,
        config: LMConfig,
        linears: Linears,
        norms: Mapping[str, NDArray[np.float32]],
        rotary: NDArray[np.float32],
    ) -> None:
        self.config, self.linears, self.norms, self.rotary = config, linears, norms, rotary
        self.width, self.kv_heads = config.head_dim, config.num_key_value_heads
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.graph = Graph("gpa-lm")

    def build(self) -> Graph:
        graph, config = self.graph, self.config
        self._declare()
        self._prepare()
        hidden = graph.add("Reshape", "embeddings", graph.constant([-1, config.hidden_size], np.int64))
        keys, values = [], []
        for index in range(config.num_hidden_layers):
            hidden, key, value = self._layer(index, hidden)
            keys.append(key)
            values.append(value)
        wanted = graph.add("Gather", hidden, "wanted", axis=0)
        self._normalize(wanted, "norm")
        graph.rename_last("hidden")
        for name, parts in (("new_keys", keys), ("new_values", values)):
            graph.add("Concat", *parts, axis=2)
            graph.rename_last(name)
        return graph

    def _declare(self) -> None:
        graph, config, kv, width = self.graph, self.config, self.kv_heads, self.width
        layers = config.num_hidden_layers
        graph.input("embeddings", FLOAT, ("R", "S", config.hidden_size))
        graph.input("positions", INT64, ("R", "S"))
        graph.input("causal", FLOAT, ("S", "S"))
        graph.input("owner", INT64, ("P",))
        graph.input("ownership", FLOAT, ("R", "P"))
        graph.input("page_mask", FLOAT, ("P", 1, 1, 1, "page"))
        for index in range(layers):
            graph.input(f"keys.{index}", FLOAT, ("P", kv, 1, width, "page"))
            graph.input(f"values.{index}", FLOAT, ("P", kv, 1, "page", width))
        graph.input("wanted", INT64, ("W",))
        graph.output("hidden", FLOAT, ("W", config.hidden_size))
        graph.output("new_keys", FLOAT, ("R", kv, layers, width, "S"))
        graph.output("new_values", FLOAT, ("R", kv, layers, "S", width))

    def _prepare(self) -> None:
        """What all layers use: rotation factors, the shape of a head-wise view, and the rows' mask over pages."""
        graph = self.graph
        positions = graph.add("Cast", "positions", to=FLOAT)
        positions = graph.add("Unsqueeze", positions, graph.constant([2, 3], np.int64))
        angles = graph.add("Mul", positions, graph.constant(self.rotary))
        cosine, sine = graph.add("Cos", angles), graph.add("Sin", angles)
        self.cosine = graph.add("Concat", cosine, cosine, axis=3)
        self.sine = graph.add("Concat", graph.add("Neg", sine), sine, axis=3)
        heads = self.config.num_attention_heads + 2 * self.kv_heads
        rows = graph.add("Shape", "positions")
        self.by_head = graph.add("Concat", rows, graph.constant([heads, self.width], np.int64), axis=0)
        # log: 0 for the pages of a row, -inf for all others.
        foreign = graph.add("Log", "ownership")
        self.foreign = graph.add("Unsqueeze", foreign, graph.constant([2, 3, 4, 5], np.int64))

    def _layer(self, index: int, hidden: str) -> tuple[str, str, str]:
        """hidden [M, hidden] -> the same after this layer, new keys [R, kv, 1, D, S], new values [R, kv, 1, S, D]."""
        graph, config = self.graph, self.config
        name = f"layers.{index}"
        x = self._normalize(hidden, f"{name}.input_layernorm")
        query, key, value = self._heads(index, self.linears.product(graph, x, f"{name}.qkv"))
        x = self._attend(index, query, key, value)
        x = graph.add("Transpose", x, perm=[0, 3, 1, 2, 4])
        x = graph.add("Reshape", x, graph.constant([-1, config.num_attention_heads * self.width], np.int64))
        hidden = self.linears.product(graph, x, f"{name}.self_attn.o_proj", hidden)
        x = self._normalize(hidden, f"{name}.post_attention_layernorm")
        x = self.linears.product(graph, x, f"{name}.gate_up")
        gate, up = graph.add_many("Split", 2, x, axis=1, num_outputs=2)
        x = graph.add("Mul", graph.add("Mul", gate, graph.add("Sigmoid", gate)), up)
        return self.linears.product(graph, x, f"{name}.mlp.down_proj", hidden), key, value

    def _normalize(self, x: str, name: str) -> str:
        """RMSNorm over the last axis, in the form that ONNX Runtime recognises and runs as one kernel."""
        graph = self.graph
        square = graph.add("Pow", x, graph.constant(2.0))
        mean = graph.add("ReduceMean", square, graph.constant([-1], np.int64), keepdims=1)
        root = graph.add("Sqrt", graph.add("Add", mean, graph.constant(self.config.rms_norm_eps)))
        return graph.add("Mul", graph.add("Div", x, root), graph.constant(self.norms[name]))

    def _heads(self, index: int, qkv: str) -> tuple[str, str, str]:
        """[M, (heads + 2 kv) · D] -> queries [R, kv, group, S, D], keys [R, kv, 1, D, S], values [R, kv, 1, S, D]."""
        graph, kv, width = self.graph, self.kv_heads, self.width
        heads = self.config.num_attention_heads
        view = graph.add("Reshape", qkv, self.by_head)
        query, key, value = graph.add_many("Split", 3, view, graph.constant([heads, kv, kv], np.int64), axis=2)
        query = self._rotate(self._normalize(query, f"layers.{index}.self_attn.q_norm"))
        key = self._rotate(self._normalize(key, f"layers.{index}.self_attn.k_norm"))

        def arrange(x: str, group: int, order: list[int]) -> str:
            x = graph.add("Reshape", x, graph.constant([0, 0, kv, group, width], np.int64))
            return graph.add("Transpose", x, perm=order)

        return (
            arrange(query, self.group, [0, 2, 3, 1, 4]),
            arrange(key, 1, [0, 2, 3, 4, 1]),
            arrange(value, 1, [0, 2, 3, 1, 4]),
        )

    def _rotate(self, x: str) -> str:
        """Rotary embedding (RoFormer, Su et al. 2021): the two halves of a head are the pairs."""
        graph = self.graph
        first, second = graph.add_many("Split", 2, x, axis=3, num_outputs=2)
        swapped = graph.add("Concat", second, first, axis=3)
        return graph.add("Add", graph.add("Mul", x, self.cosine), graph.add("Mul", swapped, self.sine))

    def _attend(self, index: int, query: str, key: str, value: str) -> str:
        """Softmax attention over a row's pages and its new positions; [R, kv, group, S, D] as the queries.

        The scale 1 / sqrt(D) is part of the query norm's weight.
        """
        graph, kv, width = self.graph, self.kv_heads, self.width
        last = graph.constant([-1], np.int64)
        flat = graph.constant([0, -1], np.int64)

        old = graph.add("MatMul", graph.add("Gather", query, "owner", axis=0), f"keys.{index}")
        old = graph.add("Add", old, "page_mask")
        new = graph.add("Add", graph.add("MatMul", query, key), "causal")

        by_page = graph.add("Add", self.foreign, graph.add("ReduceMax", old, last, keepdims=1))
        by_row = graph.add("ReduceMax", by_page, graph.constant([1], np.int64), keepdims=0)
        largest = graph.add("Max", by_row, graph.add("ReduceMax", new, last, keepdims=1))

        old = graph.add("Exp", graph.add("Sub", old, graph.add("Gather", largest, "owner", axis=0)))
        new = graph.add("Exp", graph.add("Sub", new, largest))

        def total(of_pages: str, of_new: str, last_axis: int) -> str:
            part = graph.add("MatMul", "ownership", graph.add("Reshape", of_pages, flat))
            part = graph.add("Reshape", part, graph.constant([0, kv, self.group, -1, last_axis], np.int64))
            return graph.add("Add", part, of_new)

        mass = total(graph.add("ReduceSum", old, last, keepdims=1), graph.add("ReduceSum", new, last, keepdims=1), 1)
        mixed = total(graph.add("MatMul", old, f"values.{index}"), graph.add("MatMul", new, value), width)
        return graph.add("Div", mixed, mass)
