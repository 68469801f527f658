"""Masked tokens decoded from absolute positions: the second technique of DeBERTa's paper, for Hugging Face's models.

DeBERTa's layers see relative positions only. The enhanced mask decoder brings in absolute ones just before words are
predicted: the last layer runs again, its queries being absolute positions, its keys and values what entered it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deberta_kernels.models.anatomy import anatomy_of

__all__ = ["EnhancedMaskDecoder"]

_IGNORED = -100  # label of tokens that are not predicted


class EnhancedMaskDecoder(nn.Module):
    """A `DebertaV2ForMaskedLM` that learns to predict masked tokens from their absolute positions.

    With x what enters the last layer, f that layer and E the embedding of absolute positions:

        q_0 = x + E[position],   q_t+1 = f(queries q_t, keys and values x),   logits = head(q_steps).

    The queries are as many as the keys, so attention runs through the kernels when the model is patched. The only
    parameters beside the model's are E; fine-tuning on another task needs `decoder.model` alone.

    Args:
        model: `DebertaV2ForMaskedLM`, patched or not, in either of its two forms (`config.legacy`).
        steps: how often the last layer decodes.

    Raises:
        TypeError: model is not a masked language model of DeBERTa-v2.
        ValueError: steps is not positive, or the model has fewer than two layers.

    Source:
        arXiv:2006.03654, section 3.2; microsoft/DeBERTa at 10f237a, DeBERTa/apps/models/masked_language_model.py,
        emd_context_layer. There too, a model with position_biased_input=True predicts from its last layer as it is.
        Differences: E is as wide as the layers even where the word embeddings are not; labels use -100, as in Hugging
        Face's models, not 0.
    """

    def __init__(self, model: Any, steps: int = 2) -> None:
        super().__init__()
        self._check(model, steps)
        self.model: Any = model
        self.steps = steps
        config: Any = self.model.config
        self.position_embeddings: nn.Embedding | None = None
        if not config.position_biased_input:
            weight = next(model.parameters())
            self.position_embeddings = nn.Embedding(
                config.max_position_embeddings, config.hidden_size, dtype=weight.dtype, device=weight.device
            )
            nn.init.normal_(self.position_embeddings.weight, std=config.initializer_range)

    @staticmethod
    def _check(model: Any, steps: int) -> None:
        if not hasattr(model, "deberta") or not (hasattr(model, "cls") or hasattr(model, "lm_predictions")):
            raise TypeError(f"model must be a DebertaV2ForMaskedLM, got {type(model).__name__}; load the model as one.")
        if not all(anatomy_of(layer.attention.self).takes_queries for layer in model.deberta.encoder.layer):
            raise TypeError(f"model must be a DebertaV2ForMaskedLM, got DeBERTa v1's {type(model).__name__}.")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(
                f"steps must be an integer of at least 1, got {steps!r}; the released models were trained with 2."
            )
        if len(model.deberta.encoder.layer) < 2:
            raise ValueError("model must have at least two layers, got one; the decoder reads what enters the last.")

    def decode(self, hidden_states: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Run the last layer from absolute positions.

        Args:
            hidden_states: (B, N, hidden size), what enters the last layer.
            attention_mask: (B, N) or (B, N, N); not 0 = keep.
            position_ids: (B or 1, N) int64, absolute positions below `max_position_embeddings`; None counts from 0.

        Returns:
            (B, N, hidden size). Rows of padding are defined, and mean nothing.

        Raises:
            ValueError: there are more tokens than absolute positions, or the model has its positions in the input.
        """
        if self.position_embeddings is None:
            raise ValueError("decode needs absolute positions, and this model has them in its input already.")
        length, most = hidden_states.shape[1], self.position_embeddings.num_embeddings
        if position_ids is None:
            if length > most:
                raise ValueError(f"hidden_states must have at most {most} tokens, got {length}; pass position_ids.")
            position_ids = torch.arange(length, device=hidden_states.device)[None]
        encoder = self.model.deberta.encoder
        layer, rel_embeddings = encoder.layer[-1], encoder.get_rel_embedding()
        # Keys alone are masked: nothing of N x N elements, and queries that are padding are never read.
        mask = attention_mask[:, None, None, :] if attention_mask.dim() == 2 else attention_mask.unsqueeze(1)
        queries: Tensor = self.position_embeddings(position_ids) + hidden_states
        for _ in range(self.steps):
            # By position, as a reentrant checkpoint needs them; no relative_pos means ordinary distances.
            queries = layer(hidden_states, mask, queries, None, rel_embeddings, False)[0]
        return queries

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Predict tokens.

        Args:
            input_ids: (B, N) int64, with mask tokens; or None, and inputs_embeds.
            attention_mask: (B, N); not 0 = real token; None: all are.
            token_type_ids: as in Hugging Face's model.
            position_ids: as in `decode`.
            inputs_embeds: as in Hugging Face's model.
            labels: (B, N) int64, the token to predict, or -100; None: predict every token.

        Returns:
            `MaskedLMOutput`. Without labels, `logits` is (B, N, vocabulary). With labels, `loss` is the mean cross
            entropy over the L tokens that have one (0 when none has), and `logits` is (L, vocabulary), of these alone.
            float32 loss; logits have the dtype of the weights.

        Raises:
            ValueError: neither input_ids nor inputs_embeds is given, or there are more tokens than absolute positions.
        """
        from transformers.modeling_outputs import MaskedLMOutput

        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("input_ids or inputs_embeds must be given, got neither; pass one of them.")
        if attention_mask is None:
            attention_mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        states = self.model.deberta(
            input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds, output_hidden_states=True, return_dict=True,
        ).hidden_states  # fmt: skip
        if self.position_embeddings is None:
            decoded = states[-1]
        else:
            decoded = self.decode(states[-2], attention_mask, position_ids)
        if labels is None:
            return MaskedLMOutput(logits=self._predict(decoded))
        wanted = labels.flatten() != _IGNORED
        logits = self._predict(decoded.flatten(0, 1)[wanted])
        # A sum, so that a batch without labels has a loss of 0 and gradients, not NaN.
        loss = nn.functional.cross_entropy(logits.float(), labels.flatten()[wanted], reduction="sum")
        return MaskedLMOutput(loss=loss / wanted.sum().clamp_min(1), logits=logits)

    def _predict(self, states: Tensor) -> Tensor:
        if hasattr(self.model, "cls"):
            logits: Tensor = self.model.cls(states)
        else:
            logits = self.model.lm_predictions(states, self.model.deberta.embeddings.word_embeddings)
        return logits
