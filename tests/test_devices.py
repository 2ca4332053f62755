"""Every kind of stage on a device that is not the CPU, and what a worker does with a card."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from fake_device import NAME, fake_device
from safetensors import safe_open
from tiny import Silent, answer

from limbeck.cli import doctor, evaluation
from limbeck.cli.ask import stream_answer
from limbeck.cli.options import hold_device
from limbeck.config.load import dump, load
from limbeck.config.recipe import Evaluate, Miniature
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import weights
from limbeck.model.ops import devices
from limbeck.pipeline.evaluation_run import HeldOut
from limbeck.pipeline.graph import Node
from limbeck.pipeline.job import Job
from limbeck.pipeline.run import Run
from limbeck.pipeline.run_status import RunStatus
from limbeck.pipeline.stage_device import DEVICES, device_memory, note_device, remedies
from limbeck.pipeline.stages import STAGES
from limbeck.pipeline.worker import TEMPORARY_FAILURE, run_job
from limbeck.run_log import read_metrics
from limbeck.runtime import exactness
from limbeck.runtime.card_lock import card_lock
from limbeck.runtime.exactness import equal_share
from limbeck.runtime.worker_pool import WorkerPool
from limbeck.train.alarms import SAMPLER_KL, disagreement
from limbeck.types import LimbeckError, Resumable

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


def carry_out(folder: Path, device: str, last: str = "", *overrides: str) -> dict[str, Node]:
    """Stages by name, carried out on a device in this process, to the stage `last` or to the end."""
    recipe = folder / "devices.yaml"
    recipe.write_text(RECIPE)
    return tiny.carry_out(Run(load(recipe, overrides), folder, folder / device, Silent()), device, last)


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


# ---------------------------------------------------------------- names


def test_a_device_that_is_not_here_is_one_sentence(tmp_path):
    for name, sentence in {
        "gpu": "--device gpu: not a device; choose auto, cpu, cuda, cuda:1 or mps",
        "cuda:7": "--device cuda:7: ",
    }.items():
        code, out, errors = answer("run", "smoke", "--runs", tmp_path, "--device", name)
        assert (code, out) == (2, "")
        assert errors.startswith(f"limbeck: {sentence}") and len(errors.splitlines()) == 1
    assert not any(tmp_path.iterdir())


class Cards:
    """What torch tells of a machine with cards."""

    def __init__(self, monkeypatch, *capabilities: tuple[int, int]):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")


def test_auto_is_the_first_card_that_serves_and_else_the_cpu(monkeypatch):
    assert devices.resolve("cpu") == "cpu"
    Cards(monkeypatch, (7, 5), (9, 0))
    assert (devices.resolve("auto"), devices.resolve("cuda:1")) == ("cuda:1", "cuda:1")
    with pytest.raises(LimbeckError, match=r"card 0 has compute capability 7\.5, and the kernels need 8\.0"):
        devices.resolve("cuda")
    with pytest.raises(
        LimbeckError, match=r"no such card; there is cuda:0 \(card 0\), cuda:1 \(card 1\), cpu"
    ):
        devices.resolve("cuda:2")
    Cards(monkeypatch)
    assert devices.resolve("auto") == "cpu"


def test_a_build_of_torch_for_cpus_tells_the_one_to_install(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        LimbeckError, match="built without CUDA; on Linux `pip install --force-reinstall torch"
    ):
        devices.resolve("cuda")


def test_results_on_a_card_are_made_repeatable_and_a_cpu_is_left_alone(monkeypatch):
    devices.prepare("cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: None)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        devices.prepare("cuda:0")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.backends.cudnn.allow_tf32 = True


# ---------------------------------------------------------------- settings


def stage_keys(folder: Path, *overrides: str) -> str:
    """The key of the stage that needs nothing."""
    (folder / "devices.yaml").write_text(RECIPE)
    return (
        Run(load(folder / "devices.yaml", overrides), folder, folder / "runs", Silent())
        .graph.nodes["base"]
        .key
    )


def test_precision_and_exactness_are_in_the_key_where_they_change_a_result(tmp_path):
    plain = stage_keys(tmp_path)
    same = ("precision=float32", "exact=true", "stages.base.exact=true")
    assert {stage_keys(tmp_path, override) for override in same} == {plain}
    other = stage_keys(tmp_path, "precision=bfloat16")
    assert other != plain and stage_keys(tmp_path, "exact=false") not in (plain, other)
    assert stage_keys(tmp_path, "stages.base.precision=bfloat16") == other
    assert stage_keys(tmp_path, "precision=bfloat16", "stages.base.precision=float32") == plain


@pytest.mark.parametrize("device", ["cpu", "plain"])
def test_a_recipe_in_bfloat16_runs_on_a_cpu_and_stores_bfloat16(tmp_path, device):
    nodes = carry_out(tmp_path, device, "zero", "precision=bfloat16")
    folder = nodes["zero"].artifact.folder
    with safe_open(folder / "model" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert json.loads((folder / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert weights.load(folder / "model", torch.bfloat16).embed.weight.dtype == torch.bfloat16
    steps = read_metrics(folder)
    assert all(step["gap_kl"] < SAMPLER_KL for step in steps)


def test_sixteen_bits_are_judged_by_the_kl_and_float32_by_every_token():
    assert disagreement(2e-3) == "0.0020 nats" and not disagreement(9e-4)
    assert not disagreement(1.5, 0.002) and disagreement(0.1, 0.02) == "a KL of 0.0200 nats a token"


# ---------------------------------------------------------------- the worker


def ready(folder: Path, stage: str = "base", device: str = "cpu") -> Job:
    """A stage that can begin."""
    (folder / "devices.yaml").write_text(RECIPE)
    run = Run(load(folder / "devices.yaml"), folder, folder / "runs", Silent())
    return replace(run._job(run.graph.nodes[stage]), device=device)


def test_a_stage_that_goes_on_on_another_device_says_so_and_its_manifest_tells_both(tmp_path, monkeypatch):
    job = ready(tmp_path)
    told = []
    assert note_device(job, told.append) == {}
    assert note_device(job, told.append) == {} and not told  # killed and resumed on the same
    card = {"name": "NVIDIA H100", "driver": "580.95", "torch": "2.13.0", "triton": "3.6.0"}
    monkeypatch.setattr(devices, "describe", lambda name: card)
    on_card = replace(job, device="cuda:0")
    wanted = {"device": {**card, "before": [{"name": "cpu"}]}}
    assert note_device(on_card, told.append) == wanted
    assert note_device(on_card, told.append) == wanted
    (sentence,) = told
    assert sentence == (
        "it began on cpu and goes on on NVIDIA H100 (driver 580.95, torch 2.13.0, triton 3.6.0); the two "
        "round differently, so its files will not be those of a run on one of them"
    )


def test_status_and_show_tell_the_stages_that_went_on_on_another_device(tmp_path, call):
    """One that is done says so by its manifest, one that was only begun by its folder."""
    home = tmp_path / "plain"
    nodes = carry_out(tmp_path, "plain", "base")
    run = Run(load(tmp_path / "devices.yaml"), tmp_path, home, Silent())
    run.folder.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(dump(load(tmp_path / "devices.yaml", [])))
    said = "computed on cpu, then on NVIDIA H100 (driver 580.95), which round differently"
    for command in (("status", run.folder), ("show", "--runs", home)):
        assert said not in call(*command).out
    devices_used = [{"name": "cpu"}, {"name": "NVIDIA H100", "driver": "580.95"}]
    path = nodes["base"].artifact.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "device": {**devices_used[1], "before": devices_used[:1]}}))
    for command in (("status", run.folder), ("show", "--runs", home)):
        assert call(*command).out.count(said) == 1
    with RunStatus(run.folder) as state:
        partial = run.store.root / ".partial" / "zero-1"
        partial.mkdir(parents=True)
        (partial / DEVICES).write_text(json.dumps(devices_used))
        state.begun["zero"] = partial.name
        state.tell("running")
        rows = json.loads(call("status", run.folder, "--json").out)["data"]
    assert [row["stage"] for row in rows if row["devices"].startswith(said)] == ["base", "zero"]


def test_one_process_at_a_time_has_a_card_and_the_next_says_for_whom_it_waits(tmp_path):
    told = []

    def taken(stop=lambda: False):
        return card_lock(tmp_path, "GPU-1", "stage zero in runs", told.append, stop)

    with taken(), pytest.raises(Resumable, match="waited for the card"), taken(lambda: bool(told)):
        pass
    assert told == [f"waits for the card, which stage zero in runs (process {os.getpid()}) uses"]
    with taken(), card_lock(tmp_path, "GPU-2", "", told.append, lambda: False):
        assert len(told) == 1


FULL = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.99 GiB of which "
    "1.10 GiB is free. Including non-PyTorch memory, this process has 22.8 GiB memory in use."
)


def failing(monkeypatch, error: BaseException) -> None:
    """Let the stages of pretraining fail with an error."""

    def fail(job):
        raise error

    monkeypatch.setitem(STAGES, "pretrain", fail)


def test_a_manifest_tells_the_memory_of_a_card_and_nothing_of_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "peak_bytes", lambda name: 7)
    assert device_memory(ready(tmp_path)) == {}
    assert device_memory(ready(tmp_path, device="cuda:0")) == {"device_memory_bytes": 7}


def test_a_full_card_is_one_sentence_with_what_helps_and_can_go_on(tmp_path, monkeypatch):
    failing(monkeypatch, torch.OutOfMemoryError(FULL))
    event = run_job(ready(tmp_path))
    assert (event["event"], event["code"]) == ("failed", TEMPORARY_FAILURE)
    assert event["message"] == (
        "the card's memory is full: 2.50 GiB more were asked for, of 23.99 GiB only 1.10 GiB are free; set "
        "stages.base.precision: bfloat16, or lower stages.base.batch_tokens (512)"
    )


def test_what_needs_less_memory_is_told_the_gentlest_first(tmp_path):
    job = replace(ready(tmp_path), name="zero", stage=load(tmp_path / "devices.yaml").stages["zero"])
    assert remedies(job)[0].startswith("set stages.zero.recompute: true, with which the same command goes on")
    assert [words.removeprefix("set stages.zero.") for words in remedies(job)[1:5]] == [
        "optimizer.offload: true, with which it goes on from there too",
        "precision: bfloat16",
        "optimizer.moments: int8",
        "optimizer.masters: false with precision: bfloat16",
    ]
    assert remedies(job)[-1] == (
        "lower stages.zero.batch_tokens (4096) or stages.zero.policy.group_size (4) or "
        "stages.zero.sampling.max_new_tokens (16)"
    )


def test_an_error_of_the_card_ends_the_process_and_other_errors_do_not(tmp_path, monkeypatch):
    failing(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered\nSearch for"))
    event = run_job(ready(tmp_path))
    assert event == {"event": "broken", "message": "CUDA error: an illegal memory access was encountered"}
    failing(monkeypatch, RuntimeError("shapes differ"))
    assert run_job(ready(tmp_path))["event"] == "failed"


def test_a_stage_whose_card_failed_goes_on_in_a_new_process_once(tmp_path):
    (tmp_path / "devices.yaml").write_text(RECIPE)
    run = Run(load(tmp_path / "devices.yaml"), tmp_path, tmp_path / "runs", Silent())
    broken = {"event": "broken", "name": "base", "message": "CUDA error: unknown"}
    started = []
    run.host = SimpleNamespace(start=lambda request: started.append(request["name"]), free=1)
    run.folder.mkdir(parents=True)
    assert run._start()
    run._handle(broken)
    assert not run.running
    assert run._start() and started == ["base", "base"]
    with pytest.raises(Resumable, match=r"stage base: its card failed again in a new process \(CUDA error"):
        run._handle(broken)


def test_a_worker_whose_card_failed_gets_no_other_stage():
    pool = WorkerPool(1)
    worker = SimpleNamespace(returncode=70)
    pool._busy["base"] = worker
    pool._events.put((worker, {"event": "broken", "name": "base", "message": ""}))
    assert pool.wait(1)["event"] == "broken"
    assert not pool._idle and not pool._busy and pool.free == 1
    pool._events.put((worker, None))
    assert pool.wait(1) is None


# ---------------------------------------------------------------- doctor and ask


def test_the_share_of_equal_bits_is_counted(monkeypatch):
    """Sixteen bits differ where the order of sums does; one that is handed the sampler's agrees."""
    share = equal_share("plain")
    assert 0 < share < 1
    kept = []

    class Recorded(Engine):
        def rollout(self, *arguments, **options):
            groups = super().rollout(*arguments, **options)
            kept.extend(completion.logprobs for group in groups for completion in group.completions)
            return groups

    monkeypatch.setattr(exactness, "Engine", Recorded)
    monkeypatch.setattr(exactness, "by_sample", lambda batches, values, count: kept)
    assert equal_share("plain") == 1


