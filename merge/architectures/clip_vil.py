"""CLIP-ViL's answering trunk, in the form that UniPT released: text and visual features to logits `[B, K]`.

One BERT (arXiv 1810.04805) reads the words of a question and the features of a picture as one sequence,
words first (Shen et al., arXiv 2107.06383, section 4). The names of the parameters are those of
https://github.com/Paranioar/UniPT, part CLIP-ViL (Diao et al., arXiv 2308.14316). The picture's trunk is not
part of it: the visual features come as they leave it, with a position embedding added where it has one.

Four choices of that release decide what its weights answer, and are kept:

- Padding is held back by -10000 on the scores, not by -inf. Visual tokens are never padding.
- Visual features are embedded without boxes. The layers of the boxes are held, and never called.
- The pooler is a linear layer on the first token, without a tanh.
- Every LayerNorm has an epsilon of 1e-12, and GELU is the one with erf.

Some modules compute nothing. They are seats: a forward hook there sees, and may replace, a value that
no layer of the release returns. Dropout is left out: a backbone is frozen and in eval mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UsageError
from ..inputs import Input

if TYPE_CHECKING:
    from collections.abc import Sequence

BERT = "lxrt_encoder.model.bert"
EPS = 1e-12
HELD_BACK = -10000.0  # added to the scores of padding
BOX = 4  # numbers that say where a box lies
INIT_STD = 0.02


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
        type_vocab_size: Rows of the table of token types, of which row 0 is used.
        length: Words of a question, padding included.
        visual_tokens: Visual features of a picture; 240 are a picture of 384 x 640 pixels.
        num_classes: Answers of the classifier; 0 for none.

    Attributes:
        inputs: `input_ids` `[B, length]`, `attention_mask` `[B, length]` and `visual_feats`
            `[B, visual_tokens, visual_feat_dim]`, in the order of `forward`.
        mask: Seat of the mask of all tokens, `[B, N]`, 1 or 0 in the model's dtype; N is `length +
            visual_tokens`. What it gives is what the attention heeds.
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
        visual_tokens: int = 240,
        num_classes: int = 3129,
    ) -> None:
        super().__init__()
        require_counts(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            l_layers=l_layers,
            visual_feat_dim=visual_feat_dim,
            vocab_size=vocab_size,
            max_position_embeddings=max_position_embeddings,
            type_vocab_size=type_vocab_size,
            length=length,
            visual_tokens=visual_tokens,
        )
        require_heads("num_attention_heads", num_attention_heads, hidden_size)
        require_room("length", length, max_position_embeddings)
        self.inputs = (
            Input("input_ids", (length,), "ids", high=vocab_size),
            Input("attention_mask", (length,), "mask"),
            Input("visual_feats", (visual_tokens, visual_feat_dim)),
        )
        self.num_features = hidden_size
        self.pretrained_cfg: dict[str, Any] = {"classifier": "logit_fc"}
        self.mask = nn.Identity()
        self.joint = nn.Identity()
        self.features = nn.Identity()
        bert = Bert(
            Embeddings(vocab_size, max_position_embeddings, type_vocab_size, hidden_size, EPS),
            Encoder(
                VisualEmbedding(visual_feat_dim, hidden_size),
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

    def forward_features(
        self, input_ids: Tensor, attention_mask: Tensor, visual_feats: Tensor
    ) -> Tensor:
        """The last hidden state `[B, N, C]`; see `forward`.

        Raises:
            UsageError: An input has another shape than the backbone was created for.
        """
        require_shapes(self.inputs, (input_ids, attention_mask, visual_feats))
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        words = self.bert.embeddings(input_ids, places)
        visual = self.bert.encoder.visn_fc(visual_feats)
        real = torch.cat([attention_mask.to(words.dtype), torch.ones_like(visual[..., 0])], dim=1)
        bias = (1.0 - self.mask(real)) * HELD_BACK
        x = self.joint(torch.cat([words, visual], dim=1))
        return self.features(self.bert.encoder(x, bias[:, None, None, :]))

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of a hidden state `[B, N, C]`."""
        return self.logit_fc(self.bert.pooler(x))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, visual_feats: Tensor) -> Tensor:
        """Logits `[B, K]`.

        Args:
            input_ids: `[B, length]` int64.
            attention_mask: `[B, length]`, 1 at words and 0 at padding, of any dtype.
            visual_feats: `[B, visual_tokens, visual_feat_dim]`.

        Raises:
            UsageError: An input has another shape than the backbone was created for.
        """
        return self.forward_head(self.forward_features(input_ids, attention_mask, visual_feats))


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
        self, visual: VisualEmbedding, layers: int, dim: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.visn_fc = visual
        self.layer = nn.ModuleList(BertLayer(dim, heads, hidden, EPS) for _ in range(layers))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to tokens; `bias` `[B, 1, 1, N]` is added to the scores of the keys."""
        for layer in self.layer:
            x = layer(x, bias)
        return x


class VisualEmbedding(nn.Module):
    """Visual features become tokens: a linear layer and a norm."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.visn_fc = nn.Linear(features, dim)
        self.visn_layer_norm = nn.LayerNorm(dim, eps=EPS)
        self.box_fc = nn.Linear(BOX, dim)  # held for their names; there are no boxes
        self.box_layer_norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, features: Tensor) -> Tensor:
        """Features `[B, Nv, F]` to tokens `[B, Nv, C]`."""
        return self.visn_layer_norm(self.visn_fc(features))


