"""MDETR's encoder and decoder, in the form that UniPT released: a feature map and a text to boxes.

The network is that of Kamath et al., arXiv 2104.12763, section 2 (a DETR, arXiv 2005.12872, whose encoder reads
the text behind the picture); the names of the parameters are those of https://github.com/Paranioar/UniPT,
part MDETR (Diao et al., arXiv 2308.14316). The picture's trunk is not part of it: its last feature map is
an input. So is what the text encoder gave, or with `text="ids"` the text encoder, a RoBERTa, runs inside.

What decides what the weights answer, and is kept:

- A position along an axis is the number of real cells so far over all real cells of that row or column, so
  that padding does not move it. It is computed in float32, whatever the dtype of the model.
- Tokens of the text have no position; queries start at zero, and carry their embedding as a position.
- Every norm stands behind its sum, and one more behind the last layer of the decoder, not the encoder.
- The norm behind the text's linear layer has an epsilon of 1e-12, all others 1e-5.

The release's options `normalize_before` and without `pass_pos_and_query` are refused: its own code has no
decoder for the one and stops with an error on the other. Extra queries for question answering, and the
token and projections of contrastive training are not here.

Some modules compute nothing. They are seats: a forward hook there sees, and may replace, a value that
no layer of the release returns. All values are batch first. Dropout is left out: a backbone is frozen
and in eval mode.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UsageError
from ..inputs import Input, require_rows
from .arguments import (
    require_choice,
    require_heads,
    require_lengths,
    require_room,
    require_sizes,
)
from .bert_layers import BertLayer, Embeddings, Pooler, attend, init_bert

if TYPE_CHECKING:
    from collections.abc import Sequence

BOX = 4  # centre x and y, width and height, each over the picture's
RESIZER_EPS = 1e-12
ROBERTA_PADDING = 1  # id of padding; the first word has the place behind it
TEMPERATURE = 10000.0  # longest wave of the positions, in turns
CELL = 1e-6  # keeps a row of nothing but padding from dividing by zero


class Mdetr(nn.Module):
    """A DETR whose encoder reads a picture and a text; the defaults are MDETR with a ResNet-101.

    Masks are 1 at what is real and 0 at padding (the release's own masks are the other way round).

    Args:
        d_model: Channels of a token; a multiple of 4.
        nhead: Heads of every attention outside the text encoder.
        dim_feedforward: Hidden width of every mlp outside the text encoder.
        num_encoder_layers: Layers of the encoder.
        num_decoder_layers: Layers of the decoder.
        num_queries: Boxes of an answer.
        num_classes: Classes of a box without "no object"; 0 for no classifier and no box head.
        backbone_channels: Channels of the feature map.
        map_size: Height and width of the feature map; 25 x 42 are a picture of 800 x 1333 pixels.
        text: What stands for the text: `hidden`, what the text encoder gave, or `ids`, words.
        text_length: Tokens of a text, padding included.
        text_hidden: Channels of the text encoder.
        text_layers: Layers of the text encoder.
        text_heads: Heads of the text encoder.
        text_intermediate: Hidden width of the text encoder's mlps.
        text_vocab_size: Rows of its table of words.
        text_positions: Rows of its table of positions; the first two belong to no word.
        text_types: Rows of its table of token types, of which row 0 is used.
        text_layer_norm_eps: Of its norms.
        normalize_before: False; see the module's docstring.
        pass_pos_and_query: True; see the module's docstring.

    Attributes:
        inputs: `features` `[B, backbone_channels, h, w]`, `feature_mask` `[B, h, w]`, then `text_hidden`
            `[B, text_length, text_hidden]` or `input_ids` `[B, text_length]`, and `text_mask`
            `[B, text_length]`, in the order of `forward`.
        encoder_mask: Seat of the mask of all tokens, `[B, N]`, 1 or 0 in the model's dtype; N is `h * w +
            text_length`. What it gives is what the attention heeds.
        encoder_input: Seat of the cells, row by row, and the text behind them, `[B, N, d_model]`.
        side_memory: Seat of what the encoder gave, `[B, N, d_model]`; nothing reads what it gives.
        decoder_input: Seat of the zeros that the queries start at, `[B, Q, d_model]`.
        features: Seat of what the decoder gave, `[B, Q, d_model]`, in front of the heads.
        class_embed: Class logits of a box, `num_classes + 1`, "no object" last.
        bbox_embed: The box before the sigmoid.
        logits_beside_classes: Rows of the classifier that are no class: "no object".

    Raises:
        UsageError: An argument is out of range.
    """

    def __init__(
        self,
        d_model: int = 256,
        nhead: int = 8,
        dim_feedforward: int = 2048,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        num_queries: int = 100,
        num_classes: int = 255,
        backbone_channels: int = 2048,
        map_size: Sequence[int] = (25, 42),
        text: Literal["hidden", "ids"] = "hidden",
        text_length: int = 40,
        text_hidden: int = 768,
        text_layers: int = 12,
        text_heads: int = 12,
        text_intermediate: int = 3072,
        text_vocab_size: int = 50265,
        text_positions: int = 514,
        text_types: int = 1,
        text_layer_norm_eps: float = 1e-5,
        normalize_before: bool = False,
        pass_pos_and_query: bool = True,
    ) -> None:
        super().__init__()
        _require_release(normalize_before, pass_pos_and_query)
        require_sizes(
            d_model=d_model,
            dim_feedforward=dim_feedforward,
            num_encoder_layers=num_encoder_layers,
            num_decoder_layers=num_decoder_layers,
            num_queries=num_queries,
            backbone_channels=backbone_channels,
            text_length=text_length,
            text_hidden=text_hidden,
            text_layers=text_layers,
            text_intermediate=text_intermediate,
            text_vocab_size=text_vocab_size,
            text_positions=text_positions,
            text_types=text_types,
        )
        _require_waves(d_model)
        require_heads("nhead", nhead, d_model)
        require_heads("text_heads", text_heads, text_hidden)
        height, width = require_lengths("map_size", map_size)
        require_choice("text", text, ("hidden", "ids"))
        if text == "ids":
            require_room("text_length", text_length, text_positions - ROBERTA_PADDING - 1)
            words = Input("input_ids", (text_length,), "ids", high=text_vocab_size)
        else:
            words = Input("text_hidden", (text_length, text_hidden))
        self.text = text
        self.inputs = (
            Input("features", (backbone_channels, height, width)),
            Input("feature_mask", (height, width), "mask"),
            words,
            Input("text_mask", (text_length,), "mask"),
        )
        self.num_features = d_model
        self.logits_beside_classes = 1
        self.pretrained_cfg: dict[str, Any] = {"classifier": ("class_embed", "bbox_embed")}
        self.encoder_mask = nn.Identity()
        self.encoder_input = nn.Identity()
        self.side_memory = nn.Identity()
        self.decoder_input = nn.Identity()
        self.features = nn.Identity()
        self.transformer = Transformer(
            Encoder(num_encoder_layers, d_model, nhead, dim_feedforward),
            Decoder(num_decoder_layers, d_model, nhead, dim_feedforward),
            Resizer(text_hidden, d_model),
            Roberta(
                Embeddings(
                    text_vocab_size, text_positions, text_types, text_hidden, text_layer_norm_eps
                ),
                [
                    BertLayer(text_hidden, text_heads, text_intermediate, text_layer_norm_eps)
                    for _ in range(text_layers)
                ],
                Pooler(text_hidden),
            ),
        )
        self.transformer.apply(_init)
        self.transformer.text_encoder.apply(init_bert)
        self.query_embed = nn.Embedding(num_queries, d_model)
        self.input_proj = nn.Conv2d(backbone_channels, d_model, kernel_size=1)
        self.class_embed = nn.Linear(d_model, num_classes + 1) if num_classes > 0 else nn.Identity()
        self.bbox_embed = BoxHead(d_model) if num_classes > 0 else nn.Identity()

    @property
    def hidden_states(self) -> tuple[str, ...]:
        """Modules whose outputs `[B, N, d_model]` are the encoder's states: its input, then every layer."""
        layers = range(len(self.transformer.encoder.layers))
        return ("encoder_input", *(f"transformer.encoder.layers.{number}" for number in layers))

    @property
    def decoder_hidden_states(self) -> tuple[str, ...]:
        """Modules whose outputs `[B, Q, d_model]` are the decoder's states.

        Its input, every layer but the last, and the norm behind the last.
        """
        layers = range(len(self.transformer.decoder.layers) - 1)
        inner = (f"transformer.decoder.layers.{number}" for number in layers)
        return ("decoder_input", *inner, "transformer.decoder.norm")

    def forward_features(
        self, features: Tensor, feature_mask: Tensor, text: Tensor, text_mask: Tensor
    ) -> Tensor:
        """What the decoder gives, `[B, Q, d_model]`; see `forward`.

        Raises:
            UsageError: An input has another shape than the backbone was created for.
        """
        require_rows(self.inputs, (features, feature_mask, text, text_mask))
        cells = self.input_proj(features).flatten(2).transpose(1, 2)
        hidden = self.transformer.text_encoder(text, text_mask) if self.text == "ids" else text
        words = self.transformer.resizer(hidden)
        positions = sine_positions(feature_mask, self.num_features).to(cells.dtype)
        positions = torch.cat([positions, torch.zeros_like(words)], dim=1)
        masks = (feature_mask.flatten(1), text_mask)
        real = torch.cat([mask.to(cells.dtype) for mask in masks], dim=1)
        bias = hold_back(self.encoder_mask(real))
        x = self.encoder_input(torch.cat([cells, words], dim=1))
        memory = self.transformer.encoder(x, bias, positions)
        self.side_memory(memory)
        queries = self.query_embed.weight.expand(features.shape[0], -1, -1)
        x = self.decoder_input(torch.zeros_like(queries))
        return self.features(self.transformer.decoder(x, queries, memory, bias, positions))

    def forward_head(self, x: Tensor) -> Tensor:
        """Class logits and boxes `[B, Q, num_classes + 1 + 4]` of what the decoder gave."""
        return torch.cat([self.class_embed(x), self.bbox_embed(x).sigmoid()], dim=-1)

    def forward(
        self, features: Tensor, feature_mask: Tensor, text: Tensor, text_mask: Tensor
    ) -> Tensor:
        """Class logits and boxes `[B, Q, num_classes + 1 + 4]`.

        A box is the last four of them: centre x and y, width and height, from 0 to 1. The sigmoid stands
        behind `bbox_embed`, also where that is the identity or a hook has replaced what it gave. Without
        classes the answer is `[B, Q, 2 * d_model]`.

        Args:
            features: `[B, backbone_channels, h, w]`.
            feature_mask: `[B, h, w]`, 1 at the picture and 0 at padding, of any dtype.
            text: `[B, text_length, text_hidden]`, or with `text="ids"` `[B, text_length]` int64.
            text_mask: `[B, text_length]`, 1 at words and 0 at padding, of any dtype.

        Raises:
            UsageError: An input has another shape than the backbone was created for.
        """
        return self.forward_head(self.forward_features(features, feature_mask, text, text_mask))


class Transformer(nn.Module):
    """Holds the parts under the names of the release; `Mdetr` runs them, seats between."""

    def __init__(
        self, encoder: Encoder, decoder: Decoder, resizer: Resizer, text_encoder: Roberta
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.resizer = resizer
        self.text_encoder = text_encoder


class Encoder(nn.Module):
    """Layers over the picture and the text."""

    def __init__(self, layers: int, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, hidden) for _ in range(layers))

    def forward(self, x: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to tokens.

        Args:
            x: `[B, N, C]`.
            bias: `[B, 1, 1, N]`, added to the scores of the keys.
            positions: `[B, N, C]`.
        """
        for layer in self.layers:
            x = layer(x, bias, positions)
        return x


class EncoderLayer(nn.Module):
    """Attention, then an mlp, each added to its input and normalised behind the sum."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = MultiHead(dim, heads)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to tokens; see `Encoder`."""
        placed = x + positions
        x = self.norm1(x + self.self_attn(placed, placed, x, bias))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class Decoder(nn.Module):
    """Layers over the queries, which read what the encoder gave."""

    def __init__(self, layers: int, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, queries: Tensor, memory: Tensor, bias: Tensor, positions: Tensor
    ) -> Tensor:
        """Queries `[B, Q, C]` to queries, normalised.

        Args:
            x: `[B, Q, C]`.
            queries: `[B, Q, C]`, the positions of the queries.
            memory: `[B, N, C]`, what the encoder gave.
            bias: `[B, 1, 1, N]`, added to the scores of the memory.
            positions: `[B, N, C]`, those of the memory.
        """
        placed = memory + positions
        for layer in self.layers:
            x = layer(x, queries, placed, memory, bias)
        return self.norm(x)


class DecoderLayer(nn.Module):
    """Attention among the queries, to the memory, then an mlp; each summed, with a norm behind it."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = MultiHead(dim, heads)
        self.cross_attn_image = MultiHead(dim, heads)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, queries: Tensor, placed: Tensor, memory: Tensor, bias: Tensor
    ) -> Tensor:
        """Queries `[B, Q, C]` to queries; `placed` is the memory with its positions. See `Decoder`."""
        own = x + queries
        x = self.norm1(x + self.self_attn(own, own, x, None))
        x = self.norm3(x + self.cross_attn_image(x + queries, placed, memory, bias))
        return self.norm4(x + self.linear2(F.relu(self.linear1(x))))


class MultiHead(nn.Module):
    """Attention in heads, its three projections in one tensor, as torch's own keeps them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Queries `[B, N, C]`, keys and values `[B, M, C]`, bias `[B, 1, 1, M]` or None, to `[B, N, C]`."""
        thirds = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        query, key, value = (
            F.linear(x, weight, shift)
            for x, (weight, shift) in zip((query, key, value), thirds, strict=True)
        )
        return self.out_proj(attend(query, key, value, bias, self.heads))


class Resizer(nn.Module):
    """What the text encoder gave becomes tokens of the encoder: a linear layer and a norm."""

    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(hidden, dim)
        self.layer_norm = nn.LayerNorm(dim, eps=RESIZER_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, text_hidden]` to `[B, L, C]`."""
        return self.layer_norm(self.fc(x))


class Roberta(nn.Module):
    """RoBERTa (arXiv 1907.11692) without a task."""

    def __init__(self, embeddings: Embeddings, layers: Sequence[BertLayer], pooler: Pooler) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.pooler = pooler  # held for its names, and never called

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids `[B, L]`, mask `[B, L]`, 1 at words, to hidden states `[B, L, C]`.

        Words are counted from 2; padding, known by its id, is not counted and has place 1.
        """
        words = (ids != ROBERTA_PADDING).long()
        x = self.embeddings(ids, words.cumsum(1) * words + ROBERTA_PADDING)
        bias = hold_back(mask.to(x.dtype))
        layers = self.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        for layer in layers:
            x = layer(x, bias)
        return x


class BoxHead(nn.Module):
    """Three linear layers with a ReLU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, BOX)])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Q, C]` to `[B, Q, 4]`, before the sigmoid."""
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))


