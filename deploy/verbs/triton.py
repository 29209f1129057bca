"""`utune-deploy triton`: a bundle as a Triton model repository."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..options import PATH, device_options, force_option

if TYPE_CHECKING:
    from pathlib import Path

    from ...export.engine import Device
    from ..console import Console


@click.command("triton")
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="The repository's folder.")
@device_options
@force_option
@click.pass_obj
def command(console: Console, bundle: Path, output: Path, device: Device, force: bool) -> None:
    """Write BUNDLE as a self-contained model repository for tritonserver's Python backend."""
    from ...export.bundle import open_bundle
    from ...serving.repository import write_repository

    folder = write_repository(open_bundle(bundle), output, device=device, force=force)
    console.result(f"wrote {folder}")
    console.say(f"serve it with: tritonserver --model-repository={output}")
