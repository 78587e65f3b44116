"""The loop: schedules, accumulation, mixed precision, sums. Exact where it can be."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, run, same, weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import classifier
from classifier import (
    REFERENCE_BATCH,
    CifarNet,
    Config,
    ImageData,
    Muon,
    Runtime,
    Split,
    Training,
    UserError,
    accumulation_windows,
    alternate_flip,
    augment,
    epoch_generator,
    evaluate,
    orthogonalize,
    parse_config,
    pixel_statistics,
    shifted_views,
    view_logits,
)

# Of four classes; without augmentation, and all updates at about the peak rate.
RECIPE = Config(width=4, batch_size=16, num_workers=0, epochs=1000)
PLAIN = replace(RECIPE, shift=0, cutout=0, letterbox_share=0.0)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def data_of(split, classes=4, flip=False):
    return ImageData("tiny", tuple("abcde"[:classes]), split, split, flip=flip)


@pytest.fixture(scope="module")
def split():
    """96 images of four classes, each of its own brightness."""
    labels = torch.arange(96) % 4
    noise = torch.randint(0, 50, (96, 3, 32, 32), generator=torch.Generator().manual_seed(3))
    return Split((labels.view(-1, 1, 1, 1) * 50 + noise).byte(), labels)


@pytest.fixture
def model(split):
    torch.manual_seed(0)
    return CifarNet(4, 4, pixel_statistics(split.images))


@pytest.fixture
def training(split, cpu):
    """Six batches an epoch."""
    return Training(PLAIN, data_of(split), cpu)


# --- Accumulation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count,steps,updates,last",
    [(391, 4, 98, 3), (7, 4, 2, 3), (13, 5, 3, 3), (0, 4, 0, 0), (3, 100, 1, 3), (8, 1, 8, 1)],
)
def test_windows(count, steps, updates, last):
    windows = list(accumulation_windows(range(count), count, steps))
    assert [batch for batch, _, _ in windows] == list(range(count))
    assert sum(closes for _, _, closes in windows) == updates
    assert not windows or windows[-1][2]
    assert sum(weight for _, weight, _ in windows) == pytest.approx(updates)
    assert [weight for _, weight, _ in windows[count - last :]] == last * [1 / max(last, 1)]


@pytest.mark.parametrize(
    "runtime,tolerance",
    [
        (Runtime(CPU), 1e-5),
        pytest.param(Runtime(CUDA, torch.float16), 1e-2, marks=pytest.mark.cuda),
    ],
    ids=["cpu", "cuda"],
)
def test_accumulation_equals_the_big_batch(split, monkeypatch, runtime, tolerance):
    """BatchNorm stays in eval mode: its statistics are a batch's own."""
    real = CifarNet.train
    monkeypatch.setattr(CifarNet, "train", lambda self, mode=True: real(self, False))
    ways = []
    for batch_size, steps in ((48, 1), (12, 4)):
        changes = {"batch_size": batch_size, "accumulate_grad_steps": steps, "epochs": 1}
        training = Training(replace(PLAIN, lr=0.01, **changes), data_of(split), runtime)
        before = training.model.head.weight.detach().clone()
        training.train_epoch()
        assert (training.updates, training.skipped) == (2, 0)
        assert not torch.equal(training.model.head.weight, before)
        ways.append(training.model.state_dict())
    big, small = ways
    for name, tensor in big.items():
        torch.testing.assert_close(small[name], tensor, atol=tolerance / 2, rtol=tolerance)


def test_an_update_takes_no_more_batches_than_an_epoch_has(capsys):
    """Rates follow the effective batch, which must not count images that never come."""
    for steps in (11, 64):  # of ten batches
        words = ["--epochs", 1, "--accumulate-grad-steps", steps, "--model-path", f"{steps}.pth"]
        code, _, err = run(capsys, "--mode", "train", *TINY, *words)
        assert code == 0 and "effective batch 320," in err
    assert same(weights("11.pth"), weights("64.pth"))


# --- The optimizer --------------------------------------------------------------------------------


