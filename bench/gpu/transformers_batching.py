"""transformers' continuous batching, told in lines of JSON. `peers.py` starts it, and ends it.

    python -m bench.gpu.transformers_batching '{"config": ..., "prompts": ..., "new": 256, ...}'

Left to itself, `generate_batch` looks for flash attention and, where the package `kernels` is installed, asks
the hub for it, which does not answer without a network. Without flash attention it fills a mask with a column
for each token of a cache that takes most of the memory. So the attention and the size of the cache are given.
An error inside it is logged and swallowed, also one that an alarm raises: only another process can end it.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import time
from typing import Any

import torch
import transformers

BATCH_TOKENS = 4096  # tokens of one forward pass, at most


def main() -> None:
    """Sample a few tokens, then all of them twice with one setup; tell each turn as soon as it is done."""
    settings = json.loads(sys.argv[1])
    prompts, new = settings["prompts"], settings["new"]
    attention, options = choices(len(prompts), max(map(len, prompts)) + new, settings["device"])
    tell(transformers=transformers.__version__, attention=attention)
    model = build(settings, attention)
    known = inspect.signature(model.generate_batch).parameters
    for turn, asked, length in (("few", prompts[:4], 8), ("first", prompts, new), ("warm", prompts, new)):
        generation = transformers.GenerationConfig(
            max_new_tokens=length, do_sample=True, temperature=0.6, top_k=0, eos_token_id=-1, pad_token_id=0
        )
        wanted = {"continuous_batching_config": options, "persistent_manager": turn != "few"}
        given = {name: value for name, value in wanted.items() if name in known}
        begin = time.perf_counter()
        with torch.inference_mode():
            outputs = model.generate_batch(inputs=asked, generation_config=generation, **given)
        seconds = time.perf_counter() - begin
        tokens = sum(len(output.generated_tokens) for output in outputs.values())
        rate = round(tokens / seconds)
        tell(turn=turn, tokens=tokens, of=len(asked) * length, seconds=seconds, tokens_s=rate)


def tell(**numbers: object) -> None:
    """Print one line of JSON."""
    print(json.dumps(numbers), flush=True)


def choices(rows: int, longest: int, device: str) -> tuple[str, Any]:
    """Return the attention, and the settings of batches of so many rows of `longest` tokens, as far as this
    version of transformers has them: a cache as large as the rows can need."""
    flash = device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    settings = transformers.ContinuousBatchingConfig()
    block = getattr(settings, "page_size", None) or settings.block_size
    settings.num_blocks = rows * (-(-longest // block) + 1)
    settings.max_batch_tokens = BATCH_TOKENS
    if hasattr(settings, "auto_switch_to_flash"):  # else the prefix keeps it from looking
        settings.auto_switch_to_flash = flash
        return "flash_attention_2" if flash else "sdpa", settings
    return "paged|flash_attention_2" if flash else "paged|sdpa", settings


def build(settings: dict, attention: str) -> torch.nn.Module:
    """Return a model of random weights in the shape that `settings` describe."""
    described = dict(settings["config"])
    config = transformers.AutoConfig.for_model(described.pop("model_type"), **described)
    torch.set_default_dtype(getattr(torch, settings["dtype"]))
    with torch.device(settings["device"]):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    torch.set_default_dtype(torch.float32)
    return model.eval()


if __name__ == "__main__":
    main()
