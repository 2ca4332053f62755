"""The learner: a model, its optimizer, and the update of its weights. RL, SFT and distillation use the same
learner and pass different losses.

Dimensions: N input tokens · M predicted tokens · C hidden size · L mixture-of-experts layers · E experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..activity import add_tokens, phase, track
from ..config.parts import Optimizer as OptimizerSettings
from ..model.decoder import Decoder
from ..model.ffn import RouterTrace, balance_experts
from ..model.lora import LoRA
from ..types import LimbeckError
from .batch import Batch
from .divergence import Logits
from .losses import Loss, Metrics
from .optimizer import Optimizer
from .overflow import SLOWER, blamed, finite, spoiled, stopped
from .scorer import Scorer, token_logprobs


class Learner(Scorer):
    """A model that is trained.

    `step` counts the updates so far and sets the position in the learning-rate schedule. `steps` is the
    number of updates planned. With `recompute`, activations are recomputed in the backward pass, which saves
    memory; with "keep_attention", all but the results of attention (model/decoder.py). With `lora`, adapters
    are trained in place of the model's weights (model/lora.py). `trained` are the parameters, by name.
    `seed` determines the stochastic rounding of the optimizer. Without `samples`, another engine samples with
    its weights, and nothing is `exact`."""

    def __init__(
        self,
        model: Decoder,
        settings: OptimizerSettings,
        steps: int,
        recompute: bool | str = False,
        lora: LoRA | None = None,
        seed: object = 0,
        samples: bool = True,
    ):
        super().__init__(model)
        self.samples = samples
        model.recompute = recompute
        if lora and lora.settings.learning_rate:
            settings = settings.model_copy(update={"learning_rate": lora.settings.learning_rate})
        self.settings = settings
        self.step = 0
        self.lora = lora
        self.trained = dict(model.named_parameters())
        if lora:  # and what a stage added to the model, such as the value head of a reward model
            heads = {name: p for name, p in self.trained.items() if p.requires_grad}
            self.trained = {**heads, **lora.parameters()}
        self.optimizer = Optimizer(model, settings, steps, lora and lora.parameters(), seed)
        self._routes: list[RouterTrace] = []  # one for each micro-batch since the last apply()
        self._replayed = False

    @property
    def exact(self) -> bool:
        """As a scorer's; False if another engine samples."""
        return self.samples and super().exact

    def update(self, batches: Sequence[Batch], loss: Loss, temperature: float = 1.0) -> dict[str, Any]:
        """Make one optimizer step over all micro-batches of a batch; return its metrics.

        Raises LimbeckError if the loss, a gradient or an updated weight is not finite; `step` does not
        advance then."""
        metrics = self.accumulate(batches, loss, temperature)
        return {**metrics, **self.apply()}

    def accumulate(self, batches: Sequence[Batch], loss: Loss, temperature: float = 1.0) -> dict[str, float]:
        """Add the gradients of the micro-batches to the gradients accumulated so far; return the metrics of
        the loss, by name."""
        totals: Metrics = {}
        for batch in track(batches, "learning", "micro-batches"):
            value, metrics = self._loss(batch, loss, temperature)
            if not math.isfinite(value.detach()):
                raise self._stopped(*blamed(self.model, batch))
            self.optimizer.begin_micro_batch()
            value.backward()
            add_tokens(len(batch.tokens_N))
            _add(totals, metrics)
            if self.mixtures:
                self._routes.append(batch.context.routes)
                self._replayed = batch.routes_NLK is not None
        return {name: float(value) for name, value in totals.items()}

    def apply(self) -> dict[str, Any]:
        """Clip the accumulated gradients, make the optimizer step, and adjust the routers' biases of a
        mixture of experts.

        Returns the norm of the gradients before clipping and, for a mixture of experts, the load of the
        experts."""
        with phase("updating the weights"):
            norm = self.optimizer.step(self.step)
        if not math.isfinite(norm):
            raise self._stopped(f"the gradient of {spoiled(self.optimizer.gradients())} is", SLOWER)
        if not finite(self.trained.values()):
            raise self._stopped(f"the new weight {spoiled(self.trained.items())} is", SLOWER)
        if self.lora:
            self.lora.merge()
        self.step += 1
        routing = self._balance() if self.mixtures else {}
        self._routes = []
        return {**routing, "gradient_norm": norm}

    def _stopped(self, what: str, remedy: str) -> LimbeckError:
        """Drop the gradients and return the error of an update that cannot be made. `what` names the cause,
        `remedy` what the user can do."""
        self.optimizer.drop_gradients()
        self._routes = []
        return stopped(what, remedy, self.step, self.optimizer.steps)

    def _loss(self, batch: Batch, loss: Loss, temperature: float) -> tuple[Tensor, Metrics]:
        """Return the loss of a micro-batch, with its additional terms, and its metrics.

        `loss` is called with the log-probabilities of the target tokens or, where the batch has a teacher,
        with the student's hidden states and head. The additional terms are those of multi-token prediction
        and of the experts' balance."""
        hidden_NC = self._hidden(batch)
        if batch.teacher is not None:
            logits = Logits(hidden_NC[batch.predict_M], self.model.head.weight, temperature)
            value, metrics = loss(logits, batch)
        else:
            logprobs_M, entropy_M = self._logprobs(hidden_NC, batch, temperature)
            value, metrics = loss(logprobs_M, batch)
            metrics = {**metrics, "entropy": entropy_M.sum() / batch.tokens}
        if self.model.ahead and batch.logprobs_M is None:
            metrics["loss_ahead"] = self._mtp_loss(hidden_NC, batch)
            value = value + self.settings.mtp_loss_weight * metrics["loss_ahead"]
        routes = batch.context.routes
        if routes is not None and routes.penalties:
            metrics["loss_balance"] = torch.stack(routes.penalties).sum()
            value = value + metrics["loss_balance"]
        return value, metrics

    def _hidden(self, batch: Batch) -> Tensor:
        """Return the final hidden states [N, C]. With gradients enabled, the balance loss of the experts is
        computed as well."""
        if self.mixtures:
            balance = self.settings.balance_loss / batch.sequences if torch.is_grad_enabled() else 0.0
            sequences_N = batch.context.sequences if balance else None
            batch.context.routes = RouterTrace(batch.routes_NLK, balance, sequences_N)
        return self.model(batch.tokens_N, batch.context)

    def _mtp_loss(self, hidden_NC: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the multi-token prediction modules (arXiv 2412.19437, eq. 24-25).

        The targets are those of the main loss. Module `depth`, counted from 0, predicts each target from the
        position that is `depth` + 1 before the one that the main head uses."""
        positions_M = batch.context.positions[batch.predict_M]
        ends_N = batch.context.positions.roll(-1) == 0  # the next token begins another sequence
        next_N = batch.next_N
        losses = []
        for depth in range(len(self.model.ahead)):
            hidden_NC = self.model.predict_next(hidden_NC, next_N, batch.context, depth)
            far_M = positions_M > depth
            rows_M = batch.predict_M[far_M] - depth - 1
            targets_M = batch.targets_M[far_M]
            hidden_MC = hidden_NC[rows_M]
            logprobs_M, _ = token_logprobs(hidden_MC, self.model.head.weight, targets_M, ops=self.model.ops)
            losses.append(-logprobs_M.sum() / batch.tokens)
            next_N = next_N.roll(-1).masked_fill(ends_N, 0)
        return torch.stack(losses).mean()

    def _balance(self) -> dict[str, Any]:
        """Adjust the routers' biases by the experts' load in the whole batch, unless the routes were
        replayed or adapters are trained.

        Returns metrics: the largest load divided by the mean load, the entropy of the routers, and each
        expert's share of the tokens of its layer."""
        layers = zip(*(routes.loads for routes in self._routes), strict=True)
        loads_LE = [torch.stack(loads).sum(0) for loads in layers]
        if not self._replayed and not self.lora:  # replayed routes are not the router's choice
            balance_experts(self.mixtures, loads_LE, self.settings.balance_rate)
        entropy = sum(float(sum(routes.entropies)) for routes in self._routes)
        choices = sum(int(load_E.sum()) for load_E in loads_LE)
        peaks = [float(load_E.max() / load_E.float().mean()) for load_E in loads_LE]
        return {
            "expert_load": float(np.mean(peaks)),
            "router_entropy": entropy / choices * self.mixtures[0].experts.top_k,
            "expert_loads": [_shares(load_E) for load_E in loads_LE],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state that an exact resume needs. Random draws depend on the step alone, and so need no
        state."""
        model = self.model.state_dict()
        if self.lora:  # the other weights are those of the stage's input
            model = {name: parameter.detach() for name, parameter in self.trained.items()}
        return {"model": model, "optimizer": self.optimizer.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned, so that training continues from it."""
        if self.lora:
            for name, parameter in self.trained.items():
                parameter.data.copy_(state["model"][name])
            self.lora.merge()
        else:
            self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def weights(self) -> dict[str, Tensor]:
        """Return the model's weights by name. They are not copies and change with the next update: clone
        what is needed longer."""
        return self.model.state_dict()


def _add(totals: Metrics, metrics: Metrics) -> None:
    """Add the metrics of a micro-batch to `totals`, in place. For metrics named `max_...`, the larger value
    is kept instead of the sum."""
    for name, value in metrics.items():
        value = value.detach()
        if name in totals:
            join = torch.maximum if name.startswith("max_") else torch.add
            value = join(totals[name], value)
        totals[name] = value


def _shares(load_E: Tensor) -> list[float]:
    """Return the share of each expert [E] in the tokens of a layer, rounded to four decimal places. `load_E`
    is the number of tokens of each expert."""
    return [round(share, 4) for share in (load_E / load_E.sum()).tolist()]
