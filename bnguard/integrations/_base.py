"""The guard of a trainer's run, on which each integration is built."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from bnguard.guard import messages
from bnguard.guard.frozen import frozen
from bnguard.guard.options import Frontend, GuardOptions, OnChange, settings_for
from bnguard.guard.phrases import Phrases
from bnguard.records import GuardedLayer, StatsChange


class RunGuard:
    """Guards the running statistics of a model during each run of a trainer.

    An integration derives from this class and calls ``_begin_run(model)`` when a run begins, ``check()`` before results
    are used that must not depend on changed statistics (a validation, a checkpoint), ``_end_run()`` when the run ends,
    and ``_end_failed_run(error)`` when it ends with an exception.

    Args:
        phrases: What messages call the guard.
        on_change: What to do about an update, as in ``frozen``.
        options: The other options of ``frozen``.

    Raises:
        TypeError: An option has the wrong type, or there is no such option.
        ValueError: An option has a wrong value or contradicts another.
    """

    def __init__(self, phrases: Phrases, on_change: OnChange, options: GuardOptions) -> None:
        self._settings = settings_for(Frontend(phrases), on_change, options)
        self._guard: frozen | None = None  # of the current run, else of the last one

    @property
    def changes(self) -> tuple[StatsChange, ...]:
        """What changed, or was about to, in the current or last run. See ``bnguard.frozen``."""
        return () if self._guard is None else self._guard.changes

    @property
    def layers(self) -> tuple[GuardedLayer, ...]:
        """The guarded layers, and how each is protected. Empty before the first run if the model is not known."""
        return () if self._guard is None else self._guard.layers

    def check(self) -> None:
        """Compares the statistics now, and acts as the end of the run would. Outside a run, does nothing.

        Raises:
            StatsChangedError: Under ``on_change="raise"``, if something changed or the error of a forward was caught.
        """
        if self._guard is not None:
            self._guard.check()

    def report(self) -> str:
        """What is guarded, how, and what changed, as text."""
        return messages.report_text(self.changes, self.layers, self._settings)

    def _prepare(self, model: nn.Module, within: tuple[str, ...] = ()) -> frozen:
        """Makes the guard of a run. See ``frozen`` for the errors and the warning.

        Args:
            model: The model.
            within: Paths of the submodules to guard; empty for the whole model.
        """
        self._guard = frozen._with(model, replace(self._settings, within=within))
        return self._guard

    def _begin_run(self, model: nn.Module, within: tuple[str, ...] = ()) -> None:
        """Guards the model from now on."""
        self._prepare(model, within).start()

    def _end_run(self, error: BaseException | None = None) -> None:
        """Ends the guard of a run. If it has ended, does nothing.

        Args:
            error: The exception with which the run ends. Findings become notes of it.

        Raises:
            StatsChangedError: As at the end of a block, if ``error`` is None.
        """
        if self._guard is not None:
            self._guard.__exit__(None if error is None else type(error), error, None)

    def _end_failed_run(self, error: BaseException) -> list[str]:
        """Ends the guard of a run that ended with an exception, and raises nothing that would replace it.

        Returns:
            The notes that were added to the exception.
        """
        earlier = len(getattr(error, "__notes__", ()))
        try:
            self._end_run(error)
        except Exception as failure:
            error.add_note(f"bnguard: {type(failure).__name__}: {failure}")
        return list(getattr(error, "__notes__", ()))[earlier:]


def phrases_of(call: str, variable: str, first: str = "") -> Phrases:
    """What messages call the guard of an integration.

    Args:
        call: The name of its class.
        variable: What its instance is called in an example.
        first: The arguments before the options, as code: ``"model, "``.
    """
    first = first.replace("{", "{{").replace("}", "}}")  # the choice is a format
    return Phrases(
        place=f"{call}()",
        place_with_budget=f"{call}(updates={{}})",
        choice=f"{call}({first}{{}})",
        everything=f"{variable}.changes lists them all",
        is_of_run=True,
    )


def missing_text(module: str, package: str, extra: str) -> str:
    """The error of an integration whose library is not installed."""
    return f"{module} needs {package}: pip install 'bnguard[{extra}]'"
