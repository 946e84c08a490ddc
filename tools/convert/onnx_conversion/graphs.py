"""From a torch network to an ONNX graph, and from a graph to its files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.jit import TracerWarning  # pyright: ignore[reportPrivateImportUsage]

from gpa_codecs.onnx_folder import Graph, GraphFile

OPSET = 17
"""The first with layer norms; ONNX Runtime has had it since 1.12."""

_SMALL = 1024  # Bytes up to which a tensor stays in the .onnx file.


def trace(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    output: str,
    lengths: Mapping[str, Mapping[int, str]],
    workspace: Path,
) -> onnx.ModelProto:
    """The graph of what `network` computes from `inputs`, by name, in the order of its arguments.

    lengths: the axes whose length is free, of each input and of the output, each with a name.
    workspace: a folder for a temporary file. The network is run once; a branch that it takes is taken for good.
    """
    path = workspace / "traced.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        # The older exporter is meant: it needs no further package and is ten times faster. It warns of Python values
        # that become constants; here they are the batch size of one and the widths.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", TracerWarning)
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        torch.onnx.export(
            network,
            tuple(inputs.values()),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[output],
            dynamic_axes={name: dict(axes) for name, axes in lengths.items()},
        )
    model = onnx.load(path)
    path.unlink()
    return model


def save(model: onnx.ModelProto, folder: Path, name: str) -> Graph:
    """Write NAME.onnx, and NAME.onnx.data with the weights, so that they can be mapped instead of read."""
    path, data = folder / f"{name}.onnx", f"{name}.onnx.data"
    model.producer_name, model.producer_version = "gpa-engines", ""
    model.graph.name = name
    onnx.save_model(model, path, save_as_external_data=True, location=data, size_threshold=_SMALL)
    files = [path, folder / data] if (folder / data).exists() else [path]
    if len(files) > 1:
        files[1].chmod(path.stat().st_mode & 0o777)  # onnx lets only the owner read what it makes
    return Graph(tuple(GraphFile.of(file) for file in files))
