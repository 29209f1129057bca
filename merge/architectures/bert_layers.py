"""BERT's layers (arXiv 1810.04805) under BERT's names, for trunks that are more than a BERT.

`bert` itself runs those of transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

INIT_STD = 0.02


class Embeddings(nn.Module):
    """A word, its place and its type, summed and normalised."""

    def __init__(self, words: int, places: int, types: int, dim: int, eps: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(words, dim)
        self.position_embeddings = nn.Embedding(places, dim)
        self.token_type_embeddings = nn.Embedding(types, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=eps)

    def forward(self, ids: Tensor, places: Tensor, types: Tensor | None = None) -> Tensor:
        """Ids `[B, N]` at places `[N]` or `[B, N]`, of types `[B, N]` or all of type 0, to tokens `[B, N, C]`."""
        x = self.word_embeddings(ids) + self.position_embeddings(places)
        table = self.token_type_embeddings
        return self.LayerNorm(x + (table.weight[0] if types is None else table(types)))


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