def test_rates_fall_straight_from_the_peak(split, cpu):
    config = replace(PLAIN, batch_size=REFERENCE_BATCH, epochs=4)  # one update an epoch
    twice = Split(split.images.repeat(2, 1, 1, 1), split.labels.repeat(2))
    training, seen = Training(config, data_of(twice.take(slice(128))), cpu), []
    for _ in range(4):
        for weight in training.model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        training.update()
        seen.append([group["lr"] for group in training.optimizer.param_groups])
    without_momentum = 3 / (1 - 0.9367)  # for which four updates are too few
    peaks = [0.0192, 937.5 * 0.0192 * without_momentum, 73 * 0.0192 * without_momentum]
    for rates, share in zip(seen, (1, 0.75, 0.5, 0.25), strict=True):
        assert rates == pytest.approx([share * peak for peak in peaks])


@pytest.mark.parametrize("batch", [64, 256, 2048])
def test_every_batch_goes_as_far_with_an_epoch(model, batch):
    """If the gradient stays the same: how far an image moves the weights, for how many images
    momentum remembers it, and how much it lets them decay."""
    found = []
    for size in (REFERENCE_BATCH, batch):
        filters, head, biases = Muon.for_model(model, RECIPE, size, 1000).param_groups
        moved = [group["peak_lr"] / (1 - group["momentum"]) for group in (head, biases)]
        decay = [group["peak_lr"] * group["weight_decay"] for group in (head, biases)]
        # An orthogonalized update has one length, however many updates point the same way.
        per_image = [each / size for each in (filters["peak_lr"], *moved, *decay)]
        memory = [group["momentum"] ** (1 / size) for group in (filters, head, biases)]
        found.append(per_image + memory)
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("updates", [1, 20, 40, 10_000])
def test_momentum_fits_into_short_trainings(model, updates):
    """Else a training on 50 pictures would hardly move the head: with a steady gradient, most of
    what the steady state promises is reached."""
    _, head, _ = Muon.for_model(model, RECIPE, REFERENCE_BATCH, updates).param_groups
    velocity = way = 0.0
    for _ in range(updates):
        velocity = head["momentum"] * velocity + 1
        way += head["peak_lr"] * (1 + head["momentum"] * velocity)
    promised = updates * 937.5 * 0.0192 * 3 / (1 - 0.9367)
    assert 0.75 * promised < way < 1.05 * promised


def test_batchnorm_forgets_its_start(split, cpu):
    """Also in three passes; not with --init-from, whose statistics are good."""
    config = replace(PLAIN, batch_size=96, epochs=3)
    for change, weight in ((config, 0.01), (replace(config, epochs=1000), 0.9**1000)):
        norm = Training(change, data_of(split), cpu).model.blocks[0].norm1
        assert (1 - norm.momentum) ** change.epochs == pytest.approx(weight)


def test_all_updates_of_an_epoch_span_about_as_many_batches(split, cpu):
    """They have one rate: 6 batches in windows of 4 are 3 and 3, not 4 and 2."""
    training = Training(replace(PLAIN, accumulate_grad_steps=4, epochs=2), data_of(split), cpu)
    assert (training.steps, training.total) == (3, 4)
    assert training.resolved["run_effective_batch"] == 48


def test_decay_and_momentum_of_the_groups(model):
    recipe = replace(RECIPE, weight_decay=0.1, momentum=0.7)
    filters, head, biases = Muon.for_model(model, recipe, REFERENCE_BATCH, 1000).param_groups
    assert filters["weight_decay"] == 0
    assert head["weight_decay"] * head["peak_lr"] == pytest.approx(0.1)
    momenta = [group["momentum"] for group in (filters, head, biases)]
    assert momenta == pytest.approx([0.7, 0.9, 0.9])


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonalize_against_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ orthogonalize(matrix) @ right.T
    found = turned.diag()
    torch.testing.assert_close(turned, found.diag(), atol=1e-4, rtol=0)  # the same vectors
    assert found[values > 0.02 * matrix.norm()].min() > 0.68 and found.max() < 1.21
    thousand = orthogonalize(1000 * matrix)
    torch.testing.assert_close(thousand, orthogonalize(matrix), atol=1e-4, rtol=1e-4)


def test_muon_is_nesterov_sgd_where_it_does_not_orthogonalize():
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    muon = Muon([{"params": [ours], "lr": 0.1, "momentum": 0.8, "weight_decay": 0.05}], {})
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.8, nesterov=True)
    for step in range(5):
        for weight, optimizer in ((ours, muon), (theirs, sgd)):
            optimizer.zero_grad()
            (weight**2).sum().mul(step + 1).backward()
        theirs.data *= 1 - 0.1 * 0.05  # decoupled, as in AdamW
        muon.step()
        sgd.step()
        torch.testing.assert_close(ours, theirs)


