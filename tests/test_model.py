"""The network: uint8 pixels in, logits out, and what augmentation and TTA make of the pixels."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from classifier import (
    AUGMENTATIONS,
    CifarNet,
    Config,
    ConvBlock,
    add_bars,
    alternate_flip,
    augment,
    cut_out,
    epoch_generator,
    load_data,
    move_pixels,
    pixel_statistics,
    resize,
    shifted_views,
    view_logits,
)

# Augmentation that changes nothing.
PLAIN = Config(shift=0, flip=False, cutout=0, letterbox_share=0.0)


def random_images(count, channels=3):
    generator = torch.Generator().manual_seed(1)
    shape = (count, channels, 32, 32)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.fixture
def images():
    return random_images(40)


@pytest.fixture
def gray():
    return random_images(40, channels=1).expand(-1, 3, -1, -1)


@pytest.fixture
def model(images):
    torch.manual_seed(0)
    return CifarNet(4, 7, pixel_statistics(images))


def test_shapes_and_dtypes(model, images):
    for size in (18, 20, 26, 32, 40):
        logits = model(resize(images, size))
        assert logits.shape == (40, 7) and logits.dtype == torch.float32


def test_statistics_are_those_of_the_pixels(images):
    found = pixel_statistics(images)
    values = images.permute(1, 0, 2, 3).reshape(3, -1).numpy() / 255
    np.testing.assert_allclose(found[0], values.mean(1), rtol=1e-6)
    np.testing.assert_allclose(found[1], values.std(1), rtol=1e-5)


def filtered(images):
    """What the stem's filters give: (24, answers)."""
    found = pixel_statistics(images)
    normalized = (images / 255 - found[0].view(3, 1, 1)) / found[1].view(3, 1, 1)
    return F.conv2d(normalized, found[2]).transpose(0, 1).flatten(1)


def test_whitened_patches_are_uncorrelated(images):
    out = filtered(images)
    covariance = out[:12] @ out[:12].T / out.shape[1]
    torch.testing.assert_close(covariance, torch.eye(12), atol=0.01, rtol=0)
    assert torch.equal(out[12:], -out[:12])


def test_every_filter_answers_to_gray_images_too(gray):
    torch.testing.assert_close(filtered(gray).var(1), torch.ones(24), atol=0.02, rtol=0)


def test_images_of_one_colour_do_not_break_the_whitening():
    black = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    assert all(part.isfinite().all() for part in pixel_statistics(black))


def test_real_statistics_are_cifar10s(real_cifar):
    found = pixel_statistics(load_data(Config(data_dir=str(real_cifar))).train.images)
    for part, known in (
        (found[0], (0.4914, 0.4822, 0.4465)),
        (found[1], (0.247, 0.2435, 0.2616)),
    ):
        torch.testing.assert_close(part, torch.tensor(known), atol=1e-4, rtol=0)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("side", [6, 7])
def test_a_blocks_pool_is_the_mean_of_overlapping_maxima(side, depth):
    block = ConvBlock(3, 3, depth)  # its convolutions start as the identity
    image = torch.randn(1, 3, side, side)
    maxima = image.unfold(2, 2, 1).unfold(3, 2, 1).amax((4, 5))
    rows = torch.stack([maxima[:, :, k : k + 2].mean(2) for k in range(0, side - 1, 2)], 2)
    pooled = torch.stack([rows[..., k : k + 2].mean(3) for k in range(0, side - 1, 2)], 3)
    scale = (1 + block.norm1.eps) ** -0.5
    first = F.gelu(pooled * scale)
    expected = F.gelu(first * scale)
    if depth == 3:
        expected = F.gelu(first + expected * scale)
    torch.testing.assert_close(block.eval()(image), expected)


def test_the_features_are_means_of_overlapping_maxima(model, images):
    seen = []
    model.blocks.register_forward_hook(lambda *call: seen.append(call[2]))
    found = model.features(images)
    maxima = seen[0].unfold(2, 2, 1).unfold(3, 2, 1).amax((4, 5))
    torch.testing.assert_close(found, maxima.mean((2, 3)))


def test_learns_one_batch_by_heart():
    images, labels = random_images(20), torch.arange(20) % 7
    torch.manual_seed(0)
    model = CifarNet(4, 7, pixel_statistics(images))
    trained = [each for group in model.parameter_groups().values() for each in group]
    optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9)
    for _ in range(12):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).all()


def test_groups_hold_each_trained_parameter_once(model):
    groups = model.parameter_groups()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named = {key: [names[id(each)] for each in group] for key, group in groups.items()}
    assert named["head"] == ["head.weight"] and len(named["filters"]) == 6
    assert "stem.bias" in named["biases"] and all("bias" in name for name in named["biases"])
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    assert sorted(sum(named.values(), [])) == sorted(trained)