class Embeddings(nn.Module):
    """A word, its place and its type, summed and normalised."""

    def __init__(self, words: int, places: int, types: int, dim: int, eps: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(words, dim)
        self.position_embeddings = nn.Embedding(places, dim)
        self.token_type_embeddings = nn.Embedding(types, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=eps)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """Ids `[B, N]` at places `[N]` or `[B, N]`, all of type 0, to tokens `[B, N, C]`."""
        x = self.word_embeddings(ids) + self.position_embeddings(places)
        return self.LayerNorm(x + self.token_type_embeddings.weight[0])


class BertLayer(nn.Module):
    """Attention, then an mlp, each added to its input and normalised behind the sum."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.attention = BertAttention(dim, heads, eps)
        self.intermediate = Intermediate(dim, hidden)
        self.output = Output(hidden, dim, eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to tokens; `bias` `[B, 1, 1, N]` is added to the scores of the keys."""
        x = self.attention(x, bias)
        return self.output(self.intermediate(x), x)


class BertAttention(nn.Module):
    """Attention of every token to every token, and the sum behind it."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.self = SelfAttention(dim, heads)
        self.output = Output(dim, dim, eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to tokens."""
        return self.output(self.self(x, bias), x)


class SelfAttention(nn.Module):
    """Scaled dot product attention in heads, before the layer that mixes them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to what their heads gathered, side by side `[B, N, C]`."""
        return attend(self.query(x), self.key(x), self.value(x), bias, self.heads)


class Intermediate(nn.Module):
    """The first half of an mlp."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to `[B, N, hidden]`."""
        return F.gelu(self.dense(x))


class Output(nn.Module):
    """A linear layer, the sum with what the sublayer read, and the norm behind it."""

    def __init__(self, hidden: int, dim: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        """`[B, N, hidden]` and tokens `[B, N, C]` to tokens."""
        return self.LayerNorm(self.dense(x) + read)


class Pooler(nn.Module):
    """A linear layer on the first token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to `[B, C]`."""
        return self.dense(x[:, 0])


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Scaled dot product attention in heads.

    Args:
        query: `[B, N, C]`.
        key: `[B, M, C]`.
        value: `[B, M, C]`.
        bias: `[B, 1, 1, M]`, added to the scores of every query and head, or None.
        heads: Their number; they lie side by side in the channels.

    Returns:
        `[B, N, C]`.
    """
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    if bias is not None:  # ONNX Runtime's Attention takes no mask that all queries share
        bias = bias.expand(-1, -1, query.shape[2], -1)
    x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return x.transpose(1, 2).flatten(2)


def init_bert(module: nn.Module) -> None:
    """Linear layers and tables start as in BERT."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def require_counts(**counts: Any) -> None:
    """Hold every argument to be a number of something.

    Raises:
        UsageError: One is not a whole number of at least 1.
    """
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UsageError(
                "an argument of the backbone is not a number of something",
                where=name,
                wanted="a whole number, at least 1",
                found=count,
            )


def require_heads(name: str, heads: Any, channels: int) -> None:
    """Hold attention heads to the channels that they share.

    Raises:
        UsageError: They do not divide them.
    """
    require_counts(**{name: heads})
    if channels % heads:
        raise UsageError(
            "the heads of the backbone do not divide its channels",
            where=name,
            wanted=f"a divisor of {channels}",
            found=heads,
        )


def require_room(name: str, length: int, places: int) -> None:
    """Hold a text to the table of positions.

    Raises:
        UsageError: It is longer.
    """
    if length > places:
        raise UsageError(
            "the text is longer than the table of positions",
            where=name,
            wanted=f"at most {places}",
            found=length,
        )


def require_shapes(inputs: Sequence[Input], tensors: Sequence[Tensor]) -> None:
    """Hold the tensors of one pass to what the backbone was created for.

    Raises:
        UsageError: One has another shape, apart from the batch axis.
    """
    for given, tensor in zip(inputs, tensors, strict=True):
        if tensor.dim() != len(given.shape) + 1 or tuple(tensor.shape[1:]) != given.shape:
            raise UsageError(
                "an input does not have the shape that the backbone was created for",
                where=given.name,
                wanted=f"[B, {', '.join(map(str, given.shape))}]",
                found=list(tensor.shape),
                do="pad it, or create the backbone for this shape",
            )
