"""The loop: schedules, accumulation, mixed precision, sums. Exact where it can be."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import classifier
from classifier import (BatchSampler, Meter, ModelSettings, Runtime, Split, TrainSettings, TrainState, UserError,
                        accumulation_windows, build_loader, build_model, build_optimizer, evaluate, learning_rate,
                        loader_options, pixel_statistics, train_epoch)

PLAIN = TrainSettings(shift=0, flip=False, cutout=0)


@pytest.fixture(scope="module")
def split():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(96) % 4
    images = (labels.view(-1, 1, 1, 1) * 50 + torch.randint(0, 50, (96, 3, 32, 32), generator=generator)).byte()
    return Split(images, labels)


@pytest.fixture
def model(split):
    torch.manual_seed(0)
    return build_model(ModelSettings(width=4), 4, pixel_statistics(split.images))


def state_of(model, runtime, settings=PLAIN, rate=0.1):
    return TrainState(model, model, build_optimizer(model, settings), lambda _: rate, runtime)


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
        from dataclasses import replace
        train(state_of(net, cpu), split, cpu, replace(PLAIN, accumulate_grad_steps=steps), batch_size)
    for name, tensor in big.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_short_last_window_is_a_whole_update(split, model, cpu):
    from dataclasses import replace
    state = state_of(model, cpu)
    train(state, split, cpu, replace(PLAIN, accumulate_grad_steps=4))          # 6 batches: windows of 4 and 2
    assert state.updates == 2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rate_rises_to_the_peak_and_falls_to_zero():
    settings = TrainSettings(lr=0.5, warmup=0.25)
    rates = [learning_rate(update, 100, settings, batch=256) for update in range(100)]
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(1.0, rel=0.02) and peak in (24, 25)      # twice the reference batch
    assert 0 < rates[0] < 0.1 and 0 < rates[-1] < 0.02
    assert np.all(np.diff(rates[:peak]) > 0) and np.all(np.diff(rates[peak + 1:]) < 0)
    for warmup in (0.0, 1.0):
        ends = [learning_rate(update, 10, TrainSettings(warmup=warmup), 128) for update in (0, 9)]
        assert all(0 < rate <= 0.125 for rate in ends) and (ends[0] > ends[1]) == (warmup == 0)


def test_one_update_in_all_learns():
    assert learning_rate(0, 1, TrainSettings(), 128) > 0.05


def test_biases_do_not_decay_and_frozen_weights_are_left_out(model):
    filters, biases = build_optimizer(model, TrainSettings(weight_decay=0.1, bias_lr_scale=7)).param_groups
    assert (filters["weight_decay"], filters["lr_scale"]) == (0.1, 1) and all(p.ndim > 1 for p in filters["params"])
    assert (biases["weight_decay"], biases["lr_scale"]) == (0, 7) and all(p.ndim == 1 for p in biases["params"])
    assert not any(parameter is model.stem.weight for parameter in filters["params"])


def test_meter_against_numpy(cpu):
    rng, meter, losses, correct = np.random.default_rng(0), Meter(), [], []
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
    meter = Meter()
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
    state = state_of(model, cpu, rate=0.05)
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


def test_loss_that_is_not_finite_stops(split, model, cpu):
    with pytest.raises(UserError, match=r"no longer finite \(epoch 1, batch \d+, learning rate"):
        for _ in range(5):
            train(state_of(model, cpu, rate=1e30), split, cpu, PLAIN)


@pytest.mark.parametrize("tta", [False, True])
def test_evaluation_against_numpy(split, model, cpu, tta, monkeypatch):
    train(state_of(model, cpu), split, cpu, PLAIN)
    monkeypatch.setattr(classifier, "EVALUATION_BATCH", 40)                    # 96 images: a short last batch
    found = evaluate(model, split, 4, cpu, tta=tta, mirrors=True, temperature=2.0)
    with torch.inference_mode():
        logits = classifier.logits_of_views(model, split.images, tta, True)
    truth, plain = split.labels.numpy(), logits[0].argmax(1).numpy()
    assert found.loss == pytest.approx(float(F.cross_entropy(logits[0], split.labels)), rel=1e-5)
    assert found.accuracy == pytest.approx((plain == truth).mean())
    confidence, answer = (each.numpy() for each in (logits.mean(0) / 2).softmax(1).max(1))
    assert found.accuracy_tta == (pytest.approx((answer == truth).mean()) if tta else None)
    ece = sum(abs((confidence - (answer == truth))[inside].sum()) for low in range(15)
              if (inside := (confidence * 15).astype(int) == low).any()) / 96
    assert found.ece == pytest.approx(ece, abs=1e-5)
    expected = np.zeros((4, 4))
    np.add.at(expected, (truth, plain), 1)
    np.testing.assert_array_equal(found.confusion, expected)
    assert found.per_class(tuple("abcd"))["b"] == pytest.approx(expected[1, 1] / 24)


def test_state_goes_on_bit_for_bit(split, model, cpu):
    other = copy.deepcopy(model)
    straight, broken = state_of(model, cpu), state_of(other, cpu)
    for state in (straight, broken):
        train(state, split, cpu, PLAIN)
        state.epoch += 1
    saved = copy.deepcopy(broken.state_dict())
    fresh = state_of(build_model(ModelSettings(width=4), 4), cpu)
    fresh.load_state_dict(saved)
    for state in (straight, fresh):
        train(state, split, cpu, PLAIN)
    assert fresh.updates == straight.updates == 12
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, fresh.model.state_dict()[name]), name


@pytest.mark.cuda
def test_float16_accumulation_on_cuda_equals_the_big_batch(split, model):
    from dataclasses import replace
    gpu = Runtime(torch.device("cuda"), torch.float16)
    nets = [copy.deepcopy(model).cuda().to(memory_format=torch.channels_last) for _ in range(2)]
    for net, batch_size, steps in zip(nets, (48, 12), (1, 4)):
        net.train = lambda mode=True, net=net: torch.nn.Module.train(net, False)
        train(state_of(net, gpu, rate=0.01), split, gpu, replace(PLAIN, accumulate_grad_steps=steps), batch_size)
    for name, tensor in nets[0].state_dict().items():
        torch.testing.assert_close(nets[1].state_dict()[name], tensor, atol=1e-3, rtol=1e-2)
