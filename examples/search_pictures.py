"""Find pictures by a sentence, with the model that comes with lbfast: no download."""

import torch

from lbfast import LanguageBindImage, LanguageBindImageProcessor, LanguageBindImageTokenizer, mini
from lbfast.mini.files import write_world

write_world("scenes", 12, senses=("image",))
pictures = [f"scenes/image/{number:06d}.jpg" for number in range(12)]

folder = mini.checkpoint("image")  # or "LanguageBind/LanguageBind_Image"
model = LanguageBindImage.from_pretrained(folder).eval()
tokenizer = LanguageBindImageTokenizer.from_pretrained(folder)
processor = LanguageBindImageProcessor(model.config, tokenizer)

data = processor(pictures, ["a large blue circle", "a small red cross"], return_tensors="pt")
with torch.inference_mode():
    out = model(**data)
for caption, row in zip(("a large blue circle", "a small red cross"), out.text_embeds @ out.image_embeds.T):
    print(caption, "->", pictures[int(row.argmax())], f"({float(row.max()):.2f})")
