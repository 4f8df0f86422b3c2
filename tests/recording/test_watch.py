"""``watch``: every update is recorded, by line and mode; nothing else changes."""

import copy
import gc
import re
import threading
import weakref
from contextlib import nullcontext, suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

import bnguard
from bnguard.layers.drift import DriftColumns
from bnguard.recording import layer_log, optimizer_steps, put_back
from bnguard.recording.journal import Journal
from tests.asserts import assert_clean, assert_same_bits, state_of
from tests.nets import conv_net, images
from tests.old_torch import needs_traced_layers
from tests.strategies import HandmadeNorm, OwnForward

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net_of(*layers):
    """A convolution and these."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *layers)


def run(net):
    """One forward, always from the same line."""
    net(IMAGES)


def only(items):
    """The one item."""
    (item,) = items
    return item


def test_an_update_is_recorded_with_everything():
    """Layer, type, line and function, mode, batch shape, step and count."""
    net = net_of(nn.BatchNorm2d(4))
    with bnguard.watch(net) as record:
        for _ in range(3):
            net(IMAGES)
    update = only(record.updates)
    assert update.names == ("1",)
    assert update.type == "BatchNorm2d"
    assert update.where.startswith("tests/recording/test_watch.py:")
    assert update.where.endswith(" in test_an_update_is_recorded_with_everything")
    assert update.mode == bnguard.Mode()
    assert update.count == 3
    assert update.batch_shape == (8, 4, 6, 6)
    assert update.fewest_values == 8 * 36
    assert (update.first_step, update.last_step, update.small_batches) == (0, 0, 0)


MODES = {
    "no_grad": (torch.no_grad, bnguard.Mode(grad=False), "train, no_grad"),
    "inference": (torch.inference_mode, bnguard.Mode(grad=False, inference=True), "train, inference"),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), bnguard.Mode(autocast=True), "train, autocast"),
}


@pytest.mark.parametrize(("context", "mode", "words"), MODES.values(), ids=MODES)
def test_modes_are_told_apart(context, mode, words):
    """Updates of one line in several modes are several records."""
    net = net_of(nn.BatchNorm2d(4))
    with bnguard.watch(net) as record:
        for number in range(3):
            with context() if number else torch.enable_grad():
                net(IMAGES)
    assert {update.mode: update.count for update in record.updates} == {bnguard.Mode(): 1, mode: 2}
    assert str(mode) == words


def test_recomputed_forwards_and_calibration_are_told_apart():
    """The second forward of a checkpointed region, and those of update_bn."""
    net = net_of(nn.BatchNorm2d(4))
    with bnguard.watch(net) as record:
        torch.utils.checkpoint.checkpoint(net, IMAGES, use_reentrant=False).sum().backward()
        torch.optim.swa_utils.update_bn([IMAGES], net)
    modes = [update.mode for update in record.updates]
    assert modes == [bnguard.Mode(), bnguard.Mode(recompute=True), bnguard.Mode(grad=False, calibration=True)]


def test_lines_are_those_that_call_the_model():
    """Not lines of the model's own code: who called it is what is asked. Wrappers are no callers."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    def train(model):
        model(IMAGES)

    def validate(model):
        model(IMAGES)

    net = Outer()
    with bnguard.watch(net) as record:
        train(net)
        validate(nn.DataParallel(net))
        train(net.inner)
    assert [(update.where.split()[-1], update.count) for update in record.updates] == [("train", 2), ("validate", 1)]


def test_optimizers_that_take_turns_count_as_one():
    """A step is a round of them: it ends when one of them makes its next step."""
    one, two, none = (net_of(nn.BatchNorm2d(4)) for _ in range(3))
    first, second = (torch.optim.SGD(net.parameters(), 0.1) for net in (one, two))
    with bnguard.watch() as record:
        for net in (one, two, none):
            run(net)
        for _ in range(2):
            first.step()
        second.step()
        for net in (one, two, none):
            run(net)
    assert [(update.first_step, update.last_step) for update in record.updates] == [(0, 2)] * 3


def test_a_million_steps_take_no_memory():
    """Records grow with layers and lines, not with updates."""
    net = nn.BatchNorm1d(2)
    rows = torch.randn(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)

    def sizes(record):
        log = record._recorder.logs[0]
        counters = [value for rule in log._observer._rules for value in vars(rule).values()]
        sizes = [len(value) for value in counters if hasattr(value, "__len__")]
        return len(log.sites), sizes, len(log._updates), len(record._recorder._pending)

    with bnguard.watch(net) as record:
        for number in range(300):
            net(rows)
            net(rows)
            optimizer.step()
            if number == 20:
                early = sizes(record)
        assert sizes(record) == early
    assert sum(update.count for update in record.updates) == 600


