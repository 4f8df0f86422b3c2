"""Findings BN001 to BN014 as a watch sees them: what people do, and the correct way that must stay silent."""

import contextlib
import copy
import inspect
import os
import subprocess
import sys
import sysconfig
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnguard
from bnguard.findings.codes import CODES, FindingSpec
from bnguard.findings.rule import Evidence, Rule
from bnguard.findings.rules import RULES
from tests.asserts import assert_same_bits

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 4


def classifier(**norm):
    """Two convolutions with BatchNorm, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, **norm),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, **norm),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def sgd(*nets, **options):
    """An optimizer of everything that some nets have."""
    return torch.optim.SGD([p for net in nets for p in net.parameters()], lr=0.01, **options)


def train(net, optimizer, images=IMAGES, labels=LABELS, steps=3):
    """Plain training."""
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


def line_in(function, text):
    """The user's line of a function that contains a text, as messages print it."""
    lines, first = inspect.getsourcelines(function)
    number = first + next(number for number, line in enumerate(lines) if text in line)
    return f"tests/findings/test_rules.py:{number} in {function.__name__}"


def found(run, model=None):
    """The findings of a run, by code."""
    with bnguard.watch(model) as record:
        run()
    return {finding.code: finding for finding in record.findings}


# What triggers each, and the way that does not.


def test_bn001_frozen_backbone_that_moves():
    """requires_grad_(False), and train() on the whole: the layers, the line and the way out are named."""

    def run(guarded):
        backbone, head = classifier()[:6], nn.Linear(64, 4)
        backbone.requires_grad_(False)
        net = nn.Sequential(backbone, head)
        with bnguard.frozen(backbone, use_running_stats=True) if guarded else bnguard.frozen(nn.BatchNorm1d(1)):
            train(net, sgd(head))

    finding = found(lambda: run(False))["BN001"]
    assert finding.layers == ("0.1", "0.4")
    assert finding.where == line_in(train, "F.cross_entropy(net(images)")
    assert finding.what == "2 layers (0.1, 0.4) made 3 updates each although none of their parameters is trained"
    assert "frozen(model, use_running_stats=True)" in finding.fix
    assert found(lambda: run(True)) == {}


def test_bn002_validation_in_train_mode():
    """A validation that forgets eval(), under no_grad or inference_mode."""
    net = classifier()

    def run(validate):
        train(net, sgd(net))
        validate()

    def careless(context):
        with context():
            for _ in range(4):
                net(IMAGES)

    def careful():
        net.eval()
        with torch.no_grad():
            net(IMAGES)

    for context in (torch.no_grad, torch.inference_mode):
        findings = found(lambda context=context: run(lambda: careless(context)))
        assert set(findings) == {"BN002"}
        assert findings["BN002"].what == (
            "2 layers (1, 4) made 4 updates each in train mode where autograd did not record"
        )
        assert findings["BN002"].where.endswith(" in careless")
    assert found(lambda: run(careful)) == {}


def test_bn002_does_not_mind_calibration():
    """update_bn() is a train-mode pass without gradients on purpose."""
    net = classifier()
    assert found(lambda: torch.optim.swa_utils.update_bn([IMAGES, IMAGES], net)) == {}


def test_bn003_several_forwards_of_a_step():
    """Anchor, positive and negative one by one, or real and fake: one concatenated forward is right."""
    net = classifier()
    optimizer = sgd(net)
    triplet = nn.TripletMarginLoss()

    def one_by_one():
        for _ in range(3):
            optimizer.zero_grad()
            triplet(net(IMAGES), net(IMAGES + 1), net(IMAGES - 1)).backward()
            optimizer.step()

    def at_once():
        for _ in range(3):
            optimizer.zero_grad()
            triplet(*net(torch.cat([IMAGES, IMAGES + 1, IMAGES - 1])).chunk(3)).backward()
            optimizer.step()

    def first_counts():
        for _ in range(3):
            optimizer.zero_grad()
            with bnguard.frozen(net, "restore", updates=1):
                triplet(net(IMAGES), net(IMAGES + 1), net(IMAGES - 1)).backward()
            optimizer.step()

    finding = found(one_by_one)["BN003"]
    assert finding.what == (
        "2 layers (1, 4) updated up to 3 times before one optimizer step, and several times before 3 of the run's "
        "3 optimizer steps, from that line"
    )
    assert finding.where.endswith(" in one_by_one")
    assert found(at_once) == {}
    assert found(first_counts) == {}


