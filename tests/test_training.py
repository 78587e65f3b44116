"""The loop: schedules, accumulation, mixed precision, sums. Exact where it can be."""
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import classifier
from classifier import (REFERENCE_BATCH, BatchSampler, Meter, ModelSettings, Muon, Runtime, Split, TrainSettings,
                        TrainState, UserError, accumulation_windows, build_loader, build_model, build_optimizer,
                        evaluate, fit_temperature, image_size, images_of_epoch, loader_options, orthogonalize,
                        pixel_statistics, shrink, train_epoch)

PLAIN = TrainSettings(shift=0, flip=False, cutout=0, letterbox_share=0, start_size=32, hard_share=1.0)


@pytest.fixture(scope="module")
def split():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(96) % 4
    images = (labels.view(-1, 1, 1, 1) * 50 + torch.randint(0, 50, (96, 3, 32, 32), generator=generator)).byte()
    return Split(images, labels)


@pytest.fixture
def model(split):
    torch.manual_seed(0)
    return build_model(ModelSettings(width=4, depth=3), 4, pixel_statistics(split.images))


def state_of(model, runtime, settings=PLAIN, total=100):
    return TrainState(model, model, build_optimizer(model, settings, REFERENCE_BATCH), total, 96, runtime)


def train(state, split, runtime, settings, batch_size=16):
    sampler = BatchSampler(len(split), batch_size, runtime, shuffle=True)
    sampler.epoch = state.epoch
    loader = build_loader(split, sampler, loader_options(0, runtime))
    return train_epoch(state, loader, len(sampler), settings, 0, False, runtime)


@pytest.mark.parametrize("count,steps,updates,last", [(391, 4, 98, 3), (7, 4, 2, 3), (13, 5, 3, 3), (0, 4, 0, 0),
                                                      (3, 100, 1, 3), (8, 1, 8, 1)])
def test_windows(count, steps, updates, last):
    windows = list(accumulation_windows(range(count), count, steps))
    assert [batch for batch, _, _ in windows] == list(range(count))
    assert sum(closes for _, _, closes in windows) == updates
    assert not windows or windows[-1][2]
    assert sum(share for _, share, _ in windows) == pytest.approx(updates)
    assert [share for _, share, _ in windows][count - last:] == [1 / last] * last if last else True


def test_accumulation_equals_the_big_batch(split, model, cpu):
    model.train = lambda mode=True: torch.nn.Module.train(model, False)        # BatchNorm in eval mode
    model.eval()
    big, small = model, copy.deepcopy(model)
    small.train = lambda mode=True: torch.nn.Module.train(small, False)
    for net, batch_size, steps in ((big, 48, 1), (small, 12, 4)):
        train(state_of(net, cpu), split, cpu, replace(PLAIN, accumulate_grad_steps=steps), batch_size)
    for name, tensor in big.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], tensor, atol=5e-6, rtol=1e-5)


def test_a_short_last_window_is_a_whole_update(split, model, cpu):
    state = state_of(model, cpu)
    train(state, split, cpu, replace(PLAIN, accumulate_grad_steps=4))          # 6 batches: windows of 4 and 2
    assert state.updates == 2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rates_fall_straight_from_the_peak(model, cpu):
    state, seen = state_of(model, cpu, total=4), []
    for _ in range(4):
        state.update()
        seen.append([group["lr"] for group in state.optimizer.param_groups])
    peaks = [group["peak_lr"] for group in state.optimizer.param_groups]
    assert peaks == [PLAIN.lr, PLAIN.head_lr, PLAIN.bias_lr]
    for rates, share in zip(seen, (1, 0.75, 0.5, 0.25)):
        assert rates == pytest.approx([share * peak for peak in peaks])


