"""One entry of a TensorRT engine on the device: contexts, buffers and CUDA graphs, ready before the first request."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hstu.errors import ArtifactError
from hstu.signature import Entry, TensorSpec
from serving.engine import Array
from serving.engines.tensorrt_shapes import Profile, Shape, choose_profile

if TYPE_CHECKING:
    import tensorrt_rtx as trt

LOG = logging.getLogger(__name__)
GRAPH_AFTER = 8  # requests of one shape, after which it is worth a CUDA graph
MAX_GRAPHS = 4  # each has a context and buffers of its own


class Buffers:
    """A device tensor and a pinned host tensor for every input and output, which grow when a request is larger."""

    def __init__(self, specs: tuple[TensorSpec, ...], device: torch.device) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._device = device
        self._device_side: dict[str, torch.Tensor] = {}
        self._host_side: dict[str, torch.Tensor] = {}

    def reserve(self, name: str, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """The (device, host) tensors of this shape for an input or output; contents are undefined."""
        size = int(np.prod(shape))
        if name not in self._device_side or self._device_side[name].numel() < size:
            dtype = getattr(torch, self._specs[name].dtype)
            self._device_side[name] = torch.empty(size, dtype=dtype, device=self._device)
            self._host_side[name] = torch.empty(size, dtype=dtype, pin_memory=True)
        return self._device_side[name][:size].view(shape), self._host_side[name][:size].view(shape)


class CapturedShape:
    """One fixed shape as a CUDA graph, with the context and buffers it was captured with: none may change after."""

    def __init__(self, context: trt.IExecutionContext, buffers: Buffers, graph: torch.cuda.CUDAGraph) -> None:
        self.context, self.buffers, self.graph = context, buffers, graph


class EntryOnDevice:
    """Runs one entry; one request at a time, on a stream of its own."""

    def __init__(self, engine: trt.ICudaEngine, signature: Entry, profiles: tuple[Profile, ...]) -> None:
        """One context per profile exists, and buffers for the typical request of the largest.

        Raises ArtifactError when the engine's tensors or profiles are not what the signature and build.json say.
        """
        self._engine, self._signature, self._profiles = engine, signature, profiles
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream: Any = torch.cuda.Stream(self._device)
        self._lock = threading.Lock()
        self._specs = (*signature.inputs, *signature.outputs)
        self._check_bindings()
        self._buffers = Buffers(self._specs, self._device)
        for profile in profiles:
            for name, (_, typical, _) in profile.items():
                self._buffers.reserve(name, typical)
        self._contexts = [self._context(number) for number in range(len(profiles))]
        self._seen: Counter[tuple[Shape, ...]] = Counter()
        self._captured: dict[tuple[Shape, ...], CapturedShape] = {}
        self._capturable = True

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name; InputError when no profile holds the shapes, ArtifactError when the engine fails."""
        shapes = {spec.name: tuple(feeds[spec.name].shape) for spec in self._signature.inputs}
        number = choose_profile(self._signature.name, self._profiles, shapes)
        key = tuple(shapes.values())
        with self._lock, torch.cuda.stream(self._stream):
            self._seen[key] += 1
            if self._capturable and key not in self._captured and self._seen[key] >= GRAPH_AFTER:
                self._capture(number, key, feeds)
            captured = self._captured.get(key)
            if captured is None:
                return self._enqueue(self._contexts[number], self._buffers, feeds)
            self._copy_in(captured.buffers, feeds)
            captured.graph.replay()
            return self._copy_out(captured.context, captured.buffers)

    def _enqueue(
        self, context: trt.IExecutionContext, buffers: Buffers, feeds: Mapping[str, Array]
    ) -> dict[str, Array]:
        for name, tensor in self._copy_in(buffers, feeds).items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        for spec in self._signature.outputs:
            device_side, _ = buffers.reserve(spec.name, _shape(context, spec.name))
            context.set_tensor_address(spec.name, device_side.data_ptr())
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise ArtifactError(
                f"{self._signature.name}: the engine did not run",
                fix="run `python cli.py gpu-check` for what the library says, or use another engine of the bundle",
            )
        return self._copy_out(context, buffers)

    def _copy_in(self, buffers: Buffers, feeds: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        inputs = {}
        for spec in self._signature.inputs:
            device_side, host_side = buffers.reserve(spec.name, tuple(feeds[spec.name].shape))
            host_side.copy_(torch.from_numpy(np.ascontiguousarray(feeds[spec.name])))
            device_side.copy_(host_side, non_blocking=True)
            inputs[spec.name] = device_side
        return inputs

    def _copy_out(self, context: trt.IExecutionContext, buffers: Buffers) -> dict[str, Array]:
        pairs = {o.name: buffers.reserve(o.name, _shape(context, o.name)) for o in self._signature.outputs}
        for device_side, host_side in pairs.values():
            host_side.copy_(device_side, non_blocking=True)
        self._stream.synchronize()
        return {name: host_side.numpy().copy() for name, (_, host_side) in pairs.items()}  # the buffer is used again

    def _capture(self, number: int, key: tuple[Shape, ...], feeds: Mapping[str, Array]) -> None:
        """A CUDA graph of this shape exists; where the engine cannot be captured, that is logged once and left."""
        if len(self._captured) >= MAX_GRAPHS:
            rarest = min(self._captured, key=lambda shapes: self._seen[shapes])
            if self._seen[rarest] >= self._seen[key]:
                return
            del self._captured[rarest]
        context, buffers = self._context(number), Buffers(self._specs, self._device)
        self._enqueue(context, buffers, feeds)  # the first run after a new shape does work that must not be captured
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                enqueued = context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        except RuntimeError as error:  # torch's type for what CUDA refuses
            enqueued, reason = False, str(error).splitlines()[0]
        else:
            reason = "the library did not enqueue"
        if enqueued:
            self._captured[key] = CapturedShape(context, buffers, graph)
        else:
            self._capturable = False
            LOG.warning("%s runs without CUDA graphs: %s", self._signature.name, reason)

    def _context(self, number: int) -> trt.IExecutionContext:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(number, self._stream.cuda_stream):
            raise ArtifactError(
                f"{self._signature.name}: no execution context for profile {number}",
                fix="free device memory, or build with fewer build-engine.profiles",
            )
        self._stream.synchronize()
        return context

    def _check_bindings(self) -> None:
        """Every tensor of the signature is in the engine with its type: INT64 stays INT64."""
        there = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        wanted = {spec.name: {"int64": "INT64", "float32": "FLOAT"}[spec.dtype] for spec in self._specs}
        if there != set(wanted):
            raise ArtifactError(
                f"{self._signature.name}: not the tensors of this model", got=sorted(there), expected=sorted(wanted)
            )
        for name, expected in wanted.items():
            got = self._engine.get_tensor_dtype(name).name
            if got != expected:
                raise ArtifactError(f"{self._signature.name}: tensor {name!r}", got=got, expected=expected)
        if self._engine.num_optimization_profiles != len(self._profiles):
            raise ArtifactError(
                f"{self._signature.name}: not the profiles that build.json names",
                got=self._engine.num_optimization_profiles,
                expected=len(self._profiles),
            )


def _shape(context: trt.IExecutionContext, name: str) -> Shape:
    dims = context.get_tensor_shape(name)
    return tuple(dims[axis] for axis in range(len(dims)))