CARD = {
    "device": "cuda:0",
    "serves": True,
    "memory_bytes": 24 << 30,
    "name": "RTX 4090",
    "capability": "8.9",
    "driver": "580.95",
}


@pytest.mark.parametrize(
    "card, share, ok, words",
    [
        (CARD, 1.0, True, "RTX 4090, 24.0 GiB, driver 580.95; sampler and learner agree to the last bit"),
        (CARD, 0.9, False, "90.00% of the tokens agree to the last bit"),
        ({**CARD, "serves": False, "capability": "7.5"}, 1.0, None, "RTX 4090, 24.0 GiB, driver 580.95"),
    ],
)
def test_doctor_tells_a_card_its_memory_and_whether_it_is_exact(monkeypatch, card, share, ok, words):
    monkeypatch.setattr(devices, "cards", lambda: [card])
    monkeypatch.setattr(devices, "prepare", lambda name: None)
    monkeypatch.setattr(exactness, "equal_share", lambda name: share)
    (finding,) = doctor._cards()
    assert (finding.name, finding.ok) == ("cuda:0", ok) and words in finding.value
    assert bool(finding.advice) == (ok is not True)


def test_doctor_without_a_card_says_that_there_is_none():
    (finding,) = doctor._cards()
    assert (finding.ok, finding.value) == (None, "torch sees none; every stage runs on the CPU")


