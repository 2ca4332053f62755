"""Losses by hand, and against TRL's GRPO: values and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from limbeck.config.parts import PRESETS, Policy
from limbeck.train.batch import pack
from limbeck.train.grpo import group_advantages
from limbeck.train.losses import CrossEntropy, PolicyGradient, k3
from limbeck.types import Group, Problem, Sample

# Two completions, of 3 and 2 tokens. pi / pi_old per token, the advantages of the sequences, pi_ref / pi.
RATIOS = [[1.5, 0.5, 1.0], [1.5, 0.5]]
ADVANTAGES = [2.0, -1.0]
REFERENCE = [[1.0, 2.0, 0.5], [4.0, 1.0]]
LOGPROBS = [[-1.0, -2.0, -0.5], [-0.25, -1.5]]


def batch_of(ratios=RATIOS, advantages=ADVANTAGES, reference=REFERENCE, logprobs=LOGPROBS):
    """The packed batch, and today's log-probabilities in its order: the shorter sequence comes first."""
    samples = [
        Sample(np.arange(len(r) + 2) + 10 * i, 2, a, np.array(p) - np.log(r), np.array(p) + np.log(f))
        for i, (r, a, f, p) in enumerate(zip(ratios, advantages, reference, logprobs, strict=True))
    ]
    (batch,) = pack(samples, 1 << 20)
    order = sorted(range(len(ratios)), key=lambda i: len(ratios[i]))
    return batch, torch.tensor([p for i in order for p in logprobs[i]], requires_grad=True)


def run(policy: Policy, longest: int = 10, **given) -> tuple[float, list[float], dict[str, float]]:
    batch, logprobs = batch_of(**given)
    loss, metrics = PolicyGradient(policy, longest)(logprobs, batch)
    loss.backward()
    return float(loss.detach()), logprobs.grad.tolist(), {k: float(v) for k, v in metrics.items()}


# ------------------------------------------------------------------------- by hand

# -min(ratio A, clip(ratio, 0.8, 1.28) A): A = 2: 1.5 is clipped to 1.28, 0.5 and 1 are not;
# A = -1: 1.5 counts in full, 0.5 is clipped to 0.8. A clipped token has no gradient, others -ratio A.
GAINS = {"first": [2.56, 1.0, 2.0], "second": [-1.5, -0.8]}
SLOPES = [1.5, 0.0, 0.0, -1.0, -2.0]  # second sequence, then first


def test_token_reduction_by_hand():
    """The mean over all five tokens, with both clips in action."""
    loss, gradient, metrics = run(Policy())
    assert loss == pytest.approx(-(2.56 + 1.0 + 2.0 - 1.5 - 0.8) / 5)
    assert gradient == pytest.approx([s / 5 for s in SLOPES])
    assert metrics["clipped"] == pytest.approx(4 / 5)
    assert metrics["max_drift"] == pytest.approx(np.log(2))
    drift = np.log([1.5, 0.5, 1.0, 1.5, 0.5])
    assert metrics["kl_old"] == pytest.approx(np.mean(np.exp(drift) - drift - 1))


def test_sequence_reduction_by_hand():
    """The mean of the sequences' means."""
    loss, gradient, _ = run(Policy(reduction="sequence"))
    assert loss == pytest.approx(-((2.56 + 1 + 2) / 3 + (-1.5 - 0.8) / 2) / 2)
    assert gradient == pytest.approx([1.5 / 4, 0, 0, -1 / 6, -2 / 6])


def test_constant_reduction_by_hand():
    """Over the number of sequences and the longest possible one."""
    loss, gradient, _ = run(Policy(reduction="constant"), longest=10)
    assert loss == pytest.approx(-(5.56 - 2.3) / 20)
    assert gradient == pytest.approx([s / 20 for s in SLOPES])


