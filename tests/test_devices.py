"""Every kind of stage on a device that is not the CPU: the engine, the learner and all that is between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_device import NAME, fake_device
from tiny import Silent

from limbeck.config.load import load
from limbeck.pipeline.graph import Node
from limbeck.pipeline.run import Run
from limbeck.pipeline.stages import STAGES
from limbeck.run_log import read_metrics

RECIPE = """
name: devices
threads: 1
problems:
  clock: &clock {source: miniature, modulus: 3, numbers: 2, largest: 4}
  chat: {<<: *clock, task: repeat}
stages:
  base:
    kind: pretrain
    problems: clock
    corpus: {textbook: 0, general: 0.9, plain: 0, tagged: 0.7, guessed: 0, slip: 0, misjudged: 0}
    tokens: 8000
    log_every: 1
    batch_tokens: 512
    optimizer: {name: muon, learning_rate: 0.02, warmup_steps: 5}
    shape: {hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 64}
  zero:
    kind: rl
    model: base
    problems: {chat: 1}
    steps: 2
    policy: {prompts_per_step: 4, group_size: 4, kl_coef: 0.01, updates_per_rollout: 2, zero_variance: keep}
    sampling: &brief {max_new_tokens: 16}
  traces: {kind: sample, model: base, problems: {chat: 1}, prompts: 16, samples: 2, correct: false,
           wellformed: false, sampling: *brief}
  tuned: {kind: sft, model: base, rows: {traces: 1}, batch_tokens: 256, epochs: 1}
  preferred: {kind: pairs, model: base, problems: {chat: 1}, prompts: 64, samples: 4, scored_by: tuned,
              sampling: *brief}
  reward: {kind: reward, model: base, rows: preferred, held_out: 0.4, batch_pairs: 16}
  straight: {kind: dpo, model: base, pairs: {preferred: 0.5}, batch_tokens: 512}
  labels: {kind: label, model: tuned, rows: {traces: 1}, top_k: 4}
  small: {kind: distill, model: base, teachers: {chat: tuned}, problems: {chat: 1}, rows: {labels: 1},
          on_policy: 0.5, steps: 4, prompts_per_step: 4, sampling: *brief}
  evaluation: {kind: evaluate, models: [zero], problems: [chat], prompts: 8, max_new_tokens: 16,
               modes: [greedy, t1]}
"""


def carry_out(folder: Path, device: str, last: str = "") -> dict[str, Node]:
    """Stages by name, carried out on a device in this process, to the stage `last` or to the end."""
    recipe = folder / "devices.yaml"
    recipe.write_text(RECIPE)
    run = Run(load(recipe), folder, folder / device, Silent())
    run.graph.check_contamination()
    while ready := [node for node in run.graph.nodes.values() if node.state == "ready"]:
        node = ready[0]
        job = replace(run._job(node), device=device)
        outcome = STAGES[node.kind](job)
        manifest = run._manifest(node, {**outcome, "seconds": 0, "peak_memory_bytes": 0})
        run.store.finish(job.folder, manifest)
        run.graph.refresh()
        if node.name == last:
            break
    return run.graph.nodes


def test_no_stage_mixes_the_tensors_of_two_devices(tmp_path):
    with fake_device():
        stages = carry_out(tmp_path, NAME)
    assert {name: node.state for name, node in stages.items()} == dict.fromkeys(stages, "cached")
    losses = [step["loss"] for step in read_metrics(stages["base"].artifact.folder)]
    on_cpu = carry_out(tmp_path, "plain", "base")
    assert losses == pytest.approx(
        [step["loss"] for step in read_metrics(on_cpu["base"].artifact.folder)], rel=1e-3
    )


def test_the_fake_device_is_as_strict_as_a_card():
    with fake_device():
        there = torch.zeros(3, device=NAME)
        assert there.device.type == NAME and there.cpu().tolist() == [0, 0, 0]
        with pytest.raises(AssertionError, match="tensors of the CPU"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
