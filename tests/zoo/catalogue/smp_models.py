"""segmentation-models-pytorch: every decoder with one encoder, every encoder with one decoder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import segmentation_models_pytorch as smp

from tests.zoo.case import Case, by_turns, images

__all__ = ["cases"]

DECODERS = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet", "Segformer", "DPT")  # fmt: skip  # noqa: E501


def cases() -> Iterator[Case]:
    """The two rows of the table of decoders and encoders."""
    known = [name for name in vars(smp) if isinstance(vars(smp)[name], type) and name != "from_pretrained"]
    for decoder in dict.fromkeys((*DECODERS, *known)):
        encoder = "tu-vit_small_patch16_224" if decoder == "DPT" else "resnet18"
        build = partial(getattr(smp, decoder), encoder, encoder_weights=None, classes=3)
        yield Case(f"{decoder} on {encoder}", build, images(64, 224))
    for norm in ("batchnorm", "inplace", "instancenorm"):
        build = partial(smp.Unet, "resnet18", encoder_weights=None, decoder_use_norm=norm)
        yield Case(f"Unet, {norm}", build, images(64))
    build = partial(smp.Unet, "resnet18", encoder_weights=None, aux_params={"classes": 2, "dropout": 0.5})
    yield Case("Unet, classifier with dropout", build, images(64))
    encoders = by_turns(
        smp.encoders.get_encoder_names(), lambda name: re.split(r"[-_\d]", name.removeprefix("timm-"))[0]
    )
    for encoder in encoders:
        yield Case(f"Unet on {encoder}", partial(smp.Unet, encoder, encoder_weights=None), images(64, 128, 224))
