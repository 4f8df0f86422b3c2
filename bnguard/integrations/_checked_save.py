"""A look at the statistics before Lightning's ``Trainer`` makes a checkpoint."""

from __future__ import annotations

from typing import Any, Final, Protocol

__all__ = ["CheckedSave"]

_NAME: Final = "save_checkpoint"


class Checker(Protocol):
    """Who wants to look."""

    def before_save(self, trainer: Any) -> None:
        """Looks. What it raises keeps the checkpoint from being made."""


class CheckedSave:
    """Takes the place of one trainer's ``save_checkpoint`` as long as somebody wants to look.

    ``Callback.on_save_checkpoint`` is not enough: it is not called for weights-only checkpoints, and when it is, the
    state dict has been taken already.

    Attributes:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._had_own = _NAME in vars(trainer)
        self._save = trainer.save_checkpoint
        self._checkers: list[Checker] = []

    @classmethod
    def on(cls, trainer: Any) -> CheckedSave:
        """The one that is on the trainer already, else a new one."""
        present = vars(trainer).get(_NAME)
        return present if isinstance(present, cls) else cls(trainer)

    def add(self, checker: Checker) -> None:
        """Has somebody look from now on."""
        self._checkers.append(checker)
        setattr(self.trainer, _NAME, self)

    def remove(self, checker: Checker) -> None:
        """Has them look no more. The last one takes this off the trainer, unless others have put theirs over it."""
        self._checkers = [other for other in self._checkers if other is not checker]
        if self._checkers or vars(self.trainer).get(_NAME) is not self:
            return
        if self._had_own:
            setattr(self.trainer, _NAME, self._save)
        else:
            delattr(self.trainer, _NAME)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Makes a checkpoint, after a look."""
        for checker in tuple(self._checkers):
            checker.before_save(self.trainer)
        return self._save(*args, **kwargs)
