"""Our plugin through NVIDIA's own front end: `python -m tests.stages.tensorrt.front_end LIBRARIES KERNEL MODEL`.

Prints as JSON what TensorRT would be told, for the sizes below, and what an ONNX parser says of MODEL. A process of its
own: another product's libraries stand in for TensorRT's (`tests.stages.tensorrt.bindings`).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.stages.tensorrt.bindings import import_bindings

USERS, ROWS, HEADS, WIDTH, LONGEST = 5, 130, 2, 32, 203
INPUTS = ("uvqk", "times", "next_times", "lengths", "position_bias", "time_bias", "bucket_edges")
SHAPES = [(USERS, ROWS, 4 * HEADS * WIDTH), (USERS, ROWS), (USERS, ROWS), (USERS,), (2 * LONGEST - 1,), (129,), (129,)]


class Numbers(list[Any]):
    """Stands in for containers that hold C++ expressions."""

    nbSymExprs = 0  # noqa: N815 - TensorRT's name


def use_numbers(trt: Any, tensor: Any) -> Any:
    """Expressions are numbers in this process; returns what TensorRT would make them with, and a maker of one."""

    class Number(trt.IDimensionExpr):
        value: int

        def is_constant(self) -> bool:
            return True

        def get_constant_value(self) -> int:
            return self.value

    def number(value: int) -> Number:
        made = Number.__new__(Number)  # its constructor is TensorRT's alone
        made.value = value
        return made

    kinds = trt.DimensionOperation
    operations = {
        kinds.SUM: lambda a, b: a + b, kinds.PROD: lambda a, b: a * b, kinds.SUB: lambda a, b: a - b,
        kinds.CEIL_DIV: lambda a, b: -(-a // b), kinds.FLOOR_DIV: lambda a, b: a // b,
    }  # fmt: skip
    trt.DimsExprs = lambda length: Numbers([None] * length)
    tensor.SymExprImpl = lambda expression: (type(expression).__name__, expression._expr.value)
    builder = SimpleNamespace(
        constant=number, operation=lambda kind, a, b: number(operations[kind](a.value, b.value))
    )  # fmt: skip
    return builder, number


def dynamic(trt: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    made = trt.DynamicPluginTensorDesc()
    made.desc = trt.PluginTensorDesc()
    desc = made.desc
    desc.dims, desc.type, desc.format = shape, dtype, trt.TensorFormat.LINEAR
    made.desc = desc
    return made


def main(libraries: Path, kernel: Path, model: Path) -> None:
    import_bindings(libraries)
    import tensorrt as trt
    import tensorrt.plugin as trtp

    from stages.tensorrt import plugin

    logger = trt.Logger(trt.Logger.ERROR)
    description = json.loads((kernel / "attention_plugin.json").read_text())
    ptx = (kernel / "attention_plugin.ptx").read_text()
    told: dict[str, Any] = {}
    try:
        plugin.register({**description, "arguments": description["arguments"][::-1]}, ptx)
    except ValueError as error:
        told["refused"] = str(error)
    plugin.register(description, ptx)
    told |= {"creator": trt.get_plugin_registry().get_creator(plugin.PLUGIN, "1", "hstu").name}

    product = trt.Builder(logger)  # which its networks do not keep alive
    network = product.create_network(0)
    dtypes = [trt.float16, *[trt.int64] * 3, *[trt.float32] * 3]
    inputs = [network.add_input(n, t, s) for n, t, s in zip(INPUTS, dtypes, SHAPES, strict=True)]
    create = trtp.op.hstu.HSTUPaddedAttention(*inputs, num_heads=HEADS, head_dim=WIDTH, max_length=LONGEST)
    _, _, made = create(trt.QuickPluginCreationRequest.STRICT_AOT)
    told["aot"] = isinstance(made, trt.IPluginV3QuickAOTBuild)
    told["type"] = made.get_output_data_types(dtypes, [len(shape) for shape in SHAPES])[0].name

    expressions, number = use_numbers(trt, sys.modules["tensorrt_bindings.plugin._tensor"])
    sizes = [[number(size) for size in shape] for shape in SHAPES]
    told["shape"] = [size.value for size in made.get_output_shapes(sizes, [], expressions)[0]]
    output = (USERS, ROWS, HEADS * WIDTH)
    both = [dynamic(trt, shape, t) for shape, t in zip([*SHAPES, output], [*dtypes, trt.float16], strict=True)]
    combination = made.get_supported_format_combinations(both, len(INPUTS))
    told["formats"] = sorted({f"{desc.type.name} {desc.format.name}" for desc in combination})
    made.configure_plugin(both[: len(INPUTS)], both[len(INPUTS) :])
    made.set_tactic(0)
    launch, numbers = SimpleNamespace(), Numbers([None] * 8)
    made.get_launch_params(sizes, both, len(INPUTS), launch, numbers, expressions)
    told["launch"] = {name: value[1] for name, value in vars(launch).items()}
    told["numbers"] = numbers[: numbers.nbSymExprs]
    name, ptx = made.get_kernel([one.desc for one in both[: len(INPUTS)]], [one.desc for one in both[len(INPUTS) :]])
    told |= {"kernel": name, "ptx_sha256": hashlib.sha256(ptx).hexdigest()}

    empty = product.create_network(0)
    parser = trt.OnnxParser(empty, logger)
    told["parsed"] = parser.parse_from_file(str(model))
    told["errors"] = [parser.get_error(index).desc() for index in range(parser.num_errors)]
    print(json.dumps(told))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
