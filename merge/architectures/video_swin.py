"""Video Swin Transformer, in the form that V-PETL released: clips `[B, C, T, H, W]` to logits `[B, K]`.

The network is that of Liu et al., arXiv 2106.13230, section 3; the head and the names of the parameters
are those of https://github.com/bruceyo/V-PETL (Yu et al., arXiv 2210.00788). D, H, W count tokens here.
Four choices of that release decide what its weights answer, and are kept:

- Tokens are padded to whole windows first and rolled then (timm's image Swin rolls first). Padded tokens
  are attended like any other, and carry the bias of qkv.
- A window that is longer than its axis shrinks to the axis, and is not shifted along it.
- The index of relative positions is made for the whole window and cut to the first N rows and columns.
  That is exact while only time shrinks, the slowest axis. Where height or width shrink, it gives a pair
  of tokens the bias of another distance.
- Tokens that the roll brought together are kept apart by -100, not by -inf.

Dropout and stochastic depth are left out: a backbone is frozen and in eval mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

Size = tuple[int, int, int]  # along time, height and width

APART = -100.0  # added to the scores of two tokens that the roll brought together
INIT_STD = 0.02


class VideoSwin(nn.Module):
    """A Video Swin Transformer; the defaults are Swin-B of V-PETL.

    Args:
        clip_size: Frames, height and width of the clips it reads.
        num_classes: Classes of the classifier; 0 for none.
        in_chans: Channels of a frame.
        embed_dim: Channels of the first stage; every stage doubles them.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        patch_size: Frames, height and width of a patch.
        window_size: Tokens of a window along time, height and width.
        mlp_ratio: Hidden width of an mlp over its input's.
        qkv_bias: Whether qkv has a bias.
        patch_norm: Whether patches are normalised.
        norm_eps: Of every LayerNorm.

    Raises:
        UsageError: An argument is out of range, or a clip is too short for the head.
    """

    def __init__(
        self,
        clip_size: Sequence[int] = (8, 224, 224),
        num_classes: int = 400,
        in_chans: int = 3,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        patch_size: Sequence[int] = (2, 4, 4),
        window_size: Sequence[int] = (8, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.clip_size = _size("clip_size", clip_size)
        patch = _size("patch_size", patch_size)
        window = _size("window_size", window_size)
        _require_stages(embed_dim, depths, num_heads)
        self.in_chans = in_chans
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.pretrained_cfg: dict[str, Any] = {
            "input_size": (in_chans, *self.clip_size),
            "classifier": "head",
            "interpolation": "linear",
            "crop_pct": 1.0,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "stride": 2,
            "views": 4,
        }
        self.patch_embed = PatchEmbed(
            self.clip_size, patch, in_chans, embed_dim, patch_norm, norm_eps
        )
        tokens = self.patch_embed.tokens
        if tokens[0] < 2:
            raise UsageError(
                "the clip is too short: the head averages pairs of tokens along time",
                where="clip_size",
                wanted=f"at least {patch[0] + 1} frames with patches of {patch[0]}",
                found=f"{self.clip_size[0]} frames",
            )
        self.layers = nn.ModuleList()
        for number, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = embed_dim * 2**number
            merges = number < len(depths) - 1
            stage = Stage(dim, depth, heads, tokens, window, mlp_ratio, qkv_bias, merges, norm_eps)
            self.layers.append(stage)
            tokens = stage.leaves
        self.norm = nn.LayerNorm(self.num_features, eps=norm_eps)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_init)

    def forward_features(self, clips: Tensor) -> Tensor:
        """Features `[B, D, H, W, C]` of clips `[B, C, T, H, W]`.

        Raises:
            UsageError: The clips have another size than `clip_size`.
        """
        wanted = (self.in_chans, *self.clip_size)
        if clips.dim() != 5 or tuple(clips.shape[1:]) != wanted:
            raise UsageError(
                "the clips do not have the size that the backbone was created for",
                wanted=f"[B, {', '.join(map(str, wanted))}]",
                found=list(clips.shape),
                do="create the backbone with this clip_size",
            )
        x = self.patch_embed(clips)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of features `[B, D, H, W, C]`.

        The release averages every two neighbours in time, classifies them, and averages the logits. The
        classifier is linear, so that it may come last: inner tokens of time count twice as much as
        the two at the ends.
        """
        x = x.mean(dim=(2, 3))
        pairs = (x[:, :-1] + x[:, 1:]) / 2
        return self.head(pairs.mean(dim=1))

    def forward(self, clips: Tensor) -> Tensor:
        """Logits `[B, K]` of clips `[B, C, T, H, W]`."""
        return self.forward_head(self.forward_features(clips))


