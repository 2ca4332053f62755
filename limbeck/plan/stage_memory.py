"""The memory of one stage on one card: weights, gradients, optimizer, activations, head, cache.

The peak is the largest of a few moments of an update: the head's backward pass, that of each layer, that of
the embedding, and the optimizer's step. The learner's code decides each (train/learner.py, optimizer.py,
scorer.py); activations.py has the layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import NamedTuple

from ..config.parts import LoRA, Optimizer
from ..model.config import ModelConfig
from . import cost
from .activations import Activations, position_bytes
from .micro_batch import MicroBatch

GIB = 2**30  # bytes
CONTEXT = 0.75e9  # bytes of the driver's context, kernels and libraries' workspaces: guessed
EIGHT_BITS = 2 * (1 + 4 / 256)  # bytes of two moments in 8 bits, with a scale for every 256
CHUNK = 1 << 22  # numbers that AdamW updates at once (train/adamw.py)
# tensors of a chunk in float32 that exist at once: (moments in 8 bits, rounded stochastically) -> number
CHUNKS = {(False, False): 2, (False, True): 4.5, (True, False): 12, (True, True): 13}
MODULE = 5  # tensors [N, C] that a module of multi-token prediction keeps beside its layer
MATRICES = 3  # tensors as large as the matrices of one shape while Muon makes them orthogonal


@dataclass(frozen=True)
class Memory:
    """The bytes of a stage on a card at its peak, part by part.

    `reference` are models that only read: a reference, teachers. `update` is what the optimizer's step has
    beside its state, and `head` what log-probabilities have beside hidden states. `cache` is the pool of
    keys and values of a rollout, and `sampling` what its steps and its prompts have beside it.
    """

    weights: float = 0.0
    gradients: float = 0.0
    masters: float = 0.0
    moments: float = 0.0
    reference: float = 0.0
    activations: float = 0.0
    head: float = 0.0
    update: float = 0.0
    cache: float = 0.0
    sampling: float = 0.0
    context: float = 0.0

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Return the bytes of each part by its name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Learning:
    """What decides the memory of a learner: a model, the stage's settings, and its largest micro-batch.

    `width` is the bytes of a weight: 2 in bfloat16, 4 in float32. `units` is the number of multiprocessors of
    the card.
    """

    config: ModelConfig
    width: int
    batch: MicroBatch
    optimizer: Optimizer
    recompute: bool | str | None = False
    lora: LoRA | None = None
    units: int = 132

    # ------------------------------------------------------------ what is always there

    @property
    def held(self) -> Memory:
        """What a learner holds between two updates."""
        table = self.config.max_positions * position_bytes(self.config)
        weights = self.width * self._all + table
        if self.lora:
            weights += self.width * self._adapted + 4 * self._learned
        masters = 4.0 * self._learned * self.has_masters
        return Memory(weights=weights, masters=masters, moments=self._moments())

    @property
    def has_masters(self) -> bool:
        """True if the card has float32 copies of the weights."""
        wanted = self.optimizer.masters is not False and not self.optimizer.offload
        return self.width == 2 and not self.lora and wanted

    @property
    def _all(self) -> int:
        """The number of weights of the model."""
        return cost.weights(self.config)

    @property
    def _learned(self) -> float:
        """The number of weights that learn: the model's, or the adapters'."""
        if not self.lora:
            return self._all
        rank = self.lora.rank
        return sum(rank * (matrix.rows + matrix.columns) for matrix in self._chosen())

    @property
    def _adapted(self) -> float:
        """The number of weights of layers with adapters, of which the base's are kept too."""
        layers = {(matrix.layer, matrix.module) for matrix in self._chosen()}
        chosen = (m for m in matrices(self.config) if (m.layer, m.module) in layers)
        return sum(matrix.rows * matrix.columns for matrix in chosen)

    def _chosen(self) -> list[Matrix]:
        """Return the matrices with adapters."""
        names = self.lora.names
        return [matrix for matrix in matrices(self.config) if "all" in names or matrix.name in names]

    @property
    def reserved(self) -> float:
        """Bytes that a rollout's pool leaves the learner (train/optimizer.py, `missing_bytes`)."""
        narrow = self.width == 2 and self.optimizer.offload and not self.lora
        return self._moments() + (2 if narrow else 4) * self._learned

    def _moments(self) -> float:
        """Return the bytes of the optimizer's moments: one of Muon's matrices, two of other weights."""
        if self.optimizer.offload:
            return 0.0
        if self.optimizer.moments == "int8":
            return EIGHT_BITS * self._learned
        by_muon = sum(shape.weights for group in self._muon_groups() for shape in group)
        return 4 * by_muon + 8 * (self._learned - by_muon)

    def _muon_groups(self) -> list[list[Shape]]:
        """Return the shapes of the matrices of blocks, which Muon updates: all but experts', and experts'."""
        if self.optimizer.name != "muon" or self.lora:
            return []
        counts: list[Counter[tuple[int, int]]] = [Counter(), Counter()]
        for matrix in matrices(self.config, experts=True):
            rows, columns = sorted((matrix.rows, matrix.columns))
            counts[matrix.count > 1][rows, columns] += matrix.count
        return [[Shape(*shape, count) for shape, count in group.items()] for group in counts if group]

    # ------------------------------------------------------------ moments of an update

    def peak(self) -> Memory:
        """Return the memory of an update at its peak."""
        return max(self.at_times(), key=lambda memory: memory.total)

    def at_times(self) -> Iterator[Memory]:
        """Yield the memory of the moments of an update that may be its peak."""
        held = self.held
        yield replace(held, **self._step())
        acts = self._activations
        depth = self.config.layers
        kept = acts.base + acts.states + sum(acts.kept(layer) for layer in range(depth))
        summed = self._summed
        ahead = self._ahead
        first = kept + sum(acts.saved(layer) + MODULE * acts.stream for layer in ahead)
        yield replace(held, gradients=summed, activations=first, head=acts.logits)
        for layer in ahead:
            yield replace(held, gradients=summed, activations=first + acts.transient(layer))
        done = self._waiting if self._sums else self._gradient(self._table)
        for layer in reversed(range(depth)):
            done += self._gradient(self._layer_weights(layer))
            now = kept + acts.computed_again(layer) + acts.transient(layer)
            yield replace(held, gradients=done + summed, activations=now)
            kept -= acts.kept(layer) + (acts.states if layer == depth - 1 else 0.0)
        yield replace(held, gradients=done + self._waiting + summed, activations=kept + acts.stream)

    @property
    def _activations(self) -> Activations:
        """The activations of the largest micro-batch."""
        return Activations(
            self.config, self.width, self.batch, self.units, self.lora is not None, self.recompute
        )

    @property
    def _sums(self) -> bool:
        """True if the card has sums of several micro-batches' gradients in float32.

        With `offload` the host has them, and the card has at most the first micro-batch's, in 16 bits.
        """
        several = self.batch.several and not self.optimizer.offload
        return several and self.width == 2 and not self.lora

    @property
    def _summed(self) -> float:
        """Bytes of these sums."""
        return 4.0 * self._learned * self._sums

    def _gradient(self, weights: float) -> float:
        """Return the bytes of the gradients of so many weights of the model in a backward pass; sums take
        those of a weight as soon as it has all of them."""
        return 0.0 if self.lora or self._sums else self.width * weights

    @property
    def _waiting(self) -> float:
        """Bytes of the head's gradient where the embedding is the head, and its gradient is still to come."""
        config = self.config
        return 0.0 if self.lora or not config.tied else self.width * config.vocab_size * config.hidden_size

    @property
    def _table(self) -> int:
        """The number of weights of embedding and head."""
        config = self.config
        return config.vocab_size * config.hidden_size * (1 if config.tied else 2)

    def _layer_weights(self, layer: int) -> float:
        """Return the number of weights of the matrices of a layer."""
        return cost.work(self.config)[layer].weights

    @property
    def _ahead(self) -> range:
        """The layers of the modules of multi-token prediction, where they learn too."""
        layers = self.config.layers
        return range(layers, layers + self.config.predicted * self.batch.ahead)

    def _step(self) -> dict[str, float]:
        """Return the gradients at the optimizer's step, and what the step has beside its state.

        AdamW takes the weights in chunks. Muon has gradients in float32 for its matrices, their directions,
        and the products of those of one shape. Adapters are merged into one weight at a time.
        """
        if self.lora:
            merged = 8 * max(matrix.rows * matrix.columns for matrix in self._chosen())
            return {"gradients": 4 * self._learned, "update": merged}
        gradients = self._summed if self._sums else self.width * self._learned
        update = 0.0 if self.optimizer.offload else self._chunks()
        for group in self._muon_groups():
            scaled = 0 if self.width == 4 or self._sums else sum(shape.weights for shape in group)
            update = max(update, 4 * scaled + _muon_bytes(group))
        return {"gradients": gradients, "update": update}

    def _chunks(self) -> float:
        """Return the bytes of AdamW's chunks in float32, of which it has so many at once."""
        sizes = Counter({"table": self.config.vocab_size * self.config.hidden_size})
        for matrix in matrices(self.config, experts=True):
            sizes[matrix.layer, matrix.module] += matrix.rows * matrix.columns * matrix.count
        kind = (self.optimizer.moments == "int8", self.optimizer.masters is False)
        return 4.0 * CHUNKS[kind] * min(CHUNK, max(sizes.values()))


