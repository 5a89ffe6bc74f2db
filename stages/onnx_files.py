"""ONNX models of several entries that share one weights file, read and written so that bytes never vary.

A folder holds `<entry>.onnx` per entry and `weights.bin`. Every tensor above `INLINE_BYTES` stands in
`weights.bin` once, however many entries use it: tensors are told apart by content, laid out in the order
in which the entries name them, aligned for memory mapping.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.external_data_helper import load_external_data_for_model

from hstu.errors import GateError
from hstu.signature import Entry

WEIGHTS = "weights.bin"
INLINE_BYTES = 1024  # at most this much stays inside the .onnx file
_ALIGNMENT = 64


class WeightsWriter:
    """Appends tensors to one file; the same content is written once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._offsets: dict[bytes, int] = {}

    def add(self, values: npt.NDArray[np.generic]) -> tuple[int, int]:
        """(offset, length) in bytes at which `values` stand in the file."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        key = hashlib.sha256(data).digest()
        if key not in self._offsets:
            self._stream.write(b"\0" * (-self._stream.tell() % _ALIGNMENT))
            self._offsets[key] = self._stream.tell()
            self._stream.write(data)
        return self._offsets[key], data.nbytes


@contextmanager
def open_weights(folder: Path) -> Iterator[WeightsWriter]:
    """A writer of `folder/weights.bin`; the file is whole when the block ends."""
    with (folder / WEIGHTS).open("wb") as stream:
        yield WeightsWriter(stream)


def move_weights(model: ir.Model, writer: WeightsWriter) -> None:
    """Every large initializer of an IR model stands in the writer's file; the model refers to it."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > INLINE_BYTES:
            offset, length = writer.add(tensor.numpy())
            value.const_value = ir.ExternalTensor(
                WEIGHTS, offset, length, tensor.dtype, shape=ir.Shape(tensor.numpy().shape), name=value.name or ""
            )


def write_model(model: onnx.ModelProto, folder: Path, name: str, writer: WeightsWriter) -> None:
    """`folder/<name>.onnx` holds the model; its large initializers are moved to the writer's file."""
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            values = onnx.numpy_helper.to_array(tensor)
            if values.nbytes > INLINE_BYTES:
                _refer(tensor, *writer.add(values))
    write_graph(model, folder, name)


def write_graph(model: onnx.ModelProto, folder: Path, name: str) -> None:
    """`folder/<name>.onnx` holds the model as it is; weights it refers to must stand there already."""
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))


def read_graph(folder: Path, name: str) -> onnx.ModelProto:
    """The model of an entry, its large weights where they are: it must be written to the same folder."""
    return onnx.load(folder / f"{name}.onnx", load_external_data=False)


def scope(node_name: str) -> str:
    """The module a node was traced in, which stands before the slash of its name: "layers.0.attention"."""
    return node_name.rpartition("/")[0]


def write_models(models: Mapping[str, onnx.ModelProto], folder: Path) -> None:
    """One .onnx file per entry and their shared `weights.bin`, to which the models given refer afterwards."""
    with open_weights(folder) as writer:
        for name, model in models.items():
            write_model(model, folder, name, writer)


def read_models(folder: Path, names: Sequence[str]) -> dict[str, onnx.ModelProto]:
    """The models of `folder` by entry, every weight in memory."""
    models = {name: read_graph(folder, name) for name in names}
    for model in models.values():
        load_external_data_for_model(model, str(folder))
    return models


def check_file(path: Path) -> None:
    """The ONNX checker finds no fault in the file, types and shapes included; GateError says what it found."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GateError(f"{path.name}: not a valid ONNX model", got=str(error), fix="report this as a bug") from None


def check_interface(model: onnx.ModelProto, entry: Entry) -> None:
    """Inputs and outputs are exactly the entry's: names, order, dtypes, shapes; GateError shows both."""
    for kind, values, specs in (
        ("inputs", model.graph.input, entry.inputs),
        ("outputs", model.graph.output, entry.outputs),
    ):
        got = [_describe(value) for value in values]
        expected = [f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in specs]
        if got != expected:
            raise GateError(
                f"{entry.name}: the graph's {kind} are not those of the signature", got=got, expected=expected
            )


def _describe(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return f"{value.name} {dtype} {[dim.dim_param or dim.dim_value for dim in tensor.shape.dim]}"


def _refer(tensor: onnx.TensorProto, offset: int, length: int) -> None:
    """The tensor's bytes are those at `offset` of the weights file."""
    name, dtype, dims = tensor.name, tensor.data_type, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type, tensor.data_location = name, dtype, onnx.TensorProto.EXTERNAL
    tensor.dims.extend(dims)
    for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
