"""Options that several verbs share, spelled the same everywhere."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..export.engine import Device
from ..merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..merge.backbone import Backbone

PATH = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
force_option = click.option("--force", is_flag=True, help="Replace what is there already.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
triton_env_option = click.option(
    "--triton-env",
    type=PATH,
    envvar="UTUNE_TRITON_ENV",
    show_envvar=True,
    default=Path(".venv-triton"),
    show_default=True,
    help="Environment with nvidia-pytriton, onnxruntime and numpy below 2.",
)


def device_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """`--provider`, `--threads` and `--kernels`, handed on as `device`."""

    @click.option(
        "--provider",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="Where the engine runs; never another place silently.",
    )
    @click.option("--threads", type=click.IntRange(1), help="Threads of the engine.")
    @click.option(
        "--kernels",
        type=PATH,
        envvar="UTUNE_KERNELS",
        show_envvar=True,
        help="Library of fused operators for the CUDA provider; see docs/kernels.md.",
    )
    @functools.wraps(verb)
    def with_device(
        *args: Any, provider: str, threads: int | None, kernels: Path | None, **kwargs: Any
    ) -> Any:
        return verb(*args, device=Device(provider, threads, kernels), **kwargs)

    return with_device


def memory_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """`--prepared`, `--arena` and `--device-memory-mb`, added to `device`; stands below `device_options`."""

    @click.option(
        "--prepared",
        type=PATH,
        metavar="FOLDER",
        envvar="UTUNE_PREPARED",
        show_envvar=True,
        help="Keep engines here as ONNX Runtime prepares them for this processor: the next one that opens the engine "
        "maps the file, and processes share it.",
    )
    @click.option(
        "--arena/--no-arena",
        default=True,
        show_default=True,
        help="Whether an engine on the CPU keeps the memory of a call for the next one.",
    )
    @click.option(
        "--device-memory-mb",
        type=click.IntRange(1),
        help="The most that ONNX Runtime takes of a CUDA device, in MiB.",
    )
    @functools.wraps(verb)
    def with_memory(
        *args: Any,
        device: Device,
        prepared: Path | None,
        arena: bool,
        device_memory_mb: int | None,
        **kwargs: Any,
    ) -> Any:
        device = replace(device, prepared=prepared, arena=arena, memory_mb=device_memory_mb)
        return verb(*args, device=device, **kwargs)

    return with_memory


@dataclass(frozen=True)
class BackboneChoice:
    """The backbone that a person named.

    Attributes:
        architecture: timm's name, or None when `weights` is a folder.
        arguments: For `timm.create_model`.
        weights: A safetensors file with the architecture's keys, a folder that `save` wrote, or one of
            Hugging Face; None for an architecture without weights.
    """

    architecture: str | None
    arguments: dict[str, Any]
    weights: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        """What is read."""
        return () if self.weights is None else (self.weights,)

    def load(self) -> Backbone:
        """The backbone itself."""
        from ..merge.backbone import load

        return load(self.architecture, self.arguments, self.weights)


def backbone_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """`--backbone`, `--backbone-arg` and `--weights`, handed on as `choice`."""

    @click.option(
        "--backbone",
        metavar="TIMM_NAME",
        help="timm's name of the architecture, or one of ours: video_swin_base, bert, clip_image, clip_text, "
        "t5, clip_vil, mdetr, caffe_resnet, states.",
    )
    @click.option(
        "--backbone-arg",
        "arguments",
        metavar="KEY=VALUE",
        multiple=True,
        help="An argument of the architecture, such as img_size=32; repeatable.",
    )
    @click.option(
        "--weights",
        type=PATH,
        help="Frozen weights: safetensors with the architecture's keys, a folder that `save` wrote, or a Hugging "
        "Face folder (bert, clip_image, clip_text, t5; ViT, DeiT, DINOv2, BEiT, Swin, CLIP and SigLIP for timm's models).",
    )
    @functools.wraps(verb)
    def with_choice(
        *args: Any,
        backbone: str | None,
        arguments: tuple[str, ...],
        weights: Path | None,
        **kwargs: Any,
    ) -> Any:
        choice = BackboneChoice(backbone, dict(map(_argument, arguments)), weights)
        return verb(*args, choice=choice, **kwargs)

    return with_choice


def setting(text: str) -> tuple[str, str]:
    """Name and value of `KEY=VALUE`.

    Raises:
        UsageError: It is not of that form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError("a setting cannot be read", wanted="KEY=VALUE", found=text)
    return key, value


def weight(text: str, called: str = "weight") -> tuple[str, float]:
    """Task and number of `TASK=NUMBER`.

    Raises:
        UsageError: It is not of that form, or the number is not positive.
    """
    name, value = setting(text)
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UsageError(f"a {called} is no positive number", where=name, found=value)
    return name, number


def rates(texts: Iterable[str]) -> dict[str, Any]:
    """Settings `rate` and `rates` of a batcher, from `NUMBER` and `TASK=NUMBER`.

    Raises:
        UsageError: One is not of that form, or no positive number, or there are two for the same.
    """
    every = [text for text in texts if "=" not in text]
    named = [weight(text, "rate") for text in texts if "=" in text]
    if len(every) > 1 or len(dict(named)) < len(named):
        raise UsageError("a rate is given twice", wanted="one of each task", found=" ".join(texts))
    rate = weight(f"every task={every[0]}", "rate")[1] if every else None
    return {"rate": rate, "rates": dict(named)}


def _argument(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError(
            "an argument of the backbone cannot be read", wanted="KEY=VALUE", found=text
        )
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
