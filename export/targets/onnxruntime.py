"""ONNX Runtime: the engine file is the ONNX model; the session asserts its provider.

ONNX Runtime falls back to another provider with only a printed line. Here the provider that was
asked for is the one that runs, or opening fails. On a CUDA device the bank lives there, and `bind`
keeps inputs and outputs of one batch size there too, for runs that copy nothing (IO binding) and, with
`cuda_graph`, launch all kernels at once. float32 products are float32: TF32 is a precision of its own.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ...merge.errors import IncompatibleArtefact, MissingDependency, UsageError
from ...merge.files import digest as sha256_of
from ..engine import CPU, LOGITS, TASK, by_name, is_row_input
from .onnxruntime_rows import BFLOAT16, DeviceRows, HostRows, host_value
from .prepared import prepared
from .private import ort

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ..engine import Device, Rows

GRAPHS = itertools.count(
    1
)  # numbers of recorded CUDA graphs; a graph belongs to the memory of one batch
OPTIMISED = "optimised.onnx"
DATA_FOLDER = "session.model_external_initializers_file_folder_path"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeSession:
    """An ONNX model open on one execution provider."""

    def __init__(
        self,
        model: Path | bytes,
        device: Device = CPU,
        *,
        bank: Mapping[str, NDArray[Any]] | None = None,
        tf32: bool = False,
        cuda_graph: bool = False,
        profile: Path | None = None,
        as_written: bool = False,
        folder: Path | None = None,
        in_place: bool = False,
        digest: str | None = None,
    ) -> None:
        """Open a model.

        Args:
            model: Path or serialised bytes.
            device: Its provider is a key of `PROVIDERS`. What `prepared` keeps are models of a path, without a `profile`.
            bank: Task tensors by input name, for an engine whose bank is an input; None where `reserve` follows.
            tf32: Let the device round float32 products to TF32.
            cuda_graph: Record the kernels of each batch size that is bound and replay them; such a session
                runs through `bind` alone.
            profile: A folder for `OPTIMISED`, the graph that really runs, and for what `end_profile` gives.
            as_written: Compute what stands between quantise and dequantise nodes in float32. ONNX Runtime 1.31
                fuses products of float8 into an integer kernel that does not take them, and refuses the model.
            folder: Where the data lies that a serialised model leaves outside.
            in_place: On the CPU, read a bank where its arrays lie, which then must not change; otherwise it is
                copied.
            digest: SHA-256 of the file at `model`, where it is known; otherwise taken when it is needed.

        Raises:
            UsageError: Unknown provider name, an option that the provider does not have, or a folder of prepared
                engines that cannot be written to.
            MissingDependency: The provider cannot be loaded.
            IncompatibleArtefact: The model cannot be loaded, or the bank is not the engine's.
        """
        provider = device.provider
        _require_own_options(device, tf32=tf32, cuda_graph=cuda_graph)
        self.provider = PROVIDERS[provider]
        self.device = provider
        if self.provider not in ort.get_available_providers():
            raise MissingDependency(
                f"ONNX Runtime has no {self.provider}",
                found=ort.get_available_providers(),
                do="run `utune-deploy doctor`, or choose another --provider",
            )
        ort.set_default_logger_severity(4)  # what matters is raised below
        if provider == "cuda":
            _preload_cuda()
        options = _options(device, as_written=as_written)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile / "profile")
            options.optimized_model_filepath = str(profile / OPTIMISED)
        elif device.prepared is not None and isinstance(model, Path):
            settings = {"as_written": as_written}
            known = digest or sha256_of(model)
            model = prepared(model, device.prepared, known, options, settings)
            options = _options(device, as_written=as_written)
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if folder is not None:
            options.add_session_config_entry(DATA_FOLDER, str(folder))
        settings_of_provider: list[Any] = [self.provider]
        if provider == "cuda":
            settings_of_provider = [
                (self.provider, _cuda(device, tf32=tf32, cuda_graph=cuda_graph))
            ]
        if device.kernels is not None:
            _register(options, device.kernels)
        try:
            self._session = ort.InferenceSession(
                str(model) if not isinstance(model, bytes) else model,
                options,
                providers=settings_of_provider,
            )
        except Exception as cause:
            raise IncompatibleArtefact(
                "ONNX Runtime cannot load the engine",
                where="engine in memory" if isinstance(model, bytes) else model,
                found=str(cause).splitlines()[0],
            ) from cause
        self._session.disable_fallback()
        running = self._session.get_providers()[0]
        if running != self.provider:
            raise MissingDependency(
                "ONNX Runtime fell back to another provider",
                wanted=self.provider,
                found=running,
                do="run `utune-deploy doctor` to see what the provider lacks",
            )
        self._types = {entry.name: _numpy_type(entry.type) for entry in self._session.get_inputs()}
        names = list(self._types)
        self._in_place = in_place
        self.cuda_graph = cuda_graph
        self.mixes_tasks = TASK in names
        self._row_names = [name for name in names if is_row_input(name)]
        self._bank_names = frozenset(names) - {TASK, *self._row_names}
        self._row_shapes = {
            entry.name: tuple(entry.shape[1:])
            for entry in self._session.get_inputs()
            if entry.name in self._bank_names
        }
        self._bank: dict[str, ort.OrtValue] = {}
        self._memory: HostRows | DeviceRows | None = None
        self._rows = 0
        if bank is not None or not self._bank_names:
            self.replace_bank(bank or {})

    def end_profile(self) -> Path:
        """The file of kernel times, where a `profile` was asked for: JSON events of Chrome's tracing format."""
        return Path(self._session.end_profiling())

    @property
    def metadata(self) -> Mapping[str, str]:
        """See `Session.metadata`."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, inputs: Rows, task: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See `Session.run`."""
        feeds = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in self._feeds(inputs, task).items()
        }
        return self._session.run_with_ort_values([LOGITS], {**feeds, **self._bank})[0].numpy()

    def bind(self, inputs: Rows, task: NDArray[np.int64] | None = None) -> OnnxRuntimeBound:
        """See `Session.bind`."""
        feeds = self._feeds(inputs, task)
        rows = len(next(iter(feeds.values())))
        shape = [rows, *self._session.get_outputs()[0].shape[1:]]
        if not all(isinstance(size, int) for size in shape):
            raise UsageError(
                "the answer's shape is not known before it runs", where=LOGITS, found=shape
            )
        return OnnxRuntimeBound(self._session, feeds, self._bank, shape, self.device)

    def _feeds(self, inputs: Rows, task: NDArray[np.int64] | None) -> dict[str, NDArray[Any]]:
        feeds = by_name(inputs, self._row_names)
        if self.mixes_tasks:
            if task is None:
                raise UsageError("a multi-task engine needs a task row per image")
            feeds[TASK] = task
        return feeds

    def replace_bank(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """See `Session.replace_bank`."""
        if set(tensors) != self._bank_names:
            raise IncompatibleArtefact(
                "the bank does not hold the tensors that the engine reads",
                wanted=sorted(self._bank_names) or "no bank: the tensors are constants",
                found=sorted(tensors),
            )
        for name, value in tensors.items():
            if value.dtype != self._types[name]:
                raise IncompatibleArtefact(
                    "a tensor of the bank has another type than the engine reads",
                    where=name,
                    wanted=self._types[name],
                    found=value.dtype,
                )
        # on the CPU an OrtValue shares the array's memory
        laid_out = np.ascontiguousarray if self._in_place else _copied
        self._bank = {name: _on_device(laid_out(v), self.device) for name, v in tensors.items()}
        self._memory = None

    def reserve(self, rows: int) -> None:
        """See `Session.reserve`."""
        if not self._bank_names:
            raise UsageError(
                "the tasks are constants of this engine, so none can be written",
                wanted="an engine that was exported with --bank inputs",
            )
        shapes = {name: (rows, *self._row_shapes[name]) for name in self._bank_names}
        if self.device == "cpu":
            self._memory = HostRows({n: np.empty(s, self._types[n]) for n, s in shapes.items()})
        else:
            self._memory = DeviceRows(shapes, self._types, self.device)
        self._rows = rows
        self._bank = dict(self._memory.values)

    def write_row(self, row: int, tensors: Mapping[str, NDArray[Any]]) -> None:
        """See `Session.write_row`."""
        if self._memory is None:
            raise UsageError("the engine's bank has no rows of its own", do="call reserve first")
        if not 0 <= row < self._rows:
            raise UsageError("the bank has no such row", wanted=f"0 to {self._rows - 1}", found=row)
        if set(tensors) != self._bank_names:
            missing = sorted(self._bank_names ^ set(tensors))
            raise IncompatibleArtefact(
                "the row does not hold the tensors that the engine reads",
                wanted=f"{len(self._bank_names)} tensors",
                found=f"{len(tensors)}; not in both: {', '.join(missing[:4])}",
            )
        for name, value in tensors.items():
            if value.dtype != self._types[name] or value.shape != self._row_shapes[name]:
                raise IncompatibleArtefact(
                    "a tensor of the row is not as the engine reads it",
                    where=name,
                    wanted=f"{self._types[name]} {list(self._row_shapes[name])}",
                    found=f"{value.dtype} {list(value.shape)}",
                )
        self._memory.write(row, tensors)


class OnnxRuntimeBound:
    """See `engine.Bound`."""

    def __init__(
        self,
        session: ort.InferenceSession,
        feeds: Mapping[str, NDArray[Any]],
        bank: Mapping[str, ort.OrtValue],
        shape: Sequence[int],
        device: str,
    ) -> None:
        self._session = session
        self._inputs = {
            name: _on_device(np.array(array, order="C"), device) for name, array in feeds.items()
        }
        self._answer = _on_device(np.zeros(shape, np.float32), device)
        self._binding = session.io_binding()
        for name, value in {**self._inputs, **bank}.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(LOGITS, self._answer)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(next(GRAPHS)))

    def feed(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """See `engine.Bound`."""
        for name, array in inputs.items():
            self._inputs[name].update_inplace(np.ascontiguousarray(array))

    def run(self) -> None:
        """See `engine.Bound`."""
        self._session.run_with_iobinding(self._binding, self._options)

    def fetch(self) -> NDArray[np.float32]:
        """See `engine.Bound`."""
        return np.array(self._answer.numpy())  # a copy: on the CPU it is the memory itself


open_session = OnnxRuntimeSession


def _require_own_options(device: Device, *, tf32: bool, cuda_graph: bool) -> None:
    """Refuse what the provider does not have."""
    if device.provider not in PROVIDERS:
        raise UsageError("unknown provider", wanted=sorted(PROVIDERS), found=device.provider)
    if device.provider != "cuda" and (tf32 or cuda_graph or device.kernels or device.memory_mb):
        raise UsageError(
            "TF32, CUDA graphs, fused kernels and a limit of device memory are the CUDA provider's",
            found=f"provider {device.provider}",
            do="use --provider cuda, or leave them out",
        )
    if device.provider != "cpu" and (device.prepared is not None or not device.arena):
        raise UsageError(
            "prepared engines and memory without an arena are the CPU provider's",
            found=f"provider {device.provider}",
            do="use --provider cpu, or leave --prepared and --no-arena out",
        )


def _options(device: Device, *, as_written: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle means idle
    if as_written:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if device.threads:
        options.intra_op_num_threads = device.threads
    if not device.arena:
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False  # a pattern is one allocation for all that a call needs
    return options


def _cuda(device: Device, *, tf32: bool, cuda_graph: bool) -> dict[str, str]:
    """Options of the CUDA provider, in its own names."""
    options = {"use_tf32": str(int(tf32)), "enable_cuda_graph": str(int(cuda_graph))}
    if device.memory_mb:
        options["gpu_mem_limit"] = str(device.memory_mb << 20)
        options["arena_extend_strategy"] = "kSameAsRequested"  # its own doubles what it has
    return options


def _register(options: ort.SessionOptions, kernels: Path) -> None:
    try:
        options.register_custom_ops_library(str(kernels))
    except Exception as cause:
        raise MissingDependency(
            "the library of fused kernels cannot be loaded",
            where=kernels,
            found=str(cause).splitlines()[0],
            do="build it for this machine: python -m utune_deploy.export.kernels",
        ) from cause


def _copied(array: NDArray[Any]) -> NDArray[Any]:
    return np.array(array, order="C")


def _on_device(array: NDArray[Any], device: str) -> ort.OrtValue:
    """An array where the provider computes."""
    if device == "cpu":
        return host_value(array)
    if array.dtype == ml_dtypes.bfloat16:
        there = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), BFLOAT16, device, 0)  # type: ignore[arg-type]
        there.update_inplace(host_value(array))
        return there
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def _numpy_type(name: str) -> np.dtype[Any]:
    """Of ONNX Runtime's `tensor(float16)`."""
    inner = name.removeprefix("tensor(").removesuffix(")")
    if inner == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"float": "float32", "double": "float64"}.get(inner, inner))


def _preload_cuda() -> None:
    """Load CUDA and cuDNN from the Python packages that torch brings, where the system has none."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()
