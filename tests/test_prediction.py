"""The cached predictor: one load, right answers, from any thread; and `--mode predict`."""

import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import bomb, encoded, noise, rows, run
from PIL import Image

import classifier
from classifier import (
    UserError,
    cached_model,
    center_squares,
    evaluate,
    letterbox,
    load_data,
    photo_letterbox,
    predict,
    shifted_views,
    to_pixels,
)


@pytest.fixture
def loads(monkeypatch):
    """How often weights were read."""
    count, real = [], classifier.load_model

    def counted(path):
        count.append(path)
        return real(path)

    classifier._predictors.clear()
    monkeypatch.setattr(classifier, "load_model", counted)
    return count


@pytest.fixture(scope="module")
def digits():
    return load_data(classifier.Config(dataset="digits"))


@pytest.fixture
def saved(trained, tmp_path):
    """The trained model with some of what its file says changed."""

    def change(**changes):
        path = tmp_path / f"{'-'.join(changes)}.pth"
        torch.save(torch.load(trained, weights_only=True) | changes, path)
        return path

    return change


@pytest.fixture
def unsure(saved):
    """The same answers with hardly any confidence."""
    return saved(temperature=100.0)


def png(images, number):
    return encoded(Image.fromarray(images[number].permute(1, 2, 0).numpy()))


def predicted(capsys, model, *argv):
    """Exit code, stdout and stderr of `--mode predict`."""
    return run(capsys, "--mode", "predict", "--device", "cpu", "--model-path", model, *argv)


def test_weights_are_read_once_until_path_or_content_changes(trained, tmp_path, loads):
    path = tmp_path / "model.pth"
    shutil.copy(trained, path)
    picture = noise(50, 40)
    for _ in range(3):
        predict([picture], model_path=path)
    assert len(loads) == 1
    torch.save(torch.load(trained, weights_only=True) | {"class_names": list("abcdefghij")}, path)
    assert predict([picture], model_path=path)[0].label in "abcdefghij"
    predict([picture], model_path=trained)
    assert len(loads) == 3


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
    together = [each.label for each in predict(pictures, model_path=trained)]
    assert [found[number].label for number in range(8)] == together


def test_threads_take_turns_at_the_network(trained, monkeypatch):
    """It may compile at a new shape, which torch does not allow in two threads."""
    real, inside, most = classifier.view_logits, [], []

    def slow(*args):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return real(*args)

    monkeypatch.setattr(classifier, "view_logits", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: predict(noise(50, 50), model_path=trained), range(8)))
    assert most == 8 * [1]


@pytest.mark.parametrize("tta", [True, False])
def test_data_set_images_are_answered_as_evaluate_answers_them(trained, digits, tta):
    """predict's accuracy on pictures of the network's size is evaluate's, view for view."""
    split = digits.evaluation.take(slice(0, 40))
    pictures = [png(split.images, number) for number in range(40)]
    answers = predict(pictures, model_path=trained, tta=tta, device="cpu")
    right = [a.label == str(int(label)) for a, label in zip(answers, split.labels, strict=True)]
    predictor = cached_model(trained, "cpu")
    data = replace(digits, evaluation=split, flip=predictor.saved.flip)
    found = evaluate(predictor.net, data, predictor.runtime, tta, predictor.saved.temperature)
    accuracy = found.accuracy_tta if tta else found.accuracy
    assert sum(right) / 40 == pytest.approx(accuracy) and accuracy > 0.2


def softened(image):
    """The 3x3 filter of 1, 8, 1 both ways, over 100; the outermost pixels as they were."""
    pixels = torch.nn.functional.conv2d(
        to_pixels(image)[:, None].double(),
        torch.outer(*2 * [torch.tensor([1.0, 8.0, 1.0])]).double()[None, None] / 100,
    )
    whole = to_pixels(image).clone()
    whole[:, 1:-1, 1:-1] = pixels[:, 0].round().byte()
    return whole


