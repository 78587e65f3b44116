"""The cached predictor: one load, right answers, from any thread; and `--mode predict`."""
import io
import math
import json
import os
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import classifier
from classifier import UserError, cached_model, letterbox, load_data, predict, to_pixels
from test_pixels import bomb, encoded, noise


@pytest.fixture(autouse=True)
def empty_cache():
    classifier.load_predictor.cache_clear()


@pytest.fixture
def loads(monkeypatch):
    """How often weights were read."""
    count, real = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **more: (count.append(args), real(*args, **more))[1])
    return count


@pytest.fixture(scope="module")
def digits():
    return load_data(classifier.DataSettings(dataset="digits"))


@pytest.fixture
def saved(trained, tmp_path):
    """The trained model with some of what its file says changed."""
    def change(**changes):
        path = tmp_path / f"{'-'.join(changes)}.pth"
        if not path.exists():
            torch.save(torch.load(trained, weights_only=True) | changes, path)
        return path
    return change


@pytest.fixture
def unsure(saved):
    """The same answers with hardly any confidence."""
    return saved(temperature=100.0)


def png(images, number):
    return encoded(Image.fromarray(images[number].permute(1, 2, 0).numpy()))


def test_weights_are_read_once_until_path_or_content_changes(trained, tmp_path, loads):
    path = tmp_path / "model.pth"
    shutil.copy(trained, path)
    picture = noise(50, 40)
    for _ in range(3):
        predict([picture], model_path=path)
    assert len(loads) == 1
    torch.save(torch.load(trained, weights_only=True) | {"class_names": list("abcdefghij")}, path)
    assert predict([picture], model_path=path)[0].label in "abcdefghij" and len(loads) == 3       # one is ours above
    predict([picture], model_path=trained)
    assert len(loads) == 4


def test_threads_share_one_load_and_get_right_answers(trained, loads, digits):
    pictures = [png(digits.evaluation.images, number) for number in range(8)]
    found = {}

    def work(number):
        for _ in range(3):
            found[number] = predict([pictures[number]], model_path=trained)[0]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert [found[number].label for number in range(8)] == [each.label for each in predict(pictures, model_path=trained)]


def test_a_data_set_image_through_predict_equals_evaluate(trained, digits, cpu):
    images = digits.evaluation.images[:20]
    answers = predict([png(images, number) for number in range(20)], model_path=trained, top_k=10, tta=False)
    predictor = cached_model(trained)
    expected = predictor.probabilities(images, tta=False)
    for answer, row in zip(answers, expected):
        by_name = dict(answer.top)
        np.testing.assert_allclose([by_name[name] for name in "0123456789"], row, atol=1e-6)


def softened(image):
    """The 3x3 filter of 1, 8, 1 both ways, over 100; the outermost pixels as they were."""
    pixels = torch.nn.functional.conv2d(to_pixels(image)[:, None].double(),
                                        torch.outer(*2 * [torch.tensor([1.0, 8.0, 1.0])]).double()[None, None] / 100)
    whole = to_pixels(image).clone()
    whole[:, 1:-1, 1:-1] = pixels[:, 0].round().byte()
    return whole


@pytest.mark.parametrize("margin", [math.inf, -1])
def test_unsure_photos_are_answered_by_the_mean_over_letterbox_and_centre_squares(saved, digits, monkeypatch, margin):
    monkeypatch.setattr(classifier, "SQUARES_MARGIN", margin)
    photo, predictor = Image.open(io.BytesIO(encoded(noise(200, 100)))), cached_model(saved(mirrors=True))
    views = [letterbox(photo), photo.resize((40, 40), Image.Resampling.LANCZOS, (50, 0, 150, 100), 2.0),
             photo.resize((40, 40), Image.Resampling.LANCZOS, (57.5, 7.5, 142.5, 92.5), 2.0)]
    views = [softened(view) for view in views]
    views[1] = views[1].flip(2)
    answer = predict(photo, model_path=saved(mirrors=True), top_k=10)[0]
    for found, view in zip(answer.seen.views, views, strict=True):
        assert (found.int() - view.int()).abs().max() <= 1                         # rounding of halves
    each = torch.cat([predictor.probabilities(view[None], tta=False) for view in answer.seen.views])
    assert not torch.allclose(each[0], each[1], atol=1e-3)
    mean = each.log().mean(0).softmax(0)                                           # that of logits, but for a constant
    for tta, expected in ((True, mean if margin > 0 else each[0]), (False, each[0])):
        by_name = dict(predict(photo, model_path=saved(mirrors=True), top_k=10, tta=tta)[0].top)
        np.testing.assert_allclose([by_name[name] for name in "0123456789"], expected, atol=1e-2)


