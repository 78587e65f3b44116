"""The loop: schedules, accumulation, mixed precision, sums. Exact where it can be."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, run, same, weights
from torch._subclasses.fake_tensor import FakeTensorMode

import classifier
from classifier import (
    REFERENCE_BATCH,
    BatchSampler,
    CifarNet,
    ImageData,
    Meter,
    Muon,
    RecipeSettings,
    Runtime,
    Split,
    Training,
    TrainState,
    UserError,
    accumulation_windows,
    build_loader,
    epoch_generator,
    evaluate,
    fit_temperature,
    loader_options,
    orthogonalize,
    parse_config,
    pixel_statistics,
    shifted_views,
    train_epoch,
    view_logits,
)

RECIPE = RecipeSettings(width=4).resolve(None, flip=True)
# Without augmentation.
PLAIN = replace(RECIPE, shift=0, flip=False, cutout=0, letterbox_share=0.0)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


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


def state_of(model, runtime, recipe=PLAIN, total=100):
    optimizer = Muon.for_model(model, recipe, REFERENCE_BATCH)
    return TrainState(model, model, optimizer, total, runtime)


def train(state, split, recipe=PLAIN, batch_size=16, steps=1):
    """One epoch; six batches unless told otherwise."""
    sampler = BatchSampler(len(split), batch_size, state.runtime, 0)
    sampler.epoch = state.epoch
    loader = build_loader(split, sampler, loader_options(0, state.runtime))
    return train_epoch(state, loader, len(sampler), steps, recipe, seed=0)


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
def test_accumulation_equals_the_big_batch(split, model, monkeypatch, runtime, tolerance):
    """BatchNorm stays in eval mode: its statistics are a batch's own."""
    real = CifarNet.train
    monkeypatch.setattr(CifarNet, "train", lambda self, mode=True: real(self, False))
    nets = [copy.deepcopy(model).to(runtime.device) for _ in range(2)]
    for net, batch_size, steps in zip(nets, (48, 12), (1, 4), strict=True):
        state = state_of(net.eval(), runtime, replace(PLAIN, lr=0.01))
        train(state, split, batch_size=batch_size, steps=steps)
        assert (state.updates, state.skipped) == (2, 0)
    big, small = (net.state_dict() for net in nets)
    assert not torch.equal(big["head.weight"].cpu(), model.head.weight)
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


def test_rates_fall_straight_from_the_peak(model, cpu):
    state, seen = state_of(model, cpu, total=4), []
    for _ in range(4):
        state.update()
        seen.append([group["lr"] for group in state.optimizer.param_groups])
    peaks = [PLAIN.lr, 937.5 * PLAIN.lr, 73 * PLAIN.lr]
    for rates, share in zip(seen, (1, 0.75, 0.5, 0.25), strict=True):
        assert rates == pytest.approx([share * peak for peak in peaks])


@pytest.mark.parametrize("batch", [64, 256, 2048])
def test_every_batch_goes_as_far_with_an_epoch(model, batch):
    """If the gradient stays the same: how far an image moves the weights, for how many images
    momentum remembers it, and how much it lets them decay."""
    found = []
    for size in (REFERENCE_BATCH, batch):
        filters, head, biases = Muon.for_model(model, RECIPE, size).param_groups
        moved = [group["peak_lr"] / (1 - group["momentum"]) for group in (head, biases)]
        decay = [group["peak_lr"] * group["weight_decay"] for group in (head, biases)]
        # An orthogonalized update has one length, however many updates point the same way.
        per_image = [each / size for each in (filters["peak_lr"], *moved, *decay)]
        memory = [group["momentum"] ** (1 / size) for group in (filters, head, biases)]
        found.append(per_image + memory)
    assert found[0] == pytest.approx(found[1])


def test_decay_and_momentum_of_the_groups(model):
    recipe = replace(RECIPE, weight_decay=0.1, momentum=0.7)
    filters, head, biases = Muon.for_model(model, recipe, REFERENCE_BATCH).param_groups
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
    group = {"params": [weight], "lr": 0.0, "momentum": 0.9, "weight_decay": 0.0}
    optimizer = Muon([group], {})
    weight.sum().backward()
    optimizer.step()
    assert weight.norm().item() == pytest.approx(2, rel=1e-5)  # the root of four filters


# --- The schedule of sizes ------------------------------------------------------------------------


def test_sizes_grow():
    sizes = [RecipeSettings(start_size=20).image_size(update / 20) for update in range(20)]
    assert sizes == [20] * 6 + [26] * 6 + [32] * 8
    assert RecipeSettings().image_size(0.0) == 32


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


