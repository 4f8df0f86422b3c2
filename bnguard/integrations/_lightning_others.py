"""What other callbacks of Lightning do to the model: run it by themselves, or write to it."""

from __future__ import annotations

from typing import Any, Final

# Callbacks that run the model while the trainer's callbacks are set aside, with the methods that do so.
_FINDERS: Final = {"LearningRateFinder": "lr_find", "BatchSizeFinder": "scale_batch_size"}
# Callbacks that average weights, with the hooks in which they write to the model.
_AVERAGING: Final = {
    "StochasticWeightAveraging": ("on_train_epoch_start", "on_train_end"),
    "WeightAveraging": ("on_validation_epoch_start", "on_validation_epoch_end", "on_train_end"),
}
# Hooks in which callbacks that users write exchange weights: around epochs, validations and the whole training.
_BETWEEN_EPOCHS: Final = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_end",
)
_PACKAGES: Final = ("lightning", "pytorch_lightning", "bnguard")


def trials_of(callback: Any) -> tuple[str, ...]:
    """The methods of a callback that run the model for a trial."""
    return tuple([_FINDERS[cls.__name__] for cls in type(callback).__mro__ if cls.__name__ in _FINDERS])


def averaging_hooks(callback: Any) -> tuple[str, ...]:
    """The hooks in which a callback of Lightning writes averaged weights to the model."""
    return next((_AVERAGING[cls.__name__] for cls in type(callback).__mro__ if cls.__name__ in _AVERAGING), ())


def users_hooks(callback: Any) -> tuple[str, ...]:
    """The hooks between epochs that somebody else than Lightning has written."""
    if not hasattr(callback, "__dict__"):
        return ()
    own = [cls for cls in type(callback).__mro__ if cls.__module__.partition(".")[0] not in _PACKAGES]
    defined = {name for each in (callback, *own) for name in vars(each)}
    return tuple([name for name in _BETWEEN_EPOCHS if name in defined])
