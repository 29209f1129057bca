"""Video Swin: V-PETL's own runs, its geometry written out, and what other code rests on."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from utune_deploy.export.engine import Device
from utune_deploy.export.graph import Inputs, clean, serialise, trace
from utune_deploy.export.passes import rewrite
from utune_deploy.export.targets.onnxruntime import OnnxRuntimeSession
from utune_deploy.merge.architectures.video_swin import Grid, VideoSwin, relative_positions
from utune_deploy.merge.attention import Attention, Seam
from utune_deploy.merge.backbone import create, load, save, wrap
from utune_deploy.merge.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

GOLDEN = Path(
    os.environ.get("UTUNE_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden")
)
CASES = (
    "vpetl_bapat_patt_kv_ffn",
    "vpetl_ffn_parallel",
    "vpetl_ffn_sequential",
    "vpetl_patt_qkv_padded",
)
FLOAT64, FLOAT32 = 1e-9, 2e-5  # largest difference over largest value
PADDED = {
    "clip_size": (6, 28, 40),
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": (2, 4, 4),
    "num_classes": 5,
}

golden = pytest.mark.skipif(
    not (GOLDEN / "README.md").is_file(),
    reason=f"no golden data at {GOLDEN}; set UTUNE_GOLDEN to their folder",
)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def filled(seed: int = 0, **arguments) -> VideoSwin:
    """A model with random values everywhere, in eval mode."""
    model = VideoSwin(**{**PADDED, **arguments}).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = p[0].numel() ** -0.5 if p.dim() > 1 and "table" not in name else 0.5
            one = "norm" in name and name.endswith("weight")
            p.copy_(one + scale * torch.randn(p.shape, generator=noise))
    return model


def clips(model: VideoSwin, batch: int, seed: int = 1) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.in_chans, *model.clip_size, generator=noise)


# Against the release


class Released:
    """A stored run of V-PETL: the backbone, and its tuners as hooks written from their formulas."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        folder = GOLDEN / name
        self.config = json.loads((folder / "config.json").read_text())
        options = dict(self.config["original_config"]["SwinTransformer3D"])
        del options["drop_path_rate"]
        arguments = {**options, "clip_size": self.config["clip_shape_BCTHW"][2:]}
        backbone = load("video_swin_base", arguments, folder / "backbone.safetensors")
        self.model = backbone.model.to(dtype)
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
        self.saved = {k: v.to(dtype) for k, v in saved.items() if v.is_floating_point()}
        self.io = load_file(folder / "io.safetensors")
        self.dtype = dtype

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and what every block gave."""
        hidden: dict[str, Tensor] = {}
        settings = self.config["original_config"]["tuning_config"]
        for path, module in self.model.named_modules():
            if path.endswith(".attn.qkv") and settings["att_prefix"]:
                module.register_forward_hook(self.patt(path, settings))
            if path.endswith(".mlp") and settings["ffn_adapt"]:
                module.register_forward_hook(self.adapter(path, settings))
            if ".blocks." in path and path.count(".") == 3:
                _, stage, _, block = path.split(".")
                module.register_forward_hook(keep(hidden, f"hidden64.stage{stage}.block{block}"))
        with torch.no_grad():
            features = self.model(self.io["input.clip"].to(self.dtype))
            weight = self.saved["fc.0.weight"][:, :, 0, 0, 0]
            return F.linear(features, weight, self.saved["fc.0.bias"]), hidden

    def patt(self, path: str, settings: dict):
        down, down_bias, up, up_bias = (
            self.saved[f"{path}_adapter.{layer}.{part}"]
            for layer in (0, 2)
            for part in ("weight", "bias")
        )
        thirds = ["qkv".index(letter) for letter in settings["att_prefix_mode"].split("_")[1]]

        def hook(_: nn.Module, args: tuple[Tensor], qkv: Tensor) -> Tensor:
            given = F.linear(torch.tanh(F.linear(args[0], down, down_bias)), up, up_bias)
            scattered = torch.zeros_like(qkv).unflatten(-1, (3, -1))
            scattered[..., thirds, :] = given.unflatten(-1, (len(thirds), -1))
            return qkv + settings["att_prefix_scale"] * scattered.flatten(-2)

        return hook

    def adapter(self, path: str, settings: dict):
        down, down_bias, up, up_bias = (
            self.saved[f"{path}.adaptmlp.{layer}.{part}"]
            for layer in ("down_proj", "up_proj")
            for part in ("weight", "bias")
        )
        scale = float(settings["ffn_adapter_scalar"])

        def hook(_: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
            x = out if settings["ffn_option"] == "sequential" else args[0]
            return out + scale * F.linear(F.relu(F.linear(x, down, down_bias)), up, up_bias)

        return hook


def keep(store: dict[str, Tensor], name: str):
    def hook(_: nn.Module, __: tuple[Tensor], value: Tensor) -> None:
        store[name] = value

    return hook


@golden
@dtypes
@pytest.mark.parametrize("name", CASES)
def test_the_released_runs(name, dtype, error):
    released = Released(name, dtype)
    logits, hidden = released.run()
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    assert error(logits, released.io["expected64.logits"]) <= tolerance
    known = [key for key in released.io if key.startswith("hidden64.")]
    assert known
    for key in known:
        assert error(hidden[key], released.io[key]) <= tolerance, key


@golden
@pytest.mark.parametrize("name", CASES)
def test_the_tuners_of_those_runs_are_seen(name, error):
    released = Released(name, torch.float64)
    bare = {k: v for k, v in released.saved.items() if "adapt" in k}
    released.saved |= {k: torch.zeros_like(v) for k, v in bare.items()}
    assert error(released.run()[0], released.io["expected64.logits"]) > 0.1


# Geometry


def by_hand(model: VideoSwin, x: Tensor) -> Tensor:
    """The first stage's second block on `[D, H, W, C]`, token by token."""
    block = model.layers[0].blocks[1]
    attn, tokens = block.attn, tuple(x.shape[:3])
    whole = (2, 4, 4)
    window = [min(w, n) for w, n in zip(whole, tokens, strict=True)]
    shift = [w // 2 if n > w else 0 for w, n in zip(whole, tokens, strict=True)]
    padded = [-(-n // w) * w for n, w in zip(tokens, window, strict=True)]
    h = torch.zeros(*padded, x.shape[-1], dtype=x.dtype)
    h[: tokens[0], : tokens[1], : tokens[2]] = block.norm1(x)
    heads, dim = attn.heads, x.shape[-1] // attn.heads
    q, k, v = attn.qkv(h).unflatten(-1, (3, heads, dim)).unbind(-3)
    places = list(np.ndindex(*padded))
    groups: dict[tuple, list[tuple]] = {}  # tokens in window order: by their place after the roll
    for rolled in places:
        key = tuple(r // w for r, w in zip(rolled, window, strict=True))
        groups.setdefault(key, []).append(rolled)
    out = torch.zeros_like(h)
    for members in groups.values():
        at = [tuple((r + s) % p for r, s, p in zip(m, shift, padded, strict=True)) for m in members]
        for i, here in enumerate(at):
            scores = []
            for j, there in enumerate(at):
                # A neighbour in the clip is as far away as in the window.
                near = all(
                    a - b == c - d
                    for a, b, c, d in zip(here, there, members[i], members[j], strict=True)
                )
                # The place in the whole window that has this number.
                a, b = (np.unravel_index(n, whole) for n in (i, j))
                row = 0
                for s, t, w in zip(a, b, whole, strict=True):
                    row = row * (2 * w - 1) + int(s) - int(t) + w - 1
                bias = attn.relative_position_bias_table[row]
                scores.append((q[here] * k[there]).sum(-1) * dim**-0.5 + bias - 100 * (not near))
            share = torch.softmax(torch.stack(scores), dim=0)  # [N, heads]
            value = sum(w[:, None] * v[t] for w, t in zip(share, at, strict=True))
            out[here] = value.flatten()
    x = x + attn.proj(out)[: tokens[0], : tokens[1], : tokens[2]]
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize(
    "clip",
    [
        pytest.param((8, 32, 32), id="whole windows"),
        pytest.param((6, 28, 20), id="padded, and then rolled"),
        pytest.param((4, 28, 20), id="time is as long as its window"),
        pytest.param((6, 12, 20), id="height is shorter"),
        pytest.param((6, 28, 8), id="width is shorter"),
        pytest.param((4, 12, 8), id="nothing to shift"),
    ],
)
def test_a_shifted_block_token_by_token(clip, error):
    model = filled(clip_size=clip, embed_dim=4, num_heads=(2, 2)).double()
    x = torch.randn(*model.patch_embed.tokens, 4, dtype=torch.float64)
    with torch.no_grad():
        assert error(model.layers[0].blocks[1](x[None])[0], by_hand(model, x)) < 1e-13


def test_windows_shrink_and_then_do_not_shift():
    assert Grid.of((4, 56, 56), (8, 7, 7), shifted=True) == Grid((4, 56, 56), (4, 7, 7), (0, 3, 3))
    assert Grid.of((4, 7, 7), (8, 7, 7), shifted=True).apart() is None
    assert Grid.of((16, 5, 9), (8, 7, 7), shifted=True) == Grid((16, 5, 9), (8, 5, 7), (4, 0, 3))
    assert Grid.of((16, 9, 9), (8, 7, 7), shifted=False).shift == (0, 0, 0)
    assert Grid.of((4, 9, 14), (2, 4, 7), shifted=False).counts == (2, 3, 2)


def test_windows_are_cut_clip_by_clip_and_joined_again():
    for tokens in ((4, 8, 8), (3, 7, 10)):
        for shifted in (False, True):
            grid = Grid.of(tokens, (2, 4, 4), shifted=shifted)
            x = torch.randn(3, *tokens, 5)
            windows = grid.split(x)
            assert windows.shape == (3 * np.prod(grid.counts), 32, 5)
            assert torch.equal(windows[len(windows) // 3 :], grid.split(x[1:]))
            assert torch.equal(grid.join(windows), x)


def test_relative_positions_count_time_slowest():
    index = relative_positions((2, 3, 4))
    assert index.shape == (24, 24)
    assert index.min() == 0
    assert index.max() == 3 * 5 * 7 - 1
    assert index.diagonal().unique().tolist() == [1 * 35 + 2 * 7 + 3]
    assert index[1, 0] - index[0, 0] == 1
    assert index[4, 0] - index[0, 0] == 7
    assert index[12, 0] - index[0, 0] == 35
    assert torch.equal(relative_positions((8, 7, 7))[:196, :196], relative_positions_in_time())


def relative_positions_in_time() -> Tensor:
    """For a window of (8, 7, 7) that shrank to (4, 7, 7), from the distances of its tokens."""
    place = torch.tensor(list(np.ndindex(4, 7, 7)))
    steps = place[:, None] - place[None] + torch.tensor([7, 6, 6])
    return (steps * torch.tensor([169, 13, 1])).sum(-1)


def test_the_head_weighs_time_as_the_release_does(error):
    model = filled()
    for depth, weights in ((4, [1, 2, 2, 1]), (2, [1, 1]), (5, [1, 2, 2, 2, 1])):
        features = torch.randn(2, depth, 3, 4, 32)
        mean = features.mean((2, 3)).mul(torch.tensor(weights)[:, None]).sum(1) / sum(weights)
        with torch.no_grad():
            pooled = F.avg_pool3d(features.movedim(-1, 1), (2, 3, 4), stride=1)[..., 0, 0]
            known = model.head(pooled.transpose(1, 2)).mean(1)
            assert error(model.forward_head(features), known) < 1e-6
            assert error(model.forward_head(features), model.head(mean)) < 1e-6


def test_the_released_geometry():
    with torch.device("meta"):
        model = VideoSwin()
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert shapes["layers.2.blocks.17.attn.relative_position_bias_table"] == (15 * 13 * 13, 16)
    assert shapes["patch_embed.proj.weight"] == (128, 3, 2, 4, 4)
    assert shapes["layers.2.downsample.reduction.weight"] == (1024, 2048)
    assert shapes["head.weight"] == (400, 1024)
    assert not any("relative_position_index" in name for name in shapes)
    assert not any(name.startswith("layers.3.downsample") for name in shapes)
    tuned = {"patt": 0, "ffn": 0}
    for name, shape in shapes.items():
        if name.endswith("norm1.weight"):
            (c,) = shape
            tuned["patt"] += 3 * c * 128 + 128 + 2 * c
            tuned["ffn"] += 2 * c * 64 + 64 + c
    assert tuned == {"patt": 4_647_424, "ffn": 1_553_664}  # as counted for the release
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 88_048_984
    grids = [stage.blocks[1].grid for stage in model.layers]
    assert [g.window for g in grids] == [(4, 7, 7)] * 4
    assert [g.shift for g in grids] == [(0, 3, 3)] * 3 + [(0, 0, 0)]


# What other code rests on


def test_layers_are_called_once_each():
    model = filled()
    calls: Counter[str] = Counter()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    with torch.no_grad():
        model(clips(model, 2))
    once = [p for p, m in model.named_modules() if not isinstance(m, torch.nn.ModuleList)]
    assert calls == Counter(once)


def test_every_attention_is_one_call_of_torch():
    model = filled()
    seen: list[Attention] = []

    class Watch(Seam):
        def attend(self, call: Attention) -> Tensor:
            seen.append(call)
            return call.run()

    with torch.no_grad(), Watch():
        model(clips(model, 3))
    windows = [3 * 2 * 2 * 3] * 2 + [3 * 2 * 1 * 2] * 2  # 3 x 7 x 10 tokens, then 3 x 4 x 5
    assert [call.query.shape for call in seen] == [
        (n, heads, 32, 8) for n, heads in zip(windows, (2, 2, 4, 4), strict=True)
    ]
    assert [call.mask.shape[0] for call in seen if call.mask is not None] == [
        1,
        windows[0],
        1,
        windows[2],
    ]


@dtypes
def test_rows_do_not_see_each_other(dtype, error):
    model = filled().to(dtype)
    batch = clips(model, 3).to(dtype)
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in batch])
        assert error(model(batch), alone) < (1e-14 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("window", [(2, 4, 4), (8, 7, 7)])
@pytest.mark.parametrize("clip", [(6, 28, 40), (8, 32, 32)])
def test_onnx(clip, window, error):
    model = filled(clip_size=clip, window_size=window)
    graph = trace(model, Inputs(clips(model, 2)))
    rewrite(graph)
    assert Counter(node.op_type for node in clean(graph).graph)["Attention"] == 4
    session = OnnxRuntimeSession(serialise(graph, {}), Device(threads=1))
    for batch in (1, 2, 5):
        images = clips(model, batch)
        with torch.no_grad():
            found = torch.from_numpy(session.run(images.numpy()))
            assert error(found, model(images)) < 2e-6


def test_saved_and_loaded(tmp_path):
    model = filled()
    backbone = wrap(model, "video_swin_base", PADDED)
    assert backbone.model.pretrained_cfg["classifier"] == "head"
    save(tmp_path / "folder", backbone)
    again = load(None, None, tmp_path / "folder")
    assert again.identity.fingerprint == backbone.identity.fingerprint
    assert again.identity.arguments == json.loads(json.dumps(dict(backbone.identity.arguments)))
    images = backbone.example(2)
    with torch.no_grad():
        assert torch.equal(again.model(images), model(images))


def test_arguments_that_fit_no_model():
    for arguments, where in (
        ({"clip_size": (8, 224)}, "clip_size"),
        ({"clip_size": 224}, "clip_size"),
        ({"clip_size": (2, 224, 224)}, "clip_size"),
        ({"patch_size": (2, 0, 4)}, "patch_size"),
        ({"window_size": "big"}, "window_size"),
        ({"num_heads": (3, 4)}, "num_heads, stage 0"),
        ({"depths": (2,)}, None),
        ({"depths": ()}, None),
        ({"depths": (2, 0)}, None),
    ):
        with pytest.raises(UsageError) as caught:
            create("video_swin_base", {**PADDED, **arguments})
        assert caught.value.details.get("where") == where
    with pytest.raises(UsageError, match="VideoSwin cannot create the backbone"):
        create("video_swin_base", {"wings": 2})


def test_a_clip_of_one_token_in_time_is_refused():
    for frames, patch in ((2, 2), (1, 1), (4, 4)):
        with pytest.raises(UsageError, match="too short") as caught:
            VideoSwin(**{**PADDED, "clip_size": (frames, 32, 32), "patch_size": (patch, 4, 4)})
        assert caught.value.details["wanted"].startswith(f"at least {patch + 1} frames")
    VideoSwin(**{**PADDED, "clip_size": (3, 32, 32)})


def test_clips_of_another_size_are_refused():
    model = filled()
    for shape in ((1, 3, 6, 28, 28), (1, 3, 28, 40), (3, 6, 28, 40), (1, 1, 6, 28, 40)):
        with pytest.raises(UsageError, match="do not have the size") as caught:
            model(torch.zeros(shape))
        assert caught.value.details["wanted"] == "[B, 3, 6, 28, 40]"
