"""The network: uint8 pixels in, logits out, and what augmentation and TTA make of the pixels."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import classifier
from classifier import (ModelSettings, augment, build_model, cut_out, epoch_generator, logits_with_tta, move_pixels,
                        pixel_statistics, zoom_out)


@pytest.fixture
def images():
    return torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(images):
    torch.manual_seed(0)
    return build_model(ModelSettings(width=8), 7, pixel_statistics(images))


def test_shapes_and_dtypes(model, images):
    assert model(images).shape == (40, 7) and model(images).dtype == torch.float32


def test_statistics_are_those_of_the_pixels(images):
    found = pixel_statistics(images)
    values = images.permute(1, 0, 2, 3).reshape(3, -1).numpy() / 255
    np.testing.assert_allclose(found.mean, values.mean(1), rtol=1e-6)
    np.testing.assert_allclose(found.std, values.std(1), rtol=1e-5)


def test_whitened_patches_are_uncorrelated(images):
    statistics = pixel_statistics(images)
    normalised = (images / 255 - statistics.mean.view(3, 1, 1)) / statistics.std.view(3, 1, 1)
    out = F.conv2d(normalised, statistics.whitening[:12]).permute(1, 0, 2, 3).reshape(12, -1)
    torch.testing.assert_close(out @ out.T / out.shape[1], torch.eye(12), atol=0.01, rtol=0)


def test_real_statistics_are_cifar10s(real_cifar):
    from classifier import DataSettings, load_data
    found = pixel_statistics(load_data(DataSettings(data_dir=str(real_cifar))).train.images)
    torch.testing.assert_close(found.mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.std, torch.tensor([0.2470, 0.2435, 0.2616]), atol=1e-4, rtol=0)


def test_gray_images_do_not_break_the_whitening():
    gray = torch.randint(0, 256, (40, 1, 32, 32), dtype=torch.uint8).expand(-1, 3, -1, -1)
    black = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    assert all(torch.isfinite(part).all() for images in (gray, black) for part in pixel_statistics(images))


def test_every_filter_answers_to_gray_images_too():
    gray = torch.randint(0, 256, (40, 1, 32, 32), dtype=torch.uint8).expand(-1, 3, -1, -1)
    found = pixel_statistics(gray)
    out = F.conv2d((gray / 255 - found.mean.view(3, 1, 1)) / found.std.view(3, 1, 1), found.whitening)
    torch.testing.assert_close(out.var((0, 2, 3)), torch.ones(24), atol=0.02, rtol=0)


def test_answers_do_not_depend_on_batch_mates(model, images):
    model.eval()
    torch.testing.assert_close(model(images)[:1], model(images[:1]), atol=1e-5, rtol=0)


def test_learns_one_batch_by_heart(model, images):
    labels = torch.arange(40) % 7
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    for _ in range(60):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).float().mean() > 0.9


def by_padding(image, down, right, mirrored):
    """The reference: numpy's reflected padding, a slice, a mirror."""
    padded = np.pad(image.numpy(), ((0, 0), (8, 8), (8, 8)), mode="reflect")
    moved = padded[:, 8 - down:40 - down, 8 - right:40 - right]
    return moved[:, :, ::-1] if mirrored else moved


@settings(max_examples=30, deadline=None)
@given(st.integers(-8, 8), st.integers(-8, 8), st.booleans())
def test_moved_pixels_equal_reflected_padding(down, right, mirrored):
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    moved = move_pixels(image[None], torch.tensor([down]), torch.tensor([right]), torch.tensor([mirrored]))[0]
    # Mirroring comes first in `move_pixels`' reading: columns are looked up, then mirrored.
    expected = by_padding(image, down, right, False)
    if mirrored:
        expected = by_padding(torch.from_numpy(image.numpy()[:, :, ::-1].copy()), down, right, False)
    np.testing.assert_array_equal(moved.numpy(), expected)


