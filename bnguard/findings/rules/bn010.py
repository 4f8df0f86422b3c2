"""BN010: a frozen parameter that still moves."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from bnguard.findings.events import AuditedModel, LayerEnd, Update
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.soundness import have_moved
from bnguard.layers.bits import has_values, is_valueless
from bnguard.torch_internals.tracing import outside_modes
from bnguard.torch_internals.transforms import below_transforms, unwrapped_tensor
from bnguard.words import listing


class BN010(Rule):
    """An optimizer moves parameters with requires_grad=False."""

    code = "BN010"
    title = "a frozen parameter that still moves"
    fix = "leave it out of the optimizer, set its gradient to None, or hold it: frozen(model, affine=True)"
    short_fix = "leave it out of the optimizer, or use frozen(model, affine=True)"
    in_run = "an optimizer moved {g.detail} of {g.of}, with requires_grad=False"
    in_brief = "an optimizer moved {g.detail} of {g.count}, with requires_grad=False"
    in_audit = "the next step of {g.detail} moves {g.parameters} with requires_grad=False, which still have a gradient"
    meaning = "A parameter has requires_grad=False, and a step of the optimizer moves it all the same."
    harm = (
        "An optimizer skips parameters without a gradient, and a gradient of zero is one: momentum, Adam's averages "
        "and weight decay still move the parameter. The layer that you took for frozen changes, and its running "
        "statistics no longer fit."
    )
    example = """
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step in range(3):
            if step == 1:
                model[1].requires_grad_(False)
            optimizer.zero_grad(set_to_none=False)
            model(torch.randn(16, 4)).square().sum().backward()
            optimizer.step()
    """
    remedies = (
        (
            "Leave frozen parameters out of the optimizer, or set their gradients to None, which zero_grad() does by "
            "default."
        ),
        "Or hold them: bnguard.frozen(model, affine=True).",
    )
    fine = "Weight decay is to shrink these parameters although the loss no longer trains them."

    def __init__(self) -> None:
        # By name: the value at the first update of the frozen layer, and the parameter.
        self._before: dict[str, tuple[Tensor, nn.Parameter]] = {}

    def on_update(self, update: Update, module: nn.Module | None) -> None:
        """Copies the parameters at the first update of a frozen layer; drops the copies when it is trained again."""
        if not update.is_frozen:
            self._before = {}
        elif module is not None and not self._before and update.mode.grad and update.mode.training:
            self._before = _copies_of(module)

    def at_end(self, end: LayerEnd) -> Iterator[Evidence]:
        """The parameters of an optimizer that are frozen and have other bits than their copies."""
        moved = [
            name
            for name, (before, now) in self._before.items()
            if not now.requires_grad and id(now) in end.optimized and have_moved({name: before}, {name: now})
        ]
        if moved and end.steps:
            yield Evidence(self.code, end.name, detail=listing(moved))

    @classmethod
    def audit(cls, audited: AuditedModel) -> Iterator[Evidence]:
        """The frozen parameters that the next step would move: those that have a gradient."""
        optimizer = audited.optimizer
        names = {id(parameter): name for name, parameter in audited.model.named_parameters()}
        for group in () if optimizer is None else optimizer.param_groups:
            # With a gradient of zero, these still move a parameter.
            moves_by_zero = any([bool(group.get(option)) for option in ("weight_decay", "momentum", "betas")])
            for parameter in group["params"]:
                grad, name = parameter.grad, names.get(id(parameter))
                if name is None or parameter.requires_grad or grad is None:
                    continue
                if moves_by_zero or (not is_valueless(grad) and bool(grad.any())):
                    yield Evidence(cls.code, name, detail=type(optimizer).__name__)


@outside_modes
def _copies_of(module: nn.Module) -> dict[str, tuple[Tensor, nn.Parameter]]:
    own = {name: below_transforms(parameter) for name, parameter in module._parameters.items()}
    present = {name: parameter for name, parameter in own.items() if parameter is not None and has_values(parameter)}
    return {name: (unwrapped_tensor(parameter).detach().clone(), parameter) for name, parameter in present.items()}
