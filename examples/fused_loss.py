"""The fused loss in a loop that is not ours: the call of open_clip's ClipLoss, logits never stored."""

import torch

from lbfast import InfoNCELoss

torch.manual_seed(0)
image_tower, text_tower = torch.nn.Linear(32, 64), torch.nn.Linear(16, 64)
logit_scale = torch.nn.Parameter(torch.tensor(2.66))
loss_of = InfoNCELoss()
optimizer = torch.optim.SGD([*image_tower.parameters(), *text_tower.parameters(), logit_scale], lr=0.5)

pictures, captions = torch.randn(256, 32), torch.randn(256, 16)
for step in range(5):
    image = torch.nn.functional.normalize(image_tower(pictures), dim=-1)
    text = torch.nn.functional.normalize(text_tower(captions), dim=-1)
    loss = loss_of(image, text, logit_scale.exp())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: {loss.item():.4f}")