def hold_back(mask: Tensor) -> Tensor:
    """What is added to the scores, `[B, 1, 1, N]`, for a mask `[B, N]` of 1 and 0.

    The lowest number stands for -inf: its softmax is as exactly zero, and a row of nothing but padding
    is a mean instead of no number.
    """
    floor = torch.finfo(mask.dtype).min
    return torch.zeros_like(mask).masked_fill(mask == 0, floor)[:, None, None, :]


def sine_positions(mask: Tensor, channels: int) -> Tensor:
    """Positions of the cells of a map, `[B, h * w, channels]` float32 (arXiv 2005.12872, appendix A.4).

    The first half of the channels is for the row, the second for the column. Channels 2i and 2i + 1 are
    the sine and cosine of `2 pi p / 10000^(2i / half)`, where p is the number of real cells so far over
    all real cells along that axis.

    Args:
        mask: `[B, h, w]`, 1 at real cells and 0 at padding.
        channels: A multiple of 4.
    """
    half = channels // 2
    powers = torch.arange(half, dtype=torch.float32, device=mask.device) // 2 * 2 / half
    waves = TEMPERATURE**powers
    real = mask.to(torch.float32)
    sides = []
    for axis in (1, 2):
        counted = real.cumsum(axis)
        ends = counted.narrow(axis, counted.shape[axis] - 1, 1)
        angles = (counted / (ends + CELL) * (2 * math.pi))[..., None] / waves
        sides.append(torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(3))
    return torch.cat(sides, dim=-1).flatten(1, 2)


def _init(module: nn.Module) -> None:
    """Linear layers start as in DETR."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)


def _require_waves(channels: int) -> None:
    """Hold the channels to the positions.

    Raises:
        UsageError: Rows and columns have no whole number of waves in them.
    """
    if channels % 4:
        raise UsageError(
            "the positions do not fit the channels: a sine and a cosine, for rows and for columns",
            where="d_model",
            wanted="a multiple of 4",
            found=channels,
        )


def _require_release(normalize_before: bool, pass_pos_and_query: bool) -> None:
    """Refuse what the release itself cannot run.

    Raises:
        UsageError: See the module's docstring.
    """
    if normalize_before or not pass_pos_and_query:
        raise UsageError(
            "MDETR's release cannot run with this option, so that there are no such weights",
            wanted="normalize_before false, pass_pos_and_query true",
            found=f"normalize_before {normalize_before}, pass_pos_and_query {pass_pos_and_query}",
        )
