"""Layer pruning: which layers are kept, that they are copies, and the influence that chooses them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from limbeck.model.packed import Packed
from limbeck.model.pruning import block_influence, evenly_spaced, keep_layers, most_influential
from limbeck.types import LimbeckError

TEXTS = [np.arange(3, 20), np.arange(5, 12)]


def states(decoder, tokens: np.ndarray) -> list[torch.Tensor]:
    """The hidden states [N, C] before the first layer and after each."""
    tokens_N = torch.as_tensor(tokens)
    context = Packed([len(tokens)])
    context.ops = decoder.ops
    found = [decoder._embed(tokens_N)]
    for block in decoder.blocks:
        found.append(sum(block(found[-1], None, decoder._rope(context), context)))
    return found


@torch.no_grad()
def test_influence_is_one_minus_the_cosine_of_the_states_before_and_after(decoder):
    model = decoder(layers=4)
    model.blocks[2].attention.out.weight.zero_()
    model.blocks[2].ffn.down.weight.zero_()
    sums, tokens = np.zeros(4), 0
    for text in TEXTS:
        found = [state.double().numpy() for state in states(model, text)]
        for layer, (before, after) in enumerate(pairwise(found)):
            lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
            sums[layer] += (1 - (before * after).sum(1) / lengths).sum()
        tokens += len(text)
    influence = block_influence(model, TEXTS)
    assert influence == pytest.approx((sums / tokens).tolist(), abs=1e-5)
    assert abs(influence[2]) < 1e-6 < min(influence[:2])  # it adds nothing, so the rest keeps the others
    assert most_influential(influence, 3) == [0, 1, 3]
    assert not any(block._forward_hooks for block in model.blocks)


@torch.no_grad()
def test_a_model_without_a_layer_that_adds_nothing_is_the_same_model(decoder):
    model = decoder(layers=3)
    model.blocks[1].attention.out.weight.zero_()
    model.blocks[1].ffn.down.weight.zero_()
    student = keep_layers(model, [0, 2])
    assert student.config.layers == 2
    tokens_N = torch.as_tensor(TEXTS[0])
    wanted, found = (one(tokens_N, Packed([len(tokens_N)])) for one in (model, student))
    torch.testing.assert_close(found, wanted)
    student.embed.weight.zero_()
    student.blocks[0].ffn.down.weight.zero_()
    assert model.embed.weight.abs().max() > 0 and model.blocks[0].ffn.down.weight.abs().max() > 0


@pytest.mark.parametrize(
    "count, layers, kept",
    [(2, 5, [0, 4]), (3, 5, [0, 2, 4]), (5, 5, [0, 1, 2, 3, 4]), (1, 5, [0]), (4, 6, [0, 2, 3, 5])],
)
def test_evenly_spaced_layers_have_the_first_and_the_last(count, layers, kept):
    assert evenly_spaced(count, layers) == kept


def test_of_equal_layers_the_first_are_kept():
    assert most_influential([0.2, 0.2, 0.9, 0.2], 2) == [0, 2]


@pytest.mark.parametrize("layers", [[0, 4], [0, 1, 2, 3, 4]])
def test_layers_that_the_model_has_not_are_refused(decoder, layers):
    with pytest.raises(LimbeckError, match="only 4, with the numbers 0 to 3"):
        keep_layers(decoder(layers=4), layers)


def test_layers_that_differ_are_refused(decoder):
    model = decoder(layers=2, share_kv=2)
    with pytest.raises(LimbeckError, match="layers are all alike"):
        keep_layers(model, [0])