def test_photos_are_answered_by_the_mean_over_letterbox_and_center_squares(saved):
    photo = Image.open(io.BytesIO(encoded(noise(200, 100))))
    predictor = cached_model(saved(flip=True, temperature=0.3), "cpu", False)
    views = [
        letterbox(photo),
        photo.resize((40, 40), Image.Resampling.LANCZOS, (50, 0, 150, 100), 2.0),
        photo.resize((40, 40), Image.Resampling.LANCZOS, (57.5, 7.5, 142.5, 92.5), 2.0),
    ]
    views = [softened(view) for view in views]
    views[1] = views[1].flip(2)
    ((_, seen),) = predictor.predict([photo], top_k=10)
    seen = [seen.letterbox, *seen.squares]
    for found, view in zip(seen, views, strict=True):
        assert (found.int() - view.int()).abs().max() <= 1  # rounding of halves
    each = torch.cat([predictor.probabilities(view[None, None]) for view in seen])
    assert not torch.allclose(each[0], each[1], atol=1e-3)
    mean = each.log().mean(0).softmax(0)  # that of logits, but for a constant
    assert not torch.allclose(mean, each.mean(0), atol=1e-3)  # that of probabilities is another
    for tta, expected in ((True, mean), (False, each[0])):
        ((answer, _),) = predictor.predict([photo], top_k=10, tta=tta)
        by_name = dict(answer.top)
        np.testing.assert_allclose([by_name[name] for name in "0123456789"], expected, atol=1e-5)


@pytest.mark.parametrize("size", [(10000, 300), (300, 9000), (3000, 90), (4000, 3000), (900, 48)])
def test_strips_have_center_squares_too(size):
    image = classifier.read_image(encoded(Image.new("RGB", size)))
    assert len(center_squares(image, False)) == 2
    assert image.width * image.height <= 1024**2


@pytest.mark.parametrize("flip", [True, False])
def test_views_follow_the_models_flip_and_tta(saved, flip):
    predictor = cached_model(saved(flip=flip), "cpu", False)
    small, photo = noise(32, 32), noise(100, 100)
    box, found = to_pixels(small)[None], []
    for tta, views in ((True, shifted_views(box, flip)), (False, box[None])):
        ((answer, _),) = predictor.predict([small], top_k=10, tta=tta)
        found.append(predictor.probabilities(views)[0])
        by_name = dict(answer.top)
        np.testing.assert_allclose([by_name[name] for name in "0123456789"], found[-1], atol=1e-6)
    found.append(predictor.probabilities(shifted_views(box, not flip))[0])
    assert not any(torch.allclose(found[0], other, atol=1e-5) for other in found[1:])
    ((_, seen),) = predictor.predict([photo])
    ways = [to_pixels(center_squares(photo, way)[0]) for way in (flip, not flip)]
    assert [torch.equal(seen.squares[0], way) for way in ways] == [True, False]


def test_tta_can_be_switched_off(trained, tmp_path, capsys):
    """By its flag and in Python."""
    path, found = tmp_path / "a.png", []
    noise(200, 100).save(path)
    for flags, tta in (([], True), (["--no-tta"], False)):
        (row,) = rows(predicted(capsys, trained, "--json", "--image", path, *flags)[1])
        (answer,) = predict(path, model_path=trained, tta=tta, device="cpu")
        ((expected, _),) = cached_model(trained, "cpu").predict([path], tta=tta)
        assert row["confidence"] == answer.confidence == expected.confidence
        found.append(answer.confidence)
    assert found[0] != found[1]


