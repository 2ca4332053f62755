"""A fleet samples the same completions to the bit, whatever the number of its seats, the order in which they
answer, and which of them die or are silent. Here the seats are in this process; tests/test_seats.py starts
processes."""

from __future__ import annotations

import random
import shutil
from collections import deque
from dataclasses import asdict, replace
from itertools import count

import numpy as np
import pytest

from limbeck.cluster import messages
from limbeck.cluster.fleet import Fleet
from limbeck.cluster.hosts import Event
from limbeck.cluster.pool import SeatPool
from limbeck.cluster.seat import Seat
from limbeck.config.hosts import Hosts, load_hosts
from limbeck.config.recipe import Miniature
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import weights
from limbeck.pipeline.stage_seats import ready_seats, seats_of
from limbeck.tasks.mixture import Mixture
from limbeck.types import Completion, Group, LimbeckError, Problem, Resumable, Score, fingerprint

SHARD = 8  # completions
GROUP = 3
SAMPLING = SamplingParams(0.9, 0.8, 8, keep_mask=True)
SEED = ("0/zero", 4, np.int64(1))
SOURCES = {"clock": Miniature(source="miniature").model_dump(mode="json")}


class Here:
    """Hosts whose seats are objects in this process. `fate(event)` may return another event in place of a
    seat's answer, or None to hold it back."""

    def __init__(self, folder, seed: int = 0, fate=lambda event: event):
        self.folder, self.random, self.fate = folder, random.Random(seed), fate
        self.seats, self.events, self.versions = {}, deque(), count()
        self.held: list[Event] = []
        self.killed: list[int] = []

    def start(self, seat):
        self.seats[seat] = Seat()
        self.events.append(Event(seat, messages.pack({"ready": 0})))

    def send(self, seat, message):
        if "number" in messages.unpack(message)[0]:
            self.events.append(Event(seat, self.seats[seat].answer(message)))

    def wait(self, seconds):
        while self.events:
            self.random.shuffle(self.events)
            event = self.events.popleft()
            if event.message is None or "ready" in messages.unpack(event.message)[0]:
                return event
            told = self.fate(event)
            if told:
                return told
            self.held.append(event)
        return None

    def kill(self, seat):
        self.killed.append(seat)
        self.held = [event for event in self.held if event.seat != seat]
        self.events.append(Event(seat, None, "was killed (signal 9)"))

    def publish(self, model, tokenizer):
        folder = self.folder / str(next(self.versions))
        folder.mkdir()
        weights.save(model, folder, tokenizer)
        return str(folder)

    def withdraw(self, folder):
        shutil.rmtree(folder)

    def close(self): ...


def same(one, other) -> bool:
    """Whether two lists of groups are equal to the bit, with texts and scores."""

    def flat(groups):
        return [
            (group.problem, group.prompt_tokens.tolist(), group.scores, len(group.completions))
            for group in groups
        ], [
            (
                part.tokens.tolist(), part.logprobs.tobytes(), part.text, part.stopped, part.sample,
                part.kept and [ids.tolist() for ids in part.kept],
                None if part.routes is None else part.routes.tolist(),
            )
            for group in groups for part in group.completions
        ]  # fmt: skip

    return flat(one) == flat(other)


@pytest.fixture
def problems(clock):
    return list(clock.problems("train"))[:7]


@pytest.fixture
def fleet(decoder, tokenizer, tmp_path):
    """`fleet(seats, seed, fate, **settings)`."""

    def build(seats=1, seed=0, fate=lambda event: event, **settings) -> Fleet:
        folder = tmp_path / f"weights-{seats}-{seed}"
        folder.mkdir(exist_ok=True)
        pool = SeatPool(Here(folder, seed, fate), seats, **settings)
        return Fleet(pool, decoder(), tokenizer, SHARD, sources=SOURCES)

    return build


def test_groups_are_equal_to_the_bit_for_any_number_of_seats_and_order_of_answers(fleet, problems):
    wanted = fleet().rollout(problems, GROUP, SAMPLING, SEED)
    assert len({part.text for group in wanted for part in group.completions}) > 5
    for seats in (2, 3):
        assert same(fleet(seats, seats).rollout(problems, GROUP, SAMPLING, SEED), wanted)
    other = fleet(2).rollout(problems, GROUP, SAMPLING, (*SEED, 1))
    assert not same(other, wanted)


