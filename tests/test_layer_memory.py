"""What a video layer keeps for its backward, beside the same layer of eager attention and eager norms."""

from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig
from transformers.models.clip import modeling_clip as clip

from lbfast.model.layers import Encoder, EncoderLayer
from lbfast.reference import languagebind as reference

CLIPS, FRAMES, TOKENS, WIDTH = 2, 8, 257, 1024


class EagerVideoLayer(torch.nn.Module):
    """A CLIP layer of transformers after attention over frames, rearranged as upstream does."""

    def __init__(self):
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=16, hidden_act="gelu"
        )
        config._attn_implementation = "eager"
        self.temporal_embedding = torch.nn.Parameter(torch.zeros(1, FRAMES, WIDTH))
        self.temporal_layer_norm1 = torch.nn.LayerNorm(WIDTH)
        self.temporal_attn = clip.CLIPAttention(config)
        self.layer = clip.CLIPEncoderLayer(config)

    def forward(self, x):
        x = x.unflatten(0, (-1, FRAMES)).transpose(1, 2).flatten(0, 1) + self.temporal_embedding  # [(b n), t, d]
        x = x + self.temporal_attn(hidden_states=self.temporal_layer_norm1(x))[0]
        x = x.unflatten(0, (-1, TOKENS)).transpose(1, 2).flatten(0, 1)  # [(b t), n, d]
        options = {"causal_attention_mask": None} if "causal_attention_mask" in signature(self.layer) else {}
        y = self.layer(x, attention_mask=None, **options)
        return y if isinstance(y, torch.Tensor) else y[0]


def signature(layer):
    return layer.forward.__code__.co_varnames[: layer.forward.__code__.co_argcount]


def kept_bytes(layer, step):
    """Bytes of distinct storages kept for the backward of `step`, the layer's parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in kept.values())


def config():
    return SimpleNamespace(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=16,
        layer_norm_eps=1e-5,
        hidden_act="gelu",
        add_time_attn=True,
        num_frames=FRAMES,
        attention_dropout=0.0,
    )


def kept_by_both(eager):
    """Bytes kept by our layer and by another, on the same input, printed."""
    x = torch.zeros(CLIPS * FRAMES, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    ours = EncoderLayer(config()).bfloat16()
    kept, baseline = kept_bytes(ours, lambda: ours(x, frames=FRAMES)), kept_bytes(eager, lambda: eager(x))
    print(f"kept for the backward: {kept / 2**20:.1f} MiB, eager {baseline / 2**20:.1f} MiB, {kept / baseline:.1%}")
    assert kept < 11.5 * x.nbytes
    return kept, baseline


@pytest.mark.skipif(not hasattr(clip, "eager_attention_forward"), reason="transformers of before softmax in float32")
def test_a_video_layer_keeps_less_than_45_percent_of_eager():
    kept, baseline = kept_by_both(EagerVideoLayer().bfloat16())
    assert kept <= 0.45 * baseline


def test_a_video_layer_keeps_less_than_45_percent_of_the_reference():
    """Whose softmax is in bfloat16, so that it keeps less than that of transformers."""
    layer = reference.EncoderLayer(SimpleNamespace(**vars(config()), lora_r=0)).bfloat16()
    kept, baseline = kept_by_both(layer)
    assert kept <= 0.45 * baseline


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_more_keeps_what_it_keeps_alone(checkpointing):
    """The sum between layers is in two terms, of which none is kept; with gradient checkpointing one tensor is."""
    about = SimpleNamespace(**{**vars(config()), "add_time_attn": False, "hidden_size": 64, "intermediate_size": 256})
    x = torch.zeros(CLIPS, TOKENS, 64, requires_grad=True)
    kept = []
    for about.num_hidden_layers in (2, 3):
        encoder = Encoder(about).train()
        encoder.gradient_checkpointing = checkpointing
        kept.append(kept_bytes(encoder, lambda encoder=encoder: encoder(x)))
    alone = EncoderLayer(about)
    assert kept[1] - kept[0] <= (x.nbytes if checkpointing else kept_bytes(alone, lambda: alone(x)))