def test_many_pictures_are_answered_in_order(trained, digits, monkeypatch):
    """Also when there are more than the network gets at once."""
    monkeypatch.setattr(classifier, "PREDICTION_BATCH", 7)
    pictures = [png(digits.evaluation.images, number) for number in range(40)]
    predictor = cached_model(trained, "cpu", False)
    answers = [answer for answer, _ in predictor.predict(iter(pictures), top_k=10)]
    assert [answer.image for answer in answers] == list(range(40))
    for picture, answer in zip(pictures, answers, strict=True):
        ((alone, _),) = predictor.predict([picture], top_k=10)
        assert dict(answer.top) == pytest.approx(dict(alone.top), abs=1e-5)


def test_pictures_with_and_without_squares_in_one_batch(saved):
    pictures = [noise(90, 70), noise(40, 35), b"no picture", noise(120, 60), noise(32, 32)]
    predictor = cached_model(saved(flip=True))
    together = list(predictor.predict(pictures, top_k=10))
    assert [len(seen.squares) for _, seen in together] == [2, 0, 0, 2, 0]
    for picture, (answer, _) in zip(pictures, together, strict=True):
        ((alone, _),) = predictor.predict([picture], top_k=10)
        assert dict(alone.top) == pytest.approx(dict(answer.top), abs=1e-2)


@pytest.mark.parametrize(
    "size, expected", [((32, 32), 0), ((500, 32), 0), ((500, 47), 0), ((48, 50), 2)]
)
def test_no_square_is_enlarged(size, expected):
    found = center_squares(Image.new("RGB", size), True)
    assert [each.size for each in found] == expected * [(40, 40)]
    assert photo_letterbox(Image.new("RGB", size)).size == (32, 32)


def test_digits_are_not_flipped():
    photo = noise(100, 100)
    expected = photo.resize((40, 40), Image.Resampling.LANCZOS, reducing_gap=2.0)
    expected = expected.filter(classifier.SOFTEN)
    for flip in (False, True):
        square = center_squares(photo, flip)[0]
        assert (square.tobytes() == expected.tobytes()) is not flip


def test_a_picture_of_the_networks_size_reaches_it_bit_for_bit(trained, tmp_path):
    picture = noise(32, 32)
    picture.save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", encoded(picture), picture]
    for _, seen in cached_model(trained).predict(sources):
        assert torch.equal(seen.letterbox, to_pixels(picture)) and not seen.squares


def test_answers_are_sorted_and_named(trained, unsure):
    answer = predict([noise(40, 40)], model_path=trained, top_k=99)[0]
    values = [value for _, value in answer.top]
    assert len(values) == 10 and values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1, abs=1e-5)
    assert answer.label == answer.top[0][0] and answer.confidence == values[0]
    just = predict([noise(40, 40)], model_path=trained, threshold=answer.confidence)[0]
    assert just.label == answer.label  # unknown is below the threshold only
    doubtful = predict([noise(40, 40)], model_path=unsure, threshold=0.9)[0]
    assert doubtful.label == "unknown" and doubtful.confidence < 0.9
    assert doubtful.top[0][0] == answer.label
    with pytest.raises(UserError):
        predict([noise(4, 4)], model_path=trained, top_k=0)
    with pytest.raises(UserError, match="threshold must be from 0 to 1: 60"):
        predict([noise(4, 4)], model_path=trained, threshold=60)
    with pytest.raises(UserError, match="gpu"):
        predict([noise(4, 4)], model_path=trained, device="gpu")


def test_pil_images_that_cannot_be_read(trained):
    cut = Image.open(io.BytesIO(encoded(noise(64, 64))[:900]))
    for answer in predict([cut, Image.new("RGB", (0, 0))], model_path=trained):
        assert answer.error and answer.label is None


def test_the_same_lazy_image_many_times(trained, monkeypatch):
    """Pillow decodes at the first use; threads that do so at once disturb each other."""
    monkeypatch.setattr(classifier, "usable_cpus", lambda: 8)
    photo = Image.open(io.BytesIO(encoded(noise(1200, 900), "JPEG")))
    answers = predict([photo] * 64, model_path=trained)
    assert [answer.error for answer in answers] == [None] * 64
    first = answers[0].confidence
    assert [answer.confidence for answer in answers] == pytest.approx([first] * 64, abs=1e-5)


