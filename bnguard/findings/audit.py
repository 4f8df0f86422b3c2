"""``audit``: what is wrong with a model's running statistics, told from the model as it stands."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from bnguard.findings.codes import STATIC
from bnguard.findings.grouping import Finding, Sighting, findings_of
from bnguard.findings.soundness import half_precision_of, has_broken, is_initial, is_of_another_convention
from bnguard.layers.bits import has_values
from bnguard.layers.kinds import StatsLayer
from bnguard.layers.tree import find_layers
from bnguard.torch_internals.compile import outside_graphs
from bnguard.torch_internals.tracing import aside

__all__ = ["audit"]


@outside_graphs
def audit(model: nn.Module, optimizer: Optimizer | None = None) -> tuple[Finding, ...]:
    """Looks for what is wrong with a model's running statistics, without running it.

    Sees frozen layers in train mode (BN001), a layer under several names (BN004), momentum by another convention
    (BN007), single layers in eval mode that the next ``train()`` will reach (BN008), statistics in half precision
    (BN009), ``track_running_stats`` off on a layer that has statistics (BN011), broken statistics (BN012), initial
    ones in eval mode (BN014), and with an optimizer frozen parameters that its next step would move (BN010). The other
    codes show only in a run: see ``watch``. Reads the statistics.

    Args:
        model: The model, or one layer.
        optimizer: The optimizer that trains it.

    Returns:
        The findings, the worst first; none if all is well.

    Raises:
        TypeError: ``model`` is no module, ``optimizer`` no optimizer of torch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit() takes a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    sightings: list[Sighting] = []
    for layer in find_layers(model):
        sightings += _settings_of(layer, model)
        sightings += _values_of(layer)
    if optimizer is not None:
        sightings += _movable_parameters(model, optimizer)
    return findings_of(sightings, STATIC, STATIC, frozenset({"BN004"}))  # its forward may use one name only


def _settings_of(layer: StatsLayer, model: nn.Module) -> Iterator[Sighting]:
    module, name = layer.module, layer.names[0]
    own = list(module.parameters(recurse=False))
    is_frozen = bool(own) and not any([parameter.requires_grad for parameter in own])
    if is_frozen and layer.kind.predict is not None and layer.kind.predict(module):
        yield Sighting("BN001", name, None)
    if len(layer.names) > 1:
        yield Sighting("BN004", " = ".join(layer.names), None)
    momentum = getattr(module, "momentum", None)
    if is_of_another_convention(momentum):
        yield Sighting("BN007", name, None, 0, momentum)
    if model.training and not module.training and module is not model and not is_frozen:
        yield Sighting("BN008", name, None)
    if getattr(module, "track_running_stats", True) is False:
        yield Sighting("BN011", name, None)


@aside()
def _values_of(layer: StatsLayer) -> list[Sighting]:
    module, name = layer.module, layer.names[0]
    buffers = {key: tensor for key, tensor in module.named_buffers(recurse=False) if key in layer.buffers}
    found = []
    half = half_precision_of(buffers)
    if half is not None:
        found.append(Sighting("BN009", name, None, 0, half))
    if has_broken(buffers):
        found.append(Sighting("BN012", name, None))
    if not module.training and is_initial(buffers):
        found.append(Sighting("BN014", name, None))
    return found


@aside()
def _movable_parameters(model: nn.Module, optimizer: Optimizer) -> list[Sighting]:
    """Parameters with ``requires_grad`` off that the next step would move: those that have a gradient."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        pulls = any([bool(group.get(option)) for option in ("weight_decay", "momentum", "betas")])
        for parameter in group["params"]:
            grad, name = parameter.grad, names.get(id(parameter))
            if name is None or parameter.requires_grad or grad is None:
                continue
            if pulls or (has_values(grad) and bool(grad.any())):
                found.append(Sighting("BN010", name, None, 0, type(optimizer).__name__))
    return found