def test_a_shard_is_what_an_engine_samples_from_its_problems(fleet, decoder, tokenizer, clock, problems):
    """With the same draws and the same scores, and the tokens of an engine that samples all of it at once."""
    groups = fleet(2).rollout(problems, GROUP, SAMPLING, SEED)
    engine = Engine(decoder(), tokenizer, SHARD)
    rows = SHARD // GROUP
    shards = [problems[i : i + rows] for i in range(0, len(problems), rows)]
    plain = [group for shard in shards for group in engine.rollout(shard, GROUP, SAMPLING, SEED)]
    tasks = Mixture({"clock": clock}, {"clock": 1.0}, {"accuracy": 1.0})
    assert same([tasks.score(group) for group in groups], [tasks.score(group) for group in plain])
    assert all(len(group.scores) == GROUP for group in groups)
    whole = Engine(decoder(), tokenizer).rollout(problems, GROUP, SAMPLING, SEED)
    assert [part.text for group in groups for part in group.completions] == [
        part.text for group in whole for part in group.completions
    ]


@pytest.mark.parametrize("seed", range(4))
def test_seats_that_die_at_random_lose_and_double_no_group(fleet, problems, seed):
    wanted = fleet().rollout(problems, GROUP, SAMPLING, SEED)
    chance = random.Random(seed)

    def fate(event):
        return Event(event.seat, None, "was killed (signal 9)") if chance.random() < 0.4 else event

    many = fleet(3, seed, fate, restarts=100)
    told = []
    many.pool.begin(told.append)
    rows = []
    assert same(many.rollout(problems, GROUP, SAMPLING, SEED, rows.append), wanted)
    assert many.pool.deaths == len(told)
    assert sum(rows) == len(problems) * GROUP


def test_too_many_deaths_end_the_stage_resumably(fleet, problems):
    doomed = fleet(2, fate=lambda event: Event(event.seat, None, "was killed (signal 9)"), restarts=2)
    with pytest.raises(Resumable, match=r"hosts\.restarts: .*death 3") as caught:
        doomed.rollout(problems, GROUP, SAMPLING, SEED)
    assert caught.value.exit_code == 75


def silent(seat: int):
    """The first answer of a seat is held back."""
    held = []

    def fate(event):
        if event.seat == seat and not held:
            held.append(event)
            return None
        return event

    return fate


def test_the_shard_of_a_silent_seat_is_asked_of_another_and_both_answers_must_be_equal(fleet, problems):
    wanted = fleet().rollout(problems, GROUP, SAMPLING, SEED)
    many = fleet(2, fate=silent(1), patience=0.01)
    told = []
    many.pool.begin(told.append)
    assert same(many.rollout(problems, GROUP, SAMPLING, SEED), wanted)
    assert any("asked of another seat too" in text for text in told)
    hosts = many.pool.hosts
    assert len(hosts.held) == 1 and not hosts.killed
    hosts.events.extend(hosts.held)  # it awakes
    assert same(many.rollout(problems, GROUP, SAMPLING, SEED), wanted)
    assert not many.pool._accepted


def test_two_answers_that_differ_stop_the_run(fleet, problems):
    many = fleet(2, fate=silent(1), patience=0.01)
    many.rollout(problems, GROUP, SAMPLING, SEED)
    (late,) = many.pool.hosts.held
    header, arrays = messages.unpack(late.message)
    arrays["logprobs_T"] = np.nextafter(arrays["logprobs_T"], np.float32(-9))
    many.pool.hosts.events.append(Event(late.seat, messages.pack(header, arrays)))
    with pytest.raises(LimbeckError, match="different completions of one shard"):
        many.rollout(problems, GROUP, SAMPLING, SEED)


def test_the_only_seat_is_replaced_if_it_is_silent(fleet, problems):
    wanted = fleet().rollout(problems, GROUP, SAMPLING, SEED)
    one = fleet(1, 1, fate=silent(0), patience=0.01)
    assert same(one.rollout(problems, GROUP, SAMPLING, SEED), wanted)
    assert one.pool.hosts.killed == [0] and one.pool.deaths == 1