def test_sources_of_all_kinds_and_a_bad_one_between(trained, tmp_path):
    picture = noise(60, 40)
    picture.save(tmp_path / "a.png")
    sources = [str(tmp_path / "a.png"), b"garbage", tmp_path / "a.png", encoded(picture), picture]
    answers = predict(sources, model_path=trained)
    assert [answer.image for answer in answers] == [sources[0], 1, sources[2], 3, 4]
    assert answers[1].error and answers[1].label is None
    assert len({answers[number].label for number in (0, 2, 3, 4)}) == 1
    assert predict([], model_path=trained) == []
    (alone,) = predict(picture, model_path=trained)
    assert alone.label == answers[4].label


def test_answers_keep_no_pixels(trained):
    """The 18 kB an answer that they were would be 1.8 GB for 100,000 pictures."""
    answers = predict([noise(100, 100), noise(32, 32)], model_path=trained)
    assert len(pickle.dumps(answers)) < 2000


def test_many_cpus_start_few_decoders(trained, tmp_path, monkeypatch):
    """Each may need 290 MB; both where pictures are answered and where a folder is read."""
    asked = []

    class Recorded(ThreadPoolExecutor):
        def __init__(self, max_workers):
            asked.append(max_workers)
            super().__init__(max_workers)

    monkeypatch.setattr(classifier, "ThreadPoolExecutor", Recorded)
    noise(40, 40).save(tmp_path / "a.png")
    for cpus in (64, 2):
        monkeypatch.setattr(classifier, "usable_cpus", lambda cpus=cpus: cpus)
        predict([tmp_path / "a.png"], model_path=trained)
        _, errors = classifier.read_pictures([str(tmp_path / "a.png")], tmp_path / "none", False)
        assert not errors
    assert asked == [classifier.DECODERS, classifier.DECODERS, 2, 2]


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


def named(out, folder):
    """The pictures that JSON rows are about, relative to `folder`."""
    return [os.path.relpath(row["image"], folder) for row in rows(out)]


def test_files_folders_and_globs(trained, album, capsys):
    patterns = [album, album / "c [1].png", f"{album}/*.png", f"{album}/**/*.JPG"]
    code, out, _ = predicted(capsys, trained, "--json", "--image", *patterns)
    names = named(out, album)
    assert code == 0
    assert names[:4] == ["a.png", "c [1].png", "inner/b.JPG", "ünï,code.png"]
    assert names[4:] == ["c [1].png", "a.png", "c [1].png", "ünï,code.png", "inner/b.JPG"]


def test_globs_walk_the_folders_that_they_match_and_nobody_the_hidden_ones(
    trained, tmp_path, capsys
):
    root = tmp_path / "root"
    seen = ["1/a.png", "1/deep/b.png", "2/c.png", "10/d.png", "e.png"]
    hidden = [".cache/h.png", "1/.cache/h.png", "1/deep/.cache/more/h.png", "2/.h.png", ".h.png"]
    for name in seen + hidden:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(8, 8).save(root / name)
    (root / "none").mkdir()
    for pattern in (root, f"{root}/*", f"{root}/**"):
        code, out, _ = predicted(capsys, trained, "--json", "--image", pattern)
        assert code == 0 and sorted(named(out, root)) == sorted(seen), pattern
    code, out, _ = predicted(capsys, trained, "--json", "--image", f"{root}/[12]*")
    assert code == 0 and named(out, root) == seen[:4]


def test_json_rows(trained, album, capsys):
    _, out, _ = predicted(capsys, trained, "--json", "--image", album / "a.png", "--top-k", 2)
    (row,) = rows(out)
    assert set(row) == {"image", "label", "confidence", "top", "milliseconds"}
    assert len(row["top"]) == 2 and row["top"][0] == [row["label"], row["confidence"]]
    assert row["milliseconds"] > 0


