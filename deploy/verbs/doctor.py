"""`utune-deploy doctor`: what is installed, which providers really load, what is missing."""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import click

from ..options import json_option, triton_env_option
from ..versions import versions

if TYPE_CHECKING:
    from pathlib import Path

    from ..console import Console

Row = tuple[str, str, str]  # what, state, what to do


@click.command("doctor")
@triton_env_option
@json_option
@click.pass_obj
def command(console: Console, triton_env: Path, as_json: bool) -> None:
    """Try everything that utune-deploy can use on this machine, and say how to get what is missing."""
    rows: list[Row] = [("platform", f"{platform.platform()}, {platform.machine()}", "")]
    installed = {k: v for k, v in versions().items() if k != "tensorrt"}
    rows += [(name, found, _remedy(name, found)) for name, found in installed.items()]
    rows += [_provider(name) for name in ("cpu", "cuda")]
    rows += [_torch_cuda(), _tensorrt(), _triton(triton_env)]
    if as_json:
        console.json([dict(zip(("what", "state", "do"), row, strict=True)) for row in rows])
    else:
        console.table(("what", "state", "to do"), rows)


def _remedy(name: str, found: str) -> str:
    return f"pip install {name}" if found == "absent" else ""


def _provider(name: str) -> Row:
    """Open a one-node engine on an ONNX Runtime provider and run it."""
    from ...merge.errors import UtuneError

    try:
        import numpy as np
        import onnx
        from onnx import TensorProto, helper

        from ...export.engine import IMAGES, LOGITS, Device
        from ...export.targets.onnxruntime import OnnxRuntimeSession

        value = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch"]) for n in (IMAGES, LOGITS)
        ]
        graph = helper.make_graph(
            [helper.make_node("Neg", [IMAGES], [LOGITS])], "probe", value[:1], value[1:]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
        session = OnnxRuntimeSession(model.SerializeToString(), Device(name))
        session.run(np.ones(1, dtype=np.float32))
    except UtuneError as error:
        need = "a CUDA device, its driver, CUDA 13 and cuDNN 9" if name == "cuda" else ""
        return (f"onnxruntime {name}", f"does not load: {error.what}", need)
    except ImportError as error:
        return (
            f"onnxruntime {name}",
            f"does not load: {error}",
            "pip install onnxruntime-gpu onnx",
        )
    return (f"onnxruntime {name}", f"runs on {session.provider} (onnx {onnx.__version__})", "")


def _torch_cuda() -> Row:
    try:
        torch = import_module("torch")
    except ImportError as error:
        return ("torch cuda", f"torch does not load: {error}", "pip install torch")
    if not torch.cuda.is_available():
        return ("torch cuda", "no CUDA device", "not needed: engines also run on the CPU")
    return ("torch cuda", torch.cuda.get_device_name(), "")


def _tensorrt() -> Row:
    """Load TensorRT and CUDA's runtime, and ask for the device."""
    from ...export.targets.tensorrt import library
    from ...merge.errors import UtuneError

    try:
        version = library.tensorrt().__version__
    except UtuneError as error:
        absent = isinstance(getattr(error.__cause__, "__cause__", None), ModuleNotFoundError)
        state = "absent" if absent else error.details["found"]
        return ("tensorrt", state, f"{library.INSTALL}; or export --target tensorrt --prepare")
    try:
        from ...export.targets.tensorrt.cuda import Cuda

        capability = ".".join(map(str, Cuda().capability()))
    except UtuneError as error:
        return ("tensorrt", f"{version} loads; {error.what}", error.details.get("do", ""))
    return ("tensorrt", f"{version} loads, compute capability {capability}", "")


def _triton(environment: Path) -> Row:
    from ...merge.errors import UtuneError
    from ...serving.servers.triton import inspect_environment

    if sys.platform != "linux":
        return ("tritonserver", "Linux only", "serve --engine embedded runs everywhere")
    try:
        inspect_environment(environment)
    except UtuneError as error:
        return ("tritonserver", error.what, error.details.get("do", ""))
    return ("tritonserver", f"ready in {environment}", "")
