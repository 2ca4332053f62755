"""Models to measure with: random weights of three sizes, as HF directories that every side can load.

`tiny` and `10m` follow Llama's plan; `135m` has SmolLM2-135M's shape, or is SmolLM2 itself where
`limbeck pull smollm2-135m` has put it in models/.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch

from limbeck.model import weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.text.tokenizer import Tokenizer

from .sides import CACHE

# vocabulary, hidden, layers, heads, key heads, head size, intermediate, tied
SIZES = {
    "tiny": (512, 128, 4, 4, 4, 32, 344, False),
    "10m": (2048, 384, 6, 6, 6, 64, 1024, False),
    "135m": (49152, 576, 30, 9, 3, 64, 1536, True),
}


def make(size: str, seed: int = 0) -> Path:
    """A directory with random weights, made once."""
    folder = CACHE / "models" / (f"{size}-{seed}" if seed else size)
    if not (folder / "config.json").exists():
        vocabulary, hidden, layers, heads, kv_heads, width, inner, tied = SIZES[size]
        config = ModelConfig("llama", vocabulary, hidden, layers, heads, kv_heads, width, inner, tied=tied)
        words = {f"w{i}": i for i in range(vocabulary - 2)} | {
            "<end>": vocabulary - 2,
            "<pad>": vocabulary - 1,
        }
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer = Tokenizer(backend, "{{ messages[0].content }}", "<end>", "<pad>")
        folder.mkdir(parents=True, exist_ok=True)
        weights.save(Decoder(config).initialize(seed), folder, tokenizer)
    return folder


def prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[str]:
    """`count` prompts of `length` words."""
    drawn = torch.randint(0, vocabulary - 2, (count, length), generator=torch.Generator().manual_seed(seed))
    return [" ".join(f"w{word}" for word in row) for row in drawn.tolist()]