def test_milliseconds_leave_out_what_the_caller_does(trained, album, monkeypatch):
    """Neither with the answers nor to get the pictures."""
    predictor, now = cached_model(trained), 100.0
    monkeypatch.setattr(classifier.time, "perf_counter", lambda: now)

    def slow():
        nonlocal now
        for _ in range(3):
            now += 1.0
            yield album / "a.png"

    monkeypatch.setattr(classifier, "PREDICTION_BATCH", 1)
    found = []
    for answer, _ in predictor.predict(slow()):
        now += 1.0
        found.append(answer.milliseconds)
    assert found == [0, 0, 0]


def test_paths_on_stdin(trained, album, capsys, monkeypatch):
    lines = f"\ufeff{album}/a.png\r\n\n{album}/inner"  # Windows begins with a byte order mark
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    code, out, _ = predicted(capsys, trained, "--image", "-")
    assert code == 0 and len(out.splitlines()) == 2


def test_a_picture_on_stdin_is_refused_in_words(trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(encoded(noise(40, 40)))))
    code, out, err = predicted(capsys, trained, "--image", "-")
    assert (code, out) == (1, "") and "stdin must hold paths" in err


class SlowProducer(io.RawIOBase):
    """Gives a path only when the one before has been answered."""

    def __init__(self, path, answers):
        self.path, self.answers, self.sent = f"{path}\n".encode(), answers, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        assert self.answers() == self.sent
        if self.sent == 3:
            return 0
        self.sent += 1
        buffer[: len(self.path)] = self.path
        return len(self.path)


def test_a_slow_producer_on_stdin_gets_each_answer(trained, album, monkeypatch):
    out = io.StringIO()
    producer = SlowProducer(album / "a.png", lambda: out.getvalue().count("label"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(producer)))
    monkeypatch.setattr("sys.stdout", out)
    words = ["--mode", "predict", "--json", "--model-path", str(trained), "--image", "-"]
    assert classifier.main(words) == 0 and producer.sent == 3


def test_an_empty_name_is_no_picture(trained, capsys):
    """As of a shell's variable that is not set."""
    code, out, err = run(capsys, "--mode", "predict", "--model-path", trained, "--image", "")
    assert (code, out, err) == (1, "", ": no such picture\n")


def test_a_caller_that_stops_asking_waits_for_little(trained, monkeypatch):
    """Pictures that are being decoded by then are finished; the rest never are."""
    started, gate, real = [], threading.Event(), classifier.load_picture

    def held(numbered, **options):
        started.append(numbered[0])
        if numbered[0] >= 64:
            gate.wait(60)
        return real(numbered, **options)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, **options):
            super().shutdown(False, **options)
            gate.set()
            super().shutdown(wait)

    monkeypatch.setattr(classifier, "usable_cpus", lambda: 2)
    monkeypatch.setattr(classifier, "load_picture", held)
    monkeypatch.setattr(classifier, "ThreadPoolExecutor", Pool)
    answers = cached_model(trained, "cpu").predict([noise(40, 40)] * 192)
    assert next(answers)[0].label
    answers.close()
    assert 64 <= len(started) <= 66


def test_the_included_model_is_told_once(capsys, monkeypatch):
    monkeypatch.setattr(classifier, "_predictors", {})
    for _ in range(2):
        classifier.predict(noise(40, 40), device="cpu")
    assert capsys.readouterr().err.count("using the included model") == 1


