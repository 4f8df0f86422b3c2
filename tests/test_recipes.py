"""The recipes of the documentation: each runs as it stands, beside a twin in plain PyTorch that is not guarded.

Each test first shows what happens without the guard.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnguard
from tests.asserts import assert_clean, assert_same_bits, assert_same_gradients, state_of, statistics, values
from tests.readme import IMPORTS, PASTED, RECIPES

STEPS = 4


def run_code(code, title):
    """What a block defines."""
    names = {}
    exec(compile(code, f"docs, {title}", "exec"), names)
    return SimpleNamespace(**names)


def recipe(title, *changes):
    """What a recipe defines, after changes in its code, each from an old text to a new one."""
    code = RECIPES[title]
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    return run_code(code, title)


def pasted(name):
    """What the old lines define, and what the new ones do."""
    pair = PASTED[name]
    return run_code(IMPORTS + pair.before, name), run_code(IMPORTS + pair.now, name)


class Tripwire(nn.Module):
    """Lets everything through, or as many batches as are left."""

    left = None

    def forward(self, input):
        if self.left == 0:
            raise ArithmeticError("halfway through")
        if self.left is not None:
            self.left -= 1
        return input


@contextmanager
def failing(model, after=0):
    """Expects that a forward fails halfway through, after as many that do not."""
    model.backbone.wire.left = after
    with pytest.raises(ArithmeticError):
        yield
    model.backbone.wire.left = None


def stage(inputs, outputs, **norm):
    """Convolution, BatchNorm and ReLU."""
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(inputs, outputs, 3, padding=1), bn=nn.BatchNorm2d(outputs, **norm), act=nn.ReLU())
    )


def backbone(**norm):
    """Three stages with a tripwire after the first; takes ``images()``, gives 64 features."""
    layers = {"stem": stage(2, 4, **norm), "wire": Tripwire(), "layer1": stage(4, 4, **norm)}
    layers |= {"layer2": stage(4, 4, **norm), "pool": nn.AvgPool2d(2), "flat": nn.Flatten()}
    return pretrained(nn.Sequential(OrderedDict(layers)))


def head(outputs=4):
    """Dropout and a linear layer; takes what ``backbone()`` gives."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Dropout(0.2), nn.Linear(64, outputs))


def classifier(**norm):
    """A backbone with a head; takes ``images()``, gives scores of four classes."""
    return nn.Sequential(OrderedDict(backbone=backbone(**norm), head=head()))


def pretrained(net):
    """``net`` with parameters of one seed, and statistics as after some training."""
    torch.manual_seed(0)
    for layer in net.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    for seed in range(3):
        net.train()(images(100 + seed))
    return net