def test_pictures_with_and_without_squares_in_one_batch(saved, monkeypatch):
    monkeypatch.setattr(classifier, "SQUARES_MARGIN", math.inf)
    pictures = [noise(90, 70), noise(40, 35), noise(120, 60), noise(32, 32)]
    together = predict(pictures, model_path=saved(mirrors=True), top_k=10)
    assert [len(each.seen.views) for each in together] == [3, 1, 3, 1]
    for picture, answer in zip(pictures, together):
        alone = predict(picture, model_path=saved(mirrors=True), top_k=10)[0]
        assert dict(alone.top) == pytest.approx(dict(answer.top), abs=1e-2)


@pytest.mark.parametrize("size, expected", [((32, 32), 1), ((500, 32), 1), ((500, 47), 1), ((48, 50), 3)])
def test_no_square_is_enlarged(size, expected):
    found = classifier.framings(Image.new("RGB", size), True, True)
    assert [each.size for each in found] == [(32, 32), (40, 40), (40, 40)][:expected]
    assert len(classifier.framings(Image.new("RGB", size), False, True)) == 1


def test_digits_are_not_mirrored():
    photo = noise(100, 100)
    for mirrors in (False, True):
        square = classifier.framings(photo, True, mirrors)[1]
        expected = letterbox(photo, classifier.SQUARE_SIZE).filter(classifier.SOFTEN)          # both see all of it
        assert (square.tobytes() == expected.tobytes()) is not mirrors


def test_a_picture_of_the_networks_size_reaches_it_bit_for_bit(trained, tmp_path, digits):
    picture = noise(32, 32)
    picture.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", encoded(picture), picture):
        seen, = predict(source, model_path=trained)[0].seen.views
        assert torch.equal(seen, to_pixels(picture))


def test_batch_equals_singles(trained, digits):
    pictures = [png(digits.evaluation.images, number) for number in range(5)]
    for answer, picture in zip(predict(pictures, model_path=trained), pictures):
        alone = predict(picture, model_path=trained)[0]
        assert alone.label == answer.label and alone.confidence == pytest.approx(answer.confidence, abs=2e-2)


def test_answers_are_sorted_and_named(trained, unsure):
    answer = predict([noise(40, 40)], model_path=trained, top_k=99)[0]
    values = [value for _, value in answer.top]
    assert len(values) == 10 and values == sorted(values, reverse=True) and sum(values) == pytest.approx(1, abs=1e-5)
    assert answer.label == answer.top[0][0] and answer.confidence == values[0]
    doubtful = predict([noise(40, 40)], model_path=unsure, threshold=0.9)[0]
    assert doubtful.label == "unknown" and doubtful.top[0][0] == answer.label and doubtful.confidence < 0.9
    with pytest.raises(UserError):
        predict([noise(4, 4)], model_path=trained, top_k=0)
    with pytest.raises(UserError, match="gpu"):
        predict([noise(4, 4)], model_path=trained, device="gpu")


def test_pil_images_that_cannot_be_read(trained):
    cut = Image.open(io.BytesIO(encoded(noise(64, 64))[:900]))
    for answer in predict([cut, Image.new("RGB", (0, 0))], model_path=trained):
        assert answer.error and answer.label is None


