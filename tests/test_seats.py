"""Seats that are processes: killed, stopped, and in whole runs."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from test_fleet import GROUP, SAMPLING, SEED, SHARD, SOURCES, Here, same
from tiny import Silent, alive, answer, carry_out, children, digests, limbeck, until

from limbeck.cluster.fleet import Fleet
from limbeck.cluster.hosts import Local
from limbeck.cluster.pool import SeatPool
from limbeck.config.hosts import Hosts
from limbeck.config.load import load
from limbeck.model import kernels
from limbeck.pipeline.run import Run

pytestmark = pytest.mark.slow

LONG = 600.0  # seconds; a test machine may be busy


@pytest.fixture(scope="module")
def pool():
    """Two seats, for all tests."""
    pool = SeatPool(Local(), 2, LONG, restarts=0)
    yield pool
    pids = [seat.process.pid for seat in pool.hosts._seats.values()]
    folder = pool.hosts._folder
    pool.close()
    assert pids and not any(map(alive, pids)) and not folder.exists()


@pytest.fixture
def fleet(pool, decoder, tokenizer, problems):
    """A fleet on two seats that are both ready."""
    fleet = Fleet(pool, decoder(), tokenizer, SHARD, sources=SOURCES)
    until(
        lambda: (
            fleet.rollout(problems[:1], 1, SAMPLING, SEED)
            and all(seat.ready and not seat.ask for seat in pool.seats.values())
        ),
        LONG,
    )
    pool.begin(lambda text: None)
    return fleet


@pytest.fixture
def problems(clock):
    return list(clock.problems("train"))[:8]


@pytest.fixture
def wanted(decoder, tokenizer, problems, tmp_path):
    """What one seat in this process samples."""
    one = Fleet(SeatPool(Here(tmp_path), 1), decoder(), tokenizer, SHARD, sources=SOURCES)
    return one.rollout(problems, GROUP, SAMPLING, SEED)


def test_processes_sample_what_a_seat_in_this_process_samples(fleet, problems, wanted):
    assert same(fleet.rollout(problems, GROUP, SAMPLING, SEED), wanted)


@pytest.mark.parametrize("seed", range(2))
def test_seats_killed_at_random_instants_change_nothing(fleet, pool, problems, wanted, seed):
    chance = random.Random(seed)
    fleet.rollout(problems, GROUP, SAMPLING, SEED)  # with all weights loaded
    pool.restarts = 1
    began = time.monotonic()
    fleet.rollout(problems, GROUP, SAMPLING, SEED)
    spent = time.monotonic() - began
    victim = pool.hosts._seats[chance.randrange(2)].process
    timer = threading.Timer(chance.uniform(0, spent), os.kill, (victim.pid, signal.SIGKILL))
    timer.start()
    assert same(fleet.rollout(problems, GROUP, SAMPLING, SEED), wanted)
    timer.join()
    until(lambda: same(fleet.rollout(problems, GROUP, SAMPLING, SEED), wanted) and pool.deaths)


def test_the_shard_of_a_stopped_seat_is_asked_elsewhere_and_its_late_answer_is_compared(
    fleet, pool, problems, wanted
):
    told = []
    pool.begin(told.append)
    pid = pool.hosts._seats[0].process.pid
    os.kill(pid, signal.SIGSTOP)
    pool.patience = 0.5
    pool._is_slow = lambda state, clock: False  # only the shard of the stopped one is asked twice
    silent = pool._is_silent
    pool._is_silent = lambda state, clock: state is pool.seats[0] and silent(state, clock)
    try:
        assert same(fleet.rollout(problems, GROUP, SAMPLING, SEED), wanted)
        assert any("asked of another seat too" in text for text in told)
        assert len(pool._accepted) == 1
    finally:
        os.kill(pid, signal.SIGCONT)
        pool.patience = LONG
        del pool._is_slow, pool._is_silent
    until(lambda: fleet.rollout(problems[:1], 1, SAMPLING, SEED) and not pool._accepted)
    assert same(fleet.rollout(problems, GROUP, SAMPLING, SEED), wanted)
    assert pool.deaths == 0


def seats_of(run: int) -> list[int]:
    """The processes of the seats of a run."""
    found = [pid for worker in children(run) for pid in children(worker)]
    return [pid for pid in found if b"limbeck.cluster.seat" in Path(f"/proc/{pid}/cmdline").read_bytes()]


RECIPE = """
name: small
threads: 1
problems: {clock: {source: miniature, modulus: 3, numbers: 3, largest: 2}}
stages:
  base:
    kind: pretrain
    problems: clock
    tokens: 4000
    batch_tokens: 512
    shape: {hidden_size: 32, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 64}
  zero:
    kind: rl
    model: base
    problems: {clock: 1}
    rewards: {accuracy: 1, format: 0.2}
    steps: 2
    policy: {prompts_per_step: 8, group_size: 4, zero_variance: keep}
    sampling: {max_new_tokens: 12}
  traces:
    kind: sample
    model: base
    problems: {clock: 1}
    prompts: 24
    samples: 2
    correct: false
    wellformed: false
    sampling: {max_new_tokens: 12}
  evaluation: {kind: evaluate, models: [zero], problems: [clock], prompts: 24, max_new_tokens: 12}