def images(seed, number=8):
    """A batch of images."""
    return torch.randn(number, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def loader(steps=STEPS, number=8):
    """Batches of images and labels."""
    return [(images(seed, number), torch.arange(seed, seed + number) % 4) for seed in range(steps)]


def optimizer_of(*nets):
    """An optimizer with everything that moves what should stay: momentum and weight decay."""
    parameters = [p for net in nets for p in net.parameters()]
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def norms_of(net):
    """The BatchNorm layers."""
    return [layer for layer in net.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def counts(net):
    """The counters of the BatchNorm layers, as one number if they agree."""
    found = {layer.num_batches_tracked.item() for layer in norms_of(net)}
    return found.pop() if len(found) == 1 else found


def averages(net):
    """The running means and variances."""
    return {name: tensor for name, tensor in statistics(net).items() if "num_batches" not in name}


def moved(before, after):
    """The names of what differs."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def put_back(tensors, saved):
    """Writes the saved values, by hand."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])


def assert_twins(net, twin):
    """Parameters, buffers and gradients have the same bits; nothing of bnguard is left, and nothing has gone wrong."""
    assert_same_bits(net.state_dict(), twin.state_dict())
    assert_same_gradients(net, twin)
    assert all(torch.isfinite(tensor).all() for tensor in net.state_dict().values())
    assert_clean(net)


def seeded(run):
    """Runs something from one state of the random number generator, so that twins draw the same."""
    torch.manual_seed(5)
    return run()


# Detection.


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = backbone()
        self.head = head()

    def forward(self, input):
        return self.head(self.backbone(input))


def boxes():
    """Batches of two images, with the boxes that are in them."""
    generator = torch.Generator().manual_seed(3)
    return [(batch, torch.rand(2, 4, generator=generator)) for batch, _ in loader(number=2)]


def fine_tune_by_hand(detector, frozen):
    """Fine-tuning in plain PyTorch, with layers that are put into eval mode after each ``train()``."""
    optimizer = optimizer_of(detector)
    for batch, targets in boxes():
        detector.train()
        for layer in frozen:
            layer.eval()
        optimizer.zero_grad()
        F.smooth_l1_loss(detector(batch), targets).backward()
        optimizer.step()


@pytest.mark.parametrize("held", ["stages", "affine"])
def test_detection_holds_the_first_stages_and_no_other(held):
    """Equal to eval mode by hand: the first stages stay, with frozen parameters or ``affine=True``, the third moves."""
    changes = [
        ("use_running_stats=True", "use_running_stats=True, affine=True"),
        ("detector.get_submodule(stage).requires_grad_(False)", "pass"),
    ]
    fine_tune = recipe("Detection", *changes if held == "affine" else ()).fine_tune
    detector, twin, unguarded = Detector(), Detector(), Detector()
    before = state_of(detector)
    for net in (twin, unguarded):
        for stage in (net.backbone.stem, net.backbone.layer1):
            (stage if held == "stages" else stage.bn).requires_grad_(False)

    seeded(lambda: fine_tune_by_hand(unguarded, []))
    assert {f"backbone.{stage}.bn.running_mean" for stage in ("stem", "layer1", "layer2")} <= moved(
        before, state_of(unguarded)
    )

    seeded(lambda: fine_tune(detector, optimizer_of(detector), boxes()))
    seeded(lambda: fine_tune_by_hand(twin, norms_of(twin.backbone.stem) + norms_of(twin.backbone.layer1)))
    assert_twins(detector, twin)
    changed = moved(before, state_of(detector))
    assert {"backbone.layer2.bn.running_mean", "backbone.layer2.conv.weight", "head.1.weight"} <= changed
    assert not [name for name in changed if ("stem" in name or "layer1" in name) and (held == "stages" or "bn" in name)]


# Transfer learning.


def train_head_by_hand(backbone, head, layers, restored):
    """A new head in plain PyTorch: ``layers`` in eval mode, the buffers ``restored`` put back after each step."""
    optimizer = optimizer_of(head)
    saved = values(restored)
    for batch, labels in loader():
        backbone.train()
        head.train()
        for layer in layers:
            layer.eval()
        optimizer.zero_grad()
        F.cross_entropy(head(backbone(batch)), labels).backward()
        optimizer.step()
        put_back(restored, saved)


@pytest.mark.parametrize("mode", [{"use_running_stats": True}, {"on_change": "restore"}], ids=["running", "restore"])
def test_transfer_learning_leaves_the_backbone_what_it_was(mode):
    """Equal to eval mode by hand, or to statistics put back by hand; the backbone stays, the head learns."""
    nets, twins, unguarded = (backbone(), head()), (backbone(), head()), (backbone(), head())
    before = state_of(nets[0])

    unguarded[0].requires_grad_(False)
    seeded(lambda: train_head_by_hand(*unguarded, [], {}))
    assert moved(before, state_of(unguarded[0])) == set(statistics(unguarded[0]))

    twins[0].requires_grad_(False)
    by_hand = (norms_of(twins[0]), {}) if "use_running_stats" in mode else ([], statistics(twins[0]))
    seeded(lambda: train_head_by_hand(*twins, *by_hand))
    seeded(lambda: recipe("Transfer learning").train_head(*nets, optimizer_of(nets[1]), loader(), **mode))
    assert_twins(nets[0], twins[0])
    assert_twins(nets[1], twins[1])
    assert_same_bits(state_of(nets[0]), before)
    assert moved(state_of(head()), state_of(nets[1]))


# GAN.


def generator():
    """Images from noise."""
    torch.manual_seed(2)
    return nn.Sequential(nn.ConvTranspose2d(4, 4, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 5))


def gan_step_by_hand(generator, discriminator, of_generator, of_discriminator, real, noise, restored):
    """The two steps of a GAN; the buffers ``restored`` are put back after the generator's."""
    fake = generator(noise)
    of_discriminator.zero_grad()
    scores = discriminator(torch.cat([real, fake.detach()]))
    (F.softplus(-scores[: len(real)]) + F.softplus(scores[len(real) :])).mean().backward()
    of_discriminator.step()
    saved = values(restored)
    of_generator.zero_grad()
    F.softplus(-discriminator(fake)).mean().backward()
    of_generator.step()
    put_back(restored, saved)


def test_gan_keeps_the_discriminators_statistics_in_the_generators_step():
    """Gradients and parameters are those without a guard; the statistics those that were put back by hand."""

    def train(step, restored=lambda discriminator: ()):
        nets = generator(), nn.Sequential(backbone(), head(1))
        optimizers = [optimizer_of(net) for net in nets]
        for seed in range(STEPS):
            noise = torch.randn(8, 4, 1, 1, generator=torch.Generator().manual_seed(seed))
            step(*nets, *optimizers, images(seed), noise, *restored(nets[1]))
        return nets

    unguarded = seeded(lambda: train(gan_step_by_hand, lambda discriminator: [{}]))
    twins = seeded(lambda: train(gan_step_by_hand, lambda discriminator: [statistics(discriminator)]))
    nets = seeded(lambda: train(recipe("GANs").train_step))
    assert counts(unguarded[1]) == 3 + 2 * STEPS
    assert counts(nets[1]) == 3 + STEPS
    for net, twin, other in zip(nets, twins, unguarded, strict=True):
        assert_twins(net, twin)
        assert_same_bits(dict(net.named_parameters()), dict(other.named_parameters()))
        assert_same_gradients(net, other)
    assert moved(averages(nets[1]), averages(unguarded[1])) == set(averages(nets[1]))


# A teacher.


@pytest.mark.parametrize("mode", ["restore", "running"])
def test_teachers_statistics_are_an_average_of_the_students(mode):
    """Equal to a teacher of whom a copy runs: its own forwards leave nothing, in either mode."""
    changes = [('"restore"', "use_running_stats=True")] if mode == "running" else []
    guarded_step = recipe("Teachers", *changes).train_step

    def step_by_hand(student, teacher, optimizer, view, other_view, rate=0.01, copies=True):
        runs = copy.deepcopy(teacher) if copies else teacher
        for layer in norms_of(runs):
            layer.train(mode == "restore")
        with torch.no_grad():
            targets = runs(other_view)
        optimizer.zero_grad()
        F.mse_loss(student(view), targets).backward()
        optimizer.step()
        for average, learned in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
            average.copy_(average.lerp(learned, rate) if average.is_floating_point() else learned)

    def train(step, **options):
        student = classifier()
        teacher = copy.deepcopy(student).requires_grad_(False)
        optimizer = optimizer_of(student)
        for seed in range(STEPS):
            student.train()
            teacher.train()
            step(student, teacher, optimizer, images(seed), images(seed).flip(3), **options)
        return student, teacher

    nets, twins = seeded(lambda: train(guarded_step)), seeded(lambda: train(step_by_hand))
    if mode == "restore":
        _, drifted = seeded(lambda: train(step_by_hand, copies=False))
        assert moved(averages(nets[1]), averages(drifted)) == set(averages(drifted))
    for net, twin in zip(nets, twins, strict=True):
        assert_twins(net, twin)
    assert counts(nets[1]) == 3 + STEPS
    assert all(layer.training for net in nets for layer in net.modules())


# SAM, and what is pasted for it.


def sam_by_hand(model, optimizer, batch, labels, second_pass, rho=0.05):
    """Sharpness-aware minimisation in plain PyTorch."""
    optimizer.zero_grad()
    F.cross_entropy(model(batch), labels).backward()
    parameters = list(model.parameters())
    weights = [p.detach().clone() for p in parameters]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    for p in parameters:
        p.data += p.grad * (rho / norm)
    optimizer.zero_grad()
    second_pass(model, batch, labels)
    for p, weight in zip(parameters, weights, strict=True):
        p.data = weight
    optimizer.step()


def plain_pass(model, batch, labels):
    """A second pass without any care."""
    F.cross_entropy(model(batch), labels).backward()


def train_with_sam(step, *options, **norm):
    """A few steps; returns the model."""
    model = classifier(**norm)
    optimizer = optimizer_of(model)
    for batch, labels in loader():
        step(model, optimizer, batch, labels, *options)
    return model


def test_sam_equals_bypass_bn_but_counts_each_step_once():
    """Parameters, gradients, means and variances are those of ``bypass_bn``; its counter counts both forwards."""
    before, now = pasted("bypass_bn")
    unguarded = seeded(lambda: train_with_sam(sam_by_hand, plain_pass))
    twin = seeded(lambda: train_with_sam(sam_by_hand, before.second_pass))
    assert moved(averages(twin), averages(unguarded)) == set(averages(twin))
    assert counts(twin) == 3 + 2 * STEPS
    for options in ((recipe("SAM").sam_step,), (sam_by_hand, now.second_pass)):
        model = seeded(lambda options=options: train_with_sam(*options))
        assert counts(model) == 3 + STEPS
        assert_same_bits(averages(model), averages(twin))
        assert_same_bits(dict(model.named_parameters()), dict(twin.named_parameters()))
        assert_same_gradients(model, twin)
        assert_clean(model)


def test_bypass_bn_falsifies_cumulative_averages():
    """With ``momentum=None`` the counter of ``bypass_bn`` makes later updates too small; here nothing is counted."""
    before, now = pasted("bypass_bn")

    def put_back_by_hand(model, batch, labels):
        saved = values(statistics(model))
        plain_pass(model, batch, labels)
        put_back(statistics(model), saved)

    twin = seeded(lambda: train_with_sam(sam_by_hand, put_back_by_hand, momentum=None))
    falsified = seeded(lambda: train_with_sam(sam_by_hand, before.second_pass, momentum=None))
    model = seeded(lambda: train_with_sam(sam_by_hand, now.second_pass, momentum=None))
    assert moved(averages(twin), averages(falsified)) == set(averages(twin))
    assert_twins(model, twin)


def test_bypass_bn_lets_nan_in():
    """0 times NaN is NaN; a held layer takes nothing."""
    before, now = pasted("bypass_bn")
    broken = images(0)
    broken[0, 0, 0, 0] = float("nan")
    one, other = classifier(), classifier()
    before.second_pass(one, broken, torch.arange(8) % 4)
    assert any(tensor.isnan().any() for tensor in statistics(one).values())
    saved = state_of(other)
    now.second_pass(other, broken, torch.arange(8) % 4)
    assert_same_bits(state_of(other), saved)


def test_bypass_bn_is_not_undone_on_an_error():
    """The momentum stays 0, for good after the next step; a held model is what it was."""
    before, now = pasted("bypass_bn")
    one, other = classifier(), classifier()
    saved = state_of(other)
    for model, second_pass in ((one, before.second_pass), (other, now.second_pass)):
        with failing(model):
            second_pass(model, *loader()[0])
    assert {layer.momentum for layer in norms_of(one)} == {0}
    assert moved(saved, state_of(one)) == {"backbone.stem.bn.num_batches_tracked"}
    before.second_pass(one, *loader()[0])  # disables again what is disabled
    assert {layer.momentum for layer in norms_of(one)} == {0}
    assert {layer.momentum for layer in norms_of(other)} == {0.1}
    assert_same_bits(state_of(other), saved)
    assert_clean(other)


def test_sam_that_fails_has_the_statistics_of_its_first_forward():
    """An error in the second forward leaves what the first has learned; with ``bypass_bn`` nothing is learned again."""
    before, _ = pasted("bypass_bn")
    model, twin, old = classifier(), classifier(), classifier()
    with failing(old, after=1):
        sam_by_hand(old, optimizer_of(old), *loader()[0], before.second_pass)
    assert {layer.momentum for layer in norms_of(old)} == {0}

    twin(images(0))
    with failing(model, after=1):
        recipe("SAM").sam_step(model, optimizer_of(model), *loader()[0])
    assert {layer.momentum for layer in norms_of(model)} == {0.1}
    assert_same_bits(statistics(model), statistics(twin))
    assert_clean(model)


# VAT, and what is pasted for it.


def vat_by_hand(model, batch, forward, xi=0.1, eps=1.0):
    """Virtual adversarial training in plain PyTorch: ``forward`` runs the perturbed forwards."""

    def unit(tensor):
        return F.normalize(tensor.flatten(1)).view_as(tensor)

    with torch.no_grad():
        targets = model(batch).softmax(1)
    direction = (xi * unit(torch.randn_like(batch))).requires_grad_()
    distance = F.kl_div(forward(model, batch + direction).log_softmax(1), targets, reduction="batchmean")
    (slope,) = torch.autograd.grad(distance, direction)
    return F.kl_div(forward(model, batch + eps * unit(slope)).log_softmax(1), targets, reduction="batchmean")


def train_with_vat(loss_of):
    """A few steps; returns the losses and the model."""
    model = classifier()
    optimizer = optimizer_of(model)
    losses = []
    for batch, labels in loader():
        loss = F.cross_entropy(model(batch), labels) + loss_of(model, batch * 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return losses, model


def test_vat_equals_disable_tracking_bn_stats():
    """Losses, gradients and everything in the model are those of ``_disable_tracking_bn_stats``."""
    before, now = pasted("_disable_tracking_bn_stats")
    _, unguarded = seeded(lambda: train_with_vat(lambda *batch: vat_by_hand(*batch, nn.Module.__call__)))
    expected, twin = seeded(lambda: train_with_vat(lambda *batch: vat_by_hand(*batch, before.forward_perturbed)))
    assert counts(unguarded) == 3 + 4 * STEPS
    assert counts(twin) == 3 + 2 * STEPS
    for loss_of in (recipe("VAT").vat_loss, lambda *batch: vat_by_hand(*batch, now.forward_perturbed)):
        losses, model = seeded(lambda loss_of=loss_of: train_with_vat(loss_of))
        assert_same_bits(losses, expected)
        assert_twins(model, twin)


def test_disable_tracking_bn_stats_is_not_undone_on_an_error():
    """The flag stays flipped, and nothing is learned from then on; a held model is what it was, and learns."""
    before, now = pasted("_disable_tracking_bn_stats")
    one, other = classifier(), classifier()
    for model, forward in ((one, before.forward_perturbed), (other, now.forward_perturbed)):
        saved = state_of(model)
        with failing(model):
            forward(model, images(0))
        assert_same_bits(state_of(model), saved)
        model(images(1))
    assert not any(layer.track_running_stats for layer in norms_of(one))
    assert counts(one) == 3
    assert all(layer.track_running_stats for layer in norms_of(other))
    assert counts(other) == 4
    assert_clean(other)


@pytest.mark.parametrize("after", [1, 2])
def test_vat_that_fails_has_the_statistics_of_its_clean_forward(after):
    """An error in either of the perturbed forwards leaves what the clean one has learned, and no flag off."""
    before, _ = pasted("_disable_tracking_bn_stats")
    model, twin, old = classifier(), classifier(), classifier()
    with failing(old, after):
        vat_by_hand(old, images(0), before.forward_perturbed)
    assert not any(layer.track_running_stats for layer in norms_of(old))

    twin(images(0))
    with failing(model, after):
        recipe("VAT").vat_loss(model, images(0))
    assert all(layer.track_running_stats for layer in norms_of(model))
    assert_same_bits(state_of(model), state_of(twin))
    assert_clean(model)


def test_disable_tracking_bn_stats_misses_layers():
    """A layer in two containers, and InstanceNorm, update; held ones do not."""
    before, now = pasted("_disable_tracking_bn_stats")
    shared = nn.BatchNorm2d(2)
    twice = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    for net in (twice, nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True))):
        twin, saved = copy.deepcopy(net), state_of(net)
        expected = before.forward_perturbed(twin, images(0))
        assert moved(saved, state_of(twin))
        assert_same_bits(now.forward_perturbed(net, images(0)), expected)
        assert_same_bits(state_of(net), saved)


# Semi-supervised learning, and what is pasted for it.


def fixmatch_by_hand(model, optimizer, batch, labels, weak, strong, freeze, unfreeze, threshold=0.95):
    """FixMatch in plain PyTorch: ``freeze`` and ``unfreeze`` run around the unlabelled forwards."""
    supervised = F.cross_entropy(model(batch), labels)
    freeze(model)
    with torch.no_grad():
        probabilities = model(weak).softmax(1)
    scores = model(strong)
    unfreeze(model)
    confidence, guesses = probabilities.max(1)
    unsupervised = (F.cross_entropy(scores, guesses, reduction="none") * (confidence > threshold)).mean()
    loss = supervised + unsupervised
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def train_with_fixmatch(step, *options):
    """A few steps; returns the losses and the model. The threshold lets some guesses pass."""
    model = classifier()
    optimizer = optimizer_of(model)
    losses = []
    for seed, (batch, labels) in enumerate(loader()):
        weak = images(50 + seed) * 3
        losses.append(step(model, optimizer, batch, labels, weak, weak.flip(3), *options, threshold=0.4))
    return losses, model


def test_semi_supervised_equals_bn_controller():
    """Losses, gradients and everything in the model are those of ``Bn_Controller``."""
    before, now = pasted("Bn_Controller")
    controller = before.Bn_Controller()
    _, unguarded = seeded(lambda: train_with_fixmatch(fixmatch_by_hand, id, id))
    expected, twin = seeded(lambda: train_with_fixmatch(fixmatch_by_hand, controller.freeze_bn, controller.unfreeze_bn))
    assert counts(unguarded) == 3 + 3 * STEPS
    assert counts(twin) == 3 + STEPS
    losses, model = seeded(lambda: train_with_fixmatch(recipe("Semi-supervised").train_step))
    assert_same_bits(losses, expected)
    assert_twins(model, twin)

    one, other = classifier(), classifier()
    for seed in range(STEPS):
        scores = seeded(lambda seed=seed: before.forward_unlabelled(one, images(seed)))
        assert_same_bits(seeded(lambda seed=seed: now.forward_unlabelled(other, images(seed))), scores)
    scores.sum().backward()
    seeded(lambda: now.forward_unlabelled(other, images(STEPS - 1))).sum().backward()
    assert_twins(other, one)


def test_bn_controller_is_not_undone_on_an_error():
    """The statistics stay moved, and the next step fails; a held model is what it was, and goes on."""
    before, now = pasted("Bn_Controller")
    one, other = classifier(), classifier()
    saved = state_of(one)
    for model, forward in ((one, before.forward_unlabelled), (other, now.forward_unlabelled)):
        with failing(model):
            forward(model, images(0))
    assert moved(saved, state_of(one)) == {name for name in statistics(one) if "stem" in name}
    with pytest.raises(AssertionError):
        before.forward_unlabelled(one, images(0))
    assert_same_bits(state_of(other), saved)
    now.forward_unlabelled(other, images(0))
    assert_same_bits(state_of(other), saved)
    assert_clean(other)


@pytest.mark.parametrize("after", [1, 2])
def test_semi_supervised_step_that_fails_has_the_statistics_of_the_labelled_images(after):
    """An error in either of the unlabelled forwards leaves what the labelled one has learned, and nothing else."""
    before, _ = pasted("Bn_Controller")
    model, twin, old = classifier(), classifier(), classifier()
    twin(images(0))
    batches = *loader()[0], images(1), images(2)
    controller = before.Bn_Controller()
    with failing(old, after):
        fixmatch_by_hand(old, optimizer_of(old), *batches, controller.freeze_bn, controller.unfreeze_bn)
    assert moved(statistics(old), statistics(twin)) >= {name for name in statistics(old) if "stem" in name}

    with failing(model, after):
        recipe("Semi-supervised").train_step(model, optimizer_of(model), *batches)
    assert_same_bits(state_of(model), state_of(twin))
    assert_clean(model)


def test_bn_controller_knows_two_classes():
    """BatchNorm1d and InstanceNorm move; held ones do not."""
    before, now = pasted("Bn_Controller")
    net = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten(), nn.BatchNorm1d(128))
    saved = state_of(net)
    now.forward_unlabelled(net, images(0))
    assert_same_bits(state_of(net), saved)
    before.forward_unlabelled(net, images(0))
    assert moved(saved, state_of(net)) == {*averages(net), "2.num_batches_tracked"}


