"""A training loop of your own: the exact gradient of a large batch, in the memory of a micro-batch."""

import torch

from lbfast import LanguageBindDepth, LanguageBindDepthTokenizer, mini, transform_dict
from lbfast.mini.files import write_world
from lbfast.training import LargeBatchStep, Towers
from lbfast.training.batches import Batches

manifest = write_world("world", 32, split="train", senses=("depth",))
folder = mini.checkpoint("depth")
model = LanguageBindDepth.from_pretrained(folder).train()
model.text_model.requires_grad_(False)  # language stays
model.text_projection.requires_grad_(False)

batches = Batches(
    manifest,
    transform_dict["depth"](model.config),
    LanguageBindDepthTokenizer.from_pretrained(folder),
    batch_size=16,
    captions={"depth_caption": 1},
    media="depth",
    context_length=40,
)
step = LargeBatchStep(Towers(model), micro_batch=4)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
for number, batch in enumerate(batches.epoch(0)):
    optimizer.zero_grad()
    result = step(batch, number)  # adds the gradient of all 16 rows to .grad
    optimizer.step()
    print(f"step {number}: loss {result.loss.item():.3f} of {result.rows} pairs")
