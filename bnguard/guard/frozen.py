"""``frozen``: keep the running statistics of a model fixed inside a ``with`` block.

Note [Ctrl-C]
~~~~~~~~~~~~~
Python may raise KeyboardInterrupt after any call, and at the first line of any function. So:

1. What a block undoes is registered before it is done, and every undo may be run again. If the end of a block is
   interrupted, ``_abandon()`` runs all of it once more. See also Note [Interruption].
2. A function that undoes something may be interrupted before its first ``try``. So its caller has one; and what is
   switched off for a computation is switched on by a ``finally`` in the function itself (``outside_modes``), not by
   the ``__exit__`` of a context manager.
3. The caller of ``__exit__`` is the ``with`` statement, which has no ``try``. A block whose ``__exit__`` never began
   ends when its guard is deleted: in ``with frozen(model):`` as soon as the exception is handled. A guard that is kept
   in a variable remains open; ``stop()`` ends it.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from inspect import CO_OPTIMIZED
from sys import getrefcount
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, TypeVar

from torch import nn

from bnguard.errors import StatsChangedError, hides_frame
from bnguard.guard import messages
from bnguard.guard.block import Block
from bnguard.guard.kept import keep, take
from bnguard.guard.model_checks import check_is_module, check_model
from bnguard.guard.options import PLAIN, Check, Frontend, OnChange, Settings, check_settings
from bnguard.layers.kinds import StatsLayer
from bnguard.layers.select import Selector
from bnguard.torch_internals.callsite import end_in_users_line
from bnguard.torch_internals.compile import outside_graphs

if TYPE_CHECKING:
    from bnguard.records import GuardedLayer, StatsChange

F = TypeVar("F", bound=Callable[..., Any])

__tracebackhide__ = hides_frame

_numbers: Final = itertools.count(1)
# The blocks that this thread or this task of asyncio has entered. One that another one leaves stays among them.
_own: Final[ContextVar[tuple[int, ...]]] = ContextVar("bnguard_own_blocks", default=())
_MOST_OWN: Final = 64


def _references_in_exit() -> int:
    """How many references there are to a context manager in ``__exit__`` if only its ``with`` statement has it."""
    found = []

    class Manager:
        @outside_graphs
        def __enter__(self) -> None:
            pass

        @outside_graphs
        def __exit__(self, *exception: object) -> None:
            found.append(getrefcount(self))

    with Manager():
        pass
    return found[0]


_IN_WITH: Final = _references_in_exit()


# From Python 3.14 on, what a function does with a local variable may take no reference of its own.
_BORROWS: Final = sys.version_info >= (3, 14)


def _is_known_to_caller(manager: object) -> bool:
    """Whether what has called ``__exit__`` is no ``with`` statement, or one whose function has the manager as well."""
    try:
        caller = sys._getframe(2)
    except ValueError:  # no Python code has: such as atexit
        return True
    code = caller.f_code
    if "__exit__" in code.co_names or "__exit__" in code.co_consts:
        return True
    return _BORROWS and bool(code.co_flags & CO_OPTIMIZED) and id(manager) in map(id, caller.f_locals.values())


class frozen:  # noqa: N801  # lower case, as torch.no_grad
    """Holds the running statistics of a model still: a context manager, a decorator, and ``start()``/``stop()``.

    Guarded are the buffers ``running_mean``, ``running_var`` and ``num_batches_tracked`` of every layer that owns one,
    and what other libraries call the same thing. Whatever happens inside the block, under ``"raise"`` and ``"restore"``
    they are the same tensors with the same bits afterwards. Outputs, gradients and random numbers are those of the
    unguarded model. Nothing is left on the model afterwards.

    ::

        with bnguard.frozen(model):                      # raise where an update is about to happen
            evaluate(model)

        with bnguard.frozen(teacher, "restore"):         # normalise with the batch, keep the statistics
            targets = teacher(images)

        @bnguard.frozen(backbone, use_running_stats=True)   # as in eval mode, whatever train() says
        def train(...): ...

        guard = bnguard.frozen(model).start()            # for a whole run
        ...
        guard.stop()

    Guards may be nested, entered again, shared by threads and by tasks of asyncio. The innermost one decides about a
    forward; what it lets stand is a change for the guard around it. Decorating a coroutine or a generator function
    guards each resumption; what the caller does in between is not inside.

    Not covered: after the block, activation checkpointing recomputes its region in an unguarded forward; run that
    backward inside the block. Under ``torch.compile`` nothing can be raised, warned about or counted at the forward:
    the comparison at the end of the block finds it.

    Args:
        model: The model, or one layer.
        on_change: What to do about an update.
            ``"raise"``: ``StatsChangedError`` from inside the forward, before anything changed. What only the
            comparison at the end can see (``load_state_dict()``, a write to ``.data``, a compiled graph) is put back,
            then raised.
            ``"warn"``: the change stands; one ``BNGuardWarning`` a block, all of them in ``changes``.
            ``"restore"``: no update happens, and the layer still normalises with the statistics of the batch. Silent
            for forwards; a change from elsewhere is put back with a warning.
            ``"rollback"``: statistics move inside the block as they would without a guard, and are those of its
            beginning again at the end, whoever wrote them: for test-time adaptation, a learning-rate range test, or an
            evaluation in the middle of training. Silent.
        use_running_stats: Guarded layers normalise with their running statistics, as in eval mode, however often
            ``model.train()`` is called: with those that they have when the block begins, whatever is written to them
            inside (``update_bn()``, a checkpoint). Nothing else changes mode.
        affine: Hold ``weight`` and ``bias`` of the guarded layers too: they get no gradient inside and no optimizer
            moves them. Their ``requires_grad`` flags and gradients of entry come back at the end, also after a
            ``zero_grad()`` inside.
        updates: Updates that each layer may make inside the block; one more is the change. ``updates=1`` around a train
            step finds a step with several forwards.
        include: Guard only these layers: glob patterns on names in ``state_dict()``, without what ``DataParallel``,
            ``DistributedDataParallel`` and ``torch.compile`` put before them (one that names a container selects all in
            it; the model itself is ``"(root)"``), modules, classes of layers (``nn.BatchNorm2d``, with its
            subclasses), predicates ``(name, module) -> bool``, or a list or tuple of them.
        exclude: Do not guard these layers; as ``include``.
        buffers: Guard other buffers that forwards move as well: codebooks, queues, observers of quantisation, vectors
            of spectral normalisation. Glob patterns on their names in ``state_dict()`` (one that names a module selects
            all of its buffers), or ``"all"``: every one of the layers that ``include`` selects. They are held like
            statistics: by name, with the forward of the module that owns them. What the forward of another module or a
            method moves is seen at the end of the block. Under ``use_running_stats=True`` a module that has one runs in
            eval mode.
        check: When the comparison at the end of the block is read.
            ``"exit"``: at once, which waits for the device.
            ``"deferred"``: when the next block with this option begins on the model, by ``check()`` or by ``stop()``.
            The statistics are right as soon as the block has ended; only the report is late, and one that nobody reads
            is printed when the model or the process ends. Updates that a forward would make still raise at once. It
            takes a second copy of the statistics, and does not see what other streams write while the block ends. Not
            deferred are the end of a block by an exception, and statistics that were replaced or converted.

    Raises:
        TypeError: ``model`` is no module; an option has the wrong type.
        ValueError: An ``on_change`` that does not exist, a negative ``updates``, options that contradict each other, a
            pattern that selects nothing.
        BNGuardError: When a block begins: a statistic is a quantised, sparse or nested tensor, or another one whose
            bits cannot be compared; or a CUDA graph is being captured.

    Warns:
        BNGuardWarning: The model has no layer with running statistics.
    """

    __module__ = "bnguard"  # as a user imports it
    __slots__ = ("__weakref__", "_last", "_model", "_open", "_settings")

    _frontend: ClassVar[Frontend] = PLAIN

    @outside_graphs
    def __init__(
        self,
        model: nn.Module,
        on_change: OnChange = "raise",
        *,
        use_running_stats: bool = False,
        affine: bool = False,
        updates: int = 0,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        buffers: str | Iterable[str] | None = None,
        check: Check = "exit",
    ) -> None:
        check_is_module(model, self._frontend.phrases)
        settings = check_settings(
            on_change, use_running_stats, affine, updates, include, exclude, buffers, check, frontend=self._frontend
        )
        check_model(model, settings)
        self._set(model, settings)

    @classmethod
    @outside_graphs
    def _with(cls, model: nn.Module, settings: Settings) -> Self:
        """A guard with settings that are checked already, on a model that is not. See the class for errors."""
        check_is_module(model, settings.frontend.phrases)
        check_model(model, settings)
        return cls._of(model, settings)

    @classmethod
    @outside_graphs
    def _of(cls, model: nn.Module, settings: Settings) -> Self:
        """A guard with settings and a model that are checked already."""
        guard = cls.__new__(cls)
        guard._set(model, settings)
        return guard

    def _set(self, model: nn.Module, settings: Settings) -> None:
        self._model = model
        self._settings = settings
        # Their numbers, in the order of opening; None is still being entered. Without a lock: a change is one step.
        self._open: dict[Block, int | None] = {}
        self._last: Block | None = None

    @outside_graphs
    def __enter__(self) -> Self:
        if self._settings.check == "deferred":
            self._read_verdicts(at_entry=True)
        last, number = self._last, next(_numbers)
        block = take(self._model, self._settings) if last is None else last
        if block is None or not block.claim():
            block = Block(self._model, self._settings, last)
        self._open[block] = None
        self._last = block
        try:
            block.enter(self)
            _own.set((*_own.get()[1 - _MOST_OWN :], number))
            self._open[block] = number
            return self
        except BaseException:
            self._abandon([block])
            raise

    @outside_graphs
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        left: list[Block | None] = []
        try:  # not in a function: see rule 2 of Note [Ctrl-C]
            if kind is not None and isinstance(error, StatsChangedError):  # of a with statement, not of the plugin
                end_in_users_line(error)
            is_kept = getrefcount(self) > _IN_WITH or _is_known_to_caller(self)
            self._leave(error, left, is_kept=is_kept)
        except BaseException as failure:
            self._abandon(left)
            if isinstance(failure, StatsChangedError):
                failure.__traceback__ = None  # Python adds this frame again, and those around it
            raise

    def _leave(self, error: BaseException | None, left: list[Block | None], *, is_kept: bool) -> None:
        """Ends the innermost block.

        Args:
            error: The exception that leads out of it.
            left: Receives the block, first; None in its place once it has ended.
            is_kept: Whether somebody may ask this guard about the block.
        """
        while True:
            opened = tuple(self._open.items())
            is_only = len(opened) == 1 and opened[0][1] is not None
            block = opened[0][0] if is_only else self._innermost()
            if block is None:
                return
            left.append(block)
            if (number := self._open.pop(block, None)) is not None:
                own = _own.get()
                _own.set(own[:-1] if own[-1:] == (number,) else tuple([other for other in own if other != number]))
                self._last = block
                block.leave(error)
                left[0] = None  # from here on another thread may enter it
                if not (is_kept or self._open):
                    self._last = None  # first: a guard must not be asked about a block that it does not have
                    keep(block, self._model)
                return
            left.pop()  # another thread or a signal handler has ended it in the meantime

    def _abandon(self, left: Sequence[Block | None] = ()) -> None:
        """Completes the end of a block that was interrupted: of the one in ``left``, else of the innermost."""
        block = left[0] if left else self._innermost()
        if block is not None:
            self._open.pop(block, None)
            block.abandon()

    def __call__(self, function: F) -> F:
        """Decorates ``function``: its code runs inside a block of this guard."""
        from bnguard.guard.decorate import guard_function  # imports wrapt

        guarded: F = guard_function(function, lambda *call: lambda: self, "frozen(...)")
        return guarded

    @outside_graphs
    def start(self) -> Self:
        """Enters a block that lasts until ``stop()``, with or without a reference to the guard; returns the guard."""
        self.__enter__()
        if (block := self._innermost()) is not None:
            block.outlive()
        return self

    @outside_graphs
    def stop(self) -> None:
        """Leaves the block that this thread or task entered last, else the last one of all.

        Without one, does nothing.

        Raises:
            StatsChangedError: As at the end of a ``with`` block.
        """
        error = sys.exc_info()[1]  # in a finally clause, the one on its way out
        if isinstance(error, StatsChangedError):
            end_in_users_line(error)
        self.__exit__(None, None, None)
        self._read_verdicts()

    @outside_graphs
    def check(self) -> None:
        """Compares the statistics now, without leaving, and acts as the end of the block would.

        With ``check="deferred"`` it first reads what the blocks that have ended found. Without either, does nothing.

        Raises:
            StatsChangedError: Under ``on_change="raise"``, if something changed or the error of a forward was caught.
        """
        self._read_verdicts()
        block = self._innermost()
        if block is not None:
            block.check()

    def _read_verdicts(self, *, at_entry: bool = False) -> None:
        if self._settings.check == "deferred":
            from bnguard.guard.deferred import read_verdicts

            read_verdicts(self._model, at_entry=at_entry)

    @property
    @outside_graphs
    def changes(self) -> tuple[StatsChange, ...]:
        """What changed, or was about to, in the current or last block, in the order of ``state_dict()``.

        At any time what the forwards showed; complete after ``check()`` and at the end of the block, with
        ``check="deferred"`` after ``check()`` only.
        """
        return () if self._last is None else self._last.changes

    @property
    @outside_graphs
    def layers(self) -> tuple[GuardedLayer, ...]:
        """The layers of the current or last block, or those a block would have now, and how each is protected."""
        return (self._last or Block(self._model, self._settings)).layers

    @outside_graphs
    def report(self) -> str:
        """What is guarded, how, and what changed, as text."""
        return messages.report_text(self.changes, self.layers, self._settings)

    @outside_graphs
    def __repr__(self) -> str:
        state = "open" if self._open else "closed"
        return f"<bnguard.frozen of a {type(self._model).__name__}, on_change={self._settings.on_change!r}, {state}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._of(*copy.deepcopy((self._model, self._settings), memo))

    def __getstate__(self) -> tuple[nn.Module, Settings]:
        return self._model, self._settings  # a pickle guards the copy of the model, and is not open

    def __setstate__(self, state: tuple[nn.Module, Settings]) -> None:
        self._set(*state)

    def _hand_on(self) -> None:
        """Leaves the last block to the next guard of the model. See Note [Kept blocks]."""
        block, self._last = self._last, None  # first: a guard must not be asked about a block that it does not have
        if block is not None:
            keep(block, self._model)

    @property
    def _stats_layers(self) -> Sequence[StatsLayer]:
        """The layers of the current or last block."""
        return () if self._last is None else self._last.stats_layers

    @outside_graphs
    def _put_back(self) -> list[StatsChange]:
        """Puts back what has changed, and returns it, without an error or a warning."""
        block = self._innermost()
        return [] if block is None else block.put_back()

    def _innermost(self) -> Block | None:
        """The block that this thread or task entered last, else the last of all."""
        numbers = _own.get()
        entered = [(block, number) for block, number in tuple(self._open.items()) if number is not None]
        own = [block for block, number in entered if number in numbers]
        return own[-1] if own else entered[-1][0] if entered else None