def test_sources_of_all_kinds_and_a_bad_one_between(trained, tmp_path):
    picture = noise(60, 40)
    picture.save(tmp_path / "a.png")
    sources = [str(tmp_path / "a.png"), b"garbage", tmp_path / "a.png", encoded(picture), picture]
    answers = predict(sources, model_path=trained)
    assert [answer.image for answer in answers] == sources
    assert answers[1].error and answers[1].label is None
    assert len({answers[number].label for number in (0, 2, 3, 4)}) == 1
    assert predict([], model_path=trained) == []


def run(capsys, *argv):
    code = classifier.main(["--mode", "predict", "--device", "cpu", *map(str, argv)])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.fixture
def album(tmp_path):
    folder = tmp_path / "album"
    (folder / "inner").mkdir(parents=True)
    (folder / "empty").mkdir()
    for name in ("a.png", "inner/b.JPG", "c [1].png", "ünï,code.png"):
        noise(50, 30).save(folder / name, "JPEG" if "JPG" in name else "PNG")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("")
    return folder


def test_files_folders_and_globs(trained, album, capsys):
    code, out, err = run(capsys, "--model-path", trained, "--json", "--image", album, album / "c [1].png",
                         f"{album}/*.png", f"{album}/**/*.JPG")
    names = [os.path.relpath(json.loads(line)["image"], album) for line in out.splitlines()]
    assert code == 0
    assert sorted(names[:4]) == sorted(["a.png", "c [1].png", "inner/b.JPG", "ünï,code.png"])
    assert names[4:] == ["c [1].png", "a.png", "c [1].png", "ünï,code.png", "inner/b.JPG"]


def test_json_rows(trained, album, capsys):
    _, out, _ = run(capsys, "--model-path", trained, "--json", "--image", album / "a.png", "--top-k", 2)
    row = json.loads(out)
    assert set(row) == {"image", "label", "confidence", "top", "milliseconds"}
    assert len(row["top"]) == 2 and row["top"][0] == [row["label"], row["confidence"]] and row["milliseconds"] > 0