"""


def test_a_run_on_two_seats_makes_the_artifacts_of_a_run_on_one(tmp_path):
    """By the command on two seats, of which one is killed, and then all of it, and in this process on one."""
    recipe, hosts = tmp_path / "small.yaml", tmp_path / "hosts.yaml"
    recipe.write_text(RECIPE)
    hosts.write_text("{kind: local, seats: {count: 2, threads: 1}, shard: 8, patience: 600}")
    command = ("run", recipe, "--runs", tmp_path / "two", "--hosts", hosts, "--json")
    process = limbeck(*command, start_new_session=True)
    until(lambda: seats_of(process.pid) or process.poll() is not None, LONG)
    os.kill(random.Random(0).choice(seats_of(process.pid)), signal.SIGKILL)
    until(lambda: list(tmp_path.glob("two/store/rl-*")) or process.poll() is not None, LONG)
    workers = children(process.pid)
    process.kill()
    out, errors = process.communicate()
    assert "is started anew" in out + errors, (out, errors)
    until(lambda: not any(map(alive, workers)))
    code, out, errors = answer(*command)
    assert code == 0, (out, errors)
    one = Hosts.model_validate({"shard": 8, "patience": 600})
    run = Run(load(recipe), tmp_path, tmp_path / "one", Silent(), hosts=one)
    manifest = next(tmp_path.glob("two/store/pretrain-*/manifest.json"))
    assert not kernels.adopt(json.loads(manifest.read_text(encoding="utf-8"))["kernels"])
    carry_out(run, "cpu")
    kernels.adopt(None)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    plain = Run(load(recipe), tmp_path, tmp_path / "two", Silent())
    assert all(node.artifact for node in plain.graph.nodes.values())  # the keys are those of any run
    seats = {node.name: node.artifact.manifest.get("seats") for node in plain.graph.nodes.values()}
    told = {"kind": "local", "shard": 8, "threads": 1}
    assert seats == {"base": None, "zero": told, "traces": told, "evaluation/zero": told}


def test_a_mistake_in_the_file_of_hosts_ends_the_command_before_anything_runs(call, tmp_path):
    path = tmp_path / "hosts.yaml"
    path.write_text("seats: 3")
    ended = call("run", "smoke", "--runs", tmp_path / "runs", "--hosts", path)
    assert ended.code == 2 and f"{path}: seats: " in ended.err
    path.write_text("{}")
    ended = call("run", "smoke", "--runs", tmp_path / "runs", "--hosts", path, "--device", "cuda")
    assert ended.code == 2 and "leave out --device cuda" in ended.err
    assert not Path(tmp_path / "runs").exists()


def test_seats_end_with_the_process_that_started_them_and_delete_its_weights(nursery, tmp_path):
    told = tmp_path / "told.json"
    owner = nursery.Process(target=_owner, args=(str(told),))
    owner.start()
    until(told.exists)
    pids, folder = json.loads(told.read_text())
    assert all(map(alive, pids)) and Path(folder).exists()
    owner.kill()
    owner.join()
    until(lambda: not any(map(alive, pids)) and not Path(folder).exists())


def _owner(path: str) -> None:
    """Start a seat, tell its process and the folder of its weights, and wait."""
    hosts = Local()
    hosts.start(0)
    until(lambda: hosts.wait(0.1))
    beside = Path(path).with_suffix(".partial")
    beside.write_text(json.dumps([[hosts._seats[0].process.pid], str(hosts._folder)]))
    beside.rename(path)
    time.sleep(LONG)