def test_kl_term_by_hand():
    """k3 with pi_ref / pi = 1, 2, 1/2, 4, 1; its gradient is 1 - pi_ref / pi."""
    loss, gradient, metrics = run(Policy(kl_coef=0.1))
    divergences = [0, 2 - np.log(2) - 1, 0.5 + np.log(2) - 1, 4 - np.log(4) - 1, 0]
    assert metrics["kl_reference"] == pytest.approx(np.mean(divergences))
    assert loss == pytest.approx(-3.26 / 5 + 0.1 * np.mean(divergences))
    pull = [1 - 4, 1 - 1, 1 - 1, 1 - 2, 1 - 0.5]
    assert gradient == pytest.approx([(s + 0.1 * p) / 5 for s, p in zip(SLOPES, pull, strict=True)])


def test_unbiased_kl_term_by_hand():
    """k3 weighed by pi / pi_old; its gradient is ratio (k3 + 1 - pi_ref / pi) = ratio log(pi / pi_ref)."""
    _, gradient, metrics = run(Policy(kl_coef=0.1, kl_unbiased=True))
    ratios, references = [1.5, 0.5, 1.5, 0.5, 1.0], [4.0, 1.0, 1.0, 2.0, 0.5]
    weighed = [r * (f - np.log(f) - 1) for r, f in zip(ratios, references, strict=True)]
    assert metrics["kl_reference"] == pytest.approx(np.mean(weighed))
    pull = [-r * np.log(f) for r, f in zip(ratios, references, strict=True)]
    assert gradient == pytest.approx([(s + 0.1 * p) / 5 for s, p in zip(SLOPES, pull, strict=True)])


def test_unbiased_kl_estimates_the_divergence_of_todays_policy():
    """Over tokens of pi_old, the weighed mean is KL(pi || pi_ref) exactly, and so is its gradient."""
    random = torch.Generator().manual_seed(0)
    old, reference = torch.randn(2, 6, dtype=torch.float64, generator=random).log_softmax(-1)
    logits = torch.randn(6, dtype=torch.float64, generator=random, requires_grad=True)
    logprobs = logits.log_softmax(-1)
    true = (logprobs.exp() * (logprobs - reference)).sum()
    estimate = (old.exp() * (logprobs - old).exp() * k3(logprobs, reference)).sum()
    torch.testing.assert_close(estimate, true)
    (wanted,) = torch.autograd.grad(true, logits, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(estimate, logits)[0], wanted)


def test_k3_is_never_negative_and_zero_at_equality():
    random = torch.Generator().manual_seed(0)
    logprobs, reference = -torch.rand(2, 1000, dtype=torch.float64, generator=random) * 5
    assert (k3(logprobs, reference) > 0).all()
    assert torch.equal(k3(logprobs, logprobs), torch.zeros(1000, dtype=torch.float64))


def test_stale_failures_are_left_out_of_the_surrogate_alone():
    """Mean KL(pi_old || pi): -(ln 1.5 + ln 0.5 + 0) / 3 = .096 and -(ln 1.5 + ln 0.5) / 2 = .144."""
    successes = run(Policy())[1][2:]
    assert run(Policy(off_policy_threshold=0.15))[:2] == run(Policy())[:2]
    loss, gradient, _ = run(Policy(off_policy_threshold=0.14))
    assert loss == pytest.approx(-5.56 / 5)
    assert gradient == pytest.approx([0, 0, *successes])
    assert (
        run(Policy(off_policy_threshold=0.01), advantages=[2.0, 1.0])[0]
        == run(Policy(), advantages=[2.0, 1.0])[0]
    )
    pulled = run(Policy(off_policy_threshold=0.14, kl_coef=0.1))[1]
    assert pulled[0] == pytest.approx(0.1 * (1 - 4) / 5)