def test_bad_pictures_are_named_and_the_good_ones_answered(trained, album, capsys):
    (album / "bomb.png").write_bytes(bomb())
    (album / "cut.png").write_bytes(encoded(noise(64, 64))[:900])
    (album / "zero.png").write_bytes(b"")
    (album / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1")
    (album / "loop.png").symlink_to(album / "loop.png")
    patterns = [album, album / "empty", album / "missing.png", album / "none*.png"]
    code, out, err = predicted(capsys, trained, "--json", "--image", *patterns)
    bad = [row for row in rows(out) if "error" in row]
    assert code == 1 and len(rows(out)) == 12 and len(bad) == 8
    summary = r"12 pictures in \d+\.\d s, \d+ per second; 8 could not be read"
    assert re.fullmatch(summary, err.splitlines()[-1])
    names = ["bomb.png", "cut.png", "zero.png", "loop.png", "phone.HEIC"]
    names += ["empty", "missing.png", "none*.png"]
    for name in names:
        assert any(name in row["image"] for row in bad)
        assert sum(name in line.split(": ")[0] for line in err.splitlines()) == 1


def test_text_rows(unsure, album, capsys):
    code, out, err = predicted(capsys, unsure, "--image", album / "a.png", "--threshold", 0.9)
    assert code == 0 and err == ""
    pattern = r"(.*): (\w+)  (.*)%  (\S+)  \((.*)\)\n"
    name, label, share, bar, others = re.fullmatch(pattern, out).groups()
    assert (name, label) == (f"{album}/a.png", "unknown")
    assert bar in ("██" + 8 * "░", "█" + 9 * "░") and 9 < float(share) < 25
    assert len(others.split(", ")) == 3


def test_what_the_network_saw_is_written(trained, album, tmp_path, capsys):
    folder, pictures = tmp_path / "new" / "seen", [album / "a.png", album / "ünï,code.png"]
    code, _, _ = predicted(capsys, trained, "--image", *pictures, "--save-inputs", folder)
    names = {path.name for path in folder.iterdir()}
    # 30 pixels high: too few for squares
    assert code == 0 and names == {"00001-a-letterbox.png", "00002-ünï,code-letterbox.png"}
    found = to_pixels(Image.open(folder / "00001-a-letterbox.png"))
    ((_, seen),) = cached_model(trained).predict(pictures[:1])
    assert torch.equal(found, seen.letterbox)
    long = album / f"{60 * 'ü'}{100 * 'a'}.png"  # a stem of 220 bytes
    noise(60, 60).save(long)
    code, _, _ = predicted(capsys, trained, "--image", long, "--save-inputs", tmp_path / "long")
    kinds = {path.stem.rpartition("-")[2] for path in (tmp_path / "long").iterdir()}
    assert code == 0 and kinds == {"letterbox", "square", "center"}
    for used in (folder, album / "a.png", album / "a.png" / "below a file"):
        code, _, err = predicted(capsys, trained, "--image", long, "--save-inputs", used)
        assert code == 1 and "--save-inputs" in err and len(err.splitlines()) == 1
    words = ["--image", long, "--save-inputs", tmp_path / "none"]
    code, _, err = predicted(capsys, tmp_path / "missing.pth", *words)
    assert code == 1 and "no such model" in err and not (tmp_path / "none").exists()


def test_predict_never_logs(trained, album, capsys, tmp_path):
    predicted(capsys, trained, "--image", album / "a.png")
    assert not list(tmp_path.glob("ml*"))


@pytest.mark.slow
def test_undecodable_paths_a_plain_locale_and_a_closed_pipe(trained, album, cli):
    strange = os.fsdecode(bytes(album) + b"/\xff\xfe.png")
    noise(40, 40).save(strange, "PNG")
    plain, words = {"LANG": "C", "LC_ALL": "C"}, ["--mode", "predict", "--model-path", trained]
    done = cli(*words, "--image", album, env=plain)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 5 and len(done.stderr.splitlines()) == 1
    command = (
        f"yes {album}/a.png | head -n 3000 | {sys.executable} {classifier.__file__} --mode predict "
        f"--model-path {trained} --image - | head -n 1"
    )
    piped = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert len(piped.stdout.splitlines()) == 1 and piped.stderr == ""