class Shape(NamedTuple):
    """So many matrices of one shape; rows are the smaller side."""

    rows: int
    columns: int
    count: int

    @property
    def weights(self) -> int:
        """The number of weights of all of them."""
        return self.rows * self.columns * self.count


def _muon_bytes(shapes: list[Shape]) -> float:
    """Return the bytes of Muon's step beside its state: all directions, and products of the largest shape."""
    largest = max(shapes, key=lambda shape: shape.weights)
    products = MATRICES * largest.weights + 2 * largest.count * largest.rows**2
    return 4 * (sum(shape.weights for shape in shapes) + products)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a block by its name in checkpoints, without `_proj`; `module` may hold several."""

    layer: int
    module: str
    name: str
    rows: int
    columns: int
    count: int = 1


@cache
def matrices(config: ModelConfig, experts: bool = False) -> tuple[Matrix, ...]:
    """Return the matrices of all layers; those of feed-forwards with experts only with `experts`."""
    found: list[Matrix] = []
    for layer in range(config.layers + config.predicted):
        found += _attention_matrices(config, layer)
        found += _ffn_matrices(config, layer, experts)
        if experts and layer >= config.layers:
            found.append(Matrix(layer, "join", "join", config.hidden_size, 2 * config.hidden_size))
    return tuple(found)


def _attention_matrices(config: ModelConfig, layer: int) -> Iterator[Matrix]:
    """Yield the matrices of a layer's attention."""
    hidden = config.hidden_size
    latent = config.latent
    if latent is None:
        queries = config.heads * config.head_dim
        yield Matrix(layer, "qkv", "q", queries, hidden)
        for name in ("k", "v") if config.keeps(layer) else ():
            yield Matrix(layer, "qkv", name, config.kv_heads * config.head_dim, hidden)
        yield Matrix(layer, "out", "o", hidden, queries)
        return
    queries = config.heads * latent.key_dim
    if latent.q_rank:
        yield Matrix(layer, "q_latent", "q_a", latent.q_rank, hidden)
        yield Matrix(layer, "q_up", "q_b", queries, latent.q_rank)
    else:
        yield Matrix(layer, "q_full", "q", queries, hidden)
    down = "q_latent" if latent.q_rank else "q_full"
    yield Matrix(layer, down, "kv_a_proj_with_mqa", latent.cached, hidden)
    yield Matrix(layer, "kv_up", "kv_b", config.heads * (latent.nope_dim + latent.value_dim), latent.kv_rank)
    yield Matrix(layer, "out", "o", hidden, config.heads * latent.value_dim)


def _ffn_matrices(config: ModelConfig, layer: int, experts: bool) -> Iterator[Matrix]:
    """Yield the matrices of a layer's feed-forward; in a model with experts only if they are asked for."""
    if config.experts and not experts:
        return
    hidden = config.hidden_size
    widths = [("", config.intermediate_size, 1)]
    if config.sparse(layer):
        mixture = config.experts
        widths = [("", mixture.shared_size, 1), ("experts_", mixture.intermediate_size, mixture.count)]
    for prefix, width, count in widths:
        if width:
            for name in ("gate", "up") if config.gated else ("up",):
                yield Matrix(layer, f"{prefix}gate_up", name, width, hidden, count)
            yield Matrix(layer, f"{prefix}down", "down", hidden, width, count)