def test_bn004_one_layer_in_two_places():
    """One BatchNorm called after two convolutions."""

    class Shared(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.bn = nn.BatchNorm2d(3)
            self.other = nn.BatchNorm2d(3) if own else self.bn
            self.head = nn.Linear(3 * 64, 4)

        def forward(self, x):
            x = self.bn(self.first(x)).relu()
            return self.head(self.other(self.second(x)).flatten(1))

    findings = found(lambda: train(net := Shared(own=False), sgd(net)))
    assert set(findings) == {"BN004"}
    assert findings["BN004"].what == (
        "one forward of the model called 1 layer (bn) several times, in 3 optimizer steps"
    )
    assert found(lambda: train(net := Shared(own=True), sgd(net))) == {}


def test_bn005_recomputed_forward():
    """Activation checkpointing around BatchNorm, with and without recompute_frozen."""
    net, head = classifier()[:6], nn.Linear(64, 4)
    optimizer = sgd(net, head)

    def run(**options):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(head(checkpoint(net, IMAGES, use_reentrant=False, **options)), LABELS).backward()
            optimizer.step()

    findings = found(run)
    assert set(findings) == {"BN005"}
    assert findings["BN005"].what == (
        "2 layers (1, 4) made 3 updates each when activation checkpointing ran the forward again in backward"
    )
    assert found(lambda: run(context_fn=bnguard.recompute_frozen(net))) == {}


def test_bn006_too_few_values():
    """Two images of one pixel a batch; a smaller last batch is no matter."""
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))
    finding = found(lambda: train(net, sgd(net), IMAGES[:2], LABELS[:2]))["BN006"]
    assert finding.what == "1 layer (1) made 3 updates from fewer than 8 values per channel, down to 2"

    def with_a_rest():
        train(net, sgd(net))
        train(net, sgd(net), IMAGES[:3], LABELS[:3], steps=1)

    assert found(with_a_rest) == {}


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_bn007_momentum_of_keras(momentum):
    """0.9 means the opposite; 0.1 and None are right."""
    finding = found(lambda: train(net := classifier(momentum=momentum), sgd(net)))["BN007"]
    assert finding.what == (
        f"2 layers (1, 4) have momentum {momentum}: the running statistics are those of the last batches"
    )
    for right in (0.1, 0.01, None):
        assert found(lambda right=right: train(net := classifier(momentum=right), sgd(net))) == {}


def test_bn008_eval_mode_undone():
    """bn.eval() once, and train() at the next epoch; an ordinary eval between two epochs is no matter."""

    def run(careless):
        net = classifier()
        optimizer = sgd(net)
        net.train()
        if careless:
            net[1].eval()
        net(IMAGES)
        train(net, optimizer)

    def epochs():
        net = classifier()
        optimizer = sgd(net)
        for _ in range(2):
            train(net, optimizer)
            net.eval()
            with torch.no_grad():
                net(IMAGES)

    finding = found(lambda: run(True))["BN008"]
    assert finding.layers == ("1",)
    assert finding.what == "1 layer (1) had been put into eval mode, came back into train mode and updated from here on"
    assert found(lambda: run(False)) == {}
    assert found(epochs) == {}


def test_bn009_half_precision():
    """bfloat16 statistics; float32 under autocast are right."""
    net = classifier().bfloat16()
    finding = found(lambda: train(net, sgd(net), IMAGES.bfloat16()))["BN009"]
    assert finding.what == "2 layers (1, 4) have statistics in bfloat16"

    def autocast():
        net = classifier()
        with torch.autocast("cpu", torch.bfloat16):
            train(net, sgd(net))

    assert found(autocast) == {}


