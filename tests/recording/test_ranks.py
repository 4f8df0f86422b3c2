"""Rank 0 waits for the records of the others, and for no longer than it says."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from bnguard.recording import ranks


class HangingStore:
    """A store whose server is gone: a question hangs until a timeout of its own."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def check(self, keys: list[str]) -> bool:
        """Answers only when it is released."""
        self.released.wait(60)
        return False


@pytest.fixture
def store() -> Iterator[HangingStore]:
    """One that a failing test does not wait for."""
    store = HangingStore()
    yield store
    store.released.set()


def test_a_store_that_hangs_is_not_waited_for(
    store: HangingStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The missing ranks are named after the usual time, and stderr says meanwhile what is waited for."""
    monkeypatch.setattr(ranks, "_PATIENCE", 0.2)
    monkeypatch.setattr(ranks, "_SILENT", 0.1)
    here = ranks.Ranks.__new__(ranks.Ranks)
    here.rank, here.size, here._store, here._process = 0, 3, store, os.getpid()
    merged = here.exchange(ranks.Recorded((), (), {}), "watch")
    assert not store.released.is_set()
    assert merged is not None
    assert merged.missing == (1, 2)
    assert capsys.readouterr().err == "bnguard: waiting up to 0.2 seconds for what was recorded on ranks 1 and 2\n"
