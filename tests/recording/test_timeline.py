"""Updates over the steps: nothing is lost in wider spans, and memory stays bounded."""

import itertools
from collections import Counter
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from bnguard.recording.timeline import Timeline, updates_over_steps
from tests.strategies import property_settings

paths = st.lists(st.integers(0, 40) | st.integers(0, 5000), max_size=60).map(sorted)


@property_settings
@given(paths)
def test_spans_hold_what_happened_in_them(steps):
    """At most 256 spans of one width, each with the updates of its steps."""
    timeline = Timeline()
    for step in steps:
        timeline.add(step)
    assert len(timeline.counts) <= 256
    assert timeline.width & (timeline.width - 1) == 0
    spans = Counter(step // timeline.width for step in steps)
    assert {span: count for span, count in enumerate(timeline.counts) if count} == dict(spans)
    assert timeline.width == 1 or max(steps) // (timeline.width // 2) >= 256


@property_settings
@given(st.lists(paths.filter(bool), min_size=1, max_size=4))
def test_lines_share_their_spans(lines):
    """However far each has come: the counts of all add up, the last span ends with the last step."""
    timelines, sites = {}, []
    for number, steps in enumerate(lines):
        timeline = Timeline()
        for step in steps:
            timeline.add(step)
        timelines[f"line {number}"] = timeline
        sites += [[SimpleNamespace(site=f"line {number}", last_step=max(steps))]] * (number + 1)
    series = updates_over_steps(timelines, sites)
    assert series.end == max(map(max, lines)) + 1
    assert series.counts.sum(dim=0).tolist() == [len(steps) for steps in lines]
    edges = [*series.steps, series.end]
    for span, (first, last) in enumerate(itertools.pairwise(edges)):
        for number, steps in enumerate(lines):
            count = sum(first <= step < last for step in steps)
            assert series.counts[span, number] == count
            assert abs(float(series.rates[span, number]) - count / (last - first) / (number + 1)) < 1e-12


def test_a_million_steps_take_as_much_memory_as_a_thousand():
    """The spans widen."""
    timeline = Timeline()
    for step in range(0, 10**6, 7):
        timeline.add(step)
    assert len(timeline.counts) <= 256
    assert timeline.width == 4096
    assert sum(timeline.counts) == len(range(0, 10**6, 7))
