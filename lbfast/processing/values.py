"""Values of other libraries as plain ones: Hugging Face `datasets` rows, torchcodec's samples and decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plain(item: Any) -> Any:
    """What an item stands for: an encoded file (path or bytes), `(waveform, sample_rate)`, or the item itself.

    Known are what `datasets` gives for columns of audio, images and videos, decoded or not (dictionaries of bytes and
    path, or of array and sampling_rate), and torchcodec's AudioDecoder and AudioSamples.

    Raises:
        TypeError: a dictionary without any of these.
    """
    if isinstance(item, Mapping):
        if item.get("array") is not None and item.get("sampling_rate") is not None:
            return item["array"], item["sampling_rate"]
        if item.get("bytes") is not None:
            return item["bytes"]
        if item.get("path") is not None:
            return item["path"]
        raise TypeError(
            "images: expected a dictionary with bytes, path, or array and sampling_rate (a value of Hugging Face "
            f"datasets), got one with {', '.join(map(str, list(item)[:8])) or 'nothing'}"
        )
    if hasattr(item, "get_all_samples"):  # torchcodec's AudioDecoder
        item = item.get_all_samples()
    if hasattr(item, "sample_rate") and hasattr(item, "data") and hasattr(item, "pts_seconds"):  # its AudioSamples
        return item.data, item.sample_rate
    return item
