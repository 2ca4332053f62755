"""Settings that several kinds of stage share: a model's shape, sampling, optimizer, RL policy. This module
does not import torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

RewardPart = Literal["accuracy", "format", "language", "judge", "preference"]
Recompute = bool | Literal["keep_attention"]
RECOMPUTE = (
    "keep less in memory while learning, and compute it again: the same numbers, a third slower; "
    "`keep_attention` keeps the results of attention, which take the longest (on a card; as `true` elsewhere)"
)


class Settings(BaseModel):
    """The base class of all settings. Settings cannot be changed after they are made, and an unknown key is
    an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# Linear layers of any family, by the last name in checkpoints without `_proj`.
TARGETS = ("q", "k", "v", "o", "gate", "up", "down", "q_a", "q_b", "kv_a_proj_with_mqa", "kv_b")
TARGETS += ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # Falcon


class LoRA(Settings):
    """Low-rank adapters that learn in place of the weights (arXiv 2106.09685). The stage's model is the base
    with the adapters merged into it."""

    rank: int = Field(16, ge=1, description="rank of each layer's adapter")
    alpha: float = Field(32, gt=0, description="what an adapter adds is multiplied by `alpha / rank`")
    targets: str | tuple[str, ...] = Field(
        "all",
        description="linear layers by their names in checkpoints, such as `[q, v]` or `[up_proj]`; "
        "or all, which in a mixture of experts are those of attention",
    )
    learning_rate: float | None = Field(
        None, gt=0, description="in place of the optimizer's; adapters take about ten times that of weights"
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The short names of the layers to adapt, such as `q`; `all` stands for all of them."""
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        return tuple(name.removesuffix("_proj") for name in targets)


SuiteName = Literal[
    "gsm8k", "math-500", "aime-2024", "aime-2025", "gpqa-diamond", "mmlu-pro", "ifeval", "c-eval", "cmath"
]
ProtocolName = Literal["deepseek", "lm-eval", "lm-eval-cot", "lm-eval-hendrycks", "lighteval"]


class SuiteOptions(Settings):
    """How a named benchmark is measured (docs/reference/suites.md)."""

    data: str = Field(description="the folder of its files as published, or its file of test items")
    protocol: ProtocolName = Field(
        "deepseek", description="whose prompt, extraction, metric and sampling are used"
    )
    items: int | None = Field(None, ge=1, description="only so many, the first ones; all if not set")
    samples: int | None = Field(None, ge=1, description="responses to each item; the protocol's if not set")
    max_new_tokens: int | None = Field(
        None, ge=1, description="the longest response, in tokens; the protocol's if not set"
    )


LORA = Field(None, description="learn adapters of low rank, not the weights themselves")


class Stage(Settings):
    """The settings that every stage has. They do not affect the result of a stage, and so are no part of its
    artifact's key."""

    title: str = Field("", description="a line for the report")
    log_every: int = Field(
        10,
        ge=1,
        description="steps between two that are logged; in `rl`, between two whose responses are kept",
    )
    save_every: float = Field(60, gt=0, description="seconds between checkpoints: what a kill may cost")


class ModelStage(Stage):
    """A stage that computes with a model, with the precision of its numbers.

    What is not set is the recipe's, and without that the default. A default is no part of an artifact's key,
    since it changes no result."""

    precision: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="of the weights and of most of the arithmetic, float32 by default; `bfloat16` halves the "
        "memory and is what cards are fast with, a CPU is slow with it; the optimizer keeps float32 copies",
    )
    exact: bool | None = Field(
        None,
        description="on a card, true by default: sampler and learner give a token the same log-probability, "
        "to the last bit and whatever is beside it; `false` takes the libraries' own products and attention; "
        "a CPU does the same with either",
    )