# Triplets.


def train_with_triplets(step):
    """A few steps; returns the embedding."""
    embed = backbone()
    optimizer = optimizer_of(embed)
    for seed in range(STEPS):
        step(embed, optimizer, images(seed), images(seed) + 0.1, images(seed + 50))
    return embed


def triplet_step_by_hand(forwards):
    """A step in plain PyTorch; ``forwards`` gives the three embeddings, and what to put back after backward."""

    def step(embed, optimizer, *triplet):
        optimizer.zero_grad()
        embeddings, saved = forwards(embed, triplet)
        F.triplet_margin_loss(*embeddings).backward()
        put_back(statistics(embed) if saved else {}, saved)
        optimizer.step()

    return step


def test_triplets_in_one_forward_update_once():
    """Under ``updates=1`` a second forward is an error; one forward of all is what it is without a guard."""
    one = "embed(torch.cat([anchors, positives, negatives])).chunk(3)"
    three = "(embed(batch) for batch in (anchors, positives, negatives))"
    unguarded = train_with_triplets(
        triplet_step_by_hand(lambda embed, triplet: ([embed(batch) for batch in triplet], {}))
    )
    assert counts(unguarded) == 3 + 3 * STEPS
    with pytest.raises(bnguard.StatsChangedError, match=r"stem\.bn \(BatchNorm2d\) has updated once"):
        train_with_triplets(recipe("Triplet loss", (one, three)).train_step)

    twin = train_with_triplets(
        triplet_step_by_hand(lambda embed, triplet: (embed(torch.cat(triplet)).tensor_split(3), {}))
    )
    embed = train_with_triplets(recipe("Triplet loss").train_step)
    assert counts(embed) == 3 + STEPS
    assert_twins(embed, twin)