class PatchEmbed(nn.Module):
    """Every patch of a clip becomes a token; clips are padded at their ends to whole patches."""

    def __init__(
        self, clip: Size, patch: Size, channels: int, dim: int, normalised: bool, eps: float
    ) -> None:
        super().__init__()
        self.tokens = _map(_parts, clip, patch)
        self.padding = _padding(clip, patch)
        self.proj = nn.Conv3d(channels, dim, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(dim, eps=eps) if normalised else nn.Identity()

    def forward(self, clips: Tensor) -> Tensor:
        """Tokens `[B, D, H, W, C]` of clips `[B, C, T, H, W]`."""
        if any(self.padding):
            clips = F.pad(clips, self.padding)
        return self.norm(self.proj(clips).movedim(1, -1))


class Stage(nn.Module):
    """Blocks, every second one with shifted windows, then a merger unless the stage is the last."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        tokens: Size,
        window: Size,
        mlp_ratio: float,
        qkv_bias: bool,
        merges: bool,
        eps: float,
    ) -> None:
        super().__init__()
        grids = [Grid.of(tokens, window, shifted=shifted) for shifted in (False, True)]
        self.blocks = nn.ModuleList(
            Block(dim, heads, grids[number % 2], window, mlp_ratio, qkv_bias, eps)
            for number in range(depth)
        )
        self.downsample = PatchMerging(dim, tokens, eps) if merges else nn.Identity()
        self.leaves = (tokens[0], _parts(tokens[1], 2), _parts(tokens[2], 2)) if merges else tokens

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, D, H, W, C]` to tokens, after a merger `[B, D, H / 2, W / 2, 2 C]`."""
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class Block(nn.Module):
    """Attention inside windows, then an mlp, each on the normalised input and added to it."""

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: Grid,
        window: Size,
        mlp_ratio: float,
        qkv_bias: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = WindowAttention(dim, heads, grid, window, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, D, H, W, C]` to tokens."""
        x = x + self.grid.join(self.attn(self.grid.split(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class WindowAttention(nn.Module):
    """Attention inside windows, with a bias for every relative position and head."""

    relative_position_index: Tensor  # [N, N] int64, rows of the table
    apart: Tensor | None  # [windows, N, N] bool: pairs that the roll brought together

    def __init__(self, dim: int, heads: int, grid: Grid, window: Size, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        rows = math.prod(2 * length - 1 for length in window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=INIT_STD)
        count = math.prod(grid.window)
        index = relative_positions(window)[:count, :count]
        self.register_buffer("relative_position_index", index.clone(), persistent=False)
        self.register_buffer("apart", grid.apart(), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Windows `[B * windows, N, C]` to windows."""
        rows, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [rows, heads, N, d]
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask(rows))
        return self.proj(x.transpose(1, 2).reshape(rows, tokens, dim))

    def mask(self, rows: int) -> Tensor:
        """What is added to the scores: `[1, heads, N, N]`, or `[rows, heads, N, N]` after a roll."""
        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.permute(2, 0, 1)[None]
        if self.apart is None:
            return bias
        mask = self.apart.to(bias.dtype)[:, None] * APART
        return mask.repeat(rows // len(self.apart), 1, 1, 1) + bias


class Mlp(nn.Module):
    """Two linear layers with a GELU (erf) between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, D, H, W, C]` to tokens."""
        return self.fc2(self.act(self.fc1(x)))


class PatchMerging(nn.Module):
    """Two by two neighbours in space become one token of twice the channels."""

    def __init__(self, dim: int, tokens: Size, eps: float) -> None:
        super().__init__()
        self.padding = _padding(tokens, (1, 2, 2))
        self.norm = nn.LayerNorm(4 * dim, eps=eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, D, H, W, C]`, padded at their ends, to `[B, D, H / 2, W / 2, 2 C]`."""
        if any(self.padding):
            x = F.pad(x, (0, 0, *self.padding))
        corners = [x[:, :, row::2, column::2] for column, row in product(range(2), range(2))]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


@dataclass(frozen=True)
class Grid:
    """How the tokens of a clip fall into windows.

    Attributes:
        tokens: Tokens along time, height and width.
        window: The same of a window, no longer than the axis.
        shift: How far the tokens are rolled back before they are cut.
    """

    tokens: Size
    window: Size
    shift: Size

    @classmethod
    def of(cls, tokens: Size, window: Size, *, shifted: bool) -> Grid:
        """The grid for windows of a wanted size, shifted by half of it or not at all."""
        fits = _map(min, tokens, window)
        shift = _map(lambda n, w: w // 2 if shifted and n > w else 0, tokens, window)
        return cls(tokens, fits, shift)

    @property
    def counts(self) -> Size:
        """Windows along each axis."""
        return _map(_parts, self.tokens, self.window)

    def split(self, x: Tensor) -> Tensor:
        """Tokens `[B, D, H, W, C]` as windows `[B * windows, N, C]`, clip by clip."""
        padding = _padding(self.tokens, self.window)
        if any(padding):
            x = F.pad(x, (0, 0, *padding))
        if any(self.shift):
            x = x.roll([-s for s in self.shift], dims=(1, 2, 3))
        return self.cut(x)

    def cut(self, x: Tensor) -> Tensor:
        """Padded tokens `[B, D, H, W, C]` as windows `[B * windows, N, C]`."""
        for axis, (count, length) in enumerate(zip(self.counts, self.window, strict=True)):
            x = x.unflatten(1 + 2 * axis, (count, length))
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)  # [B, counts..., window..., C]
        return x.reshape(-1, math.prod(self.window), x.shape[-1])

    def join(self, windows: Tensor) -> Tensor:
        """Windows `[B * windows, N, C]` as tokens `[B, D, H, W, C]`; padded ones are dropped."""
        x = windows.reshape(-1, *self.counts, *self.window, windows.shape[-1])
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)
        for axis in (1, 2, 3):
            x = x.flatten(axis, axis + 1)
        if any(self.shift):
            x = x.roll(self.shift, dims=(1, 2, 3))
        depth, height, width = self.tokens
        return x[:, :depth, :height, :width]

    def apart(self) -> Tensor | None:
        """`[windows, N, N]` bool, true for tokens that are no neighbours in the clip; None if unshifted.

        After the roll, an axis ends with what was its beginning.
        """
        if not any(self.shift):
            return None
        rolled = [
            torch.arange(count * length) >= count * length - shift
            for count, length, shift in zip(self.counts, self.window, self.shift, strict=True)
        ]
        time, height, width = torch.meshgrid(*rolled, indexing="ij")
        region = 4 * time + 2 * height + 1 * width
        region = self.cut(region[None, ..., None])
        return region != region.mT


