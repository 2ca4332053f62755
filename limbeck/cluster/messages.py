"""What travels between a stage and its seats: a header in JSON and arrays, as bytes. Nothing is pickled.

R completions of a shard · T tokens of all of them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..engine.sampling import SamplingParams
from ..types import Completion, Group, Problem, Score

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Seed:
    """A seed that has travelled: random draws depend on the `repr` of a seed alone (types.fingerprint)."""

    text: str

    def __repr__(self) -> str:
        """Return what the `repr` of the seed was."""
        return self.text


def pack(header: dict[str, Any], arrays: Arrays | None = None) -> bytes:
    """Return a message as bytes, in the format of `np.savez`."""
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(header, default=np.generic.item).encode(), np.uint8)
    np.savez(buffer, header=text, **(arrays or {}))
    return buffer.getvalue()


def unpack(message: bytes) -> tuple[dict[str, Any], Arrays]:
    """Return the header and the arrays of a message. Raises ValueError if an array would need pickle."""
    with np.load(io.BytesIO(message), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(arrays.pop("header").tobytes()), arrays


# ---------------------------------------------------------------- requests


def write_problem(problem: Problem) -> dict[str, Any]:
    """Return a problem as JSON. `plain` is False if JSON cannot hold its data, which are left out then: a
    seat can answer such a problem and not grade it."""
    fields = asdict(problem)
    try:
        plain = json.loads(json.dumps(fields)) == fields
    except (TypeError, ValueError):
        plain = False
    return {**fields, "data": fields["data"] if plain else {}, "plain": plain}


def read_problem(fields: dict[str, Any]) -> Problem:
    """Return the problem that `write_problem` converted."""
    return Problem(**{name: value for name, value in fields.items() if name != "plain"})


def read_sampling(fields: dict[str, Any]) -> SamplingParams:
    """Return the sampling parameters whose `asdict` travelled as JSON."""
    return SamplingParams(
        **{
            **fields,
            "force": {int(after): then for after, then in fields["force"].items()},
            "stop_ids": tuple(fields["stop_ids"]),
            "response_prefix": tuple(fields["response_prefix"]),
        }
    )


def write_prompts(prompts: Sequence[np.ndarray]) -> Arrays:
    """Return the token ids of the prompts of a shard [T], and their lengths, as arrays."""
    return {
        "prompt_sizes": np.array([len(prompt) for prompt in prompts]),
        "prompts_T": np.concatenate(prompts),
    }


def read_prompts(arrays: Arrays) -> list[np.ndarray]:
    """Return the prompts that `write_prompts` converted, each [N]."""
    return _split(arrays["prompts_T"], arrays["prompt_sizes"])


# ---------------------------------------------------------------- answers


def write_groups(groups: Sequence[Group]) -> tuple[dict[str, Any], Arrays]:
    """Return the completions of a shard as a header, with texts and scores, and arrays: lengths [R], tokens
    [T], log-probabilities [T], and where there are any the ids that sampling left and the experts chosen."""
    completions = [completion for group in groups for completion in group.completions]
    arrays = {
        "lengths_R": np.array([len(completion.tokens) for completion in completions]),
        "stopped_R": np.array([completion.stopped for completion in completions]),
        "tokens_T": np.concatenate([completion.tokens for completion in completions]),
        "logprobs_T": np.concatenate([completion.logprobs for completion in completions]),
        **_write_kept([completion.kept for completion in completions]),
    }
    if completions[0].routes is not None:
        arrays["route_sizes_R"] = np.array([len(completion.routes) for completion in completions])
        arrays["routes"] = np.concatenate([completion.routes for completion in completions])
    header = {
        "texts": [completion.text for completion in completions],
        "scores": [[asdict(score) for score in group.scores] for group in groups],
    }
    return header, arrays


def _write_kept(kept: Sequence[tuple[np.ndarray, ...] | None]) -> Arrays:
    """Return the ids that sampling left as arrays; none if all completions were drawn from all ids."""
    masked_R = np.array([ids is not None for ids in kept])
    if not masked_R.any():
        return {}
    flat = [ids for of_one in kept for ids in of_one or ()]
    sizes = np.array([len(ids) for ids in flat])
    return {"masked_R": masked_R, "kept_sizes": sizes, "kept_ids": np.concatenate(flat)}


def read_groups(
    header: dict[str, Any], arrays: Arrays, asked: Sequence[tuple[Problem, np.ndarray]], size: int
) -> list[Group]:
    """Return the groups that `write_groups` converted, of `size` completions each. `asked` are the problems
    with their prompts."""
    completions = _read_completions(header["texts"], arrays, size)
    groups = []
    for i, (problem, prompt) in enumerate(asked):
        scores = tuple(Score(**fields) for fields in header["scores"][i])
        groups.append(Group(problem, prompt, tuple(completions[i * size : (i + 1) * size]), scores))
    return groups


def _read_completions(texts: Sequence[str], arrays: Arrays, size: int) -> list[Completion]:
    """Return the completions of a shard, as views of its arrays."""
    tokens = _split(arrays["tokens_T"], arrays["lengths_R"])
    logprobs = _split(arrays["logprobs_T"], arrays["lengths_R"])
    routes = _split(arrays["routes"], arrays["route_sizes_R"]) if "routes" in arrays else [None] * len(texts)
    masked = arrays.get("masked_R", np.zeros(len(texts), bool))
    kept = iter(_split(arrays["kept_ids"], arrays["kept_sizes"]) if "kept_ids" in arrays else ())
    completions = []
    for i, text in enumerate(texts):
        ids = tuple(next(kept) for _ in tokens[i]) if masked[i] else None
        stopped = bool(arrays["stopped_R"][i])
        completions.append(Completion(tokens[i], logprobs[i], text, stopped, i % size, ids, routes[i]))
    return completions


def _split(values: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Return consecutive parts of `values` [T, ...], of these sizes, as views."""
    ends = [0, *np.cumsum(sizes).tolist()]
    return [values[begin:end] for begin, end in pairwise(ends)]


def digest(arrays: Arrays) -> str:
    """Return the SHA-256 of what was sampled: of all arrays with their names, types and shapes."""
    whole = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        whole.update(f"{name} {values.dtype} {values.shape}\n".encode())
        whole.update(np.ascontiguousarray(values).tobytes())
    return whole.hexdigest()