@pytest.mark.parametrize("batch", [64, 256, 2048])
def test_every_batch_goes_as_far_with_an_epoch(model, batch):
    """Same gradient all the time: where plain SGD ends after 2,048 images, and how far momentum looks back."""
    ends = []
    for size in (REFERENCE_BATCH, batch):
        optimizer = build_optimizer(model, TrainSettings(), size)
        momentum, rate = optimizer.param_groups[1]["momentum"], optimizer.param_groups[1]["peak_lr"]
        ends.append((rate / (1 - momentum) / size, momentum ** (1 / size), optimizer.param_groups[0]["peak_lr"] / size))
    assert ends[0] == pytest.approx(ends[1])


def test_what_the_optimizer_trains(model):
    filters, head, biases = build_optimizer(model, TrainSettings(weight_decay=0.1), REFERENCE_BATCH).param_groups
    assert len(filters["params"]) == 9 and filters["weight_decay"] == 0
    assert all(weight is not model.stem.weight for weight in filters["params"])
    assert [weight is model.head.weight for weight in head["params"]] == [True]
    assert head["weight_decay"] * head["peak_lr"] == pytest.approx(0.1)
    assert all(weight.ndim == 1 for weight in biases["params"])


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonalize_against_the_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ orthogonalize(matrix) @ right.T
    torch.testing.assert_close(turned, turned.diag().diag(), atol=1e-4, rtol=0)          # the same singular vectors
    assert 0.68 < turned.diag()[values > 0.02 * matrix.norm()].min() and turned.diag().max() < 1.21
    torch.testing.assert_close(orthogonalize(1000 * matrix), orthogonalize(matrix), atol=1e-4, rtol=1e-4)


def test_muon_is_nesterov_sgd_where_it_does_not_orthogonalize():
    weights = [torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    ours = Muon([{"params": weights[:1], "lr": 0.1, "momentum": 0.8, "weight_decay": 0.05}])
    theirs = torch.optim.SGD(weights[1:], lr=0.1, momentum=0.8, nesterov=True)
    for step in range(5):
        for weight, optimizer in zip(weights, (ours, theirs)):
            optimizer.zero_grad()
            (weight ** 2).sum().mul(step + 1).backward()
            if optimizer is theirs:
                weight.data *= 1 - 0.1 * 0.05                                            # decoupled, as in AdamW
            optimizer.step()
        torch.testing.assert_close(*weights)


def test_muon_keeps_filters_on_their_sphere():
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    optimizer = Muon([{"params": [weight], "lr": 0.0, "momentum": 0.9}])
    weight.sum().backward()
    optimizer.step()
    assert weight.norm().item() == pytest.approx(2, rel=1e-5)                            # the root of four filters


def test_epochs_shrink_to_the_hard_images():
    settings = TrainSettings(epochs=4, hard_share=0.5)
    assert [images_of_epoch(epoch, settings, 800) for epoch in range(4)] == [800, 700, 600, 500]
    assert images_of_epoch(3, replace(settings, hard_share=1.0), 800) == 800


def test_hardest_are_those_with_the_greatest_last_loss(split, model, cpu):
    state = state_of(model, cpu)
    assert torch.equal(state.hardest(3), torch.arange(3))                                # nothing seen yet
    train(state, split, cpu, PLAIN)
    assert (state.losses > 0).all() and state.losses.isfinite().all()
    before, chosen = state.losses.clone(), state.hardest(32)
    assert state.losses[chosen].min() >= state.losses.sort().values[-32]
    state.epoch = 1
    sampler = BatchSampler(len(split), 16, cpu, shuffle=True)
    sampler.chosen = chosen
    loader = build_loader(split, sampler, loader_options(0, cpu))
    train_epoch(state, loader, len(sampler), PLAIN, 0, False, cpu)
    changed = (state.losses != before).nonzero().flatten()
    assert torch.equal(changed, chosen.sort().values)                                    # the others keep theirs


def test_images_between_bars_keep_their_last_loss(split, model, cpu):
    state = state_of(model, cpu)
    train(state, split, cpu, replace(PLAIN, letterbox_share=0.25))
    assert state.losses.isinf().sum() == 6 * 4                                           # their bars made them harder


@pytest.mark.parametrize("batch_size,expected", [(1, 0), (4, 0.1 * 96)])
def test_small_batches_have_bars_too(split, model, cpu, batch_size, expected):
    state = state_of(model, cpu)
    train(state, split, cpu, replace(PLAIN, letterbox_share=0.1), batch_size)
    assert state.losses.isinf().sum() == pytest.approx(expected, abs=8)


def test_the_lowest_layers_are_frozen_late(split, model, cpu):
    settings = replace(PLAIN, freeze_after=0.5)
    state = state_of(model, cpu, total=12)                                               # two epochs of six updates
    for trained in (True, False):
        before = copy.deepcopy(model.state_dict())
        train(state, split, cpu, settings)
        state.epoch += 1
        for name, changes in (("stem.bias", trained), ("blocks.0.convs.0.weight", trained),
                              ("blocks.1.convs.0.weight", True)):
            assert torch.equal(before[name], model.state_dict()[name]) != changes


def test_sizes_grow():
    sizes = [image_size(update / 20, TrainSettings(start_size=20)) for update in range(20)]
    assert sizes == [20] * 6 + [26] * 6 + [32] * 8
    assert image_size(0.0, TrainSettings(start_size=32)) == 32


def test_shrink_against_pillow():
    from PIL import Image
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BILINEAR)).astype(int)
    ours = shrink(torch.from_numpy(image).permute(2, 0, 1)[None], 20)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() <= 1                                            # Pillow rounds