def test_time_left_grows_with_the_images(split, cpu):
    """After the first of ten epochs: two more of 20, three of 26 and four of 32 pixels."""
    data = ImageData("tiny", tuple("abcd"), split, split)
    words = "--epochs 10 --width 4 --num-workers 0 --start-size 20"
    training = Training(parse_config(words.split()), data, cpu)
    numbers = {"train_loss": 0.0, "train_accuracy": 0.0, "data_wait_seconds": 0.0}
    record = {"epoch": 1, "lr": 0.0, "seconds": 100.0, "images_per_second": 1.0} | numbers
    left = 100 * (2 * 20**2 + 3 * 26**2 + 4 * 32**2) / 20**2
    assert training.row(record, 100.0).split()[-1] == classifier.duration(left)


def test_meter_against_numpy(cpu):
    rng, meter, losses, correct = np.random.default_rng(0), Meter(CPU), [], []
    for size in (5, 5, 2):
        logits = torch.tensor(rng.normal(size=(size, 3))).float()
        labels = torch.tensor(rng.integers(0, 3, size))
        meter.add(F.cross_entropy(logits, labels), logits, labels)
        losses += F.cross_entropy(logits, labels, reduction="none").tolist()
        correct += (logits.argmax(1) == labels).tolist()
    result = meter.result(cpu)
    assert result["images"] == 12
    assert result["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["train_accuracy"] == pytest.approx(np.mean(correct))


def test_data_wait_is_measured(monkeypatch):
    now = 100.0
    monkeypatch.setattr(classifier.time, "perf_counter", lambda: now)

    def slow():
        nonlocal now
        for number in range(3):
            now += 2.0
            yield number

    meter, batches = Meter(CPU), []
    for batch in meter.timed(slow()):
        now += 50.0  # the work on a batch is no wait
        batches.append(batch)
    assert batches == [0, 1, 2] and meter.wait_seconds == 6.0


def test_loss_falls(split, model, cpu):
    state = state_of(model, cpu)
    first = train(state, split)
    for _ in range(5):
        last = train(state, split)
    assert last["train_loss"] < 0.7 * first["train_loss"]
    assert last["train_accuracy"] > first["train_accuracy"]


# --- Mixed precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_about_the_same(split, model, cpu, dtype):
    half = split.take(slice(48))
    plain = train(state_of(copy.deepcopy(model), cpu), half)
    state = state_of(model, Runtime(CPU, dtype))
    mixed = train(state, half)
    assert mixed["train_loss"] == pytest.approx(plain["train_loss"], rel=0.02)
    assert (state.updates, state.skipped) == (3, 0)
    assert state.scaler.is_enabled() == (dtype is torch.float16)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_skipped_step_does_not_advance_the_schedule(split, model):
    state, few = state_of(model, Runtime(CPU, torch.float16), total=3), split.take(slice(16))
    before = [parameter.clone() for parameter in model.parameters()]
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # overflows float16
    train(state, few)
    assert (state.updates, state.skipped, state.progress) == (0, 1, 0.0)
    assert all(map(torch.equal, before, model.parameters()))
    state.scaler.update(2.0**10)
    train(state, few)
    assert (state.updates, state.skipped) == (1, 1)
    assert state.optimizer.param_groups[0]["lr"] == PLAIN.lr  # still the peak
    assert not torch.equal(before[-1], list(model.parameters())[-1])


# --- Devices --------------------------------------------------------------------------------------


@pytest.fixture
def fake_cuda(monkeypatch):
    """Tensors that have a device and a shape but no values: a GPU that need not be there.

    What needs values or a real device is put in its place: the random generators, the numbers that
    augmentation draws on the CPU, backward and the sums of an epoch.
    """
    draw = np.random.default_rng(0)
    device_randint = torch.randint

    def randint(*args, **options):
        if "device" in options:
            return device_randint(*args, **options)
        *limits, shape = args
        return draw.integers(*limits, size=shape)

    def on_cpu(seed, epoch, stream=0, device=CPU):
        return epoch_generator(seed, epoch, stream)

    def result(meter, runtime):
        assert meter.sums.device == runtime.device
        return {"train_loss": 0.0, "images": 1}

    monkeypatch.setattr(torch, "rand", lambda *_, **__: draw.random())
    monkeypatch.setattr(torch, "randint", randint)
    monkeypatch.setattr(classifier, "epoch_generator", on_cpu)
    monkeypatch.setattr(Meter, "result", result)
    # autocast turns itself off where there is no GPU.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeTensorMode():
        yield


def fake_batches(count, size=20):
    """Batches as the loader gives them, on the CPU."""
    images = torch.empty(size, 3, 32, 32, dtype=torch.uint8)
    return [[images, torch.zeros(size).long(), torch.arange(size)] for _ in range(count)]


def fake_training(monkeypatch):
    """A training state on the fake GPU; `backward` gives gradients of zero."""
    with CUDA:
        model = CifarNet(4, 4)

    def backward(loss):
        assert loss.device == CUDA
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    state = state_of(model, Runtime(CUDA), RECIPE, total=6)
    state.runtime = Runtime(CUDA, torch.float16)  # without the scaler, which reads values
    return state


def test_the_fake_gpu_notices_mixed_devices(fake_cuda):
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3) + torch.ones(3, device=CUDA)