def test_muon_keeps_filters_on_their_sphere():
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    group = {"params": [weight], "lr": 0.0, "momentum": 0.9}
    optimizer = Muon([group], {})
    weight.sum().backward()
    optimizer.step()
    assert weight.norm().item() == pytest.approx(2, rel=1e-5)  # the root of four filters


def by_the_book(weight, velocity, gradient, group):
    """One update of Muon as Jordan's post writes it, in float64, one weight at a time."""
    velocity = group["momentum"] * velocity + gradient
    update = gradient + group["momentum"] * velocity
    if weight.ndim == 4:
        weight = weight * len(weight) ** 0.5 / weight.norm()
        x = update.flatten(1) / update.norm()
        for _ in range(3):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        update = x.view_as(weight)
    else:
        weight = weight * (1 - group["lr"] * group["weight_decay"])
    return weight - group["lr"] * update, velocity


def test_updates_equal_muon_by_the_book():
    torch.manual_seed(0)
    model = CifarNet(4, 7, pixel_statistics(torch.randint(0, 256, (50, 3, 32, 32)).byte()))
    optimizer = Muon.for_model(model, RECIPE, REFERENCE_BATCH, 1000)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    weights = [(each, group) for group in optimizer.param_groups for each in group["params"]]
    expected = [(each.detach().double(), torch.zeros_like(each).double()) for each, _ in weights]
    for _ in range(3):
        gradients = [torch.randn_like(each).double() for each, _ in weights]
        for (weight, _), gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.float()
        optimizer.step()
        parts = zip(expected, gradients, weights, strict=True)
        expected = [by_the_book(*state, grad, group) for state, grad, (_, group) in parts]
    for (weight, _), (right, _) in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), right, rtol=1e-4, atol=1e-5)