def test_meter_against_numpy(cpu):
    rng, meter, losses, correct = np.random.default_rng(0), Meter(3, cpu.device), [], []
    for size in (5, 5, 2):
        logits, labels = torch.tensor(rng.normal(size=(size, 3))).float(), torch.tensor(rng.integers(0, 3, size))
        meter.add(F.cross_entropy(logits, labels), logits, labels)
        losses += F.cross_entropy(logits, labels, reduction="none").tolist()
        correct += (logits.argmax(1) == labels).tolist()
    result = meter.result(cpu)
    assert result["images"] == 12
    assert result["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["train_accuracy"] == pytest.approx(np.mean(correct))


def test_data_wait_is_measured():
    import time

    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number
    meter = Meter(3, torch.device("cpu"))
    assert list(meter.timed(slow())) == [0, 1, 2]
    assert 0.06 <= meter.wait_seconds < 0.5


def test_skipped_steps_do_not_advance_the_schedule(model, cpu):
    class Overflows:
        scales = iter([8.0, 4.0, 4.0, 4.0])

        def get_scale(self):
            return next(self.scales)

        def step(self, _):
            pass

        def update(self):
            pass
    state = state_of(model, cpu)
    state.scaler = Overflows()
    state.update()
    assert (state.updates, state.skipped) == (0, 1)
    state.update()
    assert (state.updates, state.skipped) == (1, 1)


def test_scaler_only_for_float16(model):
    cpu = torch.device("cpu")
    for dtype, enabled in ((None, False), (torch.bfloat16, False), (torch.float16, True)):
        assert state_of(model, Runtime(cpu, dtype)).scaler.is_enabled() == enabled


def test_loss_falls(split, model, cpu):
    state = state_of(model, cpu)
    first = train(state, split, cpu, PLAIN)
    for _ in range(8):
        last = train(state, split, cpu, PLAIN)
    assert last["train_loss"] < 0.7 * first["train_loss"] and last["train_accuracy"] > first["train_accuracy"]


def test_bfloat16_trains_about_the_same(split, model, cpu):
    other = copy.deepcopy(model)
    plain = train(state_of(model, cpu), split, cpu, PLAIN)
    mixed = train(state_of(other, cpu), split, Runtime(torch.device("cpu"), torch.bfloat16), PLAIN)
    assert mixed["train_loss"] == pytest.approx(plain["train_loss"], rel=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in other.parameters())


def test_loss_that_is_not_finite_stops(split, model, cpu, monkeypatch):
    monkeypatch.setattr(classifier, "orthogonalize", lambda matrix: matrix * float("nan"))
    with pytest.raises(UserError, match=r"no longer finite \(epoch 1, batch \d+, learning rate"):
        train(state_of(model, cpu), split, cpu, PLAIN)


@pytest.mark.parametrize("tta", [False, True])
def test_evaluation_against_numpy(split, model, cpu, tta, monkeypatch):
    train(state_of(model, cpu), split, cpu, PLAIN)
    monkeypatch.setattr(classifier, "EVALUATION_BATCH", 40)                    # 96 images: a short last batch
    found = evaluate(model, split, 4, cpu, tta=tta, mirrors=True, temperature=2.0)
    with torch.inference_mode():
        logits, answers = classifier.logits_with_tta(model, split.images, tta, True)
    truth, plain = split.labels.numpy(), logits.argmax(1).numpy()
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, split.labels)), rel=1e-5)
    assert found.accuracy == pytest.approx((plain == truth).mean())
    confidence, answer = (each.numpy() for each in (answers / 2).softmax(1).max(1))
    assert found.accuracy_tta == (pytest.approx((answer == truth).mean()) if tta else None)
    ece = sum(abs((confidence - (answer == truth))[inside].sum()) for low in range(15)
              if (inside := (confidence * 15).astype(int) == low).any()) / 96
    assert found.ece == pytest.approx(ece, abs=1e-5)
    expected = np.zeros((4, 4))
    np.add.at(expected, (truth, plain), 1)
    np.testing.assert_array_equal(found.confusion, expected)
    assert found.per_class(tuple("abcd"))["b"] == pytest.approx(expected[1, 1] / 24)


