"""BERT and RoBERTa, without their pooling layer: token ids `[B, N]` to logits `[B, K]`.

The layers and the names of their parameters are transformers' (`BertModel`, `RobertaModel`), under the prefix
`bert.` for both families. Devlin et al., arXiv 1810.04805; Liu et al., arXiv 1907.11692. All tokens are of
type 0, and the mean over valid tokens is what is classified.

Dropout is left out: a backbone is frozen and in eval mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from ..errors import UsageError
from ..inputs import Input, require_rows
from .arguments import require_heads, require_room, require_sizes
from .head import classifier, masked_mean
from .huggingface import ATTENTION, require_activation

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES: dict[str, tuple[Any, Any]] = {
    "bert": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaModel),
}
PUBLISHED: dict[str, dict[str, Any]] = {  # where bert-base-uncased and roberta-base differ
    "bert": {
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    },
    "roberta": {
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
    },
}


class Bert(nn.Module):
    """A BERT or a RoBERTa; the defaults are bert-base-uncased, or roberta-base.

    Seats, modules that forward what they are called with: `mask` (`[B, N]` real numbers, 1 at valid tokens),
    `features` (the last hidden state `[B, N, C]`), `pooled` (its mean over valid tokens, `[B, C]`).

    Args:
        family: `bert` or `roberta`. They differ in the numbering of positions: RoBERTa counts the tokens that
            are not `pad_token_id`, from one above it.
        length: Tokens of a row, padding among them.
        num_classes: Classes of the classifier; 0 for none.
        vocab_size: Rows of the table of words; None for the published one, as with every other None.
        hidden_size: Channels C.
        num_hidden_layers: Layers.
        num_attention_heads: Attention heads of each layer.
        intermediate_size: Hidden channels of each mlp.
        hidden_act: The mlp's activation, by transformers' name.
        max_position_embeddings: Rows of the table of positions.
        type_vocab_size: Rows of the table of types.
        layer_norm_eps: Of every LayerNorm.
        pad_token_id: The token that is padding.

    Raises:
        UsageError: An argument is out of range.
    """

    token_type_ids: Tensor  # [1, N] int64 zeros

    def __init__(
        self,
        family: str = "bert",
        length: int = 32,
        num_classes: int = 0,
        vocab_size: int | None = None,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        max_position_embeddings: int | None = None,
        type_vocab_size: int | None = None,
        layer_norm_eps: float | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        super().__init__()
        if family not in FAMILIES:
            raise UsageError("there is no such family", wanted=sorted(FAMILIES), found=repr(family))
        given = {
            "vocab_size": vocab_size,
            "max_position_embeddings": max_position_embeddings,
            "type_vocab_size": type_vocab_size,
            "layer_norm_eps": layer_norm_eps,
            "pad_token_id": pad_token_id,
        }
        given = PUBLISHED[family] | {n: v for n, v in given.items() if v is not None}
        sizes = {
            "vocab_size": given["vocab_size"],
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "intermediate_size": intermediate_size,
            "max_position_embeddings": given["max_position_embeddings"],
            "type_vocab_size": given["type_vocab_size"],
        }
        require_sizes(length=length, **sizes)
        require_heads("num_attention_heads", num_attention_heads, hidden_size)
        require_activation("hidden_act", hidden_act)
        _require_padding(given["pad_token_id"], given["vocab_size"])
        first = given["pad_token_id"] + 1 if family == "roberta" else 0
        require_room("length", length, given["max_position_embeddings"] - first)
        config, trunk = FAMILIES[family]
        config = config(**sizes | given, hidden_act=hidden_act, **ATTENTION)
        self.inputs = (
            Input("input_ids", (length,), "ids", high=given["vocab_size"]),
            Input("attention_mask", (length,), "mask"),
        )
        self.pretrained_cfg: dict[str, Any] = {"classifier": "head"}
        self.num_features = hidden_size
        self.bert = trunk(config, add_pooling_layer=False)
        self.mask = nn.Identity()
        self.features = nn.Identity()
        self.pooled = nn.Identity()
        self.head = classifier(hidden_size, num_classes)
        types = torch.zeros(1, length, dtype=torch.int64)
        self.register_buffer("token_type_ids", types, persistent=False)

    @property
    def hidden_states(self) -> tuple[str, ...]:
        """Paths of the modules whose outputs are the hidden states, embeddings first."""
        layers = range(len(self.bert.encoder.layer))
        return ("bert.embeddings", *(f"bert.encoder.layer.{number}" for number in layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[B, K]`.

        Args:
            input_ids: `[B, N]` int64.
            attention_mask: `[B, N]` int64, 1 at valid tokens, of which every row has one, and 0 at padding.

        Raises:
            UsageError: They have another length.
        """
        require_rows(self.inputs, (input_ids, attention_mask))
        words = self.bert.embeddings.word_embeddings
        mask = self.mask(attention_mask.to(words.weight.dtype))
        length = input_ids.shape[1]
        attended = (attention_mask != 0)[:, None, None, :].expand(-1, 1, length, length)
        x = self.bert.embeddings(input_ids, self.token_type_ids)
        for layer in self.bert.encoder.layer:
            x = layer(x, attended)
        x = self.features(x)
        return self.head(self.pooled(masked_mean(x, mask)))


def _require_padding(token: Any, words: int) -> None:
    if type(token) is not int or not 0 <= token < words:
        raise UsageError(
            "pad_token_id is no word of the table", wanted=f"0 to {words - 1}", found=repr(token)
        )