@settings(max_examples=30, deadline=None)
@given(st.integers(-8, 8), st.integers(-8, 8), st.booleans())
def test_moved_pixels_equal_reflected_padding(down, right, flip):
    image = random_images(1)
    moved = move_pixels(image, torch.tensor([[down], [right]]), torch.tensor([flip]))
    flipped = image[0].numpy()[:, :, :: -1 if flip else 1]
    padded = np.pad(flipped, ((0, 0), (8, 8), (8, 8)), mode="reflect")
    expected = padded[:, 8 - down : 40 - down, 8 - right : 40 - right]
    np.testing.assert_array_equal(moved[0].numpy(), expected)


def augmented(images, epoch, seed=0, size=32, **changes):
    config = replace(PLAIN, **changes)
    flips = alternate_flip(torch.arange(len(images)), epoch) & config.flip
    generators = epoch_generator(seed, epoch), epoch_generator(seed, epoch, 1)
    return augment(images, flips, size, generators, config.augmentation)


def test_augment_changes_nothing_where_all_is_off(images):
    before = images.clone()
    assert torch.equal(augmented(images, 3), before)
    augmented(images, 3, flip=True, shift=3, cutout=8, letterbox_share=0.5)
    assert torch.equal(images, before)  # it works on copies


def test_each_image_is_flipped_in_every_other_epoch(images):
    flipped = [augmented(images, epoch, flip=True) == images.flip(3) for epoch in range(4)]
    flipped = [each.flatten(1).all(1) for each in flipped]
    assert torch.equal(flipped[0], ~flipped[1]) and torch.equal(flipped[0], flipped[2])
    assert 10 < flipped[0].sum() < 30


@pytest.mark.parametrize("changes", [{"shift": 2}, {"cutout": 8}, {"letterbox_share": 0.5}])
def test_augment_repeats_itself_and_differs_by_epoch_and_seed(images, changes):
    shown = augmented(images, 3, **changes)
    assert torch.equal(shown, augmented(images, 3, **changes)) and not torch.equal(shown, images)
    assert not torch.equal(shown, augmented(images, 4, **changes))
    assert not torch.equal(shown, augmented(images, 3, seed=1, **changes))


def test_longer_trainings_get_harder_images():
    shown = [Config(epochs=epochs).augmentation for epochs in (1, 8, 11, 12, 20, 34, 35, 100)]
    few, usual, many = AUGMENTATIONS.values()
    assert shown == [few] * 3 + [usual] * 3 + [many] * 2
    assert usual == (32, 3, 8, 0.2)
    for easier, harder in itertools.pairwise((few, usual, many)):
        assert all(a <= b for a, b in zip(easier, harder, strict=True)) and easier != harder


def test_a_flag_overrides_what_follows_the_epochs():
    asked = Config(epochs=8, shift=5, letterbox_share=0.5).augmentation
    assert asked == AUGMENTATIONS[1]._replace(shift=5, letterbox_share=0.5)
    assert Config(epochs=40, cutout=0).augmentation.cutout == 0  # 0 is a value, too


def test_shifts_reach_every_offset_and_no_further(images):
    moves = {
        (down, right): move_pixels(
            images, torch.tensor([[down], [right]]).expand(2, 40), torch.zeros(40).bool()
        )
        for down in range(-2, 3)
        for right in range(-2, 3)
    }
    seen = set()
    for epoch in range(8):
        shown = augmented(images, epoch, shift=1)
        for number, image in enumerate(shown):
            seen.add(next(key for key, moved in moves.items() if torch.equal(moved[number], image)))
    assert seen == {(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)}


def test_resize_against_pillow():
    image = random_images(1)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    expected = np.asarray(picture.resize((20, 20), Image.Resampling.BILINEAR)).astype(int)
    ours = resize(image, 20)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() <= 1  # Pillow rounds
    assert resize(image, 32) is image


def test_cutout_is_one_gray_square_in_each_image():
    black = torch.zeros(8000, 3, 32, 32, dtype=torch.uint8)
    gray = cut_out(black, 8, epoch_generator(0, 0)) == 128
    assert torch.equal(gray[:, 0], gray[:, 2])
    rows, columns = gray[:, 0].any(2).sum(1), gray[:, 0].any(1).sum(1)
    assert torch.equal(gray[:, 0].sum((1, 2)), rows * columns)  # filled rectangles
    assert {*rows.tolist(), *columns.tolist()} == {8}  # wholly inside
    assert gray[:, 0].any(0).all()  # everywhere sooner or later


