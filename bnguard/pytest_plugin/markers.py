"""The markers ``bn_frozen`` and ``bn_updates``: which one counts for a test, and the guards it asks for."""

from __future__ import annotations

import fnmatch
import unittest
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import pytest

from bnguard.errors import BNGuardWarning

if TYPE_CHECKING:
    from bnguard.guard.options import Settings
    from bnguard.guard.requests import GuardRequests

# As pytest --markers shows them.
MARKERS: Final = (
    (
        "bn_frozen(on_change='raise', **options): fail the test if it moves the running statistics of a model that it "
        "gets from its fixtures and parameters; options are those of bnguard.frozen()."
    ),
    (
        "bn_updates(reason=''): let the test move running statistics although --bn-frozen, or a bn_frozen marker on "
        "its class or module, would fail it."
    ),
)


def nearest_mark(item: pytest.Item) -> pytest.Mark | None:
    """The marker that counts. Precedence, highest first: on the parameters, on the function, class, module, package."""
    nearest: tuple[Any, pytest.Mark] | None = None
    callspec = getattr(item, "callspec", None)
    of_parameters = [] if callspec is None else [(callspec, mark) for mark in callspec.marks]
    for node, mark in [*of_parameters, *item.iter_markers_with_node()]:
        if mark.name not in ("bn_frozen", "bn_updates"):
            continue
        if nearest is None:
            nearest = node, mark
        elif node is nearest[0] and mark.name != nearest[1].name:
            pytest.fail(
                "bn_frozen and bn_updates contradict each other here: keep one of the two markers, or move the one "
                "that holds for fewer tests nearer to them",
                pytrace=False,
            )
    return None if nearest is None else nearest[1]


def reason_of(mark: pytest.Mark) -> str:
    """The reason of a ``bn_updates`` marker, ``""`` if it has none."""
    reason = mark.kwargs.get("reason", *(mark.args[:1] or ("",)))
    if not isinstance(reason, str) or len(mark.args) + len(mark.kwargs) > 1 or set(mark.kwargs) - {"reason"}:
        pytest.fail(f"bn_updates takes one reason, as in @pytest.mark.bn_updates('trains'), got {mark}", pytrace=False)
    return reason


def reason_in_file(item: pytest.Item, patterns: Sequence[str]) -> str | None:
    """Why a test without a marker may update, by the configuration file; None if it may not."""
    config = item.config
    path = item.path.relative_to(config.rootpath) if item.path.is_relative_to(config.rootpath) else item.path
    found = next((pattern for pattern in patterns if fnmatch.fnmatchcase(path.as_posix(), pattern)), None)
    return (
        None if found is None else f"{found} in {config.inipath.name if config.inipath else 'the configuration file'}"
    )


def settings_of(mark: pytest.Mark) -> Settings:
    """The options of a ``bn_frozen`` marker."""
    try:
        return _bn_frozen(*mark.args, **mark.kwargs)
    except (TypeError, ValueError) as error:
        pytest.fail(f"@pytest.mark.bn_frozen: {error}", pytrace=False)


def _bn_frozen(on_change: Any = "raise", **options: Any) -> Settings:
    from bnguard.guard.options import Frontend, settings_for
    from bnguard.pytest_plugin.requests import MARKER

    return settings_for(Frontend(MARKER), on_change, options)  # type: ignore[arg-type]  # which it checks


def after_set_up(item: pytest.Item, begin: Callable[[], None]) -> None:
    """Calls a function now; for a ``unittest.TestCase`` after ``setUp()``, which is a part of running the test."""
    instance: Any = getattr(item, "instance", None)
    if not isinstance(instance, unittest.TestCase):
        begin()
        return
    name = "asyncSetUp" if hasattr(instance, "asyncSetUp") else "setUp"
    set_up = getattr(instance, name)

    async def wait_and_begin() -> None:
        await set_up()
        begin()

    def set_up_and_begin() -> None:
        set_up()
        begin()

    setattr(instance, name, wait_and_begin if name == "asyncSetUp" else set_up_and_begin)


def guard_models(item: pytest.Item, settings: Settings, requests: GuardRequests) -> None:
    """Guards the models that reach a test with the marker ``bn_frozen``."""
    from bnguard.guard.requests import Precedence
    from bnguard.layers.search import modules_reachable_from, roots_of
    from bnguard.layers.tree import any_layer

    values = list(getattr(item, "funcargs", {}).values())
    instance = getattr(item, "instance", None)
    classes = [dict(vars(cls)) for cls in type(instance).__mro__[:-1]]  # what setup_class and setUpClass assign
    models = modules_reachable_from([*values, instance, *classes])
    if not models:
        pytest.fail(
            "@pytest.mark.bn_frozen guards the models that a test gets from its fixtures and parameters, and this test "
            "gets none: there is no torch.nn.Module among them, in their lists, tuples and dicts, or in their "
            "attributes. Inside the test, call the fixture: bn_frozen(model)",
            pytrace=False,
        )
    guarded = [model for model in models if settings.buffers or any_layer(model)]
    if not guarded:
        from bnguard.guard.messages import unguarded_text

        item.warn(BNGuardWarning(unguarded_text(type(models[0]).__name__)))
        return
    roots, refusals = roots_of(guarded), []
    for model in roots:
        try:
            requests.add(Precedence.MARKER, model, settings)
        except ValueError as error:  # a pattern may select layers of only one of several models
            refusals.append(error)
    if len(refusals) == len(roots):
        pytest.fail(f"@pytest.mark.bn_frozen: {refusals[0]}", pytrace=False)