def test_weights_are_handed_over_once_for_each_update_and_used(fleet, problems, decoder, tokenizer):
    many = fleet(2)
    first = many.rollout(problems, GROUP, SAMPLING, SEED)
    folder = many.version.folder
    many.rollout(problems, GROUP, SAMPLING, SEED)
    assert many.version.folder == folder
    many.load_weights(decoder(seed=1).state_dict())
    second = many.rollout(problems, GROUP, SAMPLING, SEED)
    assert many.version.folder != folder and not same(first, second)
    fresh = Fleet(many.pool, decoder(seed=1), tokenizer, SHARD, sources=SOURCES)
    assert same(fresh.rollout(problems, GROUP, SAMPLING, SEED), second)
    assert len(list(many.pool.hosts.folder.iterdir())) == 2


def test_other_weights_than_were_asked_for_stop_the_run(fleet, problems, monkeypatch):
    many = fleet(2)
    many.rollout(problems, GROUP, SAMPLING, SEED)
    monkeypatch.setattr(weights, "fill", lambda decoder, folder: None)
    with_one_changed = {name: value.clone() for name, value in many.model.state_dict().items()}
    with_one_changed["head.weight"][0, 0] += 1
    many.load_weights(with_one_changed)
    with pytest.raises(LimbeckError, match="sampled with the weights"):
        many.rollout(problems, GROUP, SAMPLING, SEED)


