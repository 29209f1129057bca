"""Compile the fused kernels into a library for ONNX Runtime's CUDA provider.

    python -m utune_deploy.export.kernels -o libutune.so --headers include --arch 90

The Python wheel of ONNX Runtime brings no headers: `--headers` is a folder with `onnxruntime_c_api.h`, out
of its release archive. The library asks for C API 18, so headers and runtime need not be of one version.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import click

from ...merge.errors import BuildFailed, MissingDependency, UsageError, UtuneError
from ...merge.files import atomic_file, refuse_existing

SOURCES = Path(__file__).parent
HEADER = "onnxruntime_c_api.h"
PATH = click.Path(path_type=Path)


def command(nvcc: str, headers: Path, architectures: tuple[str, ...], output: Path) -> list[str]:
    """The compiler's command line; code for each architecture, and for later ones by way of PTX."""
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    newest = max(architectures, key=int)
    code.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    flags = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
    sources = ["-I", str(headers), str(SOURCES / "operators.cu")]
    return [nvcc, *flags, *code, *sources, "-o", str(output)]


def build(output: Path, headers: Path, architectures: tuple[str, ...], *, force: bool) -> None:
    """Compile the library.

    Args:
        output: Where it is written, once it is whole.
        headers: Folder with ONNX Runtime's C header.
        architectures: Compute capabilities without their dot, `90` for 9.0; at least 80.
        force: Replace what stands at `output`.

    Raises:
        UsageError: The output exists, the header is not there, or an architecture is none.
        MissingDependency: There is no nvcc.
        BuildFailed: It does not compile.
    """
    refuse_existing(output, force=force)
    if not (headers / HEADER).is_file():
        raise UsageError(
            "ONNX Runtime's C header is not there",
            where=headers,
            wanted=HEADER,
            do="unpack the include folder of an ONNX Runtime release and name it with --headers",
        )
    for name in architectures:
        if not name.isdecimal() or int(name) < 80:
            raise UsageError(
                "the kernels need compute capability 8.0 or above",
                wanted="digits without the dot, such as 80, 86, 89 or 90",
                found=name,
            )
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise MissingDependency(
            "there is no nvcc", do="install the CUDA toolkit, or put its bin folder on PATH"
        )
    with atomic_file(output) as partial:
        run = subprocess.run(
            command(nvcc, headers, architectures, partial), capture_output=True, text=True
        )
        if run.returncode:
            raise BuildFailed("the kernels do not compile", where=SOURCES, found=run.stderr.strip())


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("-o", "--output", type=PATH, required=True, help="The library, libutune.so.")
@click.option("--headers", type=PATH, required=True, help=f"Folder with {HEADER}.")
@click.option(
    "--arch",
    multiple=True,
    default=("90",),
    show_default=True,
    help="Compute capability of the device without its dot; may be given several times.",
)
@click.option("--force", is_flag=True, help="Replace what stands at the output.")
def main(output: Path, headers: Path, arch: tuple[str, ...], force: bool) -> None:
    """Compile, or say in one line why not."""
    try:
        build(output, headers, arch, force=force)
    except UtuneError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from error
    click.echo(f"wrote {output}: name it with --kernels, or in UTUNE_KERNELS")


if __name__ == "__main__":
    main()
