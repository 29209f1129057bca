"""CLIP-ViL's answering trunk, in the form that UniPT released: text and visual features to logits `[B, K]`.

One BERT (arXiv 1810.04805) reads the words of a question and the features of a picture as one sequence,
words first (Shen et al., arXiv 2107.06383, section 4). The names of the parameters are those of
https://github.com/Paranioar/UniPT, part CLIP-ViL (Diao et al., arXiv 2308.14316). The picture's trunk is not
part of it: the visual features come as they leave it, in one of three forms. The released scripts have a
`map`, whose cells get learned positions along both axes; `tokens` have none, or brought them along; `boxes`
are tokens with the place of each in the picture.

Four choices of that release decide what its weights answer, and are kept:

- Padding is held back by -10000 on the scores, not by -inf. Visual tokens are padding only where a mask of
  them says so.
- The embedding of a feature with a box is the mean of two: the feature's and the box's, each normalised.
- The pooler is a linear layer on the first token, without a tanh.
- Every LayerNorm has an epsilon of 1e-12, and GELU is the one with erf.

Some modules compute nothing. They are seats: a forward hook there sees, and may replace, a value that
no layer of the release returns. Dropout is left out: a backbone is frozen and in eval mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ..inputs import Input, require_rows
from .arguments import (
    require_choice,
    require_heads,
    require_lengths,
    require_room,
    require_sizes,
)
from .bert_layers import BertLayer, Embeddings, Pooler, init_bert

if TYPE_CHECKING:
    from collections.abc import Sequence

BERT = "lxrt_encoder.model.bert"
EPS = 1e-12
HELD_BACK = -10000.0  # added to the scores of padding
BOX = 4  # numbers that say where a box lies


class ClipVil(nn.Module):
    """A BERT over words and visual features; the defaults are CLIP-ViL on VQA with a CLIP RN50x4.

    Masks are 1 at what is real and 0 at padding. The first token is never padding.

    Args:
        hidden_size: Channels of a token.
        num_attention_heads: Heads of every attention.
        intermediate_size: Hidden width of every mlp.
        l_layers: Layers.
        visual_feat_dim: Channels of a visual feature.
        vocab_size: Rows of the table of words.
        max_position_embeddings: Rows of the table of positions.
        type_vocab_size: Rows of the table of token types, of which row 0 is used where no types are given.
        length: Words of a question, padding included.
        visual: What stands for the picture: `tokens`, `boxes` or `map`.
        visual_tokens: Visual features of a picture, of `tokens` and `boxes`; 240 are a picture of 384 x 640
            pixels.
        map_size: Lengths of the two axes of a `map`; its cells, first axis outermost, are the visual features.
        map_positions: Rows of the two tables of positions of a `map`.
        visual_mask: A mask says which visual features are real; it may have holes.
        token_types: Every word comes with its type.
        num_classes: Answers of the classifier; 0 for none.

    Attributes:
        inputs: `input_ids` and `attention_mask` `[B, length]`; `visual_feats` `[B, visual_tokens,
            visual_feat_dim]`, or `visual_map` `[B, visual_feat_dim, *map_size]`; and where they are asked
            for `boxes` `[B, visual_tokens, 4]`, `visual_mask` `[B, Nv]` and `token_type_ids` `[B, length]`.
        mask: Seat of the mask of all tokens, `[B, N]`, 1 or 0 in the model's dtype; N is `length + Nv`.
            What it gives is what the attention heeds.
        joint: Seat of the embedded tokens `[B, N, C]`, in front of the first layer.
        features: Seat of what the last layer gave, `[B, N, C]`, in front of the pooler.
        logit_fc: The classifier. The release has none that is frozen: a task brings its own.

    Raises:
        UsageError: An argument is out of range.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        l_layers: int = 12,
        visual_feat_dim: int = 2560,
        vocab_size: int = 30522,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        length: int = 20,
        visual: Literal["tokens", "boxes", "map"] = "tokens",
        visual_tokens: int = 240,
        map_size: Sequence[int] = (12, 20),
        map_positions: int = 25,
        visual_mask: bool = False,
        token_types: bool = False,
        num_classes: int = 3129,
    ) -> None:
        super().__init__()
        require_sizes(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            l_layers=l_layers,
            visual_feat_dim=visual_feat_dim,
            vocab_size=vocab_size,
            max_position_embeddings=max_position_embeddings,
            type_vocab_size=type_vocab_size,
            length=length,
            visual_tokens=visual_tokens,
            map_positions=map_positions,
        )
        require_heads("num_attention_heads", num_attention_heads, hidden_size)
        require_room("length", length, max_position_embeddings)
        require_choice("visual", visual, ("tokens", "boxes", "map"))
        inputs = [
            Input("input_ids", (length,), "ids", high=vocab_size),
            Input("attention_mask", (length,), "mask"),
        ]
        positions = None
        if visual == "map":
            first, second = require_lengths("map_size", map_size)
            require_room("map_size", max(first, second), map_positions)
            visual_tokens = first * second
            positions = VisualPositions(map_positions, visual_feat_dim)
            inputs.append(Input("visual_map", (visual_feat_dim, first, second)))
        else:
            inputs.append(Input("visual_feats", (visual_tokens, visual_feat_dim)))
        if visual == "boxes":
            inputs.append(Input("boxes", (visual_tokens, BOX)))
        if visual_mask:
            inputs.append(Input("visual_mask", (visual_tokens,), "mask"))
        if token_types:
            inputs.append(Input("token_type_ids", (length,), "ids", high=type_vocab_size))
        self.inputs = tuple(inputs)
        self.num_features = hidden_size
        self.pretrained_cfg: dict[str, Any] = {"classifier": "logit_fc"}
        self.mask = nn.Identity()
        self.joint = nn.Identity()
        self.features = nn.Identity()
        bert = Bert(
            Embeddings(vocab_size, max_position_embeddings, type_vocab_size, hidden_size, EPS),
            Encoder(
                VisualEmbedding(visual_feat_dim, hidden_size),
                positions,
                l_layers,
                hidden_size,
                num_attention_heads,
                intermediate_size,
            ),
            Pooler(hidden_size),
        )
        self.lxrt_encoder = nn.ModuleDict({"model": nn.ModuleDict({"bert": bert})})
        self.logit_fc = nn.Linear(hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(init_bert)

    @property
    def bert(self) -> Bert:
        """Everything between the inputs and the classifier."""
        return cast("Bert", self.get_submodule(BERT))

    @property
    def hidden_states(self) -> tuple[str, ...]:
        """Modules whose outputs `[B, N, C]` are the hidden states: the embedding, then every layer."""
        layers = range(len(self.bert.encoder.layer))
        return ("joint", *(f"{BERT}.encoder.layer.{number}" for number in layers))

    def forward_features(self, *tensors: Tensor) -> Tensor:
        """The last hidden state `[B, N, C]`; see `forward`.

        Raises:
            UsageError: An input has another shape than the backbone was created for.
        """
        require_rows(self.inputs, tensors)
        given = {own.name: tensor for own, tensor in zip(self.inputs, tensors, strict=True)}
        ids, encoder = given["input_ids"], self.bert.encoder
        places = torch.arange(ids.shape[1], device=ids.device)
        words = self.bert.embeddings(ids, places, given.get("token_type_ids"))
        if encoder.visual_pos is None:
            feats = given["visual_feats"]
        else:
            feats = encoder.visual_pos(given["visual_map"]).flatten(2).mT
        visual = encoder.visn_fc(feats, given.get("boxes"))
        real = [given["attention_mask"], given.get("visual_mask", torch.ones_like(visual[..., 0]))]
        mask = self.mask(torch.cat([m.to(words.dtype) for m in real], dim=1))
        bias = (1.0 - mask) * HELD_BACK
        x = self.joint(torch.cat([words, visual], dim=1))
        return self.features(encoder(x, bias[:, None, None, :]))

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of a hidden state `[B, N, C]`."""
        return self.logit_fc(self.bert.pooler(x))

    def forward(self, *tensors: Tensor) -> Tensor:
        """Logits `[B, K]` of the tensors that `inputs` names, in that order; masks of any dtype.

        Raises:
            UsageError: An input has another shape than the backbone was created for.
        """
        return self.forward_head(self.forward_features(*tensors))


class Bert(nn.Module):
    """Holds the three parts under the names of the release; `ClipVil` runs them, seats between."""

    def __init__(self, embeddings: Embeddings, encoder: Encoder, pooler: Pooler) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = encoder
        self.pooler = pooler


class Encoder(nn.Module):
    """The layers, and the embedding of visual features that the release keeps beside them."""

    def __init__(
        self,
        visual: VisualEmbedding,
        positions: VisualPositions | None,
        layers: int,
        dim: int,
        heads: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.visn_fc = visual
        self.visual_pos = positions
        self.layer = nn.ModuleList(BertLayer(dim, heads, hidden, EPS) for _ in range(layers))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to tokens; `bias` `[B, 1, 1, N]` is added to the scores of the keys."""
        for layer in self.layer:
            x = layer(x, bias)
        return x


class VisualPositions(nn.Module):
    """Every cell of a map gets the sum of two positions, that along its first axis and that along its second."""

    def __init__(self, places: int, features: int) -> None:
        super().__init__()
        self.x_position_embedding = nn.Embedding(places, features)
        self.y_position_embedding = nn.Embedding(places, features)

    def forward(self, cells: Tensor) -> Tensor:
        """A map `[B, F, X, Y]` to one with positions."""
        first = self.x_position_embedding.weight[: cells.shape[2]].mT[:, :, None]
        second = self.y_position_embedding.weight[: cells.shape[3]].mT[:, None, :]
        return cells + (first + second)


class VisualEmbedding(nn.Module):
    """Visual features become tokens: a linear layer and a norm, and the same of their boxes."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.visn_fc = nn.Linear(features, dim)
        self.visn_layer_norm = nn.LayerNorm(dim, eps=EPS)
        self.box_fc = nn.Linear(BOX, dim)  # held for their names where there are no boxes
        self.box_layer_norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, features: Tensor, boxes: Tensor | None) -> Tensor:
        """Features `[B, Nv, F]`, and boxes `[B, Nv, 4]` or None, to tokens `[B, Nv, C]`."""
        x = self.visn_layer_norm(self.visn_fc(features))
        return x if boxes is None else (x + self.box_layer_norm(self.box_fc(boxes))) / 2