def test_devices_never_mix_in_an_epoch(fake_cuda, monkeypatch):
    """Augmentation at all sizes, forward, loss, meter and the optimizer's steps."""
    state, seen = fake_training(monkeypatch), []
    state.model.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    train_epoch(state, fake_batches(6), 6, 1, replace(RECIPE, start_size=20), 0)
    assert state.updates == 6
    assert [images.shape[-1] for images, _ in seen] == [20, 20, 26, 26, 32, 32]
    assert {tensor.device for pair in seen for tensor in pair} == {CUDA}
    assert {logits.dtype for _, logits in seen} == {torch.float16}
    assert {each["velocity"].device for each in state.optimizer.state.values()} == {CUDA}


# --- Evaluation -----------------------------------------------------------------------------------


def data_of(split, classes):
    return ImageData("tiny", tuple("abcde"[:classes]), split, split)


@pytest.mark.parametrize("tta", [False, True])
def test_evaluation_against_numpy(split, model, cpu, tta, monkeypatch):
    train(state_of(model, cpu), split)
    monkeypatch.setattr(classifier, "EVALUATION_BATCH", 40)  # 96 images: a short last batch
    found = evaluate(model, data_of(split, 4), cpu, tta, 2.0, False)
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
    confusion = torch.tensor([[5.0, 1, 0], [3, 2, 0], [0, 0, 4]])
    found = classifier.Evaluation(1.0, 0.5, None, 0.1, 1.0, confusion, 1.0)
    *lines, last = found.details(("ant", "bee", "cow")).splitlines()
    assert [line.split() for line in lines] == [
        ["ant", "83.33%"],
        ["bee", "40.00%"],
        ["cow", "100.00%"],
    ]
    assert last == "  most confused: bee as ant 3x, ant as bee 1x"
    assert found._replace(confusion=torch.eye(2)).details("ab").endswith("most confused: none")


def test_a_process_may_have_no_image_to_evaluate(model):
    for views in (1, 6):
        empty = torch.empty(views, 0, 3, 32, 32, dtype=torch.uint8)
        assert view_logits(model.eval(), [empty]).shape == (views, 0, 4)


def test_processes_evaluate_each_image_once(split, model, cpu, monkeypatch):
    whole = evaluate(model, data_of(split, 4), cpu, False, 1.0, False).confusion
    monkeypatch.setattr(Runtime, "sum", lambda _, tensor: tensor)
    shares = [Runtime(CPU, rank=rank, world_size=5) for rank in range(5)]
    each = [evaluate(model, data_of(split, 4), one, False, 1.0, False).confusion for one in shares]
    assert [int(part.sum()) for part in each] == [20, 19, 19, 19, 19]
    assert torch.equal(torch.stack(each).sum(0), whole)


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("fit", [False, True])
def test_evaluation_of_a_network_that_gives_nan_is_refused(split, model, cpu, tta, fit):
    model.head.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite.*--lr"):
        evaluate(model, data_of(split, 4), cpu, tta, 1.0, fit)


def calibrated(count):
    """Logits (count, 5) and labels drawn from their own probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(count, 5, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()


def test_fitted_temperature_undoes_a_scale(cpu):
    logits, labels = calibrated(10_000)
    for scale in (0.3, 1.0, 4.0):
        found = fit_temperature(scale * logits, labels, 1.0, cpu)
        assert found == pytest.approx(scale, rel=0.05)


def test_fitted_temperature_calibrates_the_evaluation(cpu):
    logits, labels = calibrated(10_000)
    pixels = (logits - logits.min()).mul(8).round().byte()[:, :, None, None]
    data, model = data_of(Split(pixels, labels), 5), torch.nn.Flatten()  # pixels are its logits
    fitted = evaluate(model, data, cpu, False, 1.0, True)
    assert fitted.temperature == pytest.approx(8, rel=0.05) and fitted.ece < 0.01
    assert evaluate(model, data, cpu, False, 1.0, False).ece > 0.1


@pytest.mark.parametrize("usual", [0.54, 1.0])
@pytest.mark.parametrize("margin,share", [(2.0, 0.5), (5.0, 0.8), (20.0, 0.98)])
def test_a_few_right_answers_hardly_move_the_temperature(cpu, usual, margin, share):
    """Without a prior the fit would end at the edge of the grid, 0.1, where all are certain."""
    labels = torch.arange(20) % 10
    found = fit_temperature(margin * F.one_hot(labels, 10).float(), labels, usual, cpu)
    assert share * usual < found < 1.02 * usual


def test_many_images_outweigh_the_prior(cpu):
    logits, labels = calibrated(5000)
    found = [fit_temperature(logits, labels, usual, cpu) for usual in (0.2, 1.0, 5.0)]
    assert max(found) / min(found) < 1.05