def test_layers_of_every_kind_are_seen():
    """Layers that only their statistics tell about, too; nothing is seen where nothing updates."""
    for layer in (
        OwnForward(4),
        HandmadeNorm(4, 0.1),
        HandmadeNorm(4, 0.1, reassign=True),
        nn.InstanceNorm2d(4, track_running_stats=True),
    ):
        net = net_of(layer)
        with bnguard.watch(net) as record:
            run(net)
            run(net)
            run(net.eval())
        assert only(record.updates).count == 2, type(layer)


def test_every_model_in_the_process():
    """With no model given, whatever runs is met, models that are made later included, each once."""
    early = net_of(nn.BatchNorm2d(4))
    with bnguard.watch() as record:
        run(early)
        late = net_of(nn.BatchNorm2d(4))
        run(late)
        run(nn.Sequential(late, nn.BatchNorm2d(4)))
    assert [(update.names, update.count) for update in record.updates] == [(("1",), 1), (("1",), 2), (("1",), 1)]


def test_other_models_are_not_watched():
    """With a model given, only that; a layer that comes into it later is met."""
    net, other = net_of(nn.BatchNorm2d(4)), net_of(nn.BatchNorm2d(4))
    with bnguard.watch(net) as record:
        run(other)
        run(net)
        net.append(nn.BatchNorm2d(4))
        run(net)
    assert [(update.names, update.count) for update in record.updates] == [(("1",), 2), (("2",), 1)]


def test_models_that_go_are_let_go():
    """A watch of everything keeps no model alive, and tells what one did that is gone."""
    with bnguard.watch() as record:
        seen = []
        for _ in range(3):
            net = net_of(nn.BatchNorm2d(4))
            net(IMAGES)
            seen.append(weakref.ref(net))
        del net
        gc.collect()
        assert [reference() for reference in seen] == [None] * 3
    assert [update.count for update in record.updates] == [1] * 3
    assert all(drift.has_moved for drift in record.drift)


def test_what_a_guard_prevents_is_no_update():
    """Under restore and use_running_stats nothing updates; under warn, and within a budget, it does."""
    net = net_of(nn.BatchNorm2d(4))
    with bnguard.watch(net) as record:
        for options in ({"on_change": "restore"}, {"use_running_stats": True}):
            with bnguard.frozen(net, **options):
                net(IMAGES)
        with pytest.raises(bnguard.StatsChangedError), bnguard.frozen(net):
            net(IMAGES)
        assert record.updates == ()
        with bnguard.frozen(net, "restore", updates=1):
            net(IMAGES)
            net(IMAGES)
    assert only(record.updates).count == 1


