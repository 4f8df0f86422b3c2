"""open_clip: every configuration, at reduced width and depth; from a hub: none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from torch import nn

from tests.zoo.case import Case, Inputs, call

__all__ = ["cases"]


def cases() -> Iterator[Case]:
    """All of ``open_clip.list_models()``."""
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        text = config.get("text_cfg", {})
        skip = "its text tower is loaded from a hub" if "hf_model_name" in text else ""
        yield Case(name, partial(_build, config), partial(_inputs, config), skip)


def _build(config: dict[str, Any]) -> nn.Module:
    config = copy.deepcopy(config)
    for key in ("custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"):
        if key != "custom_text" and config.get(key) is None:
            config.pop(key, None)
    custom = config.pop("custom_text", False)
    vision, text = config["vision_cfg"], config["text_cfg"]
    text.update(layers=2, vocab_size=100, hf_tokenizer_name=None)
    if isinstance(vision.get("layers"), int):
        vision["layers"] = 2
    vision.pop("timm_model_pretrained", None)
    for key in ("tokenizer_kwargs",):
        text.pop(key, None)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update(layers=2, vocab_size=100)
        return CoCa(**config)
    return (CustomTextCLIP if custom else CLIP)(**config)


def _inputs(config: dict[str, Any], model: nn.Module) -> Iterator[Callable[[], Inputs]]:
    size = config["vision_cfg"]["image_size"]
    size = size if isinstance(size, int) else size[0]
    length = config["text_cfg"].get("context_length", 77)
    for length_ in (length, length - 1):
        yield lambda length_=length_: call(torch.randn(2, 3, size, size), torch.randint(1, 99, (2, length_)))