def test_fitted_temperature_has_the_least_loss_and_undoes_a_scale(cpu):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()      # calibrated by construction
    for scale in (0.3, 1.0, 4.0):
        assert fit_temperature(scale * logits, labels, cpu) == pytest.approx(scale, rel=0.05)
    model = torch.nn.Flatten()                                                           # pixels are its logits
    split = Split((logits - logits.min()).mul(8).round().byte()[:, :, None, None], labels)
    found = evaluate(model, split, 5, cpu, tta=False, mirrors=False)
    assert found.temperature == pytest.approx(8, rel=0.05) and found.ece < 0.01
    assert evaluate(model, split, 5, cpu, tta=False, mirrors=False, temperature=1.0).ece > 0.1


def test_state_goes_on_bit_for_bit(split, model, cpu):
    settings = TrainSettings(start_size=20, freeze_after=0.4)                            # frozen from the second epoch
    other = copy.deepcopy(model)
    straight, broken = (state_of(each, cpu, settings, total=12) for each in (model, other))
    for state in (straight, broken):
        train(state, split, cpu, settings)
        state.epoch += 1
    saved = copy.deepcopy(broken.state_dict())
    fresh = state_of(build_model(ModelSettings(width=4, depth=3), 4), cpu, settings, total=12)
    fresh.load_state_dict(saved)
    for state in (straight, fresh):
        train(state, split, cpu, settings)
    assert fresh.updates == straight.updates == 12
    assert torch.equal(straight.losses, fresh.losses)
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, fresh.model.state_dict()[name]), name


@pytest.mark.cuda
def test_float16_accumulation_on_cuda_equals_the_big_batch(split, model):
    gpu = Runtime(torch.device("cuda"), torch.float16)
    nets = [copy.deepcopy(model).cuda().to(memory_format=torch.channels_last) for _ in range(2)]
    for net, batch_size, steps in zip(nets, (48, 12), (1, 4)):
        net.train = lambda mode=True, net=net: torch.nn.Module.train(net, False)
        train(state_of(net, gpu, rate=0.01), split, gpu, replace(PLAIN, accumulate_grad_steps=steps), batch_size)
    for name, tensor in nets[0].state_dict().items():
        torch.testing.assert_close(nets[1].state_dict()[name], tensor, atol=1e-3, rtol=1e-2)