def test_triplets_one_by_one_learn_the_anchors():
    """With ``"restore"`` as well the statistics are those of a twin that saw only the anchors."""

    def forwards(embed, triplet):
        first = embed(triplet[0])
        saved = values(statistics(embed))
        return [first, *map(embed, triplet[1:])], saved

    embed = train_with_triplets(recipe("Triplet loss").train_step_one_by_one)
    assert counts(embed) == 3 + STEPS
    assert_twins(embed, train_with_triplets(triplet_step_by_hand(forwards)))


# At test time.


def without_statistics(model):
    """A model in eval mode whose BatchNorms have no statistics, and so normalise with each batch."""
    model.eval()
    for layer in norms_of(model):
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return model


def test_prediction_with_the_batch_keeps_the_statistics():
    """Equal to layers that have no statistics; train mode alone gives that, too, and learns the test set."""
    model, twin, unguarded = classifier(), without_statistics(classifier()), classifier().eval()
    saved = state_of(model)
    with torch.no_grad():
        assert not torch.equal(unguarded(images(0)), twin(images(0)))
        for layer in norms_of(unguarded):
            layer.train()
        assert_same_bits(unguarded(images(0)), twin(images(0)))
        assert moved(saved, state_of(unguarded)) == set(statistics(unguarded))

        for seed in range(STEPS):
            assert_same_bits(recipe("Test-time adaptation").predict(model, images(seed)), twin(images(seed)))
    assert_same_bits(state_of(model), saved)
    assert not any(layer.training for layer in model.modules())
    assert_clean(model)