def test_bn010_frozen_parameter_that_moves():
    """Weight decay and momentum move a parameter with a zero gradient."""

    def run(guarded):
        net = classifier()
        optimizer = sgd(net, momentum=0.9, weight_decay=0.1)
        train(net, optimizer)
        norms = [net[1], net[4]]
        for norm in norms:
            norm.requires_grad_(False)
        if guarded:
            optimizer = sgd(net, momentum=0.9, weight_decay=0.1)
            for norm in norms:
                norm.zero_grad()
        with bnguard.watch() as record:
            for _ in range(3):
                optimizer.zero_grad(set_to_none=guarded)
                F.cross_entropy(net(IMAGES), LABELS).backward()
                optimizer.step()
        return {finding.code: finding for finding in record.findings}

    finding = run(False)["BN010"]
    assert finding.what == "an optimizer moved weight and bias of 2 layers (1, 4), with requires_grad=False"
    assert "BN010" not in run(True)


def test_bn011_track_running_stats_off():
    """The flag meant as a freeze; a layer built without statistics is right."""
    net = classifier()
    net[1].track_running_stats = net[4].track_running_stats = False
    finding = found(lambda: train(net, sgd(net)))["BN011"]
    assert finding.what == "2 layers (1, 4) ran 3 times in train mode with track_running_stats=False"
    assert "frozen(model, use_running_stats=True)" in finding.verdict
    assert found(lambda: train(net := classifier(track_running_stats=False), sgd(net))) == {}


def test_bn012_broken_statistics():
    """One NaN in one batch, for ever; says whether it was there before."""
    net = classifier()
    bad = IMAGES.clone()
    bad[0] = float("nan")
    finding = found(lambda: net(bad))["BN012"]
    assert finding.severity == "error"
    assert finding.what == "2 layers (1, 4) have NaN, infinite or negative statistics, and had none at the beginning"
    assert found(lambda: net.eval()(IMAGES))["BN012"].what.endswith("and had them at the beginning")
    assert found(lambda: classifier()(IMAGES)) == {}


def test_bn013_wrong_gradients():
    """Eval forward, train forward, backward of the first: found, and the gradients are indeed not the right ones."""

    def gradients(order):
        net = classifier()
        net(IMAGES * 3)
        net.eval()
        input = IMAGES.clone().requires_grad_()
        first = net(input).square().sum()
        if order == "right":
            first.backward()
        net.train()
        net(IMAGES + 5)
        if order == "wrong":
            first.backward()
        return input.grad

    right = gradients("right")
    with bnguard.watch() as record:
        wrong = gradients("wrong")
    assert not torch.allclose(wrong, right)
    (finding,) = [finding for finding in record.findings if finding.code == "BN013"]
    assert finding.severity == "error"
    assert finding.layers == ("1", "4")
    assert finding.where == line_in(gradients, "net(IMAGES + 5)")
    assert line_in(gradients, "first = net(input)") in finding.what
    assert "BN013" not in found(lambda: gradients("right"))


def test_bn013_watching_changes_no_gradient():
    """The look at backward leaves the gradients as they are."""
    net, twin = classifier().eval(), classifier().eval()
    with bnguard.watch(net):
        net(IMAGES).square().sum().backward()
    twin(IMAGES).square().sum().backward()
    assert_same_bits([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()])


def test_bn014_statistics_never_learned():
    """Trained under a guard from the initial statistics, then evaluated; pretrained ones, or update_bn, are right."""

    def run(prepare):
        net = classifier()
        prepare(net)
        with bnguard.frozen(net, "restore"):
            train(net, sgd(net))
        net.eval()
        with torch.no_grad():
            net(IMAGES)

    finding = found(lambda: run(lambda net: None))["BN014"]
    assert finding.layers == ("1", "4")
    assert found(lambda: run(lambda net: torch.optim.swa_utils.update_bn([IMAGES], net))) == {}


# Correct training code.


