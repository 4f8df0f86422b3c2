"""transformers: model classes from their default configurations, with few layers.

Those whose source speaks of a normalisation with running statistics, or of a backbone that may have one.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, VitDetConfig

from tests.zoo.case import Case, Inputs, by_turns, call

__all__ = ["cases"]

_HINT = re.compile(r"BatchNorm|InstanceNorm\dd|running_mean|load_backbone|Backbone")
_LAYERS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "d_layers", "num_encoder_layers")
_OPTIONS: dict[str, dict[str, Any]] = {
    "informer": {"prediction_length": 4, "context_length": 8, "num_time_features": 1},
    "hubert": {"conv_pos_batch_norm": True},
    "patchtst": {"norm_type": "batchnorm"},
    "tvp": {"num_frames": 2},
    "timm_backbone": {"backbone": "resnet18"},
    "vitmatte": {
        "fusion_hidden_sizes": [256, 128, 64, 32],
        "backbone_config": VitDetConfig(num_channels=4, image_size=64, hidden_size=384, out_features=["stage2"]),
    },
    "patchtsmixer": {"norm_mlp": "BatchNorm", "context_length": 32, "prediction_length": 4},
}


def cases() -> Iterator[Case]:
    """All such classes, the first of each model type first."""
    classes = {cls.__name__: (folder, cls) for folder, cls in _classes()}
    for name in by_turns(classes, lambda name: classes[name][0]):
        folder, cls = classes[name]
        skip = "has no forward" if cls.forward is nn.Module.forward else ""
        yield Case(name, partial(_build, folder, cls), partial(_inputs, folder), skip)


def _classes() -> Iterator[tuple[str, type[PreTrainedModel]]]:
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if not _HINT.search(path.read_text()):
            continue
        try:
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        except ImportError:
            continue
        for name, cls in vars(module).items():
            if not (inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__):
                continue
            if not name.endswith("PreTrainedModel") and name in getattr(module, "__all__", ()) and cls.config_class:
                yield path.parent.name, cls


def _build(folder: str, cls: type[PreTrainedModel]) -> nn.Module:
    config = cls.config_class(**_OPTIONS.get(folder, {}))
    _shrink(config)
    return cls(config)


def _shrink(config: PretrainedConfig) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value)
        elif (
            name in _LAYERS and isinstance(value, int) and value > 2 and config.model_type not in ("levit", "pp_lcnet")
        ):
            setattr(config, name, 2)
        elif name == "use_pretrained_backbone":
            config.use_pretrained_backbone = False
        elif name == "base_channels":  # of Emu3's VQVAE
            config.base_channels = 32


def _inputs(folder: str, model: nn.Module) -> Iterator[Callable[[], Inputs]]:
    names, config = inspect.signature(model.forward).parameters, model.config
    tokens = {"input_ids": lambda: torch.randint(3, 90, (2, 8))} if "input_ids" in names else {}
    if "pixel_values" in names:
        own = getattr(config, "image_size", 224)
        sizes = [(size, size) for size in (64, 128, 224)] + [
            tuple(own) if isinstance(own, (list, tuple)) else (own, own)
        ]
        channels = getattr(config, "num_channels", getattr(getattr(config, "backbone_config", None), "num_channels", 3))
        for more in (tokens, {}) if tokens else ({},):
            for height, width in sizes:
                makers = {"pixel_values": lambda h=height, w=width: torch.randn(2, channels, h, w), **more}
                yield partial(_made, makers)
                if folder in ("superglue", "efficientloftr"):
                    yield partial(_made, {"pixel_values": lambda h=height, w=width: torch.randn(1, 2, channels, h, w)})
    if "input_values" in names:
        yield partial(_made, {"input_values": lambda: torch.randn(2, 4000)})
        yield partial(_made, {"input_values": lambda: torch.randn(2, 1024, 128)})
    if "input_features" in names:
        for shape in ((2, 64, 80), (2, 64, 128), (2, 64, 160), (2, 64, 320), (2, 1, 1001, 64), (4, 1, 1001, 64)):
            yield partial(_made, {"input_features": lambda shape=shape: torch.randn(shape), **tokens})
    if "past_values" in names:
        yield from _series(folder, config)
    if tokens:
        yield partial(_made, tokens)
        yield partial(_made, {**tokens, "decoder_input_ids": tokens["input_ids"]})
    if "duration_labels" in names:
        yield _speech
    if folder == "tvp":
        makers = {"pixel_values": lambda: torch.randn(1, 2, 3, 448, 448), "attention_mask": lambda: torch.ones(1, 8)}
        yield partial(_made, {**makers, "input_ids": lambda: torch.randint(3, 90, (1, 8))})
    if folder == "omdet_turbo":
        yield _classes_and_task
    if "hidden_states" in names:
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        for shape in ((8, 8), (3, 40), (64, 64)) if first is not None else ():
            yield lambda shape=shape: call(torch.randn(2, first.in_channels, *shape))
        for size in ("input_dim", "hidden_size"):
            if hasattr(config, size):
                yield partial(_made, {"hidden_states": lambda size=size: torch.randn(2, 64, getattr(config, size))})
                yield lambda size=size: call(torch.randn(2, getattr(config, size), 8, 8))
    if "spectrogram" in names:
        yield partial(_made, {"spectrogram": lambda: torch.randn(2, 20, 80)})


def _classes_and_task() -> Inputs:
    classes = torch.randint(3, 90, (6, 8))
    return call(
        torch.randn(2, 3, 640, 640),
        classes_input_ids=classes,
        classes_attention_mask=torch.ones_like(classes),
        tasks_input_ids=classes[:2],
        tasks_attention_mask=torch.ones_like(classes[:2]),
        classes_structure=torch.tensor([3, 3]),
    )


def _speech() -> Inputs:
    durations = torch.full((2, 8), 2)
    return call(
        input_ids=torch.randint(1, 70, (2, 8)),
        attention_mask=torch.ones(2, 8, dtype=torch.long),
        spectrogram_labels=torch.randn(2, 16, 80),
        duration_labels=durations,
        pitch_labels=torch.randn(2, 8, 1),
        energy_labels=torch.randn(2, 8, 1),
    )


def _series(folder: str, config: PretrainedConfig) -> Iterator[Callable[[], Inputs]]:
    if folder == "informer":
        past, future = config.context_length + max(config.lags_sequence), config.prediction_length
        makers = {
            "past_values": lambda: torch.randn(2, past),
            "past_time_features": lambda: torch.randn(2, past, 1),
            "past_observed_mask": lambda: torch.ones(2, past),
            "future_values": lambda: torch.randn(2, future),
            "future_time_features": lambda: torch.randn(2, future, 1),
        }
        yield partial(_made, makers)
        return
    makers = {"past_values": lambda: torch.randn(2, config.context_length, config.num_input_channels)}
    yield partial(_made, makers)
    length = getattr(config, "prediction_length", 1)
    yield partial(_made, {**makers, "future_values": lambda: torch.randn(2, length, config.num_input_channels)})
    yield partial(_made, {**makers, "target_values": lambda: torch.randint(0, 2, (2,))})
    yield partial(_made, {**makers, "target_values": lambda: torch.randn(2, config.num_targets)})


def _made(makers: dict[str, Callable[[], Any]]) -> Inputs:
    return call(**{name: make() for name, make in makers.items()})