def test_a_mistake_is_reported_as_by_an_engine_and_a_defect_with_its_traceback(fleet, problems, monkeypatch):
    many = fleet(2)
    with pytest.raises(LimbeckError, match="exceed the model's 128 positions"):
        many.rollout(problems, GROUP, replace(SAMPLING, max_new_tokens=1000), SEED)
    monkeypatch.setattr(Engine, "sample", lambda *arguments: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        many.rollout(problems, GROUP, SAMPLING, SEED)


def test_prompts_are_rendered_by_the_tokenizer_of_the_fleet(fleet, problems, decoder):
    """Which is not the one that the seats read: a stage may continue texts without a chat template."""
    many = fleet(2)
    texts = many.with_tokenizer(many.tokenizer.plain())
    groups = texts.rollout(problems, 1, SAMPLING, SEED)
    engine = Engine(decoder(), many.tokenizer.plain(), SHARD)
    plain = engine.rollout(problems, 1, SAMPLING, SEED)
    assert same([replace(group, scores=()) for group in groups], plain)
    assert not same(plain, Engine(decoder(), many.tokenizer, SHARD).rollout(problems, 1, SAMPLING, SEED))
    assert many.rollout(problems, 1, SAMPLING, SEED) and len(many.pool.hosts.seats[0].engines) == 1


def test_two_fleets_share_seats_which_drop_the_engines_of_those_that_are_gone(fleet, problems, decoder):
    policy = fleet(2)
    judge = Fleet(policy.pool, decoder(seed=1), policy.tokenizer, SHARD)
    rated = judge.rollout(problems, 1, SAMPLING, SEED)
    assert not any(group.scores for group in rated)
    policy.rollout(problems, GROUP, SAMPLING, SEED)
    seats = policy.pool.hosts.seats.values()
    assert max(len(seat.engines) for seat in seats) == 2
    name = judge.name
    del judge
    policy.rollout(problems, GROUP, SAMPLING, SEED)
    assert all(name not in seat.engines for seat in seats)


def test_a_group_that_is_scored_where_it_was_sampled_is_not_scored_again(clock, problems):
    tasks = Mixture({"clock": clock}, {"clock": 1.0}, {"accuracy": 2.0})
    given = (Score({"accuracy": 0.25}),)
    group = replace(_group(problems[0]), scores=given)
    assert tasks.score(group).scores == given and tasks.score(group).rewards == (0.5,)


def _group(problem):
    completion = Completion(np.array([3]), np.array([-0.5]), "4", True, 0)
    return Group(problem, np.array([1, 2]), (completion,))


# ---------------------------------------------------------------- messages


def test_a_seed_draws_the_same_after_its_journey():
    for seed in (0, "0/zero", ("0/zero", 12), (("a", 1), np.int64(3)), ("é", None)):
        assert fingerprint(messages.Seed(repr(seed)), "p", 3) == fingerprint(seed, "p", 3)


def test_problems_and_sampling_parameters_travel_as_they_are():
    whole = Problem("a/1", "2+2?", "4", "en", "here", {"terms": [1, 2.5, None]}, "be brief", "{problem}")
    sent = messages.unpack(messages.pack({"problem": messages.write_problem(whole)}))[0]["problem"]
    assert sent["plain"] and messages.read_problem(sent) == whole
    odd = messages.write_problem(replace(whole, data={1: (2, 3)}))
    assert not odd["plain"] and messages.read_problem(odd) == replace(whole, data={})
    params = SamplingParams(0.5, 0.9, 7, True, {3: 4}, (5,), 2, 0.1, 0.2, 0.3, 1.1, (6, 7))
    sent = messages.unpack(messages.pack({"sampling": asdict(params)}))[0]["sampling"]
    assert messages.read_sampling(sent) == params


def test_no_message_is_unpickled():
    with pytest.raises(ValueError, match="allow_pickle"):
        messages.unpack(messages.pack({}, {"a": np.array([object()])}))


def test_ids_left_and_experts_chosen_travel_as_they_are():
    rng = np.random.default_rng(0)

    def completion(tokens: int, masked: bool) -> Completion:
        kept = tuple(np.arange(i + 1) for i in range(tokens)) if masked else None
        logprobs, routes = rng.random(tokens, np.float32), rng.integers(0, 9, (tokens + 2, 2, 3))
        return Completion(np.arange(tokens), logprobs, "x" * tokens, tokens > 2, tokens % 2, kept, routes)

    problem, prompt = Problem("a/1", "?"), np.arange(3)
    scores = (
        Score({"accuracy": 1.0}, {"format": "none"}, {"words": 2.0}, "4", True),
        Score({"accuracy": 0.0}),
    )
    groups = [
        Group(problem, prompt, (completion(4, True), completion(1, False)), scores),
        Group(problem, prompt, (completion(2, True), completion(3, True))),
    ]
    header, arrays = messages.unpack(messages.pack(*messages.write_groups(groups)))
    assert same(messages.read_groups(header, arrays, [(problem, prompt)] * 2, 2), groups)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seats: {count: 0}", "seats.count: input should be greater than or equal to 1, but it is 0"),
        ("seats: {thread: 2}", "unknown key seats.thread; did you mean threads?"),
        ("patiens: 3", "unknown key patiens; did you mean patience?"),
        ("kind: ray", "kind: input should be 'local', but it is 'ray'"),
        ("- 1", "hosts are a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_mistake_in_the_file_of_hosts_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "hosts.yaml"
    path.write_text(text)
    with pytest.raises(LimbeckError) as caught:
        load_hosts(path)
    assert sentence in str(caught.value) and str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_of_hosts_is_read(tmp_path):
    path = tmp_path / "hosts.yaml"
    path.write_text("kind: local\nseats: {count: 3, threads: 2}\npatience: 5\nrestarts: 0\n")
    hosts = load_hosts(path)
    assert (hosts.seats.count, hosts.patience, hosts.restarts) == (3, 5, 0)
    assert hosts.identity == {"kind": "local", "shard": 64, "threads": 2}
    with pytest.raises(LimbeckError, match="no such file"):
        load_hosts(tmp_path / "none.yaml")


class Staged:
    """As much of a job as `ready_seats` looks at."""

    def __init__(self, folder, hosts, kind="rl", model="base"):
        self.folder, self.hosts = folder, hosts
        self.endpoints = {"far": None}
        self.stage = type("Stage", (), {"kind": kind, "model": model})


def test_a_stage_notes_what_it_sampled_on(tmp_path):
    told = []
    assert ready_seats(Staged(tmp_path, None), told.append) == {}
    (tmp_path / "kernels.json").write_text("{}")  # it has begun
    assert ready_seats(Staged(tmp_path, Hosts(), "sft"), told.append) == {}
    assert ready_seats(Staged(tmp_path, Hosts(), "sample", "far"), told.append) == {}
    assert not told
    found = ready_seats(Staged(tmp_path, Hosts()), told.append)
    assert found == {"seats": {"kind": "local", "shard": 64, "threads": 1, "before": [None]}}
    assert "began with no seats" in told.pop()
    assert ready_seats(Staged(tmp_path, Hosts(restarts=9)), told.append) == found and not told
    back = ready_seats(Staged(tmp_path, None), told.append)
    assert back["seats"]["kind"] == "worker" and len(told) == 1
    assert seats_of(back) == [None, Hosts().identity, None]
    assert seats_of({}) == [None]
