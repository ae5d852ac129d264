"""What a user writes, checked by `make lint` as under `mypy --strict`: names that are imported at first use have types.

A call that is wrong must be seen: an "ignore" that nothing needs is an error.
"""

from __future__ import annotations

import torch

import lbfast
from lbfast import InfoNCELoss, LanguageBind, LanguageBindImage, LanguageBindLoss, SigLipLoss, ops, transform_dict
from lbfast.embedding import BadFileError, embed_files, find_items
from lbfast.evaluation import Encoder, classify_files, retrieve, retrieve_files
from lbfast.languagebind import LanguageBindVideo
from lbfast.processing import Limits, MediaError, default_tokenizer
from lbfast.training import LargeBatchStep, Towers, initial_model, recipe

model = LanguageBindImage.from_pretrained("lbfast-mini/image")
faster = lbfast.optimize_for_inference(model, dtype="bfloat16")
towers = LanguageBind({"image": "lbfast-mini/image"}).eval()
pixels = transform_dict["image"](model.config)(["a.jpg"])
x: torch.Tensor = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
loss: torch.Tensor = InfoNCELoss()(x, x, torch.tensor(10.0))
several: torch.Tensor = LanguageBindLoss()({"image": x, "language": x}, torch.tensor(10.0))
pairs: torch.Tensor | dict[str, torch.Tensor] = SigLipLoss(chunk_size=8)(x, x, torch.tensor(10.0), None)
value: torch.Tensor = ops.info_nce(x, x, torch.tensor(10.0))
y: torch.Tensor = ops.attention(x[None, :, None], x[None, :, None], x[None, :, None])
there, back = retrieve(x, x)
report = retrieve_files(Encoder.open("lbfast-mini/audio"), "scenes/manifest.jsonl")
plan = recipe("depth")
step = LargeBatchStep(Towers(initial_model("lbfast-mini/image", plan)), micro_batch=4)
summary = embed_files(["clips"], ["lbfast-mini/video"], "clips.parquet")
done: int = summary.embedded["video"]
embedder = lbfast.Embedder(["lbfast-mini/image"], batch_size=4)
hits = [hit.path for found in lbfast.search("embeddings.parquet", "a cat", top=3) for hit in found.hits]
video: lbfast.LanguageBindVideo = LanguageBindVideo.from_pretrained("lbfast-mini/video")
labels = classify_files(Encoder.open("lbfast-mini/image"), "photos").rankings
made = default_tokenizer
listed = find_items(["clips"], ["video"], None)
width: int = embedder.encode(["a cat"]).shape[1] + embedder({"text": ["a cat"]})["embedding"].shape[1]


class Short(MediaError):
    """Under --strict no class may be of an unknown type."""


def read(path: str) -> str:
    try:
        embedder.encode([path])
    except (lbfast.MediaError, BadFileError, lbfast.CheckpointError) as error:
        return str(error)
    return ""


def wrong() -> None:
    Limits(bogus=2)  # type: ignore[call-arg]
    embed_files(1, bogus=2)  # type: ignore[arg-type, call-arg]
    retrieve("a", "b")  # type: ignore[arg-type]
    lbfast.optimize_for_inference(1)  # type: ignore[type-var]
