"""The `config.pbtxt` of a model, written and read through Triton's own protobuf."""
# Generated protobuf modules build their classes at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from ...export.engine import LOGITS, TASK
from ...merge.errors import IncompatibleArtefact
from .. import protocol
from ..triton.alias_folder import CONFIG, LABELS, labels_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ...export.engine import Device
    from ..registry import Registry
    from .options import ModelOptions

WARMUP = "warmup"  # the folder in which Triton looks for the content of warm-up inputs
COMPANION = "companion_of"  # the parameter of a model that stands beside a bundle's model: its name


def model_fields(
    registry: Registry, options: ModelOptions, device: Device
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What every layout says of a bundle's model, and the files that this needs beside the configuration.

    Returns:
        Fields of `ModelConfig`, without the backend; file contents by path in the model's folder.

    Raises:
        UsageError: An option is out of range.
    """
    options.check(registry.max_batch)
    fields = protocol.model_config(registry, max_delay_ms=options.max_delay_ms)
    del fields["platform"]
    files: dict[str, bytes] = {}
    if len(registry.names) == 1 and registry.labelled and not registry.all_tasks:
        files |= label_file(fields, registry.versions[registry.names[0]].labels)
    fields["version_policy"] = {"latest": {"num_versions": options.keep_versions}}
    fields["dynamic_batching"] = options.batching()
    fields["instance_group"] = options.instance_group(on_gpu=device.provider != "cpu")
    parameters = {"identity": registry.bundle.identity}
    if registry.all_tasks:
        parameters |= {protocol.ALL_TASKS: "true", COMPANION: registry.bundle.name}
    fields["parameters"] = as_parameters(parameters)
    if options.cache:
        fields["response_cache"] = {"enable": True}
    if options.warmup:
        fields["model_warmup"] = [_zeros(fields["input"])]
        if not registry.all_tasks:
            name = registry.names[0].encode()
            files[f"{WARMUP}/{TASK}"] = struct.pack("<I", len(name)) + name
    return fields, files


def as_parameters(values: Mapping[str, str]) -> dict[str, Any]:
    """Triton's `parameters`."""
    return {key: {"string_value": value} for key, value in values.items()}


def label_file(fields: dict[str, Any], labels: tuple[str, ...]) -> dict[str, bytes]:
    """Name the logits' classes in the configuration; Triton knows one row of names for an output."""
    for output in fields["output"]:
        if output["name"] == LOGITS:
            output["label_filename"] = LABELS
    return {LABELS: labels_text(labels).encode()}


def write(fields: Mapping[str, Any]) -> str:
    """The text of a configuration."""
    from google.protobuf import text_format
    from google.protobuf.json_format import ParseDict
    from tritonclient.grpc import model_config_pb2

    return text_format.MessageToString(ParseDict(dict(fields), model_config_pb2.ModelConfig()))


def parse(text: str) -> Any:
    """The `ModelConfig` of a text.

    Raises:
        ParseError: Of protobuf's text format: it is none.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def read(model: Path) -> Any:
    """The `ModelConfig` in a model's folder; None where there is no configuration.

    Raises:
        IncompatibleArtefact: It cannot be read.
    """
    from google.protobuf.text_format import ParseError

    path = model / CONFIG
    if not path.is_file():
        return None
    try:
        return parse(path.read_text())
    except (ParseError, UnicodeDecodeError) as cause:
        raise IncompatibleArtefact(
            "the configuration of a model cannot be read",
            where=path,
            found=str(cause).splitlines()[0],
        ) from cause


def _zeros(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """A warm-up batch of one row: zeros, and the name of a task from a file."""
    return {
        "name": "zeros",
        "batch_size": 1,
        "inputs": {
            tensor["name"]: {
                "data_type": tensor["data_type"],
                "dims": tensor["dims"],
                **({"input_data_file": TASK} if tensor["name"] == TASK else {"zero_data": True}),
            }
            for tensor in inputs
        },
    }