class Budgeted(ModelStage):
    """A stage that trains a model, with an optional budget of FLOPs."""

    flops_of: str | None = Field(
        None,
        description="a stage to compare with: stop, at the latest when all is done, once as many "
        "FLOPs are spent as it took",
    )
    flops_of_rows: bool | None = Field(
        None, description="with `flops_of`: `true` counts what the rows that it learned from took, too"
    )
    flops: float | None = Field(
        None,
        gt=0,
        description="or a number of FLOPs, of which the teacher's, and what the rows cost, are a part",
    )
    lora: LoRA | None = LORA

    @model_validator(mode="after")
    def _one(self) -> Budgeted:
        """Refuse a budget that is given in two ways at once, and rows of no budget."""
        if self.flops_of and self.flops:
            raise ValueError(
                f"flops_of = {self.flops_of} and flops = {self.flops:g} are two budgets; give one"
            )
        if self.flops_of_rows and not self.flops_of:
            raise ValueError("flops_of_rows adds to flops_of, which is not given; name a stage there")
        return self


class LatentShape(Settings):
    """The dimensions of multi-head latent attention: each token's keys and values are projected from one
    small latent vector."""

    kv_lora_rank: int = Field(ge=4, description="size of the latent")
    nope_dim: int = Field(ge=2, description="part of a key that is not rotated")
    rope_dim: int = Field(ge=2, multiple_of=2, description="part of a key that is, shared by all heads")
    value_dim: int = Field(ge=2, description="size of a value")
    q_rank: int = Field(0, ge=0, description="size of the queries' latent; 0 makes them at full rank")


class ExpertsShape(Settings):
    """The dimensions of a mixture of experts as in DeepSeek-V3: sigmoid router scores, biases that balance
    the load, and shared experts."""

    count: int = Field(ge=2, description="routed experts")
    top_k: int = Field(ge=1, description="of which each token meets so many")
    intermediate_size: int = Field(ge=4, description="width inside an expert; multiples of 4 are fast")
    shared: int = Field(1, ge=0, description="experts of that width that every token meets")
    groups: int = Field(1, ge=1, description="groups of experts")
    top_groups: int = Field(1, ge=1, description="of which each token uses so many")
    dense_layers: int = Field(0, ge=0, description="first layers that stay dense")
    scale: float = Field(1.0, gt=0, description="multiplies what the routed experts say together")

    @model_validator(mode="after")
    def _fit(self) -> ExpertsShape:
        """Refuse groups of experts of unequal size, and more experts per token than the selected groups
        contain."""
        if self.count % self.groups:
            raise ValueError(f"count = {self.count} experts do not fall into groups = {self.groups} alike")
        if self.top_groups > self.groups or self.top_k > self.count // self.groups * self.top_groups:
            raise ValueError(f"top_k = {self.top_k} of top_groups = {self.top_groups} is more than there are")
        return self


class Shape(Settings):
    """The dimensions of a model that is trained from scratch; input and output embeddings are tied.

    Without `latent` the architecture is that of Llama. With `latent` it is that of DeepSeek-V3, and may have
    `experts`."""

    hidden_size: int = Field(64, ge=8, description="width of the hidden states")
    layers: int = Field(3, ge=1, description="number of blocks")
    heads: int = Field(4, ge=1, description="query heads; they divide `hidden_size`")
    kv_heads: int = Field(4, ge=1, description="key and value heads; they divide `heads`")
    intermediate_size: int = Field(176, ge=8, description="width inside the feed-forward layers")
    rope_theta: float = Field(
        100.0,
        gt=1,
        description="base of the rotary waves: short texts learn faster with 100 than with 10,000",
    )
    latent: LatentShape | None = Field(None, description="latent attention in place of grouped queries")
    experts: ExpertsShape | None = Field(None, description="a mixture of experts; needs `latent`")
    mtp_layers: int = Field(0, ge=0, description="modules that predict one token further each")

    @model_validator(mode="after")
    def _fit(self) -> Shape:
        """Refuse experts without latent attention, and dimensions of attention heads that are not divisible
        as the architecture needs."""
        if self.experts and not self.latent:
            raise ValueError(
                "experts: a mixture is built as DeepSeek-V3's, which has latent attention; give latent too"
            )
        if not self.latent and self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size = {self.hidden_size} is no even number of dimensions for each of heads "
                f"= {self.heads}, and rotary "
                f"positions take dimensions in pairs; make hidden_size a multiple of {2 * self.heads}"
            )
        if not self.latent and self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}; give a number that does"
            )
        return self