def test_images_between_bars_look_like_letterboxed_pictures():
    images = torch.full((40, 3, 32, 32), 200, dtype=torch.uint8)
    host, heights = epoch_generator(0, 0), set()
    for _ in range(100):
        shown = add_bars(images, 0.5, host)
        assert torch.equal(shown[20:], images[20:]) and (images == 200).all()
        wide, tall = shown[:10], shown[10:20]
        assert {len(half.unique(dim=0)) for half in (wide, tall)} == {1}  # one size a half
        for picture in (wide[0], tall[0].transpose(1, 2)):
            rows = (picture == 200).all(0)
            assert torch.equal(rows, rows[:, :1].expand(32, 32))  # whole rows are picture or
            assert (picture[:, ~rows[:, 0]] == 128).all()  # bar, as many above as below
            assert torch.equal(rows, rows.flip(0))
            heights.add(int(rows[:, 0].sum()))
    assert heights == set(range(16, 33, 2))


def test_bars_shrink_all_of_the_image_or_crop_it():
    ramp = torch.arange(32, dtype=torch.uint8).expand(4, 3, 32, 32) * 4
    slopes = set()
    for seed in range(100):
        wide = add_bars(ramp, 0.5, epoch_generator(seed, 0))[0]
        row = wide[0, 16].float()
        slopes.add(round(float(row[19] - row[12]) / 28, 1))
        assert abs(float(row[15] + row[16]) / 2 - 62) <= 1  # its middle stays in the middle
        side = 2 * round(16 / (float(row[19] - row[12]) / 28))
        margin = (32 - side) // 2
        assert torch.equal(row[:margin], row[margin + 1 : 2 * margin + 1].flip(0))  # reflected
    assert min(slopes) == 1.0 and max(slopes) >= 1.7  # from whole size to half


def test_bars_crop_at_any_height():
    ramp = (4 * torch.arange(32, dtype=torch.uint8))[:, None].expand(4, 3, 32, 32)
    middles = []
    for seed in range(100):
        column = add_bars(ramp, 0.5, epoch_generator(seed, 0))[0, 0, :, 16].float()
        middles.append(float(column[15] + column[16]) / 2)
    assert min(middles) < 58 and max(middles) > 66  # always from the top: 30 to 62


def test_filters_beyond_the_identity_start_at_random():
    weight = ConvBlock(3, 8, 2).conv1.weight
    identity = torch.zeros(3, 3, 3, 3)
    identity[range(3), range(3), 1, 1] = 1
    assert torch.equal(weight[:3], identity) and weight[3:].flatten(1).norm(dim=1).min() > 0.1


@pytest.mark.parametrize(
    "batch,share,expected", [(1, 1.0, 0.0), (4, 0.1, 0.4), (40, 0.2, 8.0), (4, 1.0, 4.0)]
)
def test_the_number_of_images_between_bars_is_right_on_average(batch, share, expected):
    images = torch.full((batch, 3, 32, 32), 200, dtype=torch.uint8)
    host, counts = epoch_generator(0, 0), []
    draws = 4000 // batch
    for _ in range(draws):
        shown = add_bars(images, share, host)
        counts.append(int((shown == 128).flatten(1).any(1).sum()))
    assert sum(counts) / draws == pytest.approx(expected, rel=0.1, abs=0.1)


@pytest.mark.parametrize("flip", [True, False])
def test_shifted_views_equal_reflected_padding(images, flip):
    sides = [images, images.flip(3)][: 1 + flip]
    padded = [F.pad(side.float(), (1, 1, 1, 1), "reflect").byte() for side in sides]
    found = shifted_views(images, flip)
    assert torch.equal(found[0], images)  # evaluation takes it for the plain one
    expected = [
        each[:, :, 1 - move : 33 - move, 1 - move : 33 - move]
        for move in (0, -1, 1)
        for each in padded
    ]
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("count", [1, 11, 65])
def test_view_logits_are_those_of_each_view(model, count):
    """Few images go through the network in one call; the answer does not depend on that."""
    model.eval()
    generator = torch.Generator().manual_seed(2)
    views = shifted_views(random_images(count), True)
    squares = torch.randint(0, 256, (2, count, 3, 40, 40), dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        found = view_logits(model, [views, squares])
        expected = torch.stack([model(view) for view in (*views, *squares)])
    assert found.shape == (8, count, 7) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_few_images_take_one_call_of_the_network(model):
    sizes = []
    model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    model.eval()
    for count in (1, 10, 70):
        view_logits(model, [shifted_views(random_images(count), True)])
    assert sizes == [6, 60] + 6 * [70]
