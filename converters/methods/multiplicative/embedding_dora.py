"""DoRA on an embedding: `W = m ⊙ (W0 + s · (BA)ᵀ) / ‖W0 + s · (BA)ᵀ‖`, a magnitude for each of its dimensions.

An embedding is (vocabulary, in), A (r, vocabulary), B (in, r). The norms are those of its columns, over the whole
vocabulary: it is DoRA of a linear layer whose weight is stored transposed. Source: HF PEFT's
`peft/tuners/lora/dora.py` (`DoraEmbeddingLayer`).
"""

from dataclasses import dataclass

from converters.methods.multiplicative.dora import Dora


@dataclass(frozen=True, eq=False)
class EmbeddingDora(Dora):
    """θ of one embedding: A (r, vocabulary), B (in, r), m (in,)."""

    name = "dora-embedding"
    formula = (
        "`W = m ⊙ (W0 + s·(B·A)ᵀ) / ‖W0 + s·(B·A)ᵀ‖`, by columns (DoRA on an embedding, "
        "[arXiv 2402.09353](https://arxiv.org/abs/2402.09353))"
    )
    remark = "A tied output head is untied, as in PEFT"
    peft = None  # PEFT saves it beside linear layers: `converters/adapters/layouts/peft_parts/embeddings.py`

    is_transposed: bool = True

    @property
    def full_rank_reason(self) -> str:
        """See `WeightDelta.full_rank_reason`."""
        return "is of an embedding, and the lora format is for linear layers"