class CountOperations(TorchDispatchMode):
    """Counts what a GPU would launch at least: all operations but views and profiling."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not (function.is_view or function.namespace == "profiler")
        return function(*args, **(kwargs or {}))


def test_an_update_needs_few_launches():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32)).byte()
    model = CifarNet(4, 7, pixel_statistics(images)).to(memory_format=torch.channels_last)
    optimizer = Muon.for_model(model, RECIPE, REFERENCE_BATCH, 1000)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    model(images).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step()  # the first makes the velocities
        with CountOperations() as operations:
            optimizer.step()
    assert operations.count <= 150
    flips, generators = torch.arange(8) > 3, (epoch_generator(0, 0), epoch_generator(0, 0))
    for size in (20, 32):
        with CountOperations() as operations:
            augment(images, flips, size, generators, Config().augmentation)
        assert operations.count <= 45


# --- The schedule of sizes ------------------------------------------------------------------------


def test_sizes_grow():
    sizes = [Config(start_size=20).image_size(update / 20) for update in range(20)]
    assert sizes == [20] * 6 + [26] * 6 + [32] * 8
    assert Config().image_size(0.0) == 32


@pytest.mark.parametrize("count,batch_size", [(20, 128), (50, 16)])
def test_training_has_three_shapes(split, cpu, monkeypatch, count, batch_size):
    """torch.compile makes a variant for each beforehand, so no short batch may come later."""
    data = ImageData("tiny", tuple("abcd"), split.take(slice(count)), split.take(slice(8)))
    words = f"--epochs 10 --batch-size {batch_size} --width 4 --num-workers 0 --eval-every 0"
    config = parse_config([*words.split(), "--compile", "--start-size", "20"])
    shapes = []

    def look(net, inputs, _):
        if net.training:
            shapes.append((*inputs[0].shape, inputs[0].dtype))

    def compile(model, dynamic):
        model.register_forward_hook(look)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    training = Training(config, data, cpu)
    first = set(shapes)
    for _ in range(10):
        training.run_epoch()
    assert len(shapes) == 3 + 10 * len(training.sampler)
    assert {shape[2] for shape in first} == {20, 26, 32} and set(shapes) == first


# --- Numbers of an epoch --------------------------------------------------------------------------


def test_time_left_grows_with_the_images():
    """After the first of ten epochs: two more of 20, three of 26 and four of 32 pixels."""
    words = "--epochs 10 --width 4 --num-workers 0 --start-size 20"
    config = parse_config(words.split())
    numbers = {"train_loss": 0.0, "train_accuracy": 0.0, "data_wait_seconds": 0.0}
    record = {"epoch": 1, "lr": 0.0, "seconds": 100.0, "images_per_second": 1.0} | numbers
    left = 100 * (2 * 20**2 + 3 * 26**2 + 4 * 32**2) / 20**2
    assert classifier.epoch_row(config, "test", record, 100.0).split()[-1] == classifier.duration(
        left
    )


def test_loss_and_accuracy_of_an_epoch_against_torch(split, training, monkeypatch):
    """Without updates and with fixed statistics, the epoch is one pass over all images."""
    real = CifarNet.train
    monkeypatch.setattr(CifarNet, "train", lambda self, mode=True: real(self, False))
    training.optimizer.param_groups[0]["lr"] = 0.0
    monkeypatch.setattr(Training, "update", lambda _: None)
    found, logits = training.train_epoch(), training.model(split.images)
    loss = F.cross_entropy(logits, split.labels, label_smoothing=PLAIN.label_smoothing)
    assert found["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    right = (logits.argmax(1) == split.labels).float().mean()
    assert found["train_accuracy"] == pytest.approx(float(right))
    assert found["images_per_second"] * found["seconds"] == pytest.approx(96)


def test_data_wait_is_measured(training, monkeypatch):
    now = 100.0
    monkeypatch.setattr(classifier.time, "perf_counter", lambda: now)

    def slow():
        nonlocal now
        for number in range(3):
            now += 2.0
            yield [torch.tensor(number)]

    training.loader, batches, told = slow(), [], []
    training.tell_speed = told.append
    for (batch,) in training.batches():
        now += 50.0  # the work on a batch is no wait
        batches.append(int(batch))
    assert batches == [0, 1, 2] and training.wait_seconds == 6.0
    assert told == [52.0]  # seconds a batch, once they are known


def test_loss_falls(split, cpu):
    training = Training(replace(PLAIN, lr=0.15), data_of(split), cpu)
    first = training.train_epoch()
    for _ in range(5):
        last = training.train_epoch()
    assert last["train_loss"] < 0.7 * first["train_loss"]
    assert last["train_accuracy"] > first["train_accuracy"]


def test_an_epoch_augments_as_its_settings_say(split, cpu, monkeypatch):
    """Flips alternate by image and epoch; draws differ by epoch, seed and process."""
    strength = {"start_size": 20, "shift": 3, "cutout": 5, "letterbox_share": 0.5}
    config = replace(RECIPE, batch_size=96, epochs=10, **strength)
    real, calls, seeds = classifier.augment, [], set()

    def recorded(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(classifier, "augment", recorded)
    for flip, seed, rank in ((True, 0, 0), (False, 1, 0), (True, 0, 1)):
        training = Training(replace(config, seed=seed), data_of(split, flip=flip), cpu)
        training.runtime = replace(cpu, rank=rank)
        for epoch in (0, 1):
            order = torch.from_numpy(next(iter(training.sampler)))  # one batch an epoch
            training.train_epoch()
            images, flips, size, generators, chosen = calls.pop()
            assert not calls and torch.equal(images, split.images[order])
            assert torch.equal(flips, alternate_flip(order, epoch) & flip)
            assert (size, chosen) == (20, config.augmentation)
            seeds |= {each.initial_seed() for each in generators}
    assert len(seeds) == 6


def test_the_schedule_ends_with_the_last_update(split, cpu):
    """Also where an epoch's last update has fewer micro-batches: six, four an update."""
    config = replace(PLAIN, accumulate_grad_steps=4, epochs=3)
    training = Training(config, data_of(split), cpu)
    for _ in range(3):
        last = training.train_epoch()
    peak = training.optimizer.param_groups[0]["peak_lr"]
    assert (training.updates, training.done) == (6, 1.0)
    assert last["lr"] == pytest.approx(peak / 6)


@pytest.mark.parametrize(
    "epochs,asked,passed",
    [(1, None, False), (400, None, None), (1, True, True), (400, False, False)],
)
def test_short_trainings_do_not_compile_by_themselves(
    split, cpu, monkeypatch, epochs, asked, passed
):
    seen = []

    def accelerate(net, _, compile, *__):
        seen.append(compile)
        return net, classifier.CompileReport(False, "")

    monkeypatch.setattr(classifier, "accelerate", accelerate)
    monkeypatch.setattr(classifier, "device_name", str)
    cuda = replace(cpu, device=CUDA)
    Training(replace(PLAIN, epochs=epochs, compile=asked), data_of(split), cuda)  # six an epoch
    assert seen == [passed]