def test_paths_on_stdin(trained, album, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{album}/a.png\n\n{album}/inner\n"))
    code, out, _ = run(capsys, "--model-path", trained, "--image", "-")
    assert code == 0 and len(out.splitlines()) == 2


def test_bad_pictures_are_named_and_the_good_ones_answered(trained, album, capsys):
    (album / "bomb.png").write_bytes(bomb())
    (album / "cut.png").write_bytes(encoded(noise(64, 64))[:900])
    (album / "zero.png").write_bytes(b"")
    code, out, err = run(capsys, "--model-path", trained, "--json", "--image", album, album / "empty",
                         album / "missing.png", album / "none*.png")
    rows = [json.loads(line) for line in out.splitlines()]
    bad = [row for row in rows if "error" in row]
    assert code == 1 and len(rows) == 10 and len(bad) == 6
    assert err.splitlines()[-1].endswith("6 could not be read")
    for name in ("bomb.png", "cut.png", "zero.png", "empty", "missing.png", "none*.png"):
        assert any(name in row["image"] for row in bad) and sum(name in line.split(": ")[0] for line in err.splitlines()) == 1


def test_text_rows(unsure, album, capsys):
    code, out, err = run(capsys, "--model-path", unsure, "--image", album / "a.png", "--threshold", 0.9)
    assert code == 0 and err == ""
    name, label, share, bar, others = re.fullmatch(r"(.*): (\w+)  (.*) %  (\S+)  \((.*)\)\n", out).groups()
    assert (name, label, len(bar)) == (f"{album}/a.png", "unknown", 10) and len(others.split(", ")) == 3
    assert bar in ("██" + 8 * "░", "█" + 9 * "░") and 9 < float(share) < 25


def test_a_summary_of_several(trained, album, capsys):
    (album / "cut.png").write_bytes(encoded(noise(64, 64))[:900])
    _, out, err = run(capsys, "--model-path", trained, "--image", album)
    assert len(out.splitlines()) == 4
    assert re.fullmatch(r"5 pictures in \d+\.\d s, \d+ a second; 1 could not be read", err.splitlines()[-1])


def test_folders_are_walked_in_natural_order(trained, tmp_path, capsys):
    names = ["a/9.png", "a/10.png", "img1.png", "img2.png", "img10.png", "img10b.png"]
    (tmp_path / "walk" / "a").mkdir(parents=True)
    for name in reversed(names):
        noise(8, 8).save(tmp_path / "walk" / name)
    for what in (tmp_path / "walk", f"{tmp_path}/walk/**/*.png"):
        _, out, _ = run(capsys, "--model-path", trained, "--image", what)
        assert [os.path.relpath(line.split(": ")[0], tmp_path / "walk") for line in out.splitlines()] == names


def test_what_the_network_saw_is_written(trained, album, tmp_path, capsys):
    code, _, _ = run(capsys, "--model-path", trained, "--image", album / "a.png", album / "ünï,code.png",
                     "--save-inputs", tmp_path / "new" / "seen")
    names = {path.name for path in (tmp_path / "new" / "seen").iterdir()}
    assert code == 0 and names == {"00001-a-letterbox.png", "00002-ünï,code-letterbox.png"}        # 30 pixels high
    found = to_pixels(Image.open(tmp_path / "new" / "seen" / "00001-a-letterbox.png"))
    assert torch.equal(found, predict(album / "a.png", model_path=trained)[0].seen.views[0])
    long = album / f"{60 * 'ü'}{100 * 'a'}.png"                    # a stem of 220 bytes
    noise(8, 8).save(long)
    assert run(capsys, "--model-path", trained, "--image", long, "--save-inputs", tmp_path / "long")[0] == 0
    for used in (tmp_path / "new" / "seen", album / "a.png", album / "a.png" / "below a file"):
        code, _, err = run(capsys, "--model-path", trained, "--image", album / "a.png", "--save-inputs", used)
        assert code == 1 and "--save-inputs" in err and len(err.splitlines()) == 1


def test_of_an_animation_the_first_picture_is_answered_and_that_said(trained, tmp_path, capsys):
    frames = [noise(20, 20), Image.new("RGB", (20, 20))]
    for name, kind in (("a.gif", "GIF"), ("a.webp", "WEBP"), ("a.png", "PNG")):
        frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:])
        _, out, err = run(capsys, "--model-path", trained, "--image", tmp_path / name)
        assert len(out.splitlines()) == 1 and "first picture" in err


def test_predict_never_logs(trained, album, capsys, tmp_path):
    run(capsys, "--model-path", trained, "--image", album / "a.png")
    assert not list(tmp_path.glob("ml*"))


@pytest.mark.slow
def test_undecodable_paths_a_plain_locale_and_a_closed_pipe(trained, album, cli, tmp_path):
    import subprocess
    import sys
    strange = os.fsdecode(bytes(album) + b"/\xff\xfe.png")
    noise(40, 40).save(strange, "PNG")
    done = cli("--mode", "predict", "--model-path", trained, "--image", album, env={"LANG": "C", "LC_ALL": "C"})
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 5 and len(done.stderr.splitlines()) == 1
    command = (f"yes {album}/a.png | head -n 3000 | {sys.executable} {classifier.__file__} --mode predict "
               f"--model-path {trained} --image - | head -n 1")
    piped = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert len(piped.stdout.splitlines()) == 1 and piped.stderr == ""


@pytest.mark.slow
def test_predict_needs_neither_mlflow_nor_torchvision(trained, album, tmp_path):
    import subprocess
    import sys
    code = ("import sys; sys.modules |= dict.fromkeys(('mlflow', 'torchvision', 'sklearn', 'matplotlib', 'tqdm')); "
            f"import classifier; sys.exit(classifier.main(['--mode', 'predict', '--model-path', {str(trained)!r}, "
            f"'--image', {str(album)!r}]))")
    from conftest import ROOT
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stderr.startswith("4 pictures in ")