def test_plain_training_has_no_finding():
    """Epochs of training and validation."""

    def run():
        net = classifier()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for _ in range(3):
            train(net, optimizer)
            net.eval()
            with torch.no_grad():
                net(IMAGES)

    assert found(run) == {}


def test_gan_has_no_finding():
    """DCGAN with one forward for real and fake, and a held discriminator in the generator's step."""

    def run():
        torch.manual_seed(0)
        generator = nn.Sequential(
            nn.ConvTranspose2d(4, 8, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 5)
        )
        discriminator = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.Flatten(), nn.Linear(288, 1)
        )
        of_generator, of_discriminator = sgd(generator), sgd(discriminator)
        for _ in range(4):
            fake = generator(torch.randn(16, 4, 1, 1))
            of_discriminator.zero_grad()
            scores = discriminator(torch.cat([IMAGES, fake.detach()]))
            F.binary_cross_entropy_with_logits(scores[:, 0], torch.cat([torch.ones(16), torch.zeros(16)])).backward()
            of_discriminator.step()
            of_generator.zero_grad()
            with bnguard.frozen(discriminator, "restore"):
                F.binary_cross_entropy_with_logits(discriminator(fake)[:, 0], torch.ones(16)).backward()
            of_generator.step()

    assert found(run) == {}


def test_teacher_and_student_have_no_finding():
    """BYOL: both views in one forward, a held teacher in train mode, its weights an average of the student's."""

    def run():
        student = classifier()
        teacher = copy.deepcopy(student).requires_grad_(False)
        optimizer = sgd(student)
        for _ in range(4):
            views = torch.cat([IMAGES, IMAGES.flip(3)])
            with torch.no_grad(), bnguard.frozen(teacher, "restore"):
                targets = teacher(views)
            optimizer.zero_grad()
            F.mse_loss(student(views), targets.roll(16, 0)).backward()
            optimizer.step()
            with torch.no_grad():
                for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                    ours.lerp_(theirs, 0.1)

    assert found(run) == {}


def test_sam_with_a_budget_has_no_finding():
    """The second forward of SAM is held; without the guard it is one update too many."""

    def run(guarded):
        net = classifier()
        optimizer = sgd(net)
        for _ in range(4):
            with bnguard.frozen(net, "restore" if guarded else "warn", updates=1 if guarded else 9):
                optimizer.zero_grad()
                F.cross_entropy(net(IMAGES), LABELS).backward()
                shifts = [p.grad * 0.05 for p in net.parameters()]
                with torch.no_grad():
                    for p, shift in zip(net.parameters(), shifts, strict=True):
                        p.add_(shift)
                optimizer.zero_grad()
                F.cross_entropy(net(IMAGES), LABELS).backward()
                with torch.no_grad():
                    for p, shift in zip(net.parameters(), shifts, strict=True):
                        p.sub_(shift)
                optimizer.step()

    assert found(lambda: run(True)) == {}
    assert set(found(lambda: run(False))) == {"BN003"}


def test_gradient_accumulation_has_no_finding():
    """Several forwards a step, each with its backward, from one line."""

    def run():
        net = classifier()
        optimizer = sgd(net)
        for _ in range(3):
            optimizer.zero_grad()
            for part in range(4):
                F.cross_entropy(net(IMAGES[4 * part : 4 * part + 4]), LABELS[4 * part : 4 * part + 4]).backward()
            optimizer.step()

    assert found(run) == {}