def test_adaptation_learns_weight_and_bias_alone():
    """Equal to Tent by hand on layers that have no statistics; here they are still there afterwards."""
    model, twin = classifier(), without_statistics(classifier())
    saved = state_of(model)
    recipes = recipe("Test-time adaptation")
    optimizers = [optimizer_of(*norms_of(net)) for net in (model, twin)]
    for seed in range(STEPS):
        scores = twin(images(seed))
        optimizers[1].zero_grad()
        torch.distributions.Categorical(logits=scores).entropy().mean().backward()
        optimizers[1].step()
        assert_same_bits(recipes.adapt(model, optimizers[0], images(seed)), scores)
    changed = {f"backbone.{name}.bn.{kind}" for name in ("stem", "layer1", "layer2") for kind in ("weight", "bias")}
    assert moved(saved, state_of(model)) == changed
    assert_same_bits(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert_clean(model)


@pytest.mark.parametrize("function", ["predict", "adapt"])
def test_failed_prediction_leaves_the_model_as_it_was(function):
    """Modes and statistics, too, where the forward fails halfway."""
    model, unguarded = classifier().eval(), classifier()
    saved = state_of(model)
    with failing(unguarded):
        unguarded(images(0))
    assert moved(saved, state_of(unguarded)) == {name for name in statistics(model) if "stem" in name}

    arguments = {"predict": (), "adapt": (optimizer_of(*norms_of(model)),)}[function]
    with failing(model):
        getattr(recipe("Test-time adaptation"), function)(model, *arguments, images(0))
    assert_same_bits(state_of(model), saved)
    assert not any(layer.training for layer in model.modules())
    assert_clean(model)


# Federated learning.


def test_clients_send_the_statistics_that_they_were_sent():
    """Equal to clients that overwrite their statistics before they send; else each sends those of its own images."""

    def train_by_hand(state, batches):
        model = classifier()
        model.load_state_dict(state)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model.train()
        for batch, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()
        return state_of(model)

    recipes = recipe("Federated learning")
    server, twin = classifier(), classifier()
    saved = state_of(server)
    sent = [[(batch.roll(shift, 0).pow(shift), labels) for batch, labels in loader()] for shift in (1, 2, 3)]
    names = set(statistics(server))
    for _ in range(2):
        states = seeded(lambda: [recipes.train_client(classifier(), state_of(server), batches) for batches in sent])
        drifted = seeded(lambda: [train_by_hand(state_of(twin), batches) for batches in sent])
        assert names <= moved(saved, drifted[0])
        assert moved(drifted[0], drifted[1]) >= set(averages(server))
        for state, twins in zip(states, drifted, strict=True):
            assert_same_bits(state, twins | {name: saved[name] for name in names})
        recipes.aggregate(server, states)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(torch.stack([state[name] for state in drifted]).mean(0))
    assert_same_bits(server.state_dict(), twin.state_dict())
    assert_same_bits({name: server.state_dict()[name] for name in names}, {name: saved[name] for name in names})
    assert moved(saved, state_of(server)) == {name for name, _ in server.named_parameters()}


# Checkpointing.


def test_checkpointed_step_equals_the_plain_one():
    """Bit for bit the net without checkpointing, by stage or around a whole net; plain checkpointing updates twice."""

    def step_by_hand(stages, head, optimizer, batch, labels, run=lambda stage, input: stage(input)):
        optimizer.zero_grad()
        for stage in stages:
            batch = run(stage, batch)
        F.cross_entropy(head(batch), labels).backward()
        optimizer.step()

    def checkpointed(stage, input):
        return checkpoint(stage, input, use_reentrant=False)

    def train(step, **options):
        model = classifier()
        optimizer = optimizer_of(model)
        for batch, labels in loader():
            step(list(model.backbone), model.head, optimizer, batch, labels, **options)
        return model

    def train_whole(step, **options):
        with bnguard.recompute_frozen(whole := classifier()):
            optimizer = optimizer_of(whole)
            for batch, labels in loader():
                step(list(whole.backbone), whole.head, optimizer, batch, labels, **options)
        return whole

    assert counts(seeded(lambda: train(step_by_hand, run=checkpointed))) == 3 + 2 * STEPS
    twin = seeded(lambda: train(step_by_hand))
    assert counts(twin) == 3 + STEPS
    assert_twins(seeded(lambda: train(recipe("Gradient checkpointing").train_step)), twin)
    assert_twins(seeded(lambda: train_whole(step_by_hand, run=checkpointed)), twin)


# Eval mode by hand.


def epoch(net, callback=lambda net: None):
    """An epoch of plain training; ``callback`` runs after the first step."""
    optimizer = optimizer_of(net)
    for number, (batch, labels) in enumerate(loader()):
        optimizer.zero_grad()
        F.cross_entropy(net(batch), labels).backward()
        optimizer.step()
        if number == 0:
            callback(net)


def validate(net):
    """A validation in the middle of an epoch, as trainers have it."""
    net.eval()
    with torch.no_grad():
        net(images(77))
    net.train()


def fit_unguarded(net, train_epoch, epochs):
    """Training without any care."""
    for _ in range(epochs):
        net.train()
        train_epoch(net)


def test_set_bn_eval_is_undone_by_the_next_train():
    """As long as nobody else calls ``train()`` the results are the same; after that only the guard holds."""
    before, now = pasted("set_bn_eval")
    model, twin, unguarded = classifier(), classifier(), classifier()
    saved = values(statistics(model))
    seeded(lambda: fit_unguarded(unguarded, epoch, 2))
    assert moved(saved, statistics(unguarded)) == set(saved)
    seeded(lambda: before.fit(twin, epoch, 2))
    seeded(lambda: now.fit(model, epoch, 2))
    assert_twins(model, twin)
    assert_same_bits(statistics(model), saved)

    before.fit(twin, lambda net: epoch(net, validate), 2)
    assert moved(saved, statistics(twin)) == set(saved)
    now.fit(model, lambda net: epoch(net, validate), 2)
    assert_same_bits(statistics(model), saved)
    assert_clean(model)


def test_set_bn_eval_goes_by_the_name_of_a_class():
    """Layers that are called otherwise move on; held ones do not."""
    before, now = pasted("set_bn_eval")

    class Norm(nn.BatchNorm2d):
        """BatchNorm by another name."""

    for norm in (Norm(2), nn.InstanceNorm2d(2, track_running_stats=True)):
        net = nn.Sequential(norm, nn.Flatten(), nn.Linear(128, 4))
        twin, saved = copy.deepcopy(net), values(statistics(net))
        before.fit(twin, epoch, 1)
        assert moved(saved, statistics(twin)) >= {"0.running_mean", "0.running_var"}
        now.fit(net, epoch, 1)
        assert_same_bits(statistics(net), saved)


def test_train_override_is_passed_by():
    """The same results, until a submodule is told to train, or the class is another; then only the guard holds."""
    before, now = pasted("train()")
    model, twin, unguarded = classifier(), classifier(), classifier()
    twin.backbone = before.Backbone(OrderedDict(twin.backbone.named_children()))
    saved = values(statistics(model))
    seeded(lambda: before.fit(unguarded, epoch, 2))  # a backbone of another class
    assert moved(saved, statistics(unguarded)) == set(saved)
    seeded(lambda: before.fit(twin, lambda net: epoch(net, validate), 2))
    seeded(lambda: now.fit(model, lambda net: epoch(net, validate), 2))
    assert_twins(model, twin)
    assert_same_bits(statistics(model), saved)

    def unfreeze(net):
        net.backbone.layer2.train()

    before.fit(twin, lambda net: epoch(net, unfreeze), 2)
    assert moved(saved, statistics(twin)) == {name for name in saved if "layer2" in name}
    now.fit(model, lambda net: epoch(net, unfreeze), 2)
    assert_same_bits(statistics(model), saved)


# All of them.


def test_pairs_define_the_same_function():
    """What replaces pasted lines is called as they were, and is shorter by one line of bnguard's or more."""
    assert len(PASTED) == 5
    for pair in PASTED.values():
        (function,) = re.findall(r"^def (\w+)\(", pair.now, re.MULTILINE)
        assert f"\ndef {function}(" in pair.before
        assert "bnguard" not in pair.before
        assert pair.now.count("bnguard") == 1
        assert pair.now.count("\n") < pair.before.count("\n")


def steps_of(title):
    """Sets a recipe up; returns what runs a few steps of it."""
    recipes = recipe(title)
    net, bare, other = classifier(), backbone(), nn.Sequential(backbone(), head(1))
    detector, teacher, making = Detector(), copy.deepcopy(net).requires_grad_(False), generator()
    optimizer = optimizer_of(net)
    batches = loader()

    def noise():
        return torch.randn(8, 4, 1, 1)

    def step_with_vat():
        optimizer.zero_grad()
        recipes.vat_loss(net, images(0)).backward()
        optimizer.step()

    of_bare, of_norms = optimizer_of(bare), optimizer_of(*norms_of(net))
    of_making, of_other = optimizer_of(making), optimizer_of(other)
    triplet = images(0), images(1), images(2)
    runs = {
        "Detection": lambda: recipes.fine_tune(detector, optimizer_of(detector), boxes()),
        "Transfer learning": lambda: recipes.train_head(bare, net.head, optimizer, batches, on_change="restore"),
        "GANs": lambda: recipes.train_step(making, other, of_making, of_other, images(0), noise()),
        "Teachers": lambda: recipes.train_step(net, teacher, optimizer, images(0), images(1)),
        "SAM": lambda: recipes.sam_step(net, optimizer, *batches[0]),
        "VAT": step_with_vat,
        "Semi-supervised": lambda: recipes.train_step(net, optimizer, *batches[0], images(1), images(2)),
        "Triplet loss": lambda: recipes.train_step_one_by_one(bare, of_bare, *triplet),
        "Test-time adaptation": lambda: recipes.adapt(net, of_norms, images(0)),
        "Federated learning": lambda: recipes.train_client(net, state_of(net), batches),
        "Gradient checkpointing": lambda: recipes.train_step(list(net.backbone), net.head, optimizer, *batches[0]),
    }
    return lambda: [runs[title]() for _ in range(STEPS)]


@pytest.mark.parametrize("title", RECIPES)
def test_watch_finds_nothing_in_a_recipe(title):
    """What the recipes advise, ``watch`` does not object to."""
    run = steps_of(title)
    with bnguard.watch() as record:
        run()
    assert record.findings == ()


def test_every_recipe_is_run():
    """No recipe and no pasted snippet without a test."""
    source = Path(__file__).read_text(encoding="utf-8")
    assert len(RECIPES) == 11
    assert set(RECIPES) == set(re.findall(r'\brecipe\("(.+?)"', source))
    assert set(PASTED) == set(re.findall(r'\bpasted\("(.+?)"', source))