def test_a_question_is_answered_on_a_device(decoder, tokenizer, tmp_path):
    weights.save(decoder(), tmp_path, tokenizer)
    sampling = SamplingParams(max_new_tokens=8)
    assert "".join(stream_answer(tmp_path, "1 + 1", sampling, 0, "plain"))
    with pytest.raises(LimbeckError, match="--device cuda:9"), hold_device("cuda:9", "limbeck ask"):
        pass


def test_an_evaluation_without_a_run_takes_a_device(decoder, tokenizer, tmp_path):
    weights.save(decoder(), tmp_path, tokenizer)
    settings = Evaluate(
        kind="evaluate", models=["model"], problems=["clock"], prompts=4, modes=["greedy"], max_new_tokens=8
    )
    test = HeldOut(settings, {"clock": Miniature(source="miniature")})

    def measure(device: str) -> dict:
        with evaluation._measured(str(tmp_path), tmp_path, test, device) as folder:
            return json.loads((folder / "evaluation.json").read_text())

    assert measure("cpu")["sources"] == measure("plain")["sources"]
    with pytest.raises(LimbeckError, match="--device cuda:9"):
        measure("cuda:9")


def test_a_stored_dtype_is_that_of_the_weights(decoder, tokenizer, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        weights.save(decoder(dtype), tmp_path, tokenizer)
        assert weights.stored_dtype(tmp_path) == dtype
