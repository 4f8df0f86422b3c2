"""What people do, mistakes and correct code that looks like them, and which findings a watch has of each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard

STEPS = 6
Run = Callable[[], object]
_CASES: list[tuple[Run, str, str]] = []


def case(expected: str = "", line: str = "") -> Callable[[Run], Run]:
    """A script, the codes of its findings, notes in brackets, and a word in the line of the first of them."""

    def add(run: Run) -> Run:
        _CASES.append((run, expected, line))
        return run

    return add


def body(**options: bool) -> nn.Sequential:
    """A convolution with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def net_of(**options: bool) -> nn.Sequential:
    """A body and a head."""
    return nn.Sequential(body(**options), nn.Linear(8, 4))


def sgd(*nets: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    """An optimizer of all parameters."""
    return torch.optim.SGD([p for net in nets for p in net.parameters()], lr)


def batches(number: int = STEPS, shift: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels."""
    for _ in range(number):
        yield torch.randn(8, 3, 6, 6) * 2 + shift, torch.randint(4, (8,))


def fit(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS, shift: float = 1.0) -> None:
    """Plain training."""
    net.train()
    for images, labels in batches(steps, shift):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


def evaluate(net: nn.Module) -> None:
    """Plain evaluation."""
    net.eval()
    with torch.no_grad():
        for images, _ in batches(2):
            net(images)


# Frozen, and moving all the same: BN001.


@case("BN001", "in fit")
def pretrained_then_frozen() -> None:
    """Pretrained then frozen."""
    net = net_of()
    fit(net, sgd(net))
    net[0].requires_grad_(False)
    fit(net, sgd(net[1]), shift=4)


@case("BN001", "in fit")
def frozen_then_thawed() -> None:
    """Frozen then thawed."""
    net = net_of()
    net[0].requires_grad_(False)
    fit(net, sgd(net[1]))
    net[0].requires_grad_(True)
    fit(net, sgd(net))


@case("BN001", "in fit")
def left_out_of_the_optimizer() -> None:
    """Left out of the optimizer."""
    net = net_of()
    fit(net, sgd(net[1]))


@case("BN001", "in fit")
def learning_rate_of_zero() -> None:
    """Learning rate of zero."""
    net = net_of()
    optimizer = torch.optim.SGD([{"params": net[0].parameters(), "lr": 0.0}, {"params": net[1].parameters()}], 0.1)
    fit(net, optimizer)


@case("BN001", "in fit")
def frozen_without_affine() -> None:
    """Frozen without affine."""
    net = net_of(affine=False)
    net[0].requires_grad_(False)
    fit(net, sgd(net[1]))


@case()
def frozen_and_in_eval_mode() -> None:
    """Frozen and in eval mode."""
    net = net_of()
    fit(net, sgd(net))
    net[0].requires_grad_(False)
    optimizer = sgd(net[1])
    for _ in range(2):
        net.train()
        net[0].eval()
        for images, labels in batches():
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()


@case()
def without_affine_in_a_model_that_is_trained() -> None:
    """Without affine in a model that is trained."""
    net = net_of(affine=False)
    fit(net, sgd(net))


@case()
def updated_by_hand_instead_of_an_optimizer() -> None:
    """Updated by hand instead of an optimizer."""
    net = net_of()
    head = sgd(net[1])
    net.train()
    for images, labels in batches():
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        head.step()
        with torch.no_grad():
            for parameter in net[0].parameters():
                parameter -= 0.05 * parameter.grad


def gan(critic_steps: int, generator_steps: int, *, freezes: bool) -> None:
    """Two nets that train against each other."""
    generator = nn.Sequential(nn.ConvTranspose2d(4, 8, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 3))
    critic = nn.Sequential(body(), nn.Linear(8, 1))
    of_generator, of_critic = sgd(generator), sgd(critic)
    for _ in range(STEPS):
        critic.requires_grad_(True)
        for _ in range(critic_steps):
            with torch.no_grad():
                fake = generator(torch.randn(8, 4, 1, 1))
            of_critic.zero_grad()
            (critic(fake).mean() - critic(torch.randn(8, 3, 6, 6)).mean()).backward()
            of_critic.step()
        critic.requires_grad_(not freezes)
        for _ in range(generator_steps):
            of_generator.zero_grad()
            (-critic(generator(torch.randn(8, 4, 1, 1))).mean()).backward()
            of_generator.step()


@case("(BN003)", "in gan")
def gan_whose_samples_move_the_generator() -> None:
    """Gan whose samples move the generator."""
    gan(1, 1, freezes=False)


@case("(BN003)", "in gan")
def gan_with_more_steps_of_the_critic() -> None:
    """Gan with more steps of the critic."""
    gan(5, 1, freezes=True)


@case("(BN003)", "in gan")
def gan_with_more_steps_of_the_generator() -> None:
    """Gan with more steps of the generator."""
    gan(1, 3, freezes=True)


def critic_steps_on_what_a_generator_made(*, detaches: bool) -> None:
    """Twenty steps of a critic for one of the generator."""
    generator, critic = net_of(), nn.Linear(4, 1)
    of_generator, of_critic = sgd(generator, lr=1e-3), sgd(critic, lr=1e-3)
    for number, (images, _) in enumerate(batches(42)):
        made = generator(images)
        of_critic.zero_grad()
        (critic(made.detach() if detaches else made).mean() - critic(torch.randn(8, 4)).mean()).backward()
        of_critic.step()
        if number % 20 == 0:
            of_generator.zero_grad()
            (-critic(generator(images)).mean()).backward()
            of_generator.step()


@case()
def a_critic_learns_from_a_detached_result() -> None:
    """A critic learns from a detached result."""
    critic_steps_on_what_a_generator_made(detaches=True)


@case()
def a_critic_learns_from_a_result_with_gradients() -> None:
    """A critic learns from a result with gradients."""
    critic_steps_on_what_a_generator_made(detaches=False)


@case()
def a_run_that_ends_before_the_first_step_of_the_generator() -> None:
    """A run that ends before the first step of the generator."""
    generator, critic = net_of(), nn.Linear(4, 1)
    of_generator, of_critic = sgd(generator), sgd(critic)
    for images, _ in batches():
        score = critic(generator(images)).mean()
        score.backward(retain_graph=True)
        of_critic.step()
        break
    else:
        of_generator.step()


@case("BN001", "")
def a_backbone_of_its_own_that_no_optimizer_has() -> None:
    """A backbone of its own that no optimizer has."""
    backbone, head = body(), nn.Linear(8, 4)
    optimizer = sgd(head)
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(head(backbone(images)), labels).backward()
        optimizer.step()


@case()
def clones_of_meta_learning() -> None:
    """Clones of meta learning."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = sgd(net)
    for _ in range(STEPS):
        optimizer.zero_grad()
        learner = copy.deepcopy(net)
        for module, own in zip(learner, net, strict=True):
            for name, parameter in own.named_parameters():
                module._parameters[name] = parameter.clone()
        learner(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()


def clone_of(net: nn.Sequential) -> nn.Sequential:
    """A clone as those of meta-learning libraries: parameters are computed, buffers are the same objects."""
    clone = nn.Sequential()
    clone.__dict__ = {**net.__dict__, "_modules": {}}
    for name, module in net._modules.items():
        assert module is not None
        part = type(module).__new__(type(module))
        part.__dict__ = {**module.__dict__, "_buffers": dict(module._buffers)}
        part._parameters = {key: None if one is None else one.clone() for key, one in module._parameters.items()}  # type: ignore[misc]
        clone._modules[name] = part
    return clone


def meta_learning(*, tests_in_train_mode: bool) -> None:
    """A task a step; then tasks that adapt a clone and look at how well it does."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = sgd(net)

    def query(learner: nn.Module) -> Tensor:
        loss: Tensor = learner(torch.randn(16, 4)).square().mean()
        return loss

    for _ in range(STEPS):
        optimizer.zero_grad()
        query(clone_of(net)).backward()
        optimizer.step()
    for _ in range(STEPS):
        query(clone_of(net).train(tests_in_train_mode)).item()


@case("BN002", "in query")
def meta_test_in_train_mode() -> None:
    """Meta test in train mode."""
    meta_learning(tests_in_train_mode=True)


@case()
def meta_test_in_eval_mode() -> None:
    """Meta test in eval mode."""
    meta_learning(tests_in_train_mode=False)


# Forwards that nothing learns from: BN002.


@case()
def an_operation_in_place_on_a_view() -> None:
    """An operation in place on a view."""
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fit(net, sgd(net))


class DeadEnd(nn.Module):
    """A block that computes a normalisation and does not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.body = nn.BatchNorm2d(3), body()

    def forward(self, images: Tensor) -> Tensor:
        self.unused(images)
        output: Tensor = self.body(images)
        return output


@case()
def a_layer_at_a_dead_end() -> None:
    """A layer at a dead end."""
    net = nn.Sequential(DeadEnd(), nn.Linear(8, 4))
    fit(net, sgd(net))


class Contrast(nn.Module):
    """A key encoder that follows the query, inside one model."""

    def __init__(self) -> None:
        super().__init__()
        self.query = body()
        self.key = copy.deepcopy(self.query).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        query = self.query(images)
        with torch.no_grad():
            for theirs, ours in zip(self.query.parameters(), self.key.parameters(), strict=True):
                ours.data = ours.data * 0.9 + theirs.data * 0.1
            key = self.key(images + 0.1)
        return F.mse_loss(query, key)


@case()
def a_key_encoder_inside_the_model_and_in_its_optimizer() -> None:
    """A key encoder inside the model and in its optimizer."""
    net = Contrast()
    optimizer = sgd(net)
    for images, _ in batches():
        optimizer.zero_grad()
        net(images).backward()
        optimizer.step()


@case("BN002", "in validate")
def validation_without_eval_and_no_grad() -> None:
    """Validation without eval and no grad."""
    net = net_of()
    optimizer = sgd(net)

    def validate() -> float:
        return sum(F.cross_entropy(net(images), labels).item() for images, labels in batches())

    for _ in range(3):
        fit(net, optimizer)
        validate()


@case("BN002", "in run_epoch")
def one_loop_for_both_and_no_eval() -> None:
    """One loop for both and no eval."""
    net = net_of()
    optimizer = sgd(net)

    def run_epoch(*, trains: bool) -> None:
        for images, labels in batches():
            loss = F.cross_entropy(net(images), labels)
            if trains:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    for _ in range(2):
        run_epoch(trains=True)
        run_epoch(trains=False)


@case("BN002", "in inference")
def inference_without_eval() -> None:
    """Inference without eval."""
    net = net_of()
    net.load_state_dict(net_of().state_dict())

    def inference() -> None:
        net(torch.randn(2, 3, 6, 6))

    inference()


@case("BN002", "in predict")
def inference_without_eval_and_gradients() -> None:
    """Inference without eval and gradients."""
    net = net_of()

    @torch.no_grad()
    def predict() -> None:
        net(torch.randn(8, 3, 6, 6))

    predict()


@case("BN002", "in visualise")
def pictures_in_train_mode() -> None:
    """Pictures in train mode."""
    net = net_of()
    optimizer = sgd(net)

    def visualise() -> None:
        for images, _ in batches(3):
            net(images).argmax(1)

    for _ in range(2):
        fit(net, optimizer)
        visualise()


@case()
def targets_of_a_step_whose_other_forwards_are_held() -> None:
    """Targets of a step whose other forwards are held."""
    net = net_of()
    optimizer = sgd(net)
    for images, _ in batches():
        targets = net(images).softmax(1).detach()
        with bnguard.frozen(net, "restore"):
            loss = F.kl_div(net(images + 0.1).log_softmax(1), targets, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@case()
def a_look_at_the_shapes() -> None:
    """A look at the shapes."""
    net = net_of()
    net(torch.randn(2, 3, 6, 6))
    fit(net, sgd(net))


@case()
def one_batch_is_skipped() -> None:
    """One batch is skipped."""
    net = net_of()
    optimizer = sgd(net)
    for number, (images, labels) in enumerate(batches(40)):
        loss = F.cross_entropy(net(images), labels)
        if number == 7:
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@case()
def losses_are_summed_over_batches() -> None:
    """Losses are summed over batches."""
    net = net_of()
    optimizer = sgd(net)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for images, labels in batches(3):
            (F.cross_entropy(net(images), labels) / 3).backward()
        optimizer.step()


@case()
def rollouts_are_learned_from_later() -> None:
    """Rollouts are learned from later."""
    policy = net_of()
    optimizer = sgd(policy)
    for _ in range(STEPS):
        with bnguard.frozen(policy, "restore", updates=1):
            chances = [policy(images).log_softmax(1) for images, _ in batches(4)]
        optimizer.zero_grad()
        (-torch.stack(chances).mean()).backward()
        optimizer.step()


@case()
def statistics_learned_anew_after_a_reset() -> None:
    """Statistics learned anew after a reset."""
    net = net_of()
    optimizer = sgd(net)
    for _ in range(2):
        fit(net, optimizer)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        net.train()
        with torch.no_grad():
            for images, _ in batches():
                net(images)
        evaluate(net)


@case()
def statistics_learned_anew_after_a_reset_by_hand() -> None:
    """Statistics learned anew after a reset by hand."""
    net = net_of()
    fit(net, sgd(net))
    net[0][1].running_mean.zero_()
    net[0][1].running_var.fill_(1)
    with torch.no_grad():
        for images, _ in batches():
            net(images)
    evaluate(net)


@case()
def statistics_learned_anew_with_a_cumulative_average() -> None:
    """Statistics learned anew with a cumulative average."""
    net = net_of()
    fit(net, sgd(net))
    net[0][1].momentum = None
    with torch.no_grad():
        for images, _ in batches():
            net(images)


@case()
def statistics_learned_anew_with_a_falling_momentum() -> None:
    """Statistics learned anew with a falling momentum."""
    net = net_of()
    fit(net, sgd(net))
    with torch.no_grad():
        for number, (images, _) in enumerate(batches()):
            net[0][1].momentum = 1 / (number + 1)
            net(images)


@case()
def statistics_learned_anew_in_a_function_that_says_so() -> None:
    """Statistics learned anew in a function that says so."""
    net = net_of()
    fit(net, sgd(net))

    @torch.no_grad()
    def update_bn_stats() -> None:
        for images, _ in batches():
            net(images)

    update_bn_stats()


@case()
def an_average_of_the_model_is_calibrated() -> None:
    """An average of the model is calibrated."""
    net = net_of()
    average = torch.optim.swa_utils.AveragedModel(net)
    optimizer = sgd(net)
    for _ in range(2):
        fit(net, optimizer)
        average.update_parameters(net)
    torch.optim.swa_utils.update_bn(batches(), average)
    evaluate(average)


@case()
def a_normaliser_that_is_filled_without_gradients() -> None:
    """A normaliser that is filled without gradients."""
    net = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = sgd(net)
    for _ in range(STEPS):
        net.train()
        with torch.no_grad():
            for _ in range(4):
                net(torch.randn(8, 4) + 3)
        net.eval()
        optimizer.zero_grad()
        net(torch.randn(32, 4) + 3).square().mean().backward()
        optimizer.step()


@case()
def a_key_encoder_that_follows_the_query() -> None:
    """A key encoder that follows the query."""
    query = net_of()
    key = copy.deepcopy(query).requires_grad_(False)
    optimizer = sgd(query)
    for images, _ in batches():
        with torch.no_grad():
            for ours, theirs in zip(key.parameters(), query.parameters(), strict=True):
                ours.lerp_(theirs, 0.1)
            keys = key(images + 0.1)
        optimizer.zero_grad()
        F.mse_loss(query(images), keys).backward()
        optimizer.step()


@case("BN002", "in distil")
def a_teacher_in_train_mode() -> None:
    """A teacher in train mode."""
    teacher, student = net_of(), net_of()
    teacher.requires_grad_(False)
    optimizer = sgd(student)

    def distil() -> None:
        for images, _ in batches():
            with torch.no_grad():
                targets = teacher(images)
            optimizer.zero_grad()
            F.mse_loss(student(images), targets).backward()
            optimizer.step()

    distil()


class WithTeacher(nn.Module):
    """A student that runs its teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = body().requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.teacher(images)
        output: Tensor = self.head(features)
        return output


@case("BN002", "in forward")
def a_teacher_inside_the_student() -> None:
    """A teacher inside the student."""
    net = WithTeacher()
    fit(net, sgd(net.head))


@case()
def a_teacher_inside_the_student_in_eval_mode() -> None:
    """A teacher inside the student in eval mode."""
    net = WithTeacher()
    net.train()
    net.teacher.eval()
    optimizer = sgd(net.head)
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


# Several updates a step: BN003, BN004.


@case("BN003", "in step")
def sharpness_aware() -> None:
    """Sharpness aware."""
    net = net_of()
    optimizer = sgd(net)

    def step(images: Tensor, labels: Tensor) -> None:
        for _ in range(2):
            F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def second(images: Tensor, labels: Tensor) -> None:
        F.cross_entropy(net(images), labels).backward()

    for images, labels in batches():
        second(images, labels)
        step(images, labels)


@case()
def sharpness_aware_with_momentum_zero() -> None:
    """Sharpness aware with momentum zero."""
    net = net_of()
    optimizer = sgd(net)
    for images, labels in batches():
        net[0][1].momentum = 0.1
        F.cross_entropy(net(images), labels).backward()
        net[0][1].momentum = 0
        F.cross_entropy(net(images + 0.1), labels).backward()
        optimizer.step()


@case()
def statistics_are_put_back_by_hand() -> None:
    """Statistics are put back by hand."""
    net = net_of()
    optimizer = sgd(net)
    for images, labels in batches():
        loss = F.cross_entropy(net(images), labels)
        kept = copy.deepcopy(dict(net.named_buffers()))
        loss = loss + net(images + 2).square().mean()
        with torch.no_grad():
            net(images + 3)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(kept[name])
        optimizer.step()


@case()
def statistics_are_put_back_by_a_state_dict() -> None:
    """Statistics are put back by a state dict."""
    net = net_of()
    optimizer = sgd(net)
    for _ in range(3):
        fit(net, optimizer, 2)
        kept = copy.deepcopy(net.state_dict())
        with torch.no_grad():
            for images, _ in batches(3):
                net(images + 3)
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(kept[name])


@case("BN003 BN002", "")
def statistics_are_put_back_too_late() -> None:
    """Statistics are put back too late."""
    net = net_of()
    optimizer = sgd(net)
    for images, labels in batches():
        loss = F.cross_entropy(net(images), labels) + net(images + 2).square().mean()
        with torch.no_grad():
            net(images + 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Siamese(nn.Module):
    """One encoder for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = body()

    def forward(self, images: Tensor) -> Tensor:
        distance: Tensor = self.encoder(images) - self.encoder(images.flip(3))
        return distance


@case("(BN003)", "in fit")
def siamese() -> None:
    """Siamese."""
    net = nn.Sequential(Siamese(), nn.Linear(8, 4))
    fit(net, sgd(net))


@case("BN003", "")
def labelled_and_unlabelled() -> None:
    """Labelled and unlabelled."""
    net = net_of()
    optimizer = sgd(net)
    for images, labels in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        (loss + net(images + 3).square().mean()).backward()
        optimizer.step()


@case()
def two_stages() -> None:
    """Two stages."""
    net = net_of()
    fit(net, torch.optim.Adam(net.parameters(), 1e-3), 20)
    fit(net, sgd(net), 10)


@case()
def two_optimizers_of_one_model() -> None:
    """Two optimizers of one model."""
    net = net_of()
    optimizers = sgd(net[0]), sgd(net[1])
    for images, labels in batches():
        F.cross_entropy(net(images), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


# Eval mode that is undone: BN008.


@case("BN008", "in fit")
def eval_once_before_the_loop() -> None:
    """Eval once before the loop."""
    net = net_of()
    net[0][1].eval()
    fit(net, sgd(net))


class KeepsEval(nn.Sequential):
    """A net whose layer stays in eval mode, whatever ``train()`` says."""

    def train(self, mode: bool = True) -> KeepsEval:
        super().train(mode)
        self[0][1].eval()
        return self


@case()
def train_is_overridden() -> None:
    """Train is overridden."""
    net = KeepsEval(body(), nn.Linear(8, 4))
    for _ in range(2):
        fit(net, sgd(net))


@case()
def a_part_is_evaluated_by_itself() -> None:
    """A part is evaluated by itself."""
    net = net_of()
    optimizer = sgd(net)
    for _ in range(3):
        fit(net, optimizer)
        net[0].eval()
        with torch.no_grad():
            net[0](torch.randn(8, 3, 6, 6))


@case()
def the_whole_is_evaluated_before_training() -> None:
    """The whole is evaluated before training."""
    net = net_of()
    evaluate(net)
    fit(net, sgd(net))
    evaluate(net)


# Evaluated with statistics that are not the model's: BN011, BN014, BN017, BN018, BN019.


@case()
def statistics_are_removed() -> None:
    """Statistics are removed."""
    net = net_of()
    norm = net[0][1]
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    fit(net, sgd(net))
    evaluate(net)


@case("BN011", "")
def a_flag_instead_of_a_freeze() -> None:
    """A flag instead of a freeze."""
    net = net_of()
    optimizer = sgd(net)
    fit(net, optimizer)
    net[0][1].track_running_stats = False
    fit(net, optimizer, 12)
    net[0][1].track_running_stats = True
    fit(net, optimizer)


@case("(BN011)", "")
def virtual_adversarial_training() -> None:
    """Virtual adversarial training."""
    net = net_of()
    optimizer = sgd(net)
    for images, labels in batches():
        net[0][1].track_running_stats = False
        distance = F.mse_loss(net(images + 0.1), net(images).detach()) + net(images - 0.1).square().mean()
        net[0][1].track_running_stats = True
        optimizer.zero_grad()
        (F.cross_entropy(net(images), labels) + distance).backward()
        optimizer.step()


@case()
def a_flag_under_a_guard_that_cures_it() -> None:
    """A flag under a guard that cures it."""
    net = net_of()
    fit(net, sgd(net))
    net[0][1].track_running_stats = False
    with bnguard.frozen(net, use_running_stats=True):
        fit(net, sgd(net))


@case("BN014", "")
def an_average_of_the_parameters_alone() -> None:
    """An average of the parameters alone."""
    net = net_of()
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = sgd(net)
    for _ in range(3):
        fit(net, optimizer)
        with torch.no_grad():
            for ours, theirs in zip(average.parameters(), net.parameters(), strict=True):
                ours.lerp_(theirs, 0.5)
        evaluate(average)


@case("BN016", "")
def a_teacher_whose_statistics_stay_behind() -> None:
    """A teacher whose statistics stay behind."""
    net = net_of()
    fit(net, sgd(net))
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = sgd(net)
    for _ in range(3):
        fit(net, optimizer)
        with torch.no_grad():
            for ours, theirs in zip(average.parameters(), net.parameters(), strict=True):
                ours.data.mul_(0.5).add_(theirs.data, alpha=0.5)
        evaluate(average)


@case()
def a_teacher_that_never_changes() -> None:
    """A teacher that never changes."""
    net = net_of()
    fit(net, sgd(net))
    teacher = copy.deepcopy(net).eval()
    optimizer = sgd(net)
    for images, _ in batches():
        with torch.no_grad():
            targets = teacher(images)
        optimizer.zero_grad()
        F.mse_loss(net(images), targets).backward()
        optimizer.step()


@case()
def an_average_with_its_statistics() -> None:
    """An average with its statistics."""
    net = net_of()
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = sgd(net)
    for _ in range(3):
        fit(net, optimizer)
        with torch.no_grad():
            for ours, theirs in zip(average.parameters(), net.parameters(), strict=True):
                ours.lerp_(theirs, 0.5)
            for ours, theirs in zip(average.buffers(), net.buffers(), strict=True):
                ours.copy_(theirs)
        evaluate(average)


@case("BN014", "")
def a_checkpoint_without_statistics() -> None:
    """A checkpoint without statistics."""
    net, fresh = net_of(), net_of()
    fit(net, sgd(net))
    state = {name: value for name, value in net.state_dict().items() if "running" not in name and "num_" not in name}
    fresh.load_state_dict(state, strict=False)
    evaluate(fresh)


@case()
def a_checkpoint_with_statistics() -> None:
    """A checkpoint with statistics."""
    net, fresh = net_of(), net_of()
    fit(net, sgd(net))
    fresh.load_state_dict(net.state_dict())
    evaluate(fresh)


@case()
def a_fresh_net_is_timed() -> None:
    """A fresh net is timed."""
    evaluate(net_of())


@case("BN017", "")
def instance_norm_with_the_flag_off() -> None:
    """Instance norm with the flag off."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.Flatten())
    optimizer = sgd(net)
    net(torch.randn(4, 3, 6, 6)).mean().backward()
    optimizer.step()
    net[1].track_running_stats = False
    net.eval()
    with torch.no_grad():
        net(torch.randn(4, 3, 6, 6))


@case("BN018", "")
def statistics_are_written_between_evaluations() -> None:
    """Statistics are written between evaluations."""
    net = net_of()
    fit(net, sgd(net))
    evaluate(net)
    net[0][1].running_mean.add_(1)
    evaluate(net)


@case()
def the_best_checkpoint_is_loaded_between_evaluations() -> None:
    """The best checkpoint is loaded between evaluations."""
    net = net_of()
    fit(net, sgd(net))
    best = copy.deepcopy(net.state_dict())
    fit(net, sgd(net))
    evaluate(net)
    net.load_state_dict(best)
    evaluate(net)


@case()
def a_model_is_moved_between_evaluations() -> None:
    """A model is moved between evaluations."""
    net = net_of()
    fit(net, sgd(net))
    evaluate(net)
    net.double().float()
    evaluate(net)


@case("BN019", "")
def a_cumulative_average_whose_counter_was_lost() -> None:
    """A cumulative average whose counter was lost."""
    net = net_of()
    fit(net, sgd(net))
    net[0][1].momentum = None
    net[0][1].num_batches_tracked.zero_()
    with bnguard.watch() as record:
        fit(net, sgd(net))
    (finding,) = record.findings
    assert finding.code == "BN019"
    assert [one.code for one in bnguard.audit(net)] == []
    net[0][1].num_batches_tracked.zero_()
    assert [one.code for one in bnguard.audit(net)] == ["BN019"]
    fresh = net_of()
    fresh[0][1].momentum = None
    with bnguard.watch(fresh) as inner:
        net[0][1].momentum = 0.1
        fit(fresh, sgd(fresh))
    assert inner.findings == ()


@pytest.mark.parametrize(("run", "expected", "line"), _CASES, ids=[run.__name__ for run, _, _ in _CASES])
def test_findings(run: Run, expected: str, line: str) -> None:
    """No finding too many and none too few, the first one at the right line."""
    torch.manual_seed(0)
    if "BN019" in expected:
        run()
        return
    with bnguard.watch() as record:
        run()
    found = [f"({one.code})" if one.severity == "note" else one.code for one in record.findings]
    assert set(found) == set(expected.split())
    warnings = [one for one in record.findings if one.severity != "note"] or record.findings
    if line:
        assert all([line in (one.where or "") for one in warnings])
    teachers = [one for one in record.findings if "teacher" in one.fix]
    assert not any(["call model.eval() before it" in one.verdict for one in teachers if "not trained" in one.what])


def test_there_are_as_many_correct_scripts_as_wrong_ones() -> None:
    """A finding that accuses correct code is worse than none."""
    counts = {key: len(list(group)) for key, group in itertools.groupby(sorted(not one for _, one, _ in _CASES))}
    assert counts[True] >= counts[False]
