"""Predicts six words at once after [CLS] and one word: a causal mask spoils all slots but the first, slots do not."""

import torch
from torch.nn import functional as F

import lookfar

WORDS, SLOTS = 60, 6
CLS, MASK = WORDS, WORDS + 1
torch.manual_seed(0)
follower = torch.randperm(WORDS)  # the truth: which word follows which
truth = torch.empty(WORDS, SLOTS, dtype=torch.long)
for slot in range(SLOTS):
    truth[:, slot] = follower if slot == 0 else follower[truth[:, slot - 1]]

config = lookfar.ModelConfig(vocabulary=WORDS + 2, width=64, layers=2, heads=4, context=2 + SLOTS, scheme="alibi")
model = lookfar.Decoder(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
prefix = torch.stack([torch.full((WORDS,), CLS), torch.arange(WORDS)], dim=1)
for _ in range(700):  # one slot at a time, somewhere after the prefix
    offset = torch.randint(SLOTS, (WORDS, 1))
    sight = lookfar.Sight.slots(2, 1, offsets=offset)
    logits = model(torch.cat([prefix, torch.full((WORDS, 1), MASK)], dim=1), sight=sight)[:, -1]
    F.cross_entropy(logits, truth.gather(1, offset)[:, 0]).backward()
    optimizer.step()
    optimizer.zero_grad()

tokens = torch.cat([prefix, torch.full((WORDS, SLOTS), MASK)], dim=1)
for name, sight in {
    "causal mask": lookfar.Sight.causal(2 + SLOTS),  # a slot sees the slots before it, which no training showed
    "slots": lookfar.Sight.slots(2, SLOTS),  # a slot sees the prefix and itself
}.items():
    right = (model(tokens, sight=sight)[:, 2:].argmax(-1) == truth).float().mean(0)
    print(f"{name:12} first {right[0]:4.0%}   others {'  '.join(f'{each:4.0%}' for each in right[1:].tolist())}")