def test_on_policy_the_gradient_is_the_advantage():
    """At ratio 1 nothing is clipped, whatever the bounds: plain REINFORCE."""
    ones = [[1.0, 1.0, 1.0], [1.0, 1.0]]
    for policy in (Policy(), Policy(preset="r1", kl_coef=0)):
        loss, gradient, metrics = run(policy.model_copy(update={"reduction": "token"}), ratios=ones)
        assert gradient == pytest.approx([1 / 5] * 2 + [-2 / 5] * 3)
        assert loss == pytest.approx(-(3 * 2 - 2) / 5) and metrics["clipped"] == 0


def test_cross_entropy_by_hand():
    batch, logprobs = batch_of()
    loss, _ = CrossEntropy()(logprobs, batch)
    assert float(loss.detach()) == pytest.approx((1 + 2 + 0.5 + 0.25 + 1.5) / 5)


# ------------------------------------------------------------------------- advantages


def groups_of(*rewards: list[float]) -> list[Group]:
    return [Group(Problem(str(i), ""), np.zeros(1), (), (), tuple(row)) for i, row in enumerate(rewards)]


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_advantages_of_a_group_add_up_to_nothing(scale):
    for row in group_advantages(groups_of([1, 0, 0, 1.2], [0.2, 0.2, 1.4, 0.7], [5, 6, 7, 1]), scale):
        assert row.sum() == pytest.approx(0, abs=1e-12) and np.abs(row).max() > 0.1


def test_advantages_by_hand():
    rows = groups_of([1, 0, 0, 1], [3, 1, 1, 3])
    assert np.array_equal(group_advantages(rows, "none"), [[0.5, -0.5, -0.5, 0.5], [1, -1, -1, 1]])
    first, second = group_advantages(rows, "group")  # sample deviations: sqrt(1 / 3) and sqrt(4 / 3)
    assert first.tolist() == pytest.approx([s * 0.5 / (3**-0.5 + 1e-4) for s in (1, -1, -1, 1)])
    assert second.tolist() == pytest.approx([s / (2 * 3**-0.5 + 1e-4) for s in (1, -1, -1, 1)])
    spread = np.std([1, 0, 0, 1, 3, 1, 1, 3], ddof=1) + 1e-4
    assert np.concatenate(group_advantages(rows, "batch")).tolist() == pytest.approx(
        [s / spread for s in (0.5, -0.5, -0.5, 0.5, 1, -1, -1, 1)]
    )


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_equal_rewards_teach_nothing(scale):
    equal, other = group_advantages(groups_of([1.2] * 7, [0, 0, 0, 0, 0, 0, 1]), scale)
    assert np.abs(equal).max() < 1e-9 < np.abs(other).max()


# ------------------------------------------------------------------------- TRL


class Trainer:
    """As much of TRL's GRPOTrainer as its `_compute_loss` looks at, with given log-probabilities."""

    def __init__(self, policy: Policy, loss_type: str, logprobs_BT: torch.Tensor, longest: int):
        from trl.trainer.grpo_trainer import GRPOTrainer

        self.compute = lambda inputs: GRPOTrainer._compute_loss(self, self.model, inputs)
        self.get_off_policy_mask = GRPOTrainer.get_off_policy_mask
        self.args = SimpleNamespace(
            use_bias_correction_kl=policy.kl_unbiased, delta=None, steps_per_generation=1
        )
        self.accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x)
        self._metrics = {"train": _Lists(), "eval": _Lists()}
        self.model = SimpleNamespace(training=True)
        self.epsilon_low, self.epsilon_high, self.beta = policy.clip_low, policy.clip_high, policy.kl_coef
        self.off_policy_mask_threshold = policy.off_policy_threshold
        self.loss_type, self.importance_sampling_level = loss_type, "token"
        self.logprobs_BT, self.max_completion_length = logprobs_BT, longest
        self.top_entropy_quantile, self.current_gradient_accumulation_steps = 1.0, 1
        self.use_vllm = self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self.tools = None

    def _get_per_token_logps_and_entropies(self, *_, **__):
        return self.logprobs_BT, torch.zeros_like(self.logprobs_BT), None


class _Lists(dict):
    def __missing__(self, key: str) -> list:
        return self.setdefault(key, [])


