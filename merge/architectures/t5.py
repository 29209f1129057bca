"""T5: token ids of a question and of the answer so far to the logits of every next word, `[B, M, V]`.

The layers and the names of their parameters are transformers' (`T5ForConditionalGeneration`). Raffel et al.,
arXiv 1910.10683; version 1.1 and FLAN-T5 differ by arguments. What differs from transformers:

- The table of words, `shared`, is kept once. It is read once, for question and answer together, and
  `embed_tokens` of encoder and decoder are seats where its rows enter.
- A block gives its tokens alone. In float16, transformers also clips what overflowed; here it does not.

Dropout is left out: a backbone is frozen and in eval mode. In float64, transformers takes the variances of
its norms in float32, and so does this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from ..errors import UsageError
from ..inputs import Input, require_rows
from .arguments import require_sizes
from .head import classifier
from .huggingface import ATTENTION, require_activation

if TYPE_CHECKING:
    from transformers.models.t5.modeling_t5 import T5Stack


class T5(nn.Module):
    """A T5; the defaults are t5-base.

    Seats, modules that forward what they are called with: `memory_mask` (`[B, N]` real numbers, 1 at valid
    tokens of the question), `side_memory` (the encoder's last hidden state `[B, N, C]`, behind its norm; the
    decoder reads the same and not what this seat gives), `features` (the decoder's, `[B, M, C]`), and
    `encoder.embed_tokens` and `decoder.embed_tokens`.

    Args:
        length: Tokens N of a question, padding among them.
        answer_length: Tokens M of an answer, the first of them the start token.
        num_classes: 0 for the published `lm_head`, whose logits go through `head`, an identity. Another
            number has `head`, a linear layer, read `features` instead of it.
        vocab_size: Rows V of the table of words.
        d_model: Channels C.
        d_kv: Channels of an attention head.
        d_ff: Hidden channels of each mlp.
        num_layers: Blocks of the encoder.
        num_decoder_layers: Of the decoder; None for as many.
        num_heads: Attention heads of each block.
        relative_attention_num_buckets: Rows of the tables of distances.
        relative_attention_max_distance: Distances from here on share a row.
        layer_norm_epsilon: Of every norm.
        feed_forward_proj: The mlp's activation, by transformers' name, behind `gated-` if it is gated.
        tie_word_embeddings: `lm_head` is the table of words, and no tensor of its own.
        scale_decoder_outputs: `features` are multiplied by `d_model ** -0.5` in front of `lm_head`.

    Raises:
        UsageError: An argument is out of range.
    """

    causal: Tensor  # [1, 1, M, M] bool: what each token of an answer attends to

    def __init__(
        self,
        length: int = 64,
        answer_length: int = 8,
        num_classes: int | None = 0,
        vocab_size: int = 32128,
        d_model: int = 768,
        d_kv: int = 64,
        d_ff: int = 3072,
        num_layers: int = 12,
        num_decoder_layers: int | None = None,
        num_heads: int = 12,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        layer_norm_epsilon: float = 1e-6,
        feed_forward_proj: str = "relu",
        tie_word_embeddings: bool = True,
        scale_decoder_outputs: bool = True,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "d_kv": d_kv,
            "d_ff": d_ff,
            "num_layers": num_layers,
            "num_decoder_layers": num_layers if num_decoder_layers is None else num_decoder_layers,
            "num_heads": num_heads,
            "relative_attention_num_buckets": relative_attention_num_buckets,
            "relative_attention_max_distance": relative_attention_max_distance,
        }
        require_sizes(length=length, answer_length=answer_length, **sizes)
        require_activation("feed_forward_proj", feed_forward_proj.removeprefix("gated-"))
        _require_buckets(relative_attention_num_buckets, relative_attention_max_distance)
        published = T5ForConditionalGeneration(
            T5Config(
                **sizes,
                layer_norm_epsilon=layer_norm_epsilon,
                feed_forward_proj=feed_forward_proj,
                **ATTENTION,
            )
        )
        self.inputs = (
            Input("input_ids", (length,), "ids", high=vocab_size),
            Input("attention_mask", (length,), "mask"),
            Input("decoder_input_ids", (answer_length,), "ids", high=vocab_size),
        )
        self.pretrained_cfg: dict[str, Any] = {"classifier": "head"}
        self.num_features = d_model
        self.scale = d_model**-0.5 if scale_decoder_outputs else None
        self.shared = published.shared
        self.encoder = Stack(published.encoder, length)
        self.decoder = Stack(published.decoder, answer_length)
        self.memory_mask = nn.Identity()
        self.side_memory = nn.Identity()
        self.features = nn.Identity()
        self.lm_head = None if tie_word_embeddings else nn.Linear(d_model, vocab_size, bias=False)
        self.head = classifier(d_model, num_classes or 0)
        causal = torch.ones(answer_length, answer_length, dtype=torch.bool).tril()[None, None]
        self.register_buffer("causal", causal, persistent=False)

    @property
    def hidden_states(self) -> tuple[str, ...]:
        """Paths of the modules whose outputs are the encoder's hidden states; the last is behind the norm."""
        return _states("encoder", self.encoder)

    @property
    def decoder_hidden_states(self) -> tuple[str, ...]:
        """The same of the decoder."""
        return _states("decoder", self.decoder)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> Tensor:
        """Logits `[B, M, V]`, or `[B, M, K]` with classes.

        Args:
            input_ids: `[B, N]` int64.
            attention_mask: `[B, N]` int64, 1 at valid tokens, of which every row has one, and 0 at padding.
            decoder_input_ids: `[B, M]` int64.

        Raises:
            UsageError: They have another length.
        """
        require_rows(self.inputs, (input_ids, attention_mask, decoder_input_ids))
        question = input_ids.shape[1]
        words = self.shared(torch.cat([input_ids, decoder_input_ids], dim=1))
        self.memory_mask(attention_mask.to(words.dtype))
        attended = (attention_mask != 0)[:, None, None, :]
        floor = torch.finfo(words.dtype).min
        scores = torch.where(attended, self.encoder.distances(), floor)
        memory = self.encoder(words[:, :question], scores)
        self.side_memory(memory)
        scores = torch.where(self.causal, self.decoder.distances(), floor)
        padding = torch.where(attended, words.new_zeros(()), floor)
        padding = padding.expand(-1, 1, decoder_input_ids.shape[1], question)
        x = self.decoder(words[:, question:], scores, memory, padding)
        x = self.features(x)
        if isinstance(self.head, nn.Identity):
            x = x if self.scale is None else x * self.scale
            x = x @ self.shared.weight.mT if self.lm_head is None else self.lm_head(x)
        return self.head(x)


class Stack(nn.Module):
    """Blocks and a norm: the encoder, or the decoder, which also reads what the encoder gave.

    Args:
        stack: transformers', with its initial weights.
        length: Tokens N.
    """

    buckets: Tensor  # [N, N] int64, rows of the table of distances

    def __init__(self, stack: T5Stack, length: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Identity()
        self.block = nn.ModuleList(Block(block.layer) for block in stack.block)  # pyright: ignore[reportArgumentType]
        self.final_layer_norm = stack.final_layer_norm
        position = torch.arange(length)
        buckets = T5Attention._relative_position_bucket(
            position[None, :] - position[:, None],
            bidirectional=not stack.is_decoder,
            num_buckets=stack.config.relative_attention_num_buckets,
            max_distance=stack.config.relative_attention_max_distance,
        )
        self.register_buffer("buckets", buckets, persistent=False)

    def distances(self) -> Tensor:
        """What distances add to the scores of every block, `[1, heads, N, N]`; the first one holds the table."""
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias  # pyright: ignore
        return table(self.buckets).permute(2, 0, 1)[None]

    def forward(
        self,
        x: Tensor,
        scores: Tensor,
        memory: Tensor | None = None,
        memory_scores: Tensor | None = None,
    ) -> Tensor:
        """Tokens `[B, N, C]` to tokens.

        Args:
            x: Rows of the table of words.
            scores: Added to those of the blocks' attentions, `[B or 1, heads, N, N]`.
            memory: The encoder's tokens `[B, N', C]`.
            memory_scores: Added to the scores of the attentions to them, `[B, 1, N, N']`.
        """
        x = self.embed_tokens(x)
        for block in self.block:
            x = block(x, scores, memory, memory_scores)
        return self.final_layer_norm(x)


class Block(nn.Module):
    """The layers of transformers' block: attention, in a decoder attention to the memory, and an mlp."""

    def __init__(self, layer: nn.ModuleList) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, x: Tensor, scores: Tensor, memory: Tensor | None, memory_scores: Tensor | None
    ) -> Tensor:
        """Tokens `[B, N, C]` to tokens; see `Stack.forward`."""
        x, *_ = self.layer[0](x, None, scores, is_causal=False)  # `scores` say what is causal
        if memory is not None:
            x, *_ = self.layer[1](x, memory, None, memory_scores)
        return self.layer[-1](x)


def _states(name: str, stack: Stack) -> tuple[str, ...]:
    inner = (f"{name}.block.{number}" for number in range(len(stack.block) - 1))
    return (f"{name}.embed_tokens", *inner, f"{name}.final_layer_norm")


def _require_buckets(buckets: int, distance: int) -> None:
    """Of the rows half are for either direction, and half of those for single distances."""
    if buckets < 4 or distance <= buckets // 2:
        raise UsageError(
            "the table of distances cannot be divided",
            where="relative_attention_num_buckets",
            wanted="at least 4, and relative_attention_max_distance above half of them",
            found=f"{buckets} and {distance}",
        )