def test_changes_without_a_forward_are_unexplained():
    """load_state_dict, a write to .data, another tensor; a layer that updated too has its explanation."""
    net = net_of(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    with bnguard.watch(net) as record:
        net[1].running_mean.data.add_(1)
        net[2].load_state_dict(nn.BatchNorm2d(4).state_dict() | {"running_var": torch.full((4,), 2.0)})
        net[3].running_var = torch.full((4,), 3.0)
    assert [(change.names, change.buffers) for change in record.unexplained] == [
        (("1",), ("running_mean",)),
        (("2",), ("running_var",)),
        (("3",), ("running_var",)),
    ]
    assert record.unexplained[0].mean_shift == pytest.approx(1, rel=1e-4)
    assert record.updates == ()


def test_conversion_is_no_change():
    """A model in another dtype has the statistics that it had."""
    net = net_of(nn.BatchNorm2d(4))
    with bnguard.watch(net) as record:
        net.double()
    assert record.unexplained == ()


@needs_traced_layers
@pytest.mark.parametrize("full", [False, True])
def test_compiled_graphs_are_counted(full):
    """No line can be seen in a graph; the layer's own counter tells how often it updated."""
    torch._dynamo.reset()
    net = net_of(nn.BatchNorm2d(4))
    compiled = torch.compile(net, backend="eager", fullgraph=full)
    try:
        with bnguard.watch(net) as record:
            for _ in range(3):
                compiled(IMAGES)
    finally:
        torch._dynamo.reset()
    update = only(record.updates)
    assert (update.mode, update.where, update.count) == (bnguard.Mode(compiled=True), None, 3)
    assert record.unexplained == ()


def test_drift_is_from_the_beginning_to_the_end():
    """By layer, in network order; what has not moved is there as well. Inside, it is that of now."""
    net = net_of(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    with bnguard.watch(net) as record:
        net[:2](IMAGES)
        during = record.drift[0].divergence
        net[:2](IMAGES)
    first, second = record.drift
    assert (first.names, second.names) == (("1",), ("2",))
    assert first.has_moved
    assert not second.has_moved
    assert not torch.equal(first.divergence, during)
    net(IMAGES)
    assert torch.equal(record.drift[0].divergence, first.divergence)


def test_series_is_measured_at_every_so_many_steps():
    """Each sample is what ``drift`` says at that moment; a layer that comes later has no value before."""
    net = net_of(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    shifts, nats = [], []
    with bnguard.watch(net, every=2) as record:
        for number in range(1, 8):
            if number == 5:
                net.append(nn.BatchNorm2d(4))
            net(IMAGES).sum().backward()
            optimizer.step()
            if number % 2 == 0:
                shifts.append([drift.mean_shift.max().item() for drift in record.drift])
                nats.append([drift.divergence.max().item() for drift in record.drift])
    series = record.series
    assert series.steps == (2, 4, 6)
    assert series.layers == ("1", "2", "3")
    assert series.mean_shift.isnan().tolist() == [[False, False, True]] * 2 + [[False] * 3]
    for row in range(3):
        width = len(shifts[row])
        torch.testing.assert_close(series.mean_shift[row, :width], torch.tensor(shifts[row], dtype=torch.float64))
        torch.testing.assert_close(series.divergence[row, :width], torch.tensor(nats[row], dtype=torch.float64))
    assert bnguard.watch(net).series.steps == ()


def test_training_is_bit_for_bit_that_of_a_twin():
    """Outputs, gradients, statistics and random numbers are those of the unwatched model."""
    net = conv_net()
    twin = copy.deepcopy(net)
    states = []
    for model, context in ((net, bnguard.watch(every=1)), (twin, torch.enable_grad())):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        with context:
            for _ in range(3):
                optimizer.zero_grad()
                F.dropout(model(images())).square().mean().backward()
                optimizer.step()
        states.append([state_of(model), [p.grad for p in model.parameters()], torch.get_rng_state()])
    assert_same_bits(states[0][0], states[1][0])
    assert_same_bits(states[0][1], states[1][1])
    assert torch.equal(states[0][2], states[1][2])


def test_report_leads_with_the_verdict():
    """Findings, then a row for each line and mode, then what no forward explains, then what moved most."""
    net = net_of(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)

    def validate():
        with torch.no_grad():
            net(IMAGES)

    with bnguard.watch(net) as record:
        for _ in range(2):
            net(IMAGES).sum().backward()
            optimizer.step()
        validate()
    lines = record.report().splitlines()
    where = record.findings[0].where
    assert where.endswith(" in validate")
    assert lines[0] == f"{where} moved 2 layers, 1 update each, without gradients: call model.eval() before it."
    assert lines[1] == "1 finding; 6 updates of 2 layers"
    assert lines[3] == f"BN002 train-mode forward that nothing learns from at {where}"
    assert lines[4] == "  2 layers (1, 2) made 1 update each in train mode where autograd did not record."
    assert lines[7:9] == ["updates by line:", "  updates  layers  steps   mode            line"]
    assert lines[9].startswith("        4       2  0 to 1  train           tests/recording/test_watch.py:")
    assert lines[10].startswith("        2       2  2       train, no_grad  tests/recording/test_watch.py:")
    assert lines[12] == "moved most:"
    assert lines[13].split() == ["layer", "channel", "mean", "variance", "divergence"]
    assert lines[14].startswith("  1 (BatchNorm2d) ")
    assert lines[14].endswith(" nats")
    assert lines[-1] == "More: record.updates, record.drift and record.findings have it all."
    assert repr(record) == "<bnguard.watch of a Sequential, closed>"


def test_report_of_nothing():
    """A run that updates nothing, and one that only writes."""
    net = net_of(nn.BatchNorm2d(4)).eval()
    with bnguard.watch(net) as record:
        net(IMAGES)
    assert record.report() == "no finding; no update"
    with bnguard.watch() as record:
        nn.Linear(2, 2)(torch.ones(1, 2))
    assert record.report() == "no finding; no layer with running statistics was seen in Linear"
    with bnguard.watch() as record:
        nn.CrossEntropyLoss()(torch.ones(1, 2), torch.zeros(1, dtype=torch.long))
    assert record.report() == "no finding; no layer with running statistics was seen"
    with bnguard.watch() as record:
        net(IMAGES)
        net[1].running_var.data.mul_(2)
    assert record.report().splitlines()[:5] == [
        "no finding; no update",
        "",
        "changed without a forward that could be seen:",
        "  layer            statistics",
        "  1 (BatchNorm2d)  running_var",
    ]


def test_models_are_told_apart():
    """Where several are watched, and only there, the name of the model is part of a layer's name."""

    class Critic(nn.Sequential):
        pass

    nets = [net_of(nn.BatchNorm2d(4)), Critic(nn.BatchNorm2d(3)), nn.DataParallel(Critic(nn.BatchNorm2d(3)))]
    with bnguard.watch() as record:
        for net in nets:
            with torch.no_grad():
                net(IMAGES)
    place = record.findings[0].where.partition(" ")[0]
    names = [f"{cls} at {place}" for cls in ("Sequential", "Critic", "Critic 2")]  # net is all of them
    assert [update.model for update in record.updates] == names
    assert [drift.model for drift in record.drift] == names
    assert [finding.layers for finding in record.findings] == [(f"{names[0]}: 1", *[f"{n}: 0" for n in names[1:]])]
    assert "3 updates of 3 layers" in record.report()
    assert f"  {names[2]}: 0 (BatchNorm2d) " in record.report()
    with bnguard.watch() as record:
        run(nets[0])
    assert only(record.updates).model == only(record.drift).model == ""
    with bnguard.watch(nets[0]) as record:
        nets[0].append(nn.BatchNorm2d(4))
        run(nets[0])
    assert [update.model for update in record.updates] == ["", ""]


def test_changes_without_a_forward_name_their_model():
    """Where several are watched, as updates and findings do."""
    net, ema = net_of(nn.BatchNorm2d(4)), net_of(nn.BatchNorm2d(4)).eval()
    with bnguard.watch() as record:
        net(IMAGES)
        ema(IMAGES)
        ema[1].running_mean.add_(1)
    assert [(change.model, change.names) for change in record.unexplained] == [("ema", ("1",))]
    assert "  ema: 1 (BatchNorm2d)  running_mean" in record.report()


@pytest.mark.parametrize("steps", [1, 5, 255, 256, 257, 1100])
def test_auto_measures_evenly_and_at_the_end(steps):
    """At equal distances, 128 to 256 times in a long run, and at the end; the drift is the twin's."""
    net, twin = net_of(nn.BatchNorm2d(4)), net_of(nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(net.parameters(), 1e-6)
    small = IMAGES[:2, :, :4, :4]
    with bnguard.watch(net, every="auto") as record:
        for _ in range(steps):
            net(small)
            optimizer.step()
        net[1].running_mean += 1
    series = record.series
    assert series.steps[-1] == steps
    assert list(series.steps) == sorted(set(series.steps))
    assert min(steps, 128) <= len(series.steps) <= 257
    distances = {later - earlier for earlier, later in zip(series.steps, series.steps[1:-1], strict=False)}
    assert len(distances) <= 1
    before = twin[1].running_mean.clone()
    for _ in range(series.steps[0]):
        twin(small)
    shift = (twin[1].running_mean - before).abs().max() / (1 + 1e-5) ** 0.5
    if steps > 1:
        torch.testing.assert_close(series.mean_shift[0, 0], shift.double())
    torch.testing.assert_close(series.mean_shift[-1, 0], record.drift[0].mean_shift.max())


def test_auto_without_a_step_measures_the_end():
    """A run that only looks has one sample."""
    net = net_of(nn.BatchNorm2d(4))
    with bnguard.watch(net, every="auto") as record:
        run(net)
    assert record.series.steps == (0,)
    torch.testing.assert_close(record.series.divergence[0, 0], record.drift[0].divergence.max())


def test_broken_layers_are_infinite_in_a_series():
    """Broken is not the same as not yet there."""
    net = net_of(nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(net.parameters(), 1e-6)
    with bnguard.watch(net, every=1) as record:
        run(net)
        optimizer.step()
        net[1].running_mean[2] = float("nan")
        optimizer.step()
    assert record.series.divergence.isinf().tolist() == [[False], [True]]


def test_updates_over_the_steps():
    """By line: how many, per layer and step, as they happened."""
    net = net_of(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with bnguard.watch(net) as record:
        for step in range(4):
            net(IMAGES).sum().backward()
            optimizer.step()
            if step == 2:
                run(net)
                run(net)
    series = record.update_series
    assert [line.rpartition(" ")[2] for line in series.lines] == ["test_updates_over_the_steps", "run"]
    assert (series.steps, series.end, series.layers) == ((0, 1, 2, 3), 4, (2, 2))
    assert series.counts.tolist() == [[2, 0], [2, 0], [2, 0], [2, 4]]
    assert series.rates.tolist() == [[1, 0], [1, 0], [1, 0], [1, 2]]
    assert bnguard.watch().update_series.lines == ()


@needs_traced_layers
def test_updates_of_a_model_that_is_gone_are_told():
    """Also those in a graph, and what became of its statistics after they were replaced."""

    def main():
        net = net_of(nn.BatchNorm2d(4))
        compiled = torch.compile(net, backend="eager")
        for _ in range(3):
            compiled(IMAGES)
        other = net_of(nn.BatchNorm2d(4))
        other(IMAGES)
        other.double()
        other(IMAGES.double())
        other[1].running_mean.fill_(float("nan"))

    torch._dynamo.reset()
    with bnguard.watch() as record:
        main()
        gc.collect()
    torch._dynamo.reset()
    assert [(update.mode.compiled, update.count) for update in record.updates] == [(True, 3), (False, 1), (False, 1)]
    assert record.unexplained == ()
    assert "BN012" in [finding.code for finding in record.findings]


@needs_traced_layers
@pytest.mark.parametrize("how", ["in place", "function"])
def test_graphs_of_every_model_are_seen(how):
    """model.compile(), and a compiled function that calls the model, under a watch of everything."""
    torch._dynamo.reset()
    net = net_of(nn.BatchNorm2d(4))
    if how == "in place":
        net.compile(backend="eager")
        call = net
    else:
        call = torch.compile(lambda x: net(x), backend="eager")
    with bnguard.watch() as record:
        for _ in range(3):
            call(IMAGES)
    torch._dynamo.reset()
    assert only(record.updates).mode.compiled
    assert only(record.updates).count == 3


def test_statistics_that_are_lent_are_not_the_layers():
    """functional_call with buffers of its own updates those."""
    net = net_of(nn.BatchNorm2d(4))
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with bnguard.watch(net) as record:
        torch.func.functional_call(net, buffers, (IMAGES,))
    assert record.updates == ()
    assert int(buffers["1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("calls_original", [True, False])
def test_clones_that_share_statistics_are_one_layer(calls_original):
    """As those of learn2learn: their updates are updates of the same statistics, whichever of them is alive."""
    net = net_of(nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(net.parameters(), 1e-6)
    with bnguard.watch() as record:
        for _ in range(5):
            clone = copy.copy(net)
            clone._modules = {name: copy.copy(module) for name, module in net._modules.items()}
            for module in clone:
                module._parameters = {name: one.clone() for name, one in module._parameters.items()}
            (net if calls_original else clone)(IMAGES)
            clone(IMAGES).square().mean().backward()
            optimizer.step()
            del clone, module
            gc.collect()
    assert sum(update.count for update in record.updates) == int(net[1].num_batches_tracked) == 10
    assert {(update.names, update.model) for update in record.updates} == {(("1",), "")}
    assert record.counts == (5, 10, 1)
    assert only(record.drift).has_moved
    assert "BN001" not in [finding.code for finding in record.findings]


def test_replicas_are_no_models():
    """Those of DataParallel come and go with each forward."""
    net = net_of(nn.BatchNorm2d(4))
    with bnguard.watch() as record:
        for _ in range(3):
            replica = net[1]._replicate_for_data_parallel()
            replica._buffers = {name: buffer.clone() for name, buffer in net[1]._buffers.items()}
            replica._parameters = dict(net[1]._parameters)
            replica(torch.randn(2, 4, 3, 3))
    assert record.updates == ()
    assert record.counts[2] == 0


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace:DeprecationWarning",
    "ignore:`torch.jit.trace:FutureWarning",  # from torch 2.14 on
    "ignore::torch.jit.TracerWarning",
)
def test_a_trace_has_nothing_of_ours_in_it():
    """torch.jit.trace of a watched model is the program that it would have been; shapes are unknown there."""
    net, twin = net_of(nn.BatchNorm2d(4)), net_of(nn.BatchNorm2d(4))
    with bnguard.watch(net) as record:
        program = torch.jit.trace(net, IMAGES, check_trace=False)
    graphs = [str(traced.inlined_graph) for traced in (program, torch.jit.trace(twin, IMAGES, check_trace=False))]
    ours, theirs = (re.sub(r"\.___torch_mangle_\d+", "", graph) for graph in graphs)  # torch's number of a class
    assert ours == theirs
    assert only(record.updates).batch_shape is None


def test_steps_that_a_scaler_skips_are_steps():
    """GradScaler leaves out those with infinite gradients; the training goes on."""
    net = net_of(nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    step = torch.amp.GradScaler.step
    with bnguard.watch(net) as record:
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(net(IMAGES).square().sum() * 1e30).backward()
            scaler.step(optimizer)
            scaler.update()
    assert (only(record.updates).first_step, only(record.updates).last_step) == (0, 3)
    assert record.findings == ()
    assert torch.amp.GradScaler.step is step


def test_steps_count_on_in_a_second_stage():
    """Also where its optimizer has other parameters."""
    first, second = net_of(nn.BatchNorm2d(4)), net_of(nn.BatchNorm2d(4))
    with bnguard.watch() as record:
        for net in (first, second):
            optimizer = torch.optim.SGD(net.parameters(), 1e-6)
            for _ in range(5):
                net(IMAGES)
                optimizer.step()
            del optimizer
    assert [(update.first_step, update.last_step) for update in record.updates] == [(0, 4), (5, 9)]


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "deleted"])
def test_steps_count_on_through_optimizers_of_the_same_parameters(is_kept: bool) -> None:
    """Pretraining and fine-tuning are one sequence of steps, and one update a step is no finding."""
    net, kept = net_of(nn.BatchNorm2d(4)), []
    with bnguard.watch(net) as record:
        for _ in range(3):
            optimizer = torch.optim.SGD(net.parameters(), 1e-6)
            kept += [optimizer] * is_kept
            for _ in range(5):
                net(IMAGES).sum().backward()
                optimizer.step()
            del optimizer
    (update,) = record.updates
    assert (update.first_step, update.last_step, update.count) == (0, 14, 15)
    assert record.findings == ()


def test_many_optimizers_cost_no_more_than_one() -> None:
    """One is made in each episode of meta-learning, for instance: what is gone is not asked again."""
    net = net_of(nn.BatchNorm2d(4))
    counter = optimizer_steps.StepCounter()
    counter.open(Journal(threading.RLock()))
    try:
        for _ in range(50):
            torch.optim.SGD(net.parameters(), 1e-6).step()
        assert (len(counter.optimizers), counter.count) == (1, 50)
        several = [torch.optim.SGD(net.parameters(), 1e-6) for _ in range(50)]
        for optimizer in several:
            optimizer.step()
        del several, optimizer
        torch.optim.SGD(net.parameters(), 1e-6).step()
        assert len(counter.optimizers) == 1
    finally:
        counter.close()


def test_nothing_is_left_behind():
    """On the model, in torch's tables, or in copies that are taken inside; also after an exception."""
    net = net_of(nn.BatchNorm2d(4))
    tables = [torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks]
    before = [dict(table) for table in tables]
    from torch.optim import optimizer as torch_optimizer

    optimizer_hooks = dict(torch_optimizer._global_optimizer_post_hooks)
    with pytest.raises(OSError, match="mine"), bnguard.watch():
        net(IMAGES)
        copied = copy.deepcopy(net)
        raise OSError("mine")
    assert [dict(table) for table in tables] == before
    assert dict(torch_optimizer._global_optimizer_post_hooks) == optimizer_hooks
    for model in (net, copied):
        assert_clean(model)


def test_forward_that_fails_leaves_the_watch_working():
    """An input that torch rejects is an error of torch's, with and without."""
    net = net_of(OwnForward(4))
    with bnguard.watch(net) as record:
        with pytest.raises(RuntimeError):
            net(torch.ones(2, 5, 8, 8))
        net(IMAGES)
    assert only(record.updates).count == 1


@pytest.mark.parametrize("later", ["eval", "held", "again"])
def test_forward_that_fails_is_no_update_at_a_later_forward(later):
    """It was announced, and did not happen; another forward of the layer does not stand for it."""
    net = net_of(nn.BatchNorm2d(4))
    with bnguard.watch(net) as record:
        net(IMAGES)
        with pytest.raises(RuntimeError):
            net[1](torch.ones(2, 5, 8, 8))
        with bnguard.frozen(net, "restore") if later == "held" else nullcontext():
            net.train(later != "eval")
            net(IMAGES)
    assert sum([update.count for update in record.updates]) == 1 + (later == "again")
    assert all([update.mode.training for update in record.updates])


def test_forward_inside_another_of_its_layer_leaves_that_its_update():
    """A hook that looks at a layer in eval mode, right before it runs in train mode, updates nothing itself."""
    net = net_of(nn.BatchNorm2d(4))

    def look(layer, args):
        if layer.training:
            layer.eval()(*args)
            layer.train()

    net[1].register_forward_pre_hook(look)
    with bnguard.watch(net) as record:
        for _ in range(2):
            run(net)
    assert [(update.count, update.mode.training) for update in record.updates] == [(2, True)]


def test_interruption_loses_none_of_the_updates_that_wait():
    """Ctrl-C while many updates are recorded together: those after the interrupted one are recorded by the next."""
    done = []

    def record(number):
        if number == 1:
            raise KeyboardInterrupt
        done.append(number)

    journal = Journal(threading.RLock())
    journal.entries += [(record, (number,)) for number in range(4)]
    with pytest.raises(KeyboardInterrupt):
        journal.work_up()
    journal.work_up()
    assert done == [0, 2, 3]


def test_measurement_during_a_reading_of_the_series_stays(monkeypatch):
    """A thread that shows the series takes nothing from it."""
    net = net_of(nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    compute = DriftColumns.samples
    threads = [threading.Thread(target=optimizer.step)]

    def compute_while_it_trains(self, steps, copies):
        if not threads[0].ident:
            threads[0].start()
            threads[0].join(0.1)  # it may wait for the end of this
        return compute(self, steps, copies)

    monkeypatch.setattr(DriftColumns, "samples", compute_while_it_trains)
    with bnguard.watch(net, every=1) as record:
        for _ in range(3):
            optimizer.step()
        assert record.series.steps[:3] == (1, 2, 3)
        threads[0].join()
    assert record.series.steps == (1, 2, 3, 4)


def test_start_and_stop():
    """A watch can be started by hand, stopped twice, and started again, which forgets."""
    net = net_of(nn.BatchNorm2d(4))
    record = bnguard.watch(net).start()
    net(IMAGES)
    with pytest.raises(RuntimeError, match="records already"):
        record.start()
    record.stop()
    record.stop()
    net(IMAGES)
    assert only(record.updates).count == 1
    with record:
        run(net)
        run(net)
    assert only(record.updates).count == 2


def test_watches_overlap():
    """Each has its own records; the hook goes with the last."""
    net = net_of(nn.BatchNorm2d(4))
    with bnguard.watch(net) as outer:
        with bnguard.watch() as inner:
            run(net)
        run(net)
    assert (only(outer.updates).count, only(inner.updates).count) == (2, 1)


def test_threads_are_recorded():
    """No update is lost between threads."""
    nets = [net_of(nn.BatchNorm2d(4)) for _ in range(4)]

    def run(net):
        for _ in range(25):
            net(IMAGES)

    with bnguard.watch() as record:
        threads = [threading.Thread(target=run, args=(net,)) for net in nets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [update.count for update in record.updates] == [25] * 4


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([],), {}, TypeError, r"watch\(\) takes a torch\.nn\.Module, or nothing for every model, got list"),
        ((), {"every": 1.5}, TypeError, "every must be a whole number of optimizer steps, or 'auto', got 1.5"),
        ((), {"every": "often"}, ValueError, "every='often': give a number of optimizer steps, or 'auto'"),
        ((), {"every": True}, TypeError, "every must be a whole number"),
        ((), {"every": 0}, ValueError, "every=0: the number of optimizer steps must be positive"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, message):
    """With the offending value, before anything is touched."""
    with pytest.raises(error, match=message):
        bnguard.watch(*arguments, **options)


class OwnLookup(nn.Module):
    """A model that looks up its attributes itself, and fails with another error than torch's for an unknown one."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def __getattr__(self, name):
        for table in (self._parameters, self._buffers, self._modules):
            if name in table:
                return table[name]
        return {"size": 3}[name]

    def forward(self, input):
        return self.norm(input)


@pytest.mark.parametrize("is_given", [True, False])
def test_model_that_looks_up_its_attributes_itself_runs(is_given):
    """It is asked for nothing that it need not have."""
    net, x = OwnLookup(), images()
    with bnguard.watch(*[net] * is_given) as record:
        net(x)
    assert [update.count for update in record.updates] == [1]
    with bnguard.frozen(net, "restore"):
        net(x)


@pytest.mark.parametrize("captures", [True, False])
def test_nothing_is_computed_while_a_cuda_graph_is_captured(monkeypatch, captures):
    """Neither copies for what may be put back, nor comparisons after somebody else has written."""
    computed = []
    for place, name in ((layer_log, "copies_of"), (put_back, "holds"), (layer_log, "is_initial")):
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, original=original: computed.append(original) or original(*args))
    net = net_of(nn.BatchNorm2d(4))
    with bnguard.watch(net), monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.cuda, "is_initialized", lambda: captures)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
        computed.clear()
        for _ in range(3):
            net(IMAGES)
            net[1].running_mean.add_(1)
        assert bool(computed) is not captures


class Odd(nn.Sequential):
    """Equal to everything, and without a hash."""

    def __eq__(self, other):
        return True

    __hash__ = None


@pytest.mark.filterwarnings("ignore:`torch.jit.*is (deprecated|not supported in Python 3.14):DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:FutureWarning")  # from torch 2.14 on
@pytest.mark.parametrize("make", [lambda: Odd(nn.BatchNorm2d(4)), lambda: torch.jit.script(nn.BatchNorm2d(4))])
def test_models_that_are_no_ordinary_objects_are_watched(make):
    """Whatever is done to them works as without a watch, in the user's code."""
    inner = make()
    net = nn.Sequential(nn.Conv2d(3, 4, 1), inner)
    with bnguard.watch() as record:
        inner.load_state_dict(inner.state_dict())
        inner.eval()
        inner.train()
        net(IMAGES).sum().backward()
        inner.eval()
        with torch.no_grad():
            net(IMAGES)
    assert sum(update.count for update in record.updates) == 1


class TrainsItself(nn.Module):
    """A module whose forward is a whole training step."""

    def __init__(self, net, asked):
        super().__init__()
        self.net, self.asked = net, asked
        self.optimizer = torch.optim.SGD(net.parameters(), 0.1)

    def forward(self, x):
        """Forward, backward, step, and a second forward."""
        loss = self.net(x).square().mean()
        self.asked.append("forward")
        loss.backward()
        self.asked.append("backward")
        self.net(x)
        self.optimizer.step()
        self.net(x)


def test_steps_inside_of_a_call_are_told_apart():
    """A model may train in its own forward: updates before and after a step belong to different steps."""
    net = net_of(nn.BatchNorm2d(4))
    with bnguard.watch() as record:
        TrainsItself(net, [])(IMAGES)
    update = only(record.updates)
    assert (update.count, update.first_step, update.last_step) == (3, 0, 1)
    assert record.update_series.counts[:, 0].tolist() == [2, 1]


class PutsBack(nn.Module):
    """A module whose forward puts back what every other forward of its net has moved."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        """Three forwards."""
        self.net(x)
        kept = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        self.net(x)
        for name, buffer in self.net.named_buffers():
            buffer.copy_(kept[name])
        self.net(x)


@pytest.mark.parametrize("grad", [True, False])
def test_statistics_are_put_back_inside_of_a_call(grad):
    """A forward whose statistics are put back is no update, also where all of that is one call."""
    with bnguard.watch() as record, torch.set_grad_enabled(grad):
        PutsBack(net_of(nn.BatchNorm2d(4)))(IMAGES)
    assert only(record.updates).count == 2


class LooksAhead(TrainsItself):
    """A module that trains on a batch twice, and puts back what it has seen of another one in between."""

    def forward(self, x):
        """Three forwards, of which two count."""
        loss = self.net(x).square().mean()
        kept = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        self.net(x + 1)
        for name, buffer in self.net.named_buffers():
            buffer.data = kept[name]
        (loss + self.net(x).square().mean()).backward()
        self.optimizer.step()


def test_update_that_is_put_back_inside_of_a_call_is_not_counted():
    """Two updates a step remain, for the record and for the findings."""
    model = LooksAhead(net_of(nn.BatchNorm2d(4)), [])
    with bnguard.watch() as record:
        for _ in range(4):
            model(IMAGES)
    assert only(record.updates).count == 8
    assert "up to twice" in only([one for one in record.findings if one.code == "BN003"]).what


class MovesBetween(nn.Module):
    """A module whose forward updates between a forward in eval mode and its backward pass."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        """Forward in eval mode, update, backward."""
        loss = self.net.eval()(x).square().mean()
        with torch.no_grad():
            self.net.train()(x)
        loss.backward()


def test_update_before_a_backward_inside_of_a_call_is_found():
    """The backward pass knows the update before it."""
    with bnguard.watch() as record:
        MovesBetween(net_of(nn.BatchNorm2d(4)))(IMAGES)
    assert "BN013" in [finding.code for finding in record.findings]


class Asks(list):
    """Notes how many updates are known at each of some moments."""

    def __init__(self, record):
        super().__init__()
        self.record = record

    def append(self, moment):
        """At this one."""
        super().append((moment, sum(update.count for update in self.record.updates)))


def test_record_is_current_in_the_middle_of_a_call():
    """Who asks inside of a forward is told what has happened so far."""
    net, asked = net_of(nn.BatchNorm2d(4)), None
    with bnguard.watch() as record:
        asked = Asks(record)
        TrainsItself(net, asked)(IMAGES)
    assert asked == [("forward", 1), ("backward", 1)]


def test_updates_before_a_failure_are_recorded():
    """What a model has updated before its forward fails has happened, whatever comes next."""

    def fail(*_):
        raise RuntimeError("on purpose")

    net = net_of(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    handle = net[2].register_forward_pre_hook(fail)
    with bnguard.watch(net) as record:
        with pytest.raises(RuntimeError, match="on purpose"):
            run(net)
        assert [update.names for update in record.updates] == [("1",)]
        handle.remove()
        run(net)
    assert [(update.names, update.count) for update in record.updates] == [(("1",), 2), (("3",), 1)]


class Hides(nn.Module):
    """A module without modules that calls layers of its own."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = layers  # a tuple: not registered

    def forward(self, x):
        """One layer after the other."""
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_behind_a_module_without_modules_have_their_line():
    """A model may call layers through a module that has none registered: the line is that of the outermost call."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Hides(nn.Identity(), layer))
    with bnguard.watch() as record:
        for _ in range(2):
            nn.Sequential(nn.Sequential(nn.Sequential(layer)))(torch.randn(2, 4, 3, 3))
            run(net)
    assert {update.where.rsplit(" ", 1)[-1]: update.count for update in record.updates} == {
        "run": 2,
        "test_layers_behind_a_module_without_modules_have_their_line": 2,
    }


def test_model_of_a_forward_that_failed_is_freed():
    """An update that is known only by half keeps no model alive."""

    def fail(*_):
        raise RuntimeError("on purpose")

    net = net_of(nn.BatchNorm2d(4), nn.ReLU())
    net[2].register_forward_pre_hook(fail)
    layer = weakref.ref(net[1])
    with bnguard.watch() as record:
        with suppress(RuntimeError):
            run(net)
        del net
        gc.collect()
        assert layer() is None
        assert only(record.updates).count == 1
