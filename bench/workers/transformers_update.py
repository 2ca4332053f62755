"""The same update with a padded batch through transformers: logits, log-probabilities, backward, AdamW."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from turns import SETTINGS, turns

torch.set_num_threads(SETTINGS["threads"])
model = AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
width, longest = SETTINGS["width"], max(SETTINGS["lengths"])
lengths = torch.tensor(SETTINGS["lengths"] * SETTINGS["prompts"])
ids = torch.randint(0, model.config.vocab_size, (len(lengths), width + longest))
mask = torch.arange(width + longest) < width + lengths.unsqueeze(1)
advantages = torch.randn(len(lengths), 1)

for clock in turns():
    logits = model(input_ids=ids, attention_mask=mask.long(), logits_to_keep=longest + 1).logits[:, :-1]
    targets = ids[:, width:]
    logprobs = torch.log_softmax(logits.float(), -1).gather(2, targets.unsqueeze(2)).squeeze(2)
    loss = -((logprobs - logprobs.detach()).exp() * advantages * mask[:, width:]).sum() / lengths.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    clock.say(tokens=int(mask.sum()))
