"""ms-swift's LoRA: plain, and in groups as in MergedLinear (arXiv 2106.09685, eq. 3)."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops import reads_patches
from ..tuner import Branch, Point
from ..tuners.bottleneck import Bottleneck
from .foreign import refuse
from .swift_files import Adapter, Reading, require, require_whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

STARTS = (True, False, None, "gaussian")  # of LoRA, that leave the frozen weights alone
IN_LORA = (
    r"(?P<module>.+?)(?:\.loramodule_(?P<old>[^.]+))?\.lora_(?P<part>[AB])"
    r"(?:\.(?P<name>[^.]+)\.weight)?"
)


def read_lora(reading: Reading, adapter: Adapter) -> None:
    """`scale B A` beside linear layers, plain or grouped as in MergedLinear.

    Raises:
        IncompatibleArtefact: A variant or a layer that cannot be carried.
    """
    off = (False, None)
    config = adapter.config
    require(
        reading,
        adapter,
        use_dora=off,
        use_qa_lora=off,
        fan_in_fan_out=off,
        layer_replication=(None,),
        loftq_config=({}, None),
        init_lora_weights=STARTS,
    )
    merged = bool(config.get("use_merged_linear"))
    enabled = config.get("enable_lora")
    for module, parts in reading.take(adapter, IN_LORA).items():
        require_whole(reading, f"{module}.lora", parts, ("A", "B"))
        require_matrices(reading.path, module, parts)
        down, up = parts["A"], parts["B"]
        if merged:
            if not isinstance(enabled, list):
                raise refuse(
                    reading.path, "the configuration of MergedLinear is malformed",
                    found=f"enable_lora={enabled!r}",
                )  # fmt: skip
            down, up = ungrouped(reading.path, module, down, up, enabled)
        rank = parts["B"].shape[1]
        alpha = _alpha(reading, adapter, module, rank)
        root = bool(config.get("use_rslora")) and not merged  # MergedLinear does not read it
        plant_lora(reading, adapter, module, down, up, alpha / (math.sqrt(rank) if root else rank))


def require_matrices(path: Path, module: str, parts: Mapping[str, Tensor]) -> None:
    """Raise where A or B is neither a matrix nor a convolution's kernel."""
    if wrong := [name for name, tensor in parts.items() if tensor.dim() not in (2, 4)]:
        raise refuse(
            path, "LoRA's tensors are no matrices",
            found=", ".join(f"{module}.lora_{n} {list(parts[n].shape)}" for n in wrong),
        )  # fmt: skip


def plant_lora(
    reading: Reading, adapter: Adapter, module: str, down: Tensor, up: Tensor, scale: float
) -> None:
    """A linear bottleneck beside a layer."""
    op = reading.module(module)
    if isinstance(op, nn.Linear):
        tap = Point(module, "input")
    elif reads_patches(op) and set(op.dilation) == {1}:  # type: ignore[arg-type]
        tap = Point(module, "patches")
    else:
        raise refuse(
            reading.path,
            "LoRA at this layer cannot be carried",
            found=f"{module}, a {type(op).__name__}",
            do="wanted: a linear layer, or a plain convolution of one group",
        )
    branch = Branch(Bottleneck("identity", bias=False), tap, Point(module, "output"))
    weights = {"down": down.flatten(1), "up": up.flatten(1)}
    scales = {"scale": torch.tensor(scale, dtype=torch.float64)}
    reading.plant(adapter, "lora", branch, weights | scales)


def _alpha(reading: Reading, adapter: Adapter, module: str, rank: int) -> float:
    """The numerator of one layer's scale, from patterns of names as ms-swift reads them.

    Of both tables together it takes the first pattern that the end of the name matches, and then each
    table's own value. The order of a table is lost when it is saved.

    Raises:
        IncompatibleArtefact: It is no number, the rank is not the layer's, or patterns disagree or cannot be
            read.
    """
    config = adapter.config
    ranks, alphas = (config.get(f"{name}_pattern") or {} for name in ("rank", "alpha"))
    names = [f"{wrapper}{module}" for wrapper in (".", "model.backbone.")]
    try:
        keys = [
            key
            for key in dict.fromkeys((*ranks, *alphas))
            if any(re.match(rf".*\.{key}$", name) for name in names) or key in (module, *names)
        ]
        said = {
            (ranks.get(key, config.get("r")), alphas.get(key, config.get("lora_alpha")))
            for key in keys or [None]
        }
    except (AttributeError, TypeError, re.error) as cause:
        raise refuse(
            reading.path, "rank_pattern or alpha_pattern of LoRA cannot be read",
            found=repr(cause), do="wanted: numbers by patterns of names",
        ) from cause  # fmt: skip
    if len(said) > 1:
        raise refuse(
            reading.path, "several patterns of LoRA match one layer, and their order is not in the files",
            found=f"{', '.join(keys)} for {module}",
        )  # fmt: skip
    ((wanted, alpha),) = said
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or wanted != rank or not rank:
        raise refuse(
            reading.path,
            "the configuration of LoRA does not fit its tensors",
            found=f"{module}: r={wanted!r} and lora_alpha={alpha!r}, tensors of rank {rank}",
        )
    return float(alpha)


def ungrouped(
    path: Path, module: str, down: Tensor, up: Tensor, enabled: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """One pair of matrices for MergedLinear's groups.

    Args:
        path: The checkpoint, for messages.
        module: The layer.
        down: `[groups * r, in]`, of the groups that are enabled.
        up: `[out / len(enabled) * groups, r]`.
        enabled: Of each part of the output.

    Returns:
        `down [groups * r, in]` and `up [out, groups * r]`, zero where nothing is enabled or another
        group's.
    """
    groups, rank = sum(enabled), up.shape[-1]
    if (
        up.dim() != 2
        or not groups
        or down.shape[0] != groups * rank
        or up.shape[0] % groups
        or not all(isinstance(e, bool) for e in enabled)
    ):
        raise refuse(
            path,
            "the tensors of MergedLinear do not fit its enable_lora",
            found=f"{module}: A {list(down.shape)}, B {list(up.shape)}, enable_lora {list(enabled)}",
        )
    rows = up.shape[0] // groups
    wide = up.new_zeros(rows * len(enabled), groups * rank)
    for group, part in enumerate(part for part, on in enumerate(enabled) if on):
        wide[part * rows : (part + 1) * rows, group * rank : (group + 1) * rank] = up[
            group * rows : (group + 1) * rows
        ]
    return down, wide
