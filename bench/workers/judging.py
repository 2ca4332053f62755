"""The miniature's clock for a worker: problems, rewards, and held-out accuracy, which is not timed."""

from __future__ import annotations

from pathlib import Path

from turns import SETTINGS

from limbeck.config.load import load
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model.decoder import Decoder
from limbeck.tasks.clock_countdown import Countdown
from limbeck.tasks.mixture import Mixture
from limbeck.text.tokenizer import Tokenizer

recipe = load(Path(SETTINGS["recipe"]), [])
zero = recipe.stages["zero"]
tasks = Mixture({"clock": Countdown("clock", recipe.problems["clock"])}, zero.problems, zero.rewards)
tokenizer = Tokenizer.from_directory(Path(SETTINGS["model"]))
sampling = SamplingParams(max_new_tokens=zero.sampling.max_new_tokens)


def accuracy(decoder: Decoder) -> float:
    """At temperature 1, over a sample of the held-out problems, three answers each."""
    problems = tasks.draw(SETTINGS["asked"], 0, "test")
    groups = [
        tasks.score(group) for group in Engine(decoder, tokenizer).rollout(problems, 3, sampling, "accuracy")
    ]
    return sum(score.parts["accuracy"] for group in groups for score in group.scores) / (3 * len(groups))
