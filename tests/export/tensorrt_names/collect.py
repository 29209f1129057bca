"""Write `10.json` and `11.json`: what TensorRT's published Python bindings offer, by class.

    python tests/export/tensorrt_names/collect.py

Downloads the two bindings wheels (1.3 MB each; Linux, x86-64, a C compiler) and imports them beside
libraries of the right names that hold nothing: declaring classes needs none of TensorRT's code, so the
members are those that a user meets. Nothing of it can be run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = {"10": "tensorrt_cu12_bindings==10.16.1.11", "11": "tensorrt_cu13_bindings==11.4.0.106"}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
CLASSES = (
    "Builder",
    "BuilderFlag",
    "DataType",
    "EngineInspector",
    "HardwareCompatibilityLevel",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "Logger",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "OnnxParserRefitter",
    "ParserError",
    "ProfilingVerbosity",
    "Refitter",
    "Runtime",
    "TensorIOMode",
    "TensorLocation",
    "Weights",
)
DUMP = f"""
import json, tensorrt_bindings as trt
members = {{c: [m for m in dir(getattr(trt, c)) if not m.startswith("_")] for c in {CLASSES!r}}}
print(json.dumps({{"version": trt.__version__, "classes": members}}))
"""


def names(requirement: str) -> dict:
    """Version and members by class of one bindings wheel."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        download = ["-m", "pip", "download", "-q", "--no-deps", "-d", folder, requirement]
        subprocess.run([sys.executable, *download], check=True)
        (wheel,) = root.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(root)
        (root / "stub.c").write_text("".join(f"void *{s}() {{ return 0; }}\n" for s in SYMBOLS))
        major = requirement.split("==")[1].split(".")[0]
        for library in LIBRARIES:
            file = f"lib{library}.so.{major}"
            build = ["cc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", root / file]
            subprocess.run([*build, root / "stub.c"], check=True)
        where = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": folder}
        said = subprocess.run(
            [sys.executable, "-c", DUMP], env=where, capture_output=True, text=True, check=True
        )
        return json.loads(said.stdout)


if __name__ == "__main__":
    for major, requirement in WHEELS.items():
        file = Path(__file__).with_name(f"{major}.json")
        file.write_text(json.dumps(names(requirement), indent=1, sort_keys=True) + "\n")
        print(f"wrote {file}")  # noqa: T201
