"""PEFT's own mixed batch: `adapter_names` names an adapter for each row (LoRA; huggingface/peft)."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ....merge.backbone import create
from ....merge.errors import MissingDependency, UsageError
from ....merge.to_peft import to_peft, write_peft
from .opened import Opened
from .torch_mixed import compiled, dtype_of, prepared, runner, torch_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from ....export.engine import Device
    from .originals import Originals


def peft_mixed(originals: Originals, precision: str, device: Device) -> Opened:
    """See `Alternative.opens`."""
    return _open(originals, precision, device, lambda model: model)


def peft_mixed_compiled(originals: Originals, precision: str, device: Device) -> Opened:
    """See `Alternative.opens`."""
    return _open(originals, precision, device, compiled)


def _open(
    originals: Originals,
    precision: str,
    device: Device,
    through: Callable[[nn.Module], Callable[..., Tensor]],
) -> Opened:
    dtype = dtype_of(precision)
    names = [f"task{number}" for number in range(len(originals.deltas))]
    model = through(prepared(_tuned(originals, names), dtype, device))

    def mixed(*given: Tensor) -> Tensor:
        *inputs, task = given
        return model(*inputs, adapter_names=[names[row] for row in task.tolist()])

    run = runner(mixed, originals, dtype, device, takes_task=True)
    return Opened(run, torch_on(device))


def _tuned(originals: Originals, names: list[str]) -> nn.Module:
    """PEFT's model with every task as an adapter.

    Raises:
        MissingDependency: PEFT is not installed.
        UsageError: The tasks do not have as many classes each, which PEFT's saved head needs, or a branch
            has no form in PEFT.
    """
    try:
        from peft import PeftModel
    except ImportError as cause:
        raise MissingDependency("PEFT is not installed", do="pip install peft") from cause
    backbone = originals.backbone
    classes = sorted({len(delta.labels) for delta in originals.deltas})
    if len(classes) > 1:
        raise UsageError(
            "PEFT's mixed batch needs tasks of as many classes each", found=f"{classes} classes"
        )
    identity = backbone.identity
    plain = create(identity.architecture, {**identity.arguments, "num_classes": classes[0]}).model
    frozen = {
        name: tensor
        for name, tensor in backbone.model.state_dict().items()
        if not any(name.startswith(f"{head}.") for head in backbone.classifiers)
    }
    plain.load_state_dict(frozen, strict=False)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the base model on a hub
        model: PeftModel | None = None
        for name, delta in zip(names, originals.deltas, strict=True):
            folder = Path(scratch) / name
            write_peft(folder, to_peft(delta, backbone, originals.sites))
            if model is None:
                model = PeftModel.from_pretrained(plain, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), adapter_name=name)
    assert model is not None  # a bundle has a task
    return model
