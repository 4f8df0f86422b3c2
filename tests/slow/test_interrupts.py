"""Ctrl-C at random moments leaves nothing behind, with real signals."""

from tests import interrupts


def test_interrupts_leave_nothing(capsys):
    """Of 10,000 at most 10 leave anything, all of which arrive before ``__exit__`` has begun; never a lock."""
    seen = interrupts.run(list(interrupts.CASES), 3_000)
    plain = interrupts.run(["a class"], 500)
    with capsys.disabled():
        print(f"\nbnguard: {seen}\na class: {plain}")
    assert seen.inside > seen.interrupts / 2
    assert not [kinds for _, kinds, _ in seen.left if "lock" in kinds]
    assert len(seen.left) == seen.window, str(seen)
    assert len(seen.left) <= 6, str(seen)  # of so few there may be more than 3 by chance