@pytest.mark.parametrize("smoothing,classes", [(0.2, 10), (0.2, 2), (0.5, 100)])
def test_the_temperature_undoes_label_smoothing(smoothing, classes):
    """A network that answers what the labels ask for gets the margin of a certain answer."""
    asked = F.one_hot(torch.tensor(0), classes) * (1 - smoothing) + smoothing / classes
    logits = asked.log() / classifier.usual_temperature(smoothing, classes)
    assert float(logits[0] - logits[1]) == pytest.approx(classifier.CERTAIN_MARGIN, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 1e-4])
def test_without_smoothing_the_temperature_only_corrects_the_mean_over_views(smoothing):
    assert classifier.usual_temperature(smoothing, 10) == classifier.MOST_TEMPERATURE < 1


# --- Mixed precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_about_the_same(split, cpu, dtype):
    half = data_of(split.take(slice(48)))
    plain = Training(PLAIN, half, cpu).train_epoch()
    training = Training(PLAIN, half, Runtime(CPU, dtype))
    mixed = training.train_epoch()
    assert mixed["train_loss"] == pytest.approx(plain["train_loss"], rel=0.02)
    assert (training.updates, training.skipped) == (3, 0)
    assert training.scaler.is_enabled() == (dtype is torch.float16)
    assert all(each.dtype == torch.float32 for each in training.model.parameters())


def test_a_skipped_step_does_not_advance_the_schedule(split):
    data = data_of(split.take(slice(16)))
    training = Training(PLAIN, data, Runtime(CPU, torch.float16))
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # overflows float16
    training.train_epoch()
    assert (training.updates, training.skipped, training.done) == (0, 1, 0.0)
    assert all(map(torch.equal, before, training.model.parameters()))
    training.scaler.update(2.0**10)
    training.train_epoch()
    assert (training.updates, training.skipped) == (1, 1)
    peak = training.optimizer.param_groups[0]["peak_lr"]
    assert training.optimizer.param_groups[0]["lr"] == peak  # still the peak
    assert not torch.equal(before[-1], list(training.model.parameters())[-1])


# --- Devices --------------------------------------------------------------------------------------


@pytest.fixture
def fake_cuda(monkeypatch):
    """Tensors that have a device and a shape but no values: a GPU that need not be there.

    What needs values or a real device is put in its place: the random generators, the numbers that
    augmentation draws on the CPU, backward and the sums of an epoch.
    """
    if torch.__version__.startswith("2.6."):
        pytest.skip("its fake tensors ask for a driver")
    draw = np.random.default_rng(0)
    device_randint = torch.randint

    def randint(*args, **options):
        if "device" in options:
            return device_randint(*args, **options)
        *limits, shape = args
        return draw.integers(*limits, size=shape)

    def on_cpu(seed, epoch, stream=0, device=CPU):
        return epoch_generator(seed, epoch, stream)

    def sums(runtime, tensor):
        assert tensor.device == runtime.device
        return np.ones(3)

    monkeypatch.setattr(torch, "rand", lambda *_, **__: draw.random())
    monkeypatch.setattr(torch, "randint", randint)
    monkeypatch.setattr(classifier, "epoch_generator", on_cpu)
    monkeypatch.setattr(Runtime, "sum", sums)
    monkeypatch.setattr(Runtime, "average_buffers", lambda *_: None)
    # autocast turns itself off where there is no GPU.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeTensorMode():
        yield


def fake_batches(count, size=20):
    """Batches as the loader gives them, on the CPU."""
    images = torch.empty(size, 3, 32, 32, dtype=torch.uint8)
    return [[images, torch.zeros(size).long(), torch.arange(size)] for _ in range(count)]


def fake_training(monkeypatch, config):
    """A training on the fake GPU; `backward` gives gradients of zero."""
    with CUDA:
        model = CifarNet(4, 4)

    def backward(loss):
        assert loss.device == CUDA
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(classifier, "build_model", lambda *_: model)
    not_compiled = classifier.CompileReport(False, "")
    monkeypatch.setattr(classifier, "accelerate", lambda net, *_: (net, not_compiled))
    monkeypatch.setattr(classifier, "device_name", str)
    none = Split(torch.empty(120, 3, 32, 32, dtype=torch.uint8), torch.zeros(120).long())
    training = Training(config, data_of(none), Runtime(CUDA))
    training.runtime = Runtime(CUDA, torch.float16)  # without the scaler, which reads values
    training.loader = fake_batches(6)
    return training