def test_distributed_training_has_no_finding():
    """A step through DistributedDataParallel; the line is the user's, not the wrapper's."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        net = nn.parallel.DistributedDataParallel(classifier())
        with bnguard.watch() as record:
            train(net, sgd(net))
    finally:
        # First: the reducer in it would be the last to have the group, and waits for its threads while Python can run
        # none of them.
        net = None
        torch.distributed.destroy_process_group()
    assert record.findings == ()
    assert {update.where for update in record.updates} == {line_in(train, "F.cross_entropy(net(images)")}
    assert [update.names for update in record.updates] == [("1",), ("4",)]


def test_a_discriminator_that_is_frozen_for_a_while_is_no_finding():
    """set_requires_grad(D, False) around G's step: D is trained in the other one."""
    generator, critic = classifier(), classifier()
    optimizers = sgd(generator), sgd(critic)

    def run(guard):
        for _ in range(3):
            critic.requires_grad_(True)
            optimizers[1].zero_grad()
            critic(IMAGES).mean().backward()
            optimizers[1].step()
            critic.requires_grad_(False)
            with guard():
                critic(IMAGES + generator(IMAGES).mean()).mean().backward()
            optimizers[0].step()

    assert found(lambda: run(lambda: bnguard.frozen(critic, "restore"))) == {}
    assert found(lambda: run(contextlib.nullcontext)) == {}


def test_part_in_a_loop_is_a_note():
    """A head that is shared over the levels of a pyramid: as a whole, so no layer of it sits in two places."""

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3)
            self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            features = self.body(x)
            return sum(self.head(level).mean() for level in (features, F.avg_pool2d(features, 2)))

    net = Pyramid()
    optimizer = sgd(net)

    def run():
        for _ in range(3):
            optimizer.zero_grad()
            net(IMAGES).backward()
            optimizer.step()

    findings = found(run)
    assert set(findings) == {"BN003"}
    assert findings["BN003"].severity == "note"
    assert findings["BN003"].what == (
        "one forward of the model ran 1 layer (head.1) up to twice, with the part around it, in 3 optimizer steps"
    )


def test_a_part_that_is_evaluated_in_between_is_no_finding():
    """encoder.eval(), a look without gradients, encoder.train()."""
    net = nn.Sequential(classifier(), nn.Linear(4, 4))
    optimizer = sgd(net)

    def run():
        for _ in range(2):
            train(net, optimizer)
            net[0].eval()
            with torch.no_grad():
                net[0](IMAGES)
            net[0].train()

    assert found(run) == {}


def test_accumulation_without_a_gradient_of_the_first_parameter_is_no_finding():
    """Backward passes are counted, and not told from some parameter."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    net.token = nn.Parameter(torch.zeros(1))  # which nobody uses
    optimizer = sgd(net)

    def run():
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(4):
                net(IMAGES).square().mean().backward()
            optimizer.step()

    engine = torch.autograd._engine_run_backward
    assert found(run) == {}
    assert torch.autograd._engine_run_backward is engine


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")  # of torch 2.8's LBFGS
def test_closures_are_no_finding():
    """LBFGS runs forward and backward as often as it likes in one step."""
    net = classifier()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.01, max_iter=8)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(IMAGES), LABELS)
        loss.backward()
        return loss

    assert found(lambda: [optimizer.step(closure) for _ in range(3)]) == {}


def test_reentrant_checkpoint_is_recomputed_and_not_without_gradients():
    """Its first forward records nothing, but is one of the training."""
    net = classifier()
    optimizer = sgd(net)

    def run():
        for _ in range(2):
            optimizer.zero_grad()
            features = checkpoint(net[:5], IMAGES.requires_grad_(), use_reentrant=True)
            F.cross_entropy(net[5:](features), LABELS).backward()
            optimizer.step()

    findings = found(run)
    assert set(findings) == {"BN005"}
    assert findings["BN005"].fix.startswith("pass use_reentrant=False, context_fn=bnguard.recompute_frozen(model)")


def test_bn002_in_a_function_of_a_library():
    """Its no_grad() is a decorator as that of torch's update_bn(), and no calibration."""
    net = classifier()
    library = os.path.join(sysconfig.get_paths()["purelib"], "somebodys_library.py")
    names = {"torch": torch}
    code = "@torch.no_grad()\ndef predict(net, images):\n    return net(images)\n"
    exec(compile(code, library, "exec"), names)
    assert set(found(lambda: names["predict"](net, IMAGES))) == {"BN002"}


def test_bn014_only_where_a_guard_has_kept_the_layer_from_learning():
    """A fresh layer in eval mode beside a head that learns was never meant to."""
    backbone, head = classifier()[:6].eval(), nn.Linear(64, 4)
    optimizer = sgd(head)

    def run():
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(head(backbone(IMAGES)), LABELS).backward()
            optimizer.step()

    assert "BN014" not in found(run)


