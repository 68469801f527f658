"""DeBERTa-v2's self-attention as a module of its own, to build models from or to put into one of Hugging Face's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deberta_kernels import dispatch
from deberta_kernels.models.attention import attend
from deberta_kernels.models.options import AttentionOptions
from deberta_kernels.models.standalone.configuration import check_configuration
from deberta_kernels.models.standalone.in_full import attend_in_full

__all__ = ["DisentangledSelfAttention"]


class DisentangledSelfAttention(nn.Module):
    """DeBERTa-v2's disentangled self-attention; a drop-in for Hugging Face's module of this name.

    Parameter names, state-dict keys and the signature of `forward` are Hugging Face's, and so are the answers: placed
    in a Hugging Face encoder it works as that one's own did. What no kernel computes runs in plain PyTorch, with one
    warning for each reason.

    Args:
        config: `DebertaV2Config`, or any object with its attributes.
        backend: "auto" or the name of a backend.

    Raises:
        TypeError: a field of the configuration has a wrong type.
        ValueError: a field of the configuration has a wrong value, or the backend is unknown.

    Source:
        transformers v5.23.0, models/deberta_v2/modeling_deberta_v2.py.
    """

    def __init__(self, config: Any, backend: str = "auto") -> None:
        super().__init__()
        dispatch.check_backend(backend)
        check_configuration(config)
        self.options = AttentionOptions(backend=backend)
        self.num_attention_heads = config.num_attention_heads
        default_size = config.hidden_size // config.num_attention_heads
        self.attention_head_size = getattr(config, "attention_head_size", default_size)
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.query_proj = nn.Linear(config.hidden_size, self.all_head_size)
        self.key_proj = nn.Linear(config.hidden_size, self.all_head_size)
        self.value_proj = nn.Linear(config.hidden_size, self.all_head_size)
        self.share_att_key = getattr(config, "share_att_key", False)
        self.pos_att_type = config.pos_att_type if config.pos_att_type is not None else []
        self.relative_attention = getattr(config, "relative_attention", False)
        if self.relative_attention:
            self._init_positions(config)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def _init_positions(self, config: Any) -> None:
        self.position_buckets = getattr(config, "position_buckets", -1)
        self.max_relative_positions = getattr(config, "max_relative_positions", -1)
        if self.max_relative_positions < 1:
            self.max_relative_positions = config.max_position_embeddings
        self.pos_ebd_size = self.position_buckets if self.position_buckets > 0 else self.max_relative_positions
        self.pos_dropout = nn.Dropout(config.hidden_dropout_prob)
        if not self.share_att_key:
            if "c2p" in self.pos_att_type:
                self.pos_key_proj = nn.Linear(config.hidden_size, self.all_head_size)
            if "p2c" in self.pos_att_type:
                self.pos_query_proj = nn.Linear(config.hidden_size, self.all_head_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: (B, N, hidden size), dtype of the weights; keys and values.
            attention_mask: broadcastable to (B, H, N, N), any dtype, not 0 = keep: (B, 1, 1, N) for keys,
                (B, 1 or H, N, N) for pairs; None masks nothing.
            output_attentions: also return the probabilities, which plain PyTorch computes.
            query_states: (B, N, hidden size), the queries; None: hidden_states.
            relative_pos: None for ordinary distances; other integers, (N, N) to (1, H, N, N), in plain PyTorch.
            rel_embeddings: (2 * att_span, hidden size), dtype of the weights; None without relative attention only.

        Returns:
            (context, probabilities): context is (B, N, H * D), dtype of the weights; probabilities is None unless asked
            for, else (B, H, N, N).

        Raises:
            ValueError: a tensor has a wrong shape or device.
            TypeError: a tensor has a wrong dtype.
        """
        return attend(
            self, self.options, attend_in_full, hidden_states, attention_mask, output_attentions, query_states,
            relative_pos, rel_embeddings,
        )  # fmt: skip
