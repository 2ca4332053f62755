"""What llama.cpp itself makes of our GGUF files: the same greedy tokens as our engine and as transformers.

Runs where `llama-simple` of llama.cpp is found: on PATH, or where LIMBECK_LLAMA_CPP says (the program, or the
folder that it lies in). It keeps its cache in fp16 and multiplies in its own order, so where two tokens are
nearly as likely it may take the other: a run is compared up to there, and how much that may be is tested.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import CHECKPOINTS
from torch import Tensor

from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import gguf, weights
from limbeck.model.kv_cache import Packed
from limbeck.text.tokenizer import Tokenizer

STEPS = 40
QUESTIONS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "What is 17 + 25? Think step by step.",
    "Translate 'good morning' to French, and say 中文 too.",
    "List three uses of a hammer:\n1.",
]
# GPT-2 writes bytes that print as themselves, and the others by the letters from 256 on.
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in PRINTED]
BYTES = {chr(b): b for b in PRINTED} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}


@pytest.fixture(scope="session")
def llama_simple() -> str:
    place = os.environ.get("LIMBECK_LLAMA_CPP", "")
    for found in (place, Path(place or ".") / "llama-simple", shutil.which("llama-simple")):
        if found and Path(found).is_file():
            return str(found)
    pytest.skip("llama-simple of llama.cpp is neither on PATH nor where LIMBECK_LLAMA_CPP says")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    directory = Path(os.environ.get("LIMBECK_SMOLLM2", "models/smollm2-135m"))
    if not (directory / "config.json").exists():
        pytest.skip(f"{directory} is missing; limbeck pull smollm2-135m")
    return directory


def said(program: str, model: Path, prompt: str, steps: int = STEPS) -> bytes:
    """The prompt and what llama.cpp continues it with, greedily."""
    run = subprocess.run([program, "-m", model, "-n", str(steps), prompt], capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode(errors="replace")[-2000:]
    return run.stdout


def spelled(tokenizer: Tokenizer, tokens: Sequence[int]) -> bytes:
    """The bytes of tokens; special ones by their names, as llama.cpp prints them."""
    special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
    out = b""
    for token in tokens:
        text = tokenizer.backend.id_to_token(int(token))
        out += text.encode() if token in special else bytes(BYTES[letter] for letter in text)
    return out


def agreed(
    theirs: bytes, tokenizer: Tokenizer, prompt: list[int], ours: list[int], logits: Tensor, close: float
) -> int:
    """How many tokens are the same; a difference is allowed only between tokens that are nearly as likely."""
    if theirs[:-1] == spelled(tokenizer, [*prompt, *ours]):
        return len(ours)
    same = next(
        n for n in range(len(ours)) if not theirs.startswith(spelled(tokenizer, [*prompt, *ours[: n + 1]]))
    )
    best = logits[same].topk(2).values
    assert best[0] - best[1] < close, f"after {same} tokens, where the best leads by {best[0] - best[1]:.3f}"
    return same


@pytest.mark.parametrize("kind, close, share", [("f32", 0.05, 0.9), ("f16", 0.1, 0.9), ("q8_0", 2.0, 0.0)])
def test_smollm2_says_in_llama_cpp_what_our_engine_says(tmp_path, llama_simple, smollm2, kind, close, share):
    """Compared on the numbers that are in the file: read back, they are what our engine runs.

    With q8_0 llama.cpp also rounds the other factor of each product to 8 bits. In our engine that moves the
    logits by up to 1.7, so there only the lead of our token over theirs is held to account.
    """
    gguf.write(smollm2, tmp_path / "m.gguf", kind)
    gguf.read(tmp_path / "m.gguf", tmp_path / "back")
    decoder, tokenizer = weights.load(tmp_path / "back"), Tokenizer.from_directory(tmp_path / "back")
    engine, same = Engine(decoder, tokenizer), []
    for question in QUESTIONS:
        prompt = [int(token) for token in tokenizer.prompt(question)]
        row = engine.stream(tokenizer.prompt(question), SamplingParams(0.0, 1.0, STEPS), 0)
        ours = [int(token) for token in row if token != tokenizer.end_id]
        with torch.no_grad():
            whole = torch.tensor([*prompt, *ours])
            logits = decoder.head(decoder(whole, Packed([len(whole)])))[len(prompt) - 1 :]
        theirs = said(llama_simple, tmp_path / "m.gguf", spelled(tokenizer, prompt).decode())
        same.append((agreed(theirs, tokenizer, prompt, ours, logits, close), len(ours)))
    print(f"{kind}: tokens that agree, of those said: {same}")
    assert sum(found for found, _ in same) >= share * sum(said for _, said in same)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_random_models_say_in_llama_cpp_what_they_say_in_transformers(tmp_path, llama_simple, smollm2, name):
    """The second prompt is longer than the positions that yarn began with.

    Random weights leave the next token in doubt more often than learned ones, and a cache in fp16 then parts
    the two: with it 36 to 80 of 80 tokens agree, with one in fp32 all of them. A wrong form or key leaves
    none."""
    pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_directory(smollm2)
    model = checkpoints.save(name, tmp_path / "hf", tokenizer.size)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / file, tmp_path / "hf" / file)
    gguf.write(tmp_path / "hf", tmp_path / "m.gguf", "f32")

    same = []
    for text in ("Hello, 1984!", "The quick brown fox jumps over the lazy dog. " * 30):
        prompt = tokenizer.encode(text)
        run = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=STEPS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ours = [int(token) for token in run.sequences[0, len(prompt) :] if token != tokenizer.end_id]
        logits = torch.cat(run.logits)
        theirs = said(llama_simple, tmp_path / "m.gguf", text)
        same.append((agreed(theirs, tokenizer, prompt, ours, logits, close=0.1), len(ours)))
    print(f"{name}: tokens that agree, of those said: {same}")
    assert sum(found for found, _ in same) >= 0.25 * sum(said for _, said in same)
