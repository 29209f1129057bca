"""A stand-in for `tensorrt`, for the control flow of our code only: nothing in it is TensorRT.

A plan is the ONNX file with what was asked for in front; a context runs it in ONNX Runtime on the CPU.
Names and answers are those of the Python API; a test holds the names to the published bindings.
Faults are the names of functions that are to answer False, None or -1, in `STANDIN_FAULTS`.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import time
from typing import Any

import numpy as np
import onnx
import standin_cuda
from onnx import numpy_helper

__version__ = os.environ.get("STANDIN_TENSORRT", "11.4.0.106")
faults = standin_cuda.faults


class BuilderFlag(enum.Enum):
    TF32 = 0
    STRIP_PLAN = 1
    REFIT_INDIVIDUAL = 2
    VERSION_COMPATIBLE = 3


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class HardwareCompatibilityLevel(enum.Enum):
    NONE = 0
    AMPERE_PLUS = 1
    SAME_COMPUTE_CAPABILITY = 2


class ProfilingVerbosity(enum.Enum):
    DETAILED = 0


class LayerInformationFormat(enum.Enum):
    JSON = 0


class TensorIOMode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class DataType(enum.Enum):
    FLOAT = 1
    HALF = 10
    BF16 = 16
    INT64 = 7


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    pass


def answer(name: str, good: Any, bad: Any, logger: Any = None) -> Any:
    """What a function answers, or, if it is to fail, what it answers then."""
    if name not in faults:
        return good
    if logger is not None:
        logger.log(ILogger.Severity.ERROR, f"{name} was told to fail")
    return bad


class ParserError:
    def node_name(self) -> str:
        return "blocks.0"

    def node_operator(self) -> str:
        return "Attention"

    def desc(self) -> str:
        return "no importer"


class ITensor:
    def __init__(self, name: str) -> None:
        self.name = name


class INetworkDefinition:
    def __init__(self, logger: Any) -> None:
        self._logger, self._model, self._marked = logger, onnx.ModelProto(), []

    @property
    def num_inputs(self) -> int:
        return len(self._model.graph.input)

    def get_input(self, number: int) -> ITensor:
        return ITensor(answer("get_input", self._model.graph.input[number].name, "other"))

    def mark_weights_refittable(self, name: str) -> bool:
        self._marked.append(name)
        known = any(tensor.name == name for tensor in self._model.graph.initializer)
        return answer("mark_weights_refittable", known, False, self._logger)


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network, self.num_errors = network, 0

    def parse_from_file(self, model: str) -> bool:
        self._network._model = onnx.load(model)
        self.num_errors = answer("parse_from_file", 0, 2)
        return not self.num_errors

    def get_error(self, index: int) -> ParserError:
        return ParserError()


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        if "set_shape" in faults:
            raise ValueError("min, opt and max are inconsistent")
        self._shapes[input] = [list(min), list(opt), list(max)]


class ITimingCache:
    def __init__(self, blob: bytes) -> None:
        self._blob = blob

    def serialize(self) -> bytes | None:
        return answer("serialize", self._blob + b"measured", None)


class IBuilderConfig:
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._flags, self._profiles, self._limits = {BuilderFlag.TF32}, [], {}
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.builder_optimization_level = 3
        self.profiling_verbosity = self.progress_monitor = self._cache = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self._limits[pool] = size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile._shapes)
        return answer("add_optimization_profile", len(self._profiles) - 1, -1, self._logger)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        return answer("create_timing_cache", ITimingCache(serialized_timing_cache), None)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return answer("set_timing_cache", not ignore_mismatch, False, self._logger)

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class Builder:
    def __init__(self, logger: Any) -> None:
        if "Builder" in faults:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags & (1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return answer("create_network", INetworkDefinition(self.logger), None)

    def create_builder_config(self) -> IBuilderConfig:
        return answer("create_builder_config", IBuilderConfig(self.logger), None)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return answer("create_optimization_profile", IOptimizationProfile(), None)

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> bytes | None:
        told, steps = config.progress_monitor, 400 if "slow" in faults else 2
        told.phase_start("Building Engine", None, steps)
        told.phase_start("Timing", "Building Engine", steps)
        for step in range(steps):
            if "slow" in faults:
                time.sleep(0.05)
            if not told.step_complete("Timing", step):
                return None
        told.phase_finish("Timing")
        told.phase_finish("Building Engine")
        head = {
            "profiles": config._profiles,
            "flags": sorted(flag.name for flag in config._flags),
            "hardware": config.hardware_compatibility_level.name,
            "level": config.builder_optimization_level,
            "workspace": config._limits[MemoryPoolType.WORKSPACE],
            "refit": network._marked,
        }
        model = onnx.ModelProto()
        model.CopyFrom(network._model)
        if BuilderFlag.STRIP_PLAN in config._flags:
            for tensor in model.graph.initializer:
                zeros = np.zeros_like(numpy_helper.to_array(tensor))
                tensor.CopyFrom(numpy_helper.from_array(zeros, tensor.name))
        plan = json.dumps(head).encode() + b"\n" + model.SerializeToString()
        return answer("build_serialized_network", plan, None, self.logger)


class Runtime:
    def __init__(self, logger: Any) -> None:
        if "Runtime" in faults:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.logger, self.engine_host_code_allowed = logger, False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        engine = ICudaEngine(serialized_engine, self.logger)
        needs = "VERSION_COMPATIBLE" in engine._head["flags"]
        refused = None if needs and not self.engine_host_code_allowed else engine
        return answer("deserialize_cuda_engine", refused, None, self.logger)


class EngineInspector:
    def get_engine_information(self, format: LayerInformationFormat) -> str:
        return '{"Layers": []}'


class ICudaEngine:
    def __init__(self, plan: bytes, logger: Any) -> None:
        head, _, model = plan.partition(b"\n")
        self._head, self._model, self._logger = (
            json.loads(head),
            onnx.load_from_string(model),
            logger,
        )
        self.num_optimization_profiles = answer(
            "num_optimization_profiles", len(self._head["profiles"]), 9
        )
        self.refittable = answer(
            "refittable", bool({"STRIP_PLAN", "REFIT_INDIVIDUAL"} & set(self._head["flags"])), False
        )
        self._io = {v.name: v for v in (*self._model.graph.input, *self._model.graph.output)}
        self.num_io_tensors = len(self._io)
        self._load()

    def _load(self) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._run = ort.InferenceSession(
            self._model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        is_input = any(value.name == name for value in self._model.graph.input)
        return TensorIOMode.INPUT if is_input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self._io[name].type.tensor_type.elem_type)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return answer("get_tensor_location", TensorLocation.DEVICE, TensorLocation.HOST)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        dims = self._io[name].type.tensor_type.shape.dim
        return tuple(-1 if dim.dim_param else dim.dim_value for dim in dims)

    def create_engine_inspector(self) -> EngineInspector:
        return answer("create_engine_inspector", EngineInspector(), None)

    def create_execution_context(self) -> IExecutionContext:
        return answer("create_execution_context", IExecutionContext(self), None, self._logger)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._logger = engine, engine._logger
        self._shapes, self._addresses, self._profile = {}, {}, {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle
        self._profile = self._engine._head["profiles"][profile_index]
        return answer("set_optimization_profile_async", True, False, self._logger)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._profile.get(name, [shape, shape, shape])
        fits = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        self._shapes[name] = shape
        return answer("set_input_shape", fits, False, self._logger)

    def infer_shapes(self) -> list[str]:
        return answer("infer_shapes", [], ["images"])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = self._shapes["images"][0]
        shape = self._engine.get_tensor_shape(name)
        return tuple(
            answer("get_tensor_shape", batch, -1) if size == -1 else size for size in shape
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return answer("set_tensor_address", bool(memory), False, self._logger)

    def execute_async_v3(self, stream_handle: int) -> bool:
        addresses, shapes = dict(self._addresses), dict(self._shapes)

        def compute() -> None:
            types = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}
            feeds = {}
            for name, shape in shapes.items():
                dtype = np.dtype(types[self._engine.get_tensor_dtype(name).name])
                data = ctypes.string_at(addresses[name], dtype.itemsize * int(np.prod(shape)))
                feeds[name] = np.frombuffer(data, dtype).reshape(shape)
            (found,) = self._engine._run.run(["logits"], feeds)
            ctypes.memmove(addresses["logits"], found.ctypes.data, found.nbytes)

        recording = standin_cuda.captures[stream_handle]
        compute() if recording is None else recording.append(compute)
        return answer("execute_async_v3", True, False, self._logger)


class Weights:
    def __init__(self, type: DataType, ptr: int, count: int) -> None:
        self.dtype, self.size, self._address = type, count, ptr


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        if "Refitter" in faults:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._engine, self._logger, self._new = engine, logger, {}
        self._tensors = {tensor.name: tensor for tensor in engine._model.graph.initializer}

    def get_all_weights(self) -> list[str]:
        return answer("get_all_weights", self._engine._head["refit"], [])

    def get_weights_prototype(self, weights_name: str) -> Weights:
        if answer("get_weights_prototype", weights_name, None) not in self._engine._head["refit"]:
            return Weights(DataType.FLOAT, 0, -1)
        tensor = self._tensors[weights_name]
        return Weights(DataType(tensor.data_type), 0, int(np.prod(tensor.dims)))

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        self._new[name] = weights
        return answer("set_named_weights", True, False, self._logger)

    def get_missing_weights(self) -> list[str]:
        return answer("get_missing_weights", [], ["bank/other"])

    def refit_cuda_engine(self) -> bool:
        for name, new in self._new.items():
            tensor = self._tensors[name]
            size = numpy_helper.to_array(tensor).nbytes
            tensor.raw_data = ctypes.string_at(new._address, size)
        self._engine._load()
        return answer("refit_cuda_engine", True, False, self._logger)


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._refitter, self.num_errors = refitter, 0

    def refit_from_file(self, model: str) -> bool:
        given = {tensor.name: tensor for tensor in onnx.load(model).graph.initializer}
        for name, tensor in self._refitter._tensors.items():
            tensor.CopyFrom(given[name])
        self.num_errors = answer("refit_from_file", 0, 1)
        return not self.num_errors

    def get_error(self, index: int) -> ParserError:
        return ParserError()