# Sampling parameters that a recipe need not set, with the values that have no effect. Unset they are left
# out of keys and manifests.
PENALTIES = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
OPTIONAL_SAMPLING = {"top_k": 0, "min_p": 0, **PENALTIES}


class Sampling(Settings):
    """The sampling parameters of completions. `temperature: 0` is greedy decoding."""

    temperature: float = Field(1.0, ge=0, description="divides the logits; 0 is greedy")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the likeliest tokens that have this share together"
    )
    speculate: bool = Field(
        False, description="let the module that looks ahead draft tokens: the same, sooner"
    )
    max_new_tokens: int = Field(160, ge=1, description="the longest response, in tokens")
    top_k: int | None = Field(None, ge=0, description="sample from this many likeliest tokens; 0 is all")
    min_p: float | None = Field(
        None, ge=0, le=1, description="sample from tokens with this share of the greatest probability"
    )
    presence_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="subtracted from the logits of tokens that the response has; not in `rl`",
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="the same, as often as the response has them; not in `rl`"
    )
    repetition_penalty: float | None = Field(
        None,
        gt=0,
        description="divides positive logits of tokens that prompt or response has, and multiplies "
        "negative ones; not in `rl`",
    )

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the settings without those of `OPTIONAL_SAMPLING` that are not set, which therefore change
        no key."""
        settings = serialize(self)
        return {name: value for name, value in settings.items() if value is not None}


class Prices(Settings):
    """The prices of a remote endpoint, per million tokens."""

    input: float = Field(ge=0, description="for a million tokens of prompts")
    output: float = Field(ge=0, description="for a million tokens of responses, thoughts included")
    currency: str = Field("USD", description="in which money is told")


class Optimizer(Settings):
    """The settings of the optimizer: AdamW for all parameters, or Muon for matrices and AdamW for the rest.
    The learning rate warms up linearly and then follows the schedule."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="`muon` for the matrices inside the blocks, AdamW for the rest; or AdamW for all"
    )
    learning_rate: float = Field(1e-3, gt=0, description="at its highest")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of AdamW's two moments")
    adamw_ratio: float = Field(
        0.3, gt=0, description="AdamW's rate beside Muon, as a share of Muon's: embeddings want less"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled; not for vectors")
    warmup_steps: int = Field(0, ge=0, description="updates of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the learning rate goes on after the warm-up"
    )
    final_ratio: float = Field(
        0.1, ge=0, le=1, description="where `linear` and `cosine` end, as a share of the highest"
    )
    clip_norm: float = Field(1.0, gt=0, description="a gradient with a larger norm is scaled down to it")
    balance_rate: float = Field(
        0.001, ge=0, description="how far the bias of an expert moves against its load in one update"
    )
    balance_loss: float = Field(
        0.0001, ge=0, description="weight of the sequence-wise balance loss of experts"
    )
    expert_ratio: float = Field(
        1.0, gt=0, description="the rate of routed experts as a share of the others' (Hunyuan-Large: 0.31)"
    )
    mtp_loss_weight: float = Field(
        0.3, ge=0, description="weight of the loss of modules that predict further than the next token"
    )
    moments: Literal["float32", "int8"] | None = Field(
        None,
        description="of AdamW: float32 by default, 8 bytes a weight; `int8` keeps both in 8 bits each, "
        "with a scale for every 256 numbers: 2 bytes a weight (arXiv 2110.02861)",
    )
    masters: bool | None = Field(
        None,
        description="with `precision: bfloat16`, true by default: float32 copies of the weights, 4 bytes a "
        "weight; `false` keeps none, and rounds updates into the weights stochastically",
    )
    offload: bool | None = Field(
        None,
        description="false by default; `true` keeps masters and moments in the host's memory and computes "
        "AdamW's update there: slower on a card, nothing changes on a CPU; in no key",
    )

    @model_validator(mode="after")
    def _fit(self) -> Optimizer:
        """Refuse for Muon what saves memory with AdamW."""
        saving = {"moments": "int8", "masters": False, "offload": True}
        for key, value in saving.items():
            if self.name == "muon" and getattr(self, key) == value:
                raise ValueError(
                    f"{key}: {str(value).lower()} is for AdamW, but name is muon; set name: adamw, or leave "
                    f"{key} out"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the settings without those that are not set, which therefore change no key."""
        return {name: value for name, value in serialize(self).items() if value is not None}


PRESETS: dict[str, dict[str, Any]] = {
    # DAPO and Dr. GRPO: token-level loss, mean baseline, clip-higher, no KL (arXiv 2503.14476, 2503.20783)
    "default": {},
    # DeepSeek-R1 (arXiv 2501.12948v2, sections 2.1 and 3.2.1); the reference is refreshed every 400 updates
    "r1": {
        "group_size": 16, "advantage_scale": "group", "reduction": "sequence", "kl_coef": 0.001,
        "reference_every": 400, "clip_low": 1.0, "clip_high": 10.0, "zero_variance": "keep",
        "mask_truncated": False, "updates_per_rollout": 16,
    },
}  # fmt: skip


class Policy(Settings):
    """The settings of group-relative policy optimisation: group size, advantages, clipping, and the
    reference model."""

    preset: Literal["default", "r1"] = Field(
        "default", description="where the defaults of the other settings come from"
    )
    group_size: int = Field(8, ge=2, description="completions of each problem")
    prompts_per_step: int = Field(32, ge=1, description="problems of each step")
    updates_per_rollout: int = Field(
        1, ge=1, description="updates on the completions of one step, each on its part of them"
    )
    advantage_scale: Literal["none", "group", "batch"] = Field(
        "none", description="divide advantages by the group's deviation, the batch's, or nothing"
    )
    reduction: Literal["token", "sequence", "constant"] = Field(
        "token", description="mean over all tokens; over sequences; or over sequences times `max_new_tokens`"
    )
    clip_low: float = Field(0.2, gt=0, le=1, description="the ratio counts no lower than 1 minus this")
    clip_high: float = Field(0.28, gt=0, description="the ratio counts no higher than 1 plus this")
    kl_coef: float = Field(
        0.0, ge=0, description="weight of the divergence from the reference; with 0 there is no reference"
    )
    kl_unbiased: bool = Field(False, description="weigh that divergence by the ratio (DeepSeek-V3.2)")
    reference_every: int = Field(
        0, ge=0, description="updates after which the policy becomes the reference; 0 keeps the first"
    )
    zero_variance: Literal["replace", "drop", "keep"] = Field(
        "replace", description="groups of equal rewards: draw others for them, leave them out, or keep them"
    )
    mask_truncated: bool = Field(True, description="do not learn from responses that ran out of tokens")
    off_policy_threshold: float | None = Field(
        None, gt=0, description="leave out failures that drifted further than this, in nats (DeepSeek-V3.2)"
    )
    keep_sampling_mask: bool = Field(
        False,
        description="score tokens among those that `top_p`, `top_k` and `min_p` left; needed where they "
        "exclude any",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, settings: Any) -> Any:
        """Fill in the preset's value for each setting that is not given."""
        if not isinstance(settings, dict):
            return settings
        preset = str(settings.get("preset", "default"))
        return {**PRESETS.get(preset, {}), **settings}