def relative_positions(window: Size) -> Tensor:
    """Row of the bias table for each pair of tokens of a window, `[N, N]` int64.

    The distance along each axis, from `1 - length` to `length - 1`, is counted from 0; time is the
    slowest axis, of the tokens and of the table.
    """
    axes = torch.meshgrid(*(torch.arange(length) for length in window), indexing="ij")
    index = torch.zeros(math.prod(window), math.prod(window), dtype=torch.int64)
    for places, length in zip(axes, window, strict=True):
        place = places.flatten()
        index = index * (2 * length - 1) + place[:, None] - place[None, :] + length - 1
    return index


def _init(module: nn.Module) -> None:
    """Linear layers start as in the release."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _parts(length: int, part: int) -> int:
    """How many parts of one length cover another."""
    return -(-length // part)


def _map(function: Any, first: Size, second: Size) -> Size:
    """A function of two lengths, along each axis."""
    time, height, width = (function(a, b) for a, b in zip(first, second, strict=True))
    return time, height, width


def _padding(tokens: Size, part: Size) -> list[int]:
    """What `F.pad` adds at the ends of width, height and time to reach whole parts."""
    ends = _map(lambda n, p: -n % p, tokens, part)
    return [n for end in reversed(ends) for n in (0, end)]


def _size(name: str, values: Any) -> Size:
    """Three lengths of at least 1.

    Raises:
        UsageError: They are not that.
    """
    given = list(values) if isinstance(values, list | tuple) else [values]
    if len(given) != 3 or not all(isinstance(v, int) and v >= 1 for v in given):
        raise UsageError(
            "a size of the backbone is not three lengths",
            where=name,
            wanted="time, height and width, each at least 1",
            found=values,
        )
    time, height, width = given
    return time, height, width


def _require_stages(dim: int, depths: Sequence[int], heads: Sequence[int]) -> None:
    """Hold the stages to each other.

    Raises:
        UsageError: Depths and heads are not of the same stages, or heads do not divide the channels.
    """
    if len(depths) != len(heads) or not depths or min(*depths, *heads) < 1:
        raise UsageError(
            "the stages of the backbone do not fit each other",
            wanted="a depth and a number of heads, each at least 1, for every stage",
            found=f"depths {list(depths)}, num_heads {list(heads)}",
        )
    for stage, count in enumerate(heads):
        if dim * 2**stage % count:
            raise UsageError(
                "the heads of a stage do not divide its channels",
                where=f"num_heads, stage {stage}",
                wanted=f"a divisor of {dim * 2**stage}",
                found=count,
            )