def test_augment_repeats_itself_and_mirrors_by_turns(images):
    indices = torch.arange(40)

    def run(epoch, flip=True, shift=0, rank=0):
        return augment(images, indices, epoch, epoch_generator(0, epoch, rank), flip, shift)

    assert torch.equal(run(3, shift=2), run(3, shift=2))
    assert not torch.equal(run(3, shift=2), run(4, shift=2))
    mirrored = [(run(epoch) == images.flip(3)).flatten(1).all(1) for epoch in (0, 1)]
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert 10 < mirrored[0].sum() < 30
    assert torch.equal(run(0, flip=False), images)


def test_cutout_is_one_gray_square_in_each_image():
    images = torch.zeros(300, 3, 32, 32, dtype=torch.uint8)
    gray = (cut_out(images, 8, epoch_generator(0, 0)) == 128)
    assert torch.equal(gray[:, 0], gray[:, 2])
    rows, columns = gray[:, 0].any(2).sum(1), gray[:, 0].any(1).sum(1)
    assert torch.equal(gray[:, 0].sum((1, 2)), rows * columns)                  # filled rectangles
    assert rows.min() >= 4 and rows.max() == 8 and columns.max() == 8
    assert gray[:, 0].any(0).all()                                              # everywhere sooner or later


def test_zoomed_out_images_look_like_letterboxed_pictures():
    images = torch.full((40, 3, 32, 32), 200, dtype=torch.uint8)
    host, heights = epoch_generator(0, 0), set()
    for _ in range(200):
        shown = zoom_out(images, 20, host)
        assert torch.equal(shown[20:], images[20:]) and (images == 200).all()   # the others, and the originals, as before
        wide, tall = shown[:10], shown[10:20]
        assert {len(half.unique(dim=0)) for half in (wide, tall)} == {1}        # one size a half
        for picture in (wide[0], tall[0].transpose(1, 2)):
            rows = (picture == 200).all(0)
            assert torch.equal(rows, rows[:, :1].expand(32, 32))                # whole rows are picture or
            assert (picture[:, ~rows[:, 0]] == 128).all()                       # bar, as many above as below
            assert torch.equal(rows, rows.flip(0))
            heights.add(int(rows[:, 0].sum()))
    assert heights == set(range(16, 33, 2))


def test_zooming_out_shrinks_all_of_the_image_or_crops_it():
    ramp = torch.arange(32, dtype=torch.uint8).expand(4, 3, 32, 32) * 4
    slopes = set()
    for seed in range(100):
        wide = zoom_out(ramp, 2, epoch_generator(seed, 0))[0]
        row = wide[0, 16].float()
        slopes.add(round(float(row[19] - row[12]) / 28, 1))
        assert abs(float(row[15] + row[16]) / 2 - 62) <= 1                      # its middle stays in the middle
    assert min(slopes) == 1.0 and max(slopes) >= 1.7                            # from whole size to half


def test_views(model, images, monkeypatch):
    model.eval()
    monkeypatch.setattr(classifier, "TTA_MARGIN", math.inf)
    plain, same = logits_with_tta(model, images, False, True)
    assert same is plain
    for flip in (True, False):
        edges = [F.pad(side.float(), (1, 1, 1, 1), "reflect").byte() for side in (images, images.flip(3))[:1 + flip]]
        views = [side[:, :, start:start + 32, start:start + 32] for side in edges for start in (0, 1, 2)]
        _, averaged = logits_with_tta(model, images, True, flip)
        torch.testing.assert_close(averaged, torch.stack([model(view) for view in views]).mean(0), atol=1e-5, rtol=0)


def test_only_unsure_images_get_more_views(model, images, monkeypatch):
    model.eval()
    best = logits_with_tta(model, images, False, True)[0].detach().topk(2).values
    gaps = best[:, 0] - best[:, 1]
    monkeypatch.setattr(classifier, "TTA_MARGIN", float(gaps.sort().values[19:21].mean()))
    plain, answers = logits_with_tta(model, images, True, True)
    assert torch.equal((plain != answers).any(1), gaps < classifier.TTA_MARGIN) and (plain != answers).any()
    alone = torch.cat([logits_with_tta(model, image[None], True, True)[1] for image in images])
    torch.testing.assert_close(alone, answers, atol=1e-5, rtol=0)