TRL = {
    "default": (Policy(), "dapo"),
    "r1": (Policy(preset="r1"), "grpo"),
    "r1-strict": (Policy(preset="r1", clip_low=0.2, clip_high=0.2, kl_coef=0.5), "grpo"),
    "dr-grpo": (Policy(reduction="constant", kl_coef=0.1), "dr_grpo"),
    "deepseek-v3.2": (Policy(kl_coef=0.1, kl_unbiased=True, off_policy_threshold=0.2), "dapo"),
}


@pytest.mark.parametrize(("policy", "loss_type"), TRL.values(), ids=TRL)
def test_loss_and_gradient_equal_trls(policy, loss_type):
    """Twelve completions of 1 to 9 tokens with ratios from 1/3 to 3, and 12 for the widest clip."""
    pytest.importorskip("trl")
    random, longest = np.random.default_rng(4), 9
    lengths = random.permutation(np.r_[1:10, 3, 5, 9])
    rows = [
        {
            "ratios": np.exp(random.uniform(-1.1, 1.1, n)),
            "advantages": float(random.normal()),
            "reference": np.exp(random.normal(0, 0.5, n)),
            "logprobs": -random.exponential(1.0, n),
        }
        for n in lengths
    ]
    rows[0]["ratios"][0] = rows[1]["ratios"][0] = 12.0
    rows[1]["advantages"] = -rows[0]["advantages"]
    rows.sort(key=lambda row: len(row["ratios"]))
    batch, logprobs = batch_of(*([row[key] for row in rows] for key in rows[0]))
    loss, metrics = PolicyGradient(policy, longest)(logprobs, batch)
    loss.backward()

    mask = torch.zeros(len(rows), longest)
    for i, row in enumerate(rows):
        mask[i, : len(row["ratios"])] = 1

    def padded(values_M: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape).masked_scatter_(mask.bool(), values_M.detach().float())

    theirs = padded(logprobs).requires_grad_()
    trainer = Trainer(policy, loss_type, theirs, longest)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    wanted = trainer.compute(
        {
            "prompt_ids": ids[:, :2],
            "prompt_mask": ids[:, :2] + 1,
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": torch.tensor([row["advantages"] for row in rows]),
            "num_items_in_batch": mask.sum(),
            "old_per_token_logps": padded(batch.logprobs_M),
            "ref_per_token_logps": padded(batch.reference_M),
        }
    )
    wanted.backward()
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(padded(logprobs.grad), theirs.grad, atol=1e-6, rtol=1e-4)
    assert 0 < metrics["clipped"] < 1 and theirs.grad.abs().max() > 0


# ------------------------------------------------------------------------- settings


def test_a_preset_is_the_papers_settings():
    r1 = Policy(preset="r1")
    assert (r1.group_size, r1.kl_coef, r1.clip_high, r1.reference_every, r1.reduction) == (
        16,
        0.001,
        10.0,
        400,
        "sequence",
    )
    assert {key: getattr(r1, key) for key in PRESETS["r1"]} == PRESETS["r1"]
    assert Policy(preset="default") == Policy()


def test_a_given_key_wins_over_the_preset():
    policy = Policy(preset="r1", group_size=4, kl_coef=0.0)
    assert policy.group_size == 4 and policy.kl_coef == 0.0
    assert policy.clip_high == 10.0 and policy.reduction == "sequence"
    for key in PRESETS["r1"]:
        default = getattr(Policy(), key)
        assert getattr(Policy(preset="r1", **{key: default}), key) == default


@pytest.mark.parametrize("preset", ["r2", ["r1"], {"r1": 1}, None])
def test_a_preset_that_is_none_is_refused(preset):
    with pytest.raises(ValidationError, match="preset"):
        Policy(preset=preset)


def test_a_resolved_policy_reads_back_as_itself():
    policy = Policy(preset="r1", clip_low=0.2)
    assert Policy(**policy.model_dump()) == policy
