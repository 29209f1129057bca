"""An open TensorRT engine. It refuses what was not built for this machine before TensorRT sees it.

Each optimization profile has an execution context of its own, which one caller uses at a time; a batch
goes to the smallest profile that holds it. Work runs on streams of its own, never on the default one.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from ....merge.errors import IncompatibleArtefact, MissingDependency, UsageError
from ...bundle import IDENTITY
from ...engine import LOGITS, TASK, Device, by_name, is_row_input
from . import builder, library
from .bound import TensorRTBound
from .cuda import Array, Cuda, Stream
from .lane import DTYPES, Lane, Opened
from .plan import AGAIN, read_plan
from .refit import refit, restore_weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ...engine import Rows

CUDA = Device("cuda")


class TensorRTSession:
    """A plan, open on the CUDA device."""

    provider = "TensorRT"

    def __init__(
        self,
        plan: Path,
        device: Device = CUDA,
        *,
        bank: Mapping[str, NDArray[Any]] | None = None,
        tf32: bool = False,
        cuda_graph: bool = False,
        identity: str | None = None,
        digest: str | None = None,
    ) -> None:
        """Open a plan.

        Args:
            plan: The file; `plan.json` stands beside it.
            device: Its provider is `cuda`.
            bank: Task tensors by input name, for an engine whose bank is an input.
            tf32: Whether the engine may round float32 products to TF32. It was decided when it was built.
            cuda_graph: Record the kernels of each batch size that is bound and replay them.
            identity: That of the tasks and the backbone that the plan must be of; None: any.
            digest: SHA-256 of the file, which no plan needs.

        Raises:
            UsageError: There is no such plan, or something is asked of it that it was not built for.
            MissingDependency: TensorRT, CUDA's runtime or a device is missing.
            IncompatibleArtefact: The plan is damaged, or not of this version, device or identity; or the
                bank is not the engine's.
            UtuneError: TensorRT refuses.
        """
        del digest
        if device != CUDA:
            raise UsageError(
                "a TensorRT engine runs on a CUDA device, with its own kernels, threads and memory",
                found=device,
                do="use --provider cuda, without options of ONNX Runtime",
            )
        trt = library.tensorrt()
        self.plan = read_plan(plan)
        self.plan.require_tensorrt(trt.__version__)
        if identity is not None and identity != self.plan.identity:
            raise IncompatibleArtefact(
                "the plan was built for other tasks or another backbone",
                where=plan,
                wanted=f"identity {identity}",
                found=f"identity {self.plan.identity}",
            )
        if tf32 != (self.plan.precision == "tf32"):
            raise UsageError(
                "whether float32 products are rounded to TF32 is decided when a plan is built",
                where=plan,
                wanted="TF32" if tf32 else "float32 products",
                found=f"precision {self.plan.precision}",
            )
        cuda = Cuda()
        self.plan.require_device(cuda.capability())
        self._logger = builder.recorder(trt)
        try:
            self._runtime = trt.Runtime(self._logger)
        except TypeError as cause:  # how the bindings say that none could be made
            raise MissingDependency(
                "TensorRT cannot start", found=self._logger.last(), do="run `nvidia-smi`"
            ) from cause
        if self.plan.version_compatible:
            self._runtime.engine_host_code_allowed = True  # the plan brings a runtime of its own
        engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise IncompatibleArtefact(
                "TensorRT cannot open the plan", where=plan, found=self._logger.last(), do=AGAIN
            )
        self._opened = Opened(plan, trt, cuda, engine, self._logger)
        self.cuda_graph = cuda_graph
        self._describe()
        if self.plan.weights == "stripped":
            restore_weights(self._opened, self.plan.require_onnx())
        self._stream = Stream(cuda)
        self._lanes = [Lane(self._opened, number) for number in range(len(self.plan.profiles))]
        self._bound: weakref.WeakSet[Lane] = weakref.WeakSet()
        self._lock = threading.Lock()  # over the bank, and over the list of lanes
        self._bank: dict[str, Array] = {}
        self.replace_bank(bank or {})

    @property
    def metadata(self) -> Mapping[str, str]:
        """See `Session.metadata`."""
        return {IDENTITY: self.plan.identity}

    def run(self, inputs: Rows, task: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """See `Session.run`."""
        feeds = self._feeds(inputs, task)
        lane, bank = self._lanes[self._profile(feeds)], self._bank
        with lane.lock:
            lane.require_sound()
            lane.take(feeds, bank)
            lane.enqueue()
            return lane.fetch()

    def bind(self, inputs: Rows, task: NDArray[np.int64] | None = None) -> TensorRTBound:
        """See `Session.bind`."""
        feeds = self._feeds(inputs, task)
        with self._lock:
            lane = Lane(self._opened, self._profile(feeds))
            self._bound.add(lane)
        return TensorRTBound(lane, feeds, self._bank, cuda_graph=self.cuda_graph)

    def replace_bank(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """See `Session.replace_bank`."""
        wanted = set(self._types) - {TASK, *self._row_names}
        if set(tensors) != wanted:
            raise IncompatibleArtefact(
                "the bank does not hold the tensors that the engine reads",
                wanted=sorted(wanted) or "no bank: the tensors are constants",
                found=sorted(tensors),
            )
        for name, array in tensors.items():
            self._require(name, array, IncompatibleArtefact)
        with self._lock:
            self._bank = {name: Array(self._stream, array) for name, array in tensors.items()}

    def reserve(self, rows: int) -> None:
        """See `Session.reserve`: single rows cannot be written, so this target's tasks are its bank's.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "the TensorRT target cannot write single rows of a bank",
            found=f"{rows} rows asked for",
            do="replace the whole bank, or serve the bundle with its ONNX Runtime engine",
        )

    def write_row(self, row: int, tensors: Mapping[str, NDArray[Any]]) -> None:
        """See `reserve`.

        Raises:
            UsageError: Always.
        """
        self.reserve(1)

    def refit(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Serve from other task tensors from the next call on; waits for what is running.

        Args:
            tensors: By their names in the graph, `plan.refit`; those that are left out stay.

        Raises:
            UsageError: The engine was not built for it, or not for these tensors.
            IncompatibleArtefact: A tensor has another type or size than the engine's.
            UtuneError: TensorRT refuses.
        """
        if unknown := sorted(set(tensors) - set(self.plan.refit)):
            raise UsageError(
                "the engine was not built to have these weights replaced",
                where=self.plan.path,
                wanted=", ".join(self.plan.refit) or "none: export it with --weights-form refit",
                found=", ".join(unknown),
            )
        with ExitStack() as held:
            held.enter_context(self._lock)
            for lane in (*self._lanes, *self._bound):
                held.enter_context(lane.lock)
                lane.stream.wait()
            self._lanes[0].require_sound()
            refit(self._opened, tensors)

    def _describe(self) -> None:
        """Read the engine's inputs, and hold it to what its description says.

        Raises:
            IncompatibleArtefact: It is another engine than described.
        """
        engine, trt = self._opened.engine, self._opened.trt
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        types = {name: DTYPES.get(engine.get_tensor_dtype(name).name) for name in names}
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        on_host = [n for n in names if engine.get_tensor_location(n) != trt.TensorLocation.DEVICE]
        outputs = [name for name in names if name not in inputs]
        described = [tensor.name for tensor in self.plan.inputs]
        if (
            set(inputs) != set(described)
            or outputs != [LOGITS]
            or types[LOGITS] != np.float32
            or None in types.values()
            or on_host
            or engine.num_optimization_profiles != len(self.plan.profiles)
        ):
            raise IncompatibleArtefact(
                "the plan is not the engine that its description says",
                where=self.plan.path,
                wanted=f"{', '.join(described)} to {LOGITS} float32 on the device, "
                f"{len(self.plan.profiles)} profiles",
                found=f"{', '.join(inputs)} to {', '.join(outputs)}, types {types}, on the host "
                f"{on_host}, {engine.num_optimization_profiles} profiles",
                do=AGAIN,
            )
        self._types = {name: types[name] for name in described}
        self._shapes = {name: tuple(engine.get_tensor_shape(name)) for name in described}
        self._row_names = [name for name in described if is_row_input(name)]
        self.mixes_tasks = TASK in described

    def _feeds(self, inputs: Rows, task: NDArray[np.int64] | None) -> dict[str, NDArray[Any]]:
        feeds = by_name(inputs, self._row_names)
        if self.mixes_tasks:
            if task is None:
                raise UsageError("a multi-task engine needs a task row per image")
            feeds[TASK] = task
        for name, array in feeds.items():
            self._require(name, array, UsageError)
        sizes = {name: len(array) for name, array in feeds.items()}
        if len(set(sizes.values())) != 1:
            raise UsageError("the inputs do not have one number of rows", found=sizes)
        return feeds

    def _require(
        self,
        name: str,
        array: NDArray[Any],
        refusal: type[UsageError] | type[IncompatibleArtefact],
    ) -> None:
        """Hold an array to an input's type and shape."""
        shape = self._shapes[name]
        fits = len(array.shape) == len(shape) and all(
            wanted in (-1, size) for wanted, size in zip(shape, array.shape, strict=True)
        )
        if array.dtype != self._types[name] or not fits:
            raise refusal(
                "an array has another type or shape than the engine reads",
                where=name,
                wanted=f"{self._types[name]} {list(shape)}, -1 any",
                found=f"{array.dtype} {list(array.shape)}",
            )

    def _profile(self, feeds: Mapping[str, NDArray[Any]]) -> int:
        """Number of the smallest profile that holds a batch.

        Raises:
            UsageError: None does.
        """
        rows = len(next(iter(feeds.values())))
        profiles = self.plan.profiles
        holding = [n for n, profile in enumerate(profiles) if profile.min <= rows <= profile.max]
        if not holding:
            raise UsageError(
                "the engine was not built for a batch of this size",
                where=self.plan.path,
                wanted=", ".join(f"{p.min} to {p.max}" for p in profiles),
                found=rows,
            )
        return min(holding, key=lambda number: profiles[number].max)
