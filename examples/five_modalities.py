"""One space for pictures, clips, sounds, depth maps and heat: which sound belongs to which clip?"""

from pathlib import Path

import torch

from lbfast import LanguageBind, mini, transform_dict
from lbfast.mini.files import write_world

write_world("scenes", 6)
names = ("image", "video", "audio", "depth", "thermal")
model = LanguageBind({name: mini.checkpoint(name) for name in names}).eval()
inputs = {
    name: transform_dict[name](model.modality_config[name])(sorted(Path("scenes", name).iterdir())) for name in names
}
with torch.inference_mode():
    embeddings = model(inputs)
for name in names:
    print(f"{name:8}", tuple(embeddings[name].shape))
print("clip -> sound:", (embeddings["video"] @ embeddings["audio"].T).argmax(-1).tolist())
