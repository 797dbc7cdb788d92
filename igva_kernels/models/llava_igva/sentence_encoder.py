"""Instructions as text: a frozen sentence-transformers model, shared by every model and processor that names it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def encode_sentences(encoder: str | None, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """Sentence embeddings ``[len(texts), E]`` in fp32, without a gradient.

    Args:
        encoder: name or directory of a sentence-transformers model; it is loaded once per process.
        texts: the bare instructions, without a chat template or image tokens, as IGVA's authors embed them.
        device: where the encoder runs and the embeddings end up.

    Raises:
        ValueError: ``encoder`` is None.
        TypeError: ``texts`` is a string, not a sequence of them.
        ImportError: sentence-transformers is not installed.
    """
    if encoder is None:
        raise ValueError("sentence_encoder: instructions given as text need the name of an encoder, got None")
    if isinstance(texts, str):
        raise TypeError(f"instructions: need a sequence of strings, one per sample, got the string {texts!r}")
    embeds = _load(encoder).encode(list(texts), convert_to_tensor=True, show_progress_bar=False, device=str(device))
    return embeds.float().clone()  # the encoder returns inference tensors, which autograd cannot save


def encode_instructions(
    encoder: str | None, instructions: Sequence[str | Sequence[str]], device: torch.device | str = "cpu"
) -> Tensor:
    """One embedding per sample ``[B, E]`` in fp32: of its instruction, or the mean over several of them.

    Args:
        encoder: as in ``encode_sentences``.
        instructions: one bare instruction per sample, or a list of them; zeros stand for an empty list.
        device: where the encoder runs and the embeddings end up.

    Raises:
        ValueError: there is no instruction at all; and as in ``encode_sentences``.
        TypeError, ImportError: as in ``encode_sentences``.
    """
    samples = [[sample] if isinstance(sample, str) else list(sample) for sample in instructions]
    texts = list(dict.fromkeys(text for sample in samples for text in sample))
    if not texts:
        raise ValueError(f"instructions: need one per sample, got none for {len(samples)} samples")
    row = {text: i for i, text in enumerate(texts)}
    embeds = encode_sentences(encoder, texts, device)
    return torch.stack([embeds[[row[text] for text in sample]].sum(dim=0) / max(len(sample), 1) for sample in samples])


@lru_cache(maxsize=2)
def _load(encoder: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "instructions given as text need sentence-transformers (pip install sentence-transformers); "
            "sentence_embeds computed elsewhere do not"
        ) from error
    return SentenceTransformer(encoder, device="cpu")