def test_bn010_only_where_an_optimizer_has_moved_it():
    """What somebody writes into a frozen parameter himself is his business."""
    teacher, student = classifier(), classifier()
    teacher.requires_grad_(False)
    optimizer = sgd(student)

    def run():
        for _ in range(3):
            teacher(IMAGES)
            train(student, optimizer, steps=1)
            for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                ours.lerp_(theirs.detach(), 0.1)

    assert "BN010" not in found(run)


def test_many_updates_of_a_step_are_counted():
    """However many there were."""
    net = classifier()
    optimizer = sgd(net)

    def run():
        for _ in range(2):
            loss = sum(net(IMAGES).mean() for _ in range(100))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    assert found(run)["BN003"].what.startswith("2 layers (1, 4) updated up to 100 times before one optimizer step, ")


def test_every_code_has_a_rule():
    """The torch-free table says the same of them as their rules, which say what to do."""
    assert list(CODES) == list(RULES) == sorted(RULES)
    for code, rule in RULES.items():
        assert (rule.code, FindingSpec(rule.title, rule.severity)) == (code, CODES[code])
        assert rule.title
        assert len(rule.fix) > 20
        assert 10 < len(rule.short_fix) < 90


def test_codes_are_known_without_torch():
    """The command line checks its options before it imports torch."""
    code = "import sys, bnguard.findings.codes; sys.exit('torch' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_a_rule_is_all_that_a_finding_needs(monkeypatch):
    """A rule that is registered gets the events it listens to; watch and audit report what it finds."""

    class Counting(Rule):
        code = "BN999"
        title = "counting"
        fix = "nothing to be done about it"
        short_fix = "go on"
        in_run = "{g.of} had {g.detail}"
        in_audit = "{g.of} {g.be} there"

        def __init__(self):
            self.events = Counter()

        def on_update(self, update, module):
            self.events[update.site.rpartition(" ")[2]] += 1

        def on_held(self):
            self.events["held"] += 1

        def on_evaluation(self, evaluation):
            self.events["evaluation"] += 1

        def on_result(self, result):
            self.events["result"] += result.output.shape == (16, 4, 6, 6)

        def on_step_end(self, step):
            self.events["steps"] += 1

        def at_end(self, end):
            return [Evidence(self.code, end.name, None, 0, str(dict(sorted(self.events.items()))))]

        @classmethod
        def audit(cls, audited):
            return [Evidence(cls.code, layer.names[0]) for layer in audited.layers]

    monkeypatch.setitem(RULES, "BN999", Counting)
    net = classifier()[:2]
    optimizer = sgd(net)

    def run():
        for _ in range(3):
            net(IMAGES)
            optimizer.step()
        with bnguard.frozen(net, "restore"):
            net(IMAGES)
        net.eval()(IMAGES)
        net(IMAGES)

    finding = found(run)["BN999"]
    # Results are asked for from the first eval-mode forward on.
    events = {"evaluation": 2, "held": 1, "result": 2, "run": 3, "steps": 3}
    assert finding.what == f"1 layer (1) had {events}"
    assert finding.verdict == f"{finding.what}: go on"
    (finding,) = [finding for finding in bnguard.audit(net) if finding.code == "BN999"]
    assert (finding.what, finding.layers) == ("1 layer (1) is there", ("1",))


def test_what_happened_most_comes_first():
    """A forward that a constructor runs to learn a shape does not lead, whatever its code."""
    net = classifier()
    optimizer = sgd(net)

    def look():
        with torch.no_grad():
            net(IMAGES)

    def steps():
        for _ in range(5):
            optimizer.zero_grad()
            (net(IMAGES).mean() + net(IMAGES + 1).mean()).backward()
            optimizer.step()

    with bnguard.watch() as record:
        look()
        steps()
    assert [finding.code for finding in record.findings] == ["BN003", "BN002"]
