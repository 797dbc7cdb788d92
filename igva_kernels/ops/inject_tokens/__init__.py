"""Visual features into the hidden states of a language model: ``token_rows``, ``inject_tokens``."""

from igva_kernels.ops.inject_tokens.api import inject_tokens, token_rows

__all__ = ["inject_tokens", "token_rows"]
