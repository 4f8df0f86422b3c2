"""Ctrl-C at random moments leaves nothing behind, with real signals."""

from tests import interrupts


def test_interrupts_leave_nothing(capsys):
    """Of 10,000 interrupts at most 10 leave anything: those that arrive when ``__exit__`` has not begun."""
    seen = interrupts.run(list(interrupts.CASES), 3_000)
    plain = interrupts.run(["a class"], 500)
    with capsys.disabled():
        print(f"\nbnguard: {seen}\na class: {plain}")
    assert seen.inside > seen.interrupts / 2
    assert {case for case, kind, _ in seen.left if kind == "lock"} == set()
    assert len({place for _, _, place in seen.left}) <= 1, str(seen)
    assert len(seen.left) < 3, str(seen)
