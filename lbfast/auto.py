"""transformers' Auto classes: after `register()` they know the five published model types."""

from __future__ import annotations


def register() -> None:
    """Makes AutoConfig, AutoModel, AutoProcessor and AutoTokenizer know LanguageBind{Image,Video,Audio,Depth,Thermal}.

    By transformers' own registration; calling it again changes nothing. They then give lbfast's classes.
    """
    from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

    from lbfast.model.languagebind import model_dict
    from lbfast.processing.processor import transform_dict
    from lbfast.processing.text import TOKENIZERS

    for modality, model in model_dict.items():
        config = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoProcessor.register(config, transform_dict[modality], exist_ok=True)  # type: ignore[arg-type]
        AutoTokenizer.register(config, slow_tokenizer_class=TOKENIZERS[modality], exist_ok=True)