def test_the_fake_gpu_notices_mixed_devices(fake_cuda):
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3) + torch.ones(3, device=CUDA)


def test_devices_never_mix_in_an_epoch(fake_cuda, monkeypatch):
    """Augmentation at all sizes, forward, loss, sums and the optimizer's steps."""
    config = replace(RECIPE, start_size=20, batch_size=20, epochs=1, compile=False)
    training, seen = fake_training(monkeypatch, config), []
    training.model.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    training.train_epoch()
    assert training.updates == 6
    assert [images.shape[-1] for images, _ in seen] == [20, 20, 26, 26, 32, 32]
    assert {tensor.device for pair in seen for tensor in pair} == {CUDA}
    assert {logits.dtype for _, logits in seen} == {torch.float16}
    assert {each["velocity"].device for each in training.optimizer.state.values()} == {CUDA}


# --- Evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tta", [False, True])
def test_evaluation_against_numpy(split, training, cpu, tta, monkeypatch):
    training.train_epoch()
    model = training.model
    monkeypatch.setattr(classifier, "EVALUATION_BATCH", 40)  # 96 images: a short last batch
    found = evaluate(model, data_of(split, flip=True), cpu, tta, 2.0)
    images, truth = split.images, split.labels.numpy()
    views = shifted_views(images, True) if tta else images[None]
    with torch.inference_mode():
        logits = torch.stack([model(view) for view in views])
    answers, plain = (logits.mean(0) / 2).softmax(1).max(1), logits[0].argmax(1).numpy()
    expected_loss = float(F.cross_entropy(logits[0], split.labels))
    assert found.loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.accuracy == pytest.approx((plain == truth).mean())
    confidence, answer = (each.numpy() for each in answers)
    assert found.accuracy_tta == (pytest.approx((answer == truth).mean()) if tta else None)
    gaps, bins = confidence - (answer == truth), (confidence * 15).astype(int)
    ece = sum(abs(gaps[bins == each].sum()) for each in range(15)) / 96
    assert found.ece == pytest.approx(ece, abs=1e-5) and found.temperature == 2.0
    expected = np.zeros((4, 4))
    np.add.at(expected, (truth, plain), 1)
    np.testing.assert_array_equal(found.confusion, expected)
    assert found.per_class(tuple("abcd"))["b"] == pytest.approx(expected[1, 1] / 24)


def test_details_name_the_most_frequent_confusions():
    confusion = torch.tensor([[5, 1, 0], [3, 2, 0], [0, 0, 4]])
    found = classifier.Evaluation(1.0, 0.5, None, 0.1, 1.0, confusion, 1.0)
    *lines, last = found.details(("ant", "bee", "cow")).splitlines()
    assert [line.split() for line in lines] == [
        ["ant", "83.33%"],
        ["bee", "40.00%"],
        ["cow", "100.00%"],
    ]
    assert last == "  most confused: bee as ant 3x, ant as bee 1x"
    gap = found._replace(confusion=torch.tensor([[2, 1], [0, 0]]))  # no image of the second class
    assert gap.per_class(("ant", "bee")) == {"ant": pytest.approx(2 / 3)}
    assert "bee" not in gap.details(("ant", "bee")).splitlines()[0]
    assert found._replace(confusion=torch.eye(2)).details("ab").endswith("most confused: none")


def test_a_process_may_have_no_image_to_evaluate(model):
    for views in (1, 6):
        empty = torch.empty(views, 0, 3, 32, 32, dtype=torch.uint8)
        assert view_logits(model.eval(), [empty]).shape == (views, 0, 4)


def test_processes_evaluate_each_image_once(split, model, monkeypatch):
    seen = []
    monkeypatch.setattr(Runtime, "gather", lambda _, tensor: seen.append(tensor) or tensor)
    for rank in range(5):
        evaluate(model, data_of(split), Runtime(CPU, rank=rank, world_size=5), False, 1.0)
    labels = seen[2::3]
    assert list(map(len, labels)) == [20, 19, 19, 19, 19]
    assert torch.equal(torch.cat(labels).bincount(), split.labels.bincount())


@pytest.mark.parametrize("tta", [False, True])
def test_evaluation_of_a_network_that_gives_nan_is_refused(split, model, cpu, tta):
    model.head.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite.*--lr"):
        evaluate(model, data_of(split), cpu, tta, 1.0)
