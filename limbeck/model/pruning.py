"""Layer pruning: a decoder with some of another one's layers, evenly spaced or those with most influence.

Dimensions: N tokens of all texts · C hidden size · L layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..types import LimbeckError
from .decoder import Block, Decoder
from .packed import Packed

TEXT_TOKENS = 512  # tokens of a text that are read, at most


def keep_layers(decoder: Decoder, layers: Sequence[int]) -> Decoder:
    """Return a new decoder with those layers of `decoder` that have the numbers `layers`, from 0. Its weights
    are copies.

    Raises:
        LimbeckError: the model has fewer layers, or layers that are not all alike.
    """
    config = decoder.config
    if len(layers) > config.layers or max(layers) >= config.layers:
        raise LimbeckError(
            f"layers: the model has only {config.layers}, with the numbers 0 to {config.layers - 1}; name "
            "some of these"
        )
    if config.experts or config.windows or config.share_kv > 1 or config.predicted:
        raise LimbeckError("layers: only dense models whose layers are all alike can be thinned")
    student = Decoder(replace(config, layers=len(layers)))
    outer = {k: v for k, v in decoder.state_dict().items() if not k.startswith("blocks.")}
    student.load_state_dict(outer, strict=False)
    for layer, block in zip(layers, student.blocks, strict=True):
        block.load_state_dict(decoder.blocks[layer].state_dict())
    return student


def evenly_spaced(count: int, layers: int) -> list[int]:
    """Return the numbers of `count` evenly spaced layers of `layers`, first and last included. DistilBERT's
    student was initialised in this way (arXiv 1910.01108, section 2)."""
    return [round(place * (layers - 1) / max(1, count - 1)) for place in range(count)]


def most_influential(influence_L: Sequence[float], count: int) -> list[int]:
    """Return the numbers of the `count` layers with the greatest influence, in ascending order."""
    return sorted(np.argsort(-np.asarray(influence_L), kind="stable")[:count].tolist())


@torch.no_grad()
def block_influence(decoder: Decoder, texts: Sequence[np.ndarray]) -> list[float]:
    """Return the block influence of each layer [L]: 1 minus the cosine similarity of a token's hidden states
    before and after the layer, the mean over all tokens of `texts`, each the token ids of one text (ShortGPT,
    arXiv 2403.03853, eq. 1)."""
    sums_L = torch.zeros(len(decoder.blocks), dtype=torch.float64)
    hooks = [block.register_forward_hook(_adder(sums_L, layer)) for layer, block in enumerate(decoder.blocks)]
    tokens = 0
    try:
        for text in texts:
            tokens_N = torch.as_tensor(text[:TEXT_TOKENS], device=decoder.embed.weight.device)
            decoder(tokens_N, Packed([len(tokens_N)], device=tokens_N.device))
            tokens += len(tokens_N)
    finally:
        for hook in hooks:
            hook.remove()
    return (sums_L / tokens).tolist()


def _adder(sums_L: Tensor, layer: int) -> Callable[..., None]:
    """Return a forward hook of a block, which adds to `sums_L[layer]` 1 minus the cosine similarity of the
    states before and after the block, summed over all tokens."""

    def add(_: Block, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x_NC, delta_NC, *_ = inputs
        before_NC = x_NC if delta_NC is None else x_NC + delta_NC
        similarity_N = torch.cosine_similarity(before_NC, output[0] + output[1], dim=-1)
        sums_L[layer] += float((1 - similarity_N).double().sum())

    return add
