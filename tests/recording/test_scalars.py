"""``record.log_to(writer)``: drift and updates as scalars, each once, as TensorBoard reads them."""

from collections import defaultdict

import pytest
import torch
from torch import nn

import bnguard
from bnguard.words import name_text


class Writer:
    """Keeps what is written: by tag, the values by step. A second value for a step is an error."""

    def __init__(self):
        self.written = defaultdict(dict)

    def add_scalar(self, tag, value, step):
        assert step not in self.written[tag], (tag, step)
        self.written[tag][step] = value


def net():
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))


def train(model, steps, optimizer):
    """Some steps; after each second one, a forward from another line."""
    for step in range(steps):
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        if step % 2:
            model(torch.randn(8, 3))


def expected(record):
    """The scalars, from the series."""
    series, updates = record.series, record.update_series
    scalars = defaultdict(dict)
    for name in ("divergence", "mean_shift"):
        for row, step in enumerate(series.steps):
            for layer, value in zip(series.layers, getattr(series, name)[row].tolist(), strict=True):
                scalars[f"bnguard/{name}/{layer}"][step] = value
    for row, step in enumerate(updates.steps):
        for line, rate in zip(updates.lines, updates.rates[row].tolist(), strict=True):
            scalars[f"bnguard/updates/{line}"][step] = rate
    return scalars


@pytest.mark.parametrize("every", [1, 3, "auto"])
def test_series_are_written(every):
    """Each value of both series, at its step."""
    model = net()
    with bnguard.watch(model, every=every) as record:
        train(model, 7, torch.optim.SGD(model.parameters(), 0.1))
    writer = Writer()
    record.log_to(writer)
    assert writer.written == expected(record)
    assert len(writer.written) == 2 * 2 + 2


def test_calls_on_the_way_write_what_is_new():
    """Once an epoch and at the end is the same as once at the end; the step that goes on is written when it is over."""
    model, writer, late = net(), Writer(), Writer()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bnguard.watch(model, every=2) as record:
        record.log_to(writer)
        assert not writer.written
        for _ in range(3):
            train(model, 4, optimizer)
            record.log_to(writer)
            record.log_to(writer)
        steps = max(max(values) for tag, values in writer.written.items() if "/updates/" in tag)
        assert steps == 11
    record.log_to(writer)
    record.log_to(writer)
    record.log_to(late)
    assert writer.written == late.written == expected(record)


def test_drift_without_every_is_that_of_the_end():
    """One value a layer, at the last optimizer step, once the watch has stopped."""
    model, writer = net(), Writer()
    with bnguard.watch(model) as record:
        train(model, 5, torch.optim.SGD(model.parameters(), 0.1))
        record.log_to(writer)
        assert not any("divergence" in tag for tag in writer.written)
    record.log_to(writer, "bnguard")
    record.log_to(writer)
    for drift in record.drift:
        layer = name_text(drift.names[0])
        assert writer.written[f"bnguard/divergence/{layer}"] == {5: drift.largest}
        assert writer.written[f"bnguard/mean_shift/{layer}"] == {5: float(drift.mean_shift.max())}


def test_layers_that_come_later_have_no_values_before():
    """NaN is not written."""
    model, writer = net(), Writer()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bnguard.watch(model, every=1) as record:
        train(model, 2, optimizer)
        model.append(nn.BatchNorm1d(3))
        train(model, 2, optimizer)
    record.log_to(writer, prefix="stats")
    assert list(writer.written["stats/divergence/0"]) == [1, 2, 3, 4]
    assert list(writer.written["stats/divergence/3"]) == [3, 4]


@pytest.mark.parametrize(("writer", "got"), [(None, "NoneType"), ("runs", "str"), (Writer, "the class Writer")])
def test_what_is_no_writer_is_refused(writer, got):
    """The error says what was expected."""
    text = rf"^log_to\(\) takes a writer with add_scalar\(\), such as a SummaryWriter, got {got}$"
    with pytest.raises(TypeError, match=text):
        bnguard.watch(net()).log_to(writer)


def test_tensorboard_reads_it(tmp_path):
    """A real ``SummaryWriter``: the events that TensorBoard reads back are the values."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = net()
    with bnguard.watch(model, every=1) as record:
        train(model, 4, torch.optim.SGD(model.parameters(), 0.1))
    with SummaryWriter(str(tmp_path)) as writer:
        record.log_to(writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert len(events.Tags()["scalars"]) == 6
    read = {event.step: event.value for event in events.Scalars("bnguard/divergence/0")}
    assert read == pytest.approx(dict(zip(record.series.steps, record.series.divergence[:, 0].tolist(), strict=True)))
