"""`--dataset FOLDER`: people's own pictures as a data set, their cache, and `--init-from`."""

import json
import math
import multiprocessing
import os
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Evil, encoded, noise, rows, run, runs_of, weights
from PIL import Image

import classifier
from classifier import (
    Config,
    UserError,
    load_data,
    photo_letterbox,
    pictures_below,
    read_image,
    split_class,
    to_pixels,
)

QUICK = ["--width", "8", "--epochs", "2", "--num-workers", "0", "--device", "cpu", "--no-mlflow"]
PETS = ("cat 9", "cat 10", "ünï")


def picture(colour, number=0):
    return Image.blend(noise(50, 40), Image.new("RGB", (50, 40), colour), 0.7 + number / 1000)


@pytest.fixture
def pets(tmp_path):
    """30 pictures of three classes, whose names need care."""
    root = tmp_path / "my pets"
    for name, colour in (("cat 10", "red"), ("cat 9", "green"), ("ünï", "blue")):
        (root / name / "more").mkdir(parents=True)
        for number in range(10):
            place = root / name / ("more" if number % 2 else ".")
            picture(colour, number).save(place / f"{number}.png")
    (root / "readme.txt").write_text("hello")
    return root


@pytest.fixture
def reads(monkeypatch):
    """The pictures that were read, one by one."""
    paths, real = [], classifier.read_image

    def counting(path):
        paths.append(path)
        return real(path)

    monkeypatch.setattr(classifier, "read_image", counting)
    return paths


def load(root, training=True, **more):
    return load_data(Config(dataset=str(root), **more), training)


def digests(data):
    return data.train.digest, data.evaluation.digest


def counts(split):
    return split.labels.bincount().tolist()


def pixels(path):
    """What the network sees of a picture."""
    return to_pixels(photo_letterbox(read_image(path))).numpy().tobytes()


def pixels_of(*splits):
    return sorted(image.numpy().tobytes() for split in splits for image in split.images)


def all_files(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


# --------------------------------------------------------------------------------------------------
# What is found
# --------------------------------------------------------------------------------------------------
def test_subfolders_are_classes(pets, capsys):
    data = load(pets)
    assert data.class_names == PETS and data.evaluation_name == "test"
    train, test = counts(data.train), counts(data.evaluation)
    assert [sum(pair) for pair in zip(train, test, strict=True)] == [10, 10, 10] and min(test) > 0
    assert data.train.labels[:9].unique().numel() > 1  # mixed: --limit-images takes the first
    told = (
        f"3 classes ({', '.join(PETS)}): {sum(train)} pictures to train on, {sum(test)} to test on"
    )
    assert capsys.readouterr().err == f"{told}\n"
    colour = torch.tensor([1, 0, 2])  # PETS are green, red and blue: each picture has its own label
    for split in (data.train, data.evaluation):
        assert torch.equal(split.images.float().mean((2, 3)).argmax(1), colour[split.labels])


def test_pictures_are_letterboxed_as_predict_does(pets):
    data = load(pets)
    assert pixels_of(data.train, data.evaluation) == sorted(map(pixels, pictures_below(pets)))


def test_hidden_pictures_are_not_used(pets):
    before = load(pets)
    for place in (pets / ".hidden", pets / "cat 9" / ".thumbnails", pets / "cat 9" / "more"):
        place.mkdir(exist_ok=True)
        picture("white").save(place / (".0.png" if place.name == "more" else "0.png"))
    after = load(pets)
    assert after.class_names == before.class_names and digests(after) == digests(before)


def test_the_order_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    """Nor do digests, which tell machines and resumed runs whether they have the same images."""
    names, walk = ("photo001", "photo01", "photo1", "photo2", "photo10"), os.walk
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "set" / place).mkdir(parents=True)
        for number, name in enumerate(names):
            picture("white", number).save(tmp_path / "set" / place / f"{name}.png")

    def backwards(folder, **options):
        for place, folders, files in walk(folder, **options):
            folders.sort(reverse=True)
            yield place, folders, sorted(files, reverse=True)

    before = load(tmp_path / "set")
    monkeypatch.setattr(os, "walk", backwards)
    after = load(tmp_path / "set", data_dir="elsewhere")
    assert digests(after) == digests(before)
    found = [os.path.basename(path) for path in pictures_below(tmp_path / "set" / "test" / "a")]
    assert found == [f"{name}.png" for name in names]


@pytest.mark.parametrize("name", ["{} data", "{}_set", "{}-images", "{}"])
def test_splits_have_usual_names(pets, name):
    for part in ("Train", "Test"):
        shutil.copytree(pets, pets.parent / "parts" / name.format(part))
    data = load(pets.parent / "parts")
    assert (data.class_names, len(data.train), len(data.evaluation)) == (PETS, 30, 30)


@pytest.mark.parametrize("val", [True, False])
def test_test_pictures_without_classes_are_left_out(pets, capsys, val):
    """As competitions have them."""
    root = pets.parent / "parts"
    for part in ("train", "val") if val else ("train",):
        shutil.copytree(pets, root / part)
    (root / "test").mkdir()
    picture("red", 1).save(root / "test" / "1.jpg")
    data = load(root)
    assert len(data.train) + len(data.evaluation) == (60 if val else 30)
    assert f"{root}/test: no classes' folders in it, so it is not used" in capsys.readouterr().err


def test_a_locked_test_folder_is_no_reason_to_test_on_another(pets, monkeypatch):
    root, real = pets.parent / "parts", os.scandir
    for part in ("train", "val", "test"):
        shutil.copytree(pets, root / part)

    def scandir(path):
        if os.path.basename(path) == "test":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        load(root)


def test_the_split_is_the_same_however_accents_are_written():
    """A Mac writes them as characters of their own, and most copies to Linux do not."""
    composed = [f"/a/Möwe/{number}.png" for number in range(100)]
    apart = [unicodedata.normalize("NFD", path) for path in composed]
    assert apart != composed
    found = [split_class(paths, "/a") for paths in (composed, apart)]
    for one, other in zip(*found, strict=True):
        assert one == [unicodedata.normalize("NFC", path) for path in other]


def test_a_folder_called_like_a_built_in_set_is_told(tmp_path, capsys):
    (tmp_path / "digits").mkdir()
    load_data(Config(dataset="digits", limit_images=10))
    assert "./digits means the folder here" in capsys.readouterr().err


def test_a_link_beside_its_folder_does_not_change_the_names(tmp_path, monkeypatch):
    """Whichever of the two the disk lists first."""
    (tmp_path / "a").mkdir()
    picture("white", 1).save(tmp_path / "a" / "1.png")
    (tmp_path / "z").symlink_to("a")
    walk = os.walk

    def backwards(folder, **options):
        for place, folders, files in walk(folder, **options):
            folders.sort(reverse=True)
            yield place, folders, files

    monkeypatch.setattr(os, "walk", backwards)
    assert pictures_below(tmp_path) == [str(tmp_path / "a" / "1.png")]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    for name in ("open", "locked"):
        (tmp_path / name).mkdir()
        picture("white", 1).save(tmp_path / name / "1.png")
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    good = str(tmp_path / "open" / "1.png")
    assert pictures_below(tmp_path) == [good] and "locked" in capsys.readouterr().err
    found = list(classifier.find_images([str(tmp_path)]))
    assert found == [good, str(tmp_path / "locked")]  # which is then counted as unreadable
    assert list(classifier.find_images([str(tmp_path / "locked")])) == [str(tmp_path / "locked")]


def test_nothing_is_written_below_the_pictures(pets, monkeypatch):
    """However --data-dir names the place."""
    (pets.parent / "work").mkdir()
    monkeypatch.chdir(pets.parent / "work")
    before = sorted(pets.rglob("*"))
    load(pets, data_dir=f"../{pets.name}/caches")
    assert sorted(pets.rglob("*")) == before


def test_bad_pictures_are_named_left_out_and_counted(pets, capsys):
    """Also when what could be read comes from the cache."""
    (pets / "ünï" / "empty.png").write_bytes(b"")
    (pets / "ünï" / "cut.jpg").write_bytes(encoded(noise(90, 90), "JPEG")[:900])
    (pets / "ünï" / "lost.png").symlink_to("nothing.png")
    for _ in range(2):
        data = load(pets)
        told = capsys.readouterr().err
        assert len(data.train) + len(data.evaluation) == 30
        assert "empty.png: the file is empty" in told and "cut.jpg: " in told
        assert "lost.png: no such picture" in told
        assert " could not be read and are left out" in told


def test_what_makes_no_classes_is_said(pets, capsys):
    (pets / "nothing in it").mkdir()
    (pets / "one").mkdir()
    (pets / "mlartifacts").mkdir()  # MLflow's, of a training that was started in this folder
    for place in ("one", "mlartifacts"):
        picture("white").save(pets / place / "only.png")
    data = load(pets)
    told = capsys.readouterr().err
    assert "nothing in it: no pictures" in told and "class one: no picture to test on" in told
    assert data.class_names == ("cat 9", "cat 10", "one", "ünï")
    assert counts(data.train)[2] == 1


def test_what_makes_no_data_set_is_said(tmp_path):
    root = tmp_path / "bare"
    for name in "ab":
        (root / name).mkdir(parents=True)
    picture("white").save(root / "a" / "1.png")
    for place in (root, root / "a"):
        with pytest.raises(UserError, match="at least two subfolders"):
            load(place)
    (root / "b" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match="no picture of b could be read"):
        load(root)
    picture("white").save(root / "b" / "1.png")
    with pytest.raises(UserError, match="leaves no picture to test on"):
        load(root)


def test_a_folder_that_cannot_be_read_is_said(pets, monkeypatch):
    monkeypatch.setattr(os, "walk", lambda *_: iter(()))  # what it gives without permission
    with pytest.raises(UserError, match="--dataset"):
        load(pets)


# --------------------------------------------------------------------------------------------------
# Training and test pictures
# --------------------------------------------------------------------------------------------------
def names_of(count):
    return [f"/pets/cat/{number}.png" for number in range(count)]


def test_about_a_tenth_is_the_test():
    train, test = split_class(names_of(2000), "/pets")
    assert 150 < len(test) < 250 and sorted(train + test) == sorted(names_of(2000))
    assert [len(part) for part in split_class(names_of(2), "/pets")] == [1, 1]
    assert [len(part) for part in split_class(names_of(1), "/pets")] == [1, 0]


def test_a_folder_that_grows_moves_no_picture_from_training_to_test():
    paths = names_of(300)
    random.Random(0).shuffle(paths)
    for before, after in ((10, 11), (50, 60), (100, 150), (150, 300)):
        trained, _ = split_class(paths[:before], "/pets")
        _, tested = split_class(paths[:after], "/pets")
        assert not set(trained) & set(tested)


def test_the_split_depends_on_names_alone(pets):
    """Not on the order on the disk or where the folder lies."""
    paths = names_of(100)
    shuffled = random.Random(0).sample(paths, 100)
    assert split_class(paths, "/pets") == split_class(shuffled, "/pets")
    before = load(pets)
    (pets.parent / "elsewhere").mkdir()
    moved = pets.rename(pets.parent / "elsewhere" / "pets")
    assert load(moved).evaluation.digest == before.evaluation.digest


def test_train_and_test_folders(pets):
    (pets / "train").mkdir()
    for name in PETS:
        (pets / name).rename(pets / "train" / name)
    alone = load(pets)  # without test/ a part of train/ is the test
    assert alone.class_names == PETS and len(alone.train) + len(alone.evaluation) == 30
    (pets / "test" / "cat 10").mkdir(parents=True)
    picture("red", 77).save(pets / "test" / "cat 10" / "a.png")
    data = load(pets)
    assert len(data.train) == 30 and data.evaluation.labels.tolist() == [1]
    (pets / "test" / "dog").mkdir()
    picture("green").save(pets / "test" / "dog" / "a.png")
    with pytest.raises(UserError, match="no training pictures of dog"):
        load(pets)


@pytest.mark.parametrize("below", [None, ".thumbnails", "more"])
def test_a_class_may_be_called_train(pets, below):
    """Also if there are folders in it, next to its own pictures."""
    (pets / "ünï").rename(pets / "train")
    (pets / "cat 10").rename(pets / "test")
    if below != "more":
        for path in (pets / "train" / "more").iterdir():
            path.rename(pets / "train" / path.name)
        (pets / "train" / "more").rmdir()
    if below:
        (pets / "train" / below).mkdir(exist_ok=True)
    data = load(pets)
    assert data.class_names == ("cat 9", "test", "train")
    assert len(data.train) + len(data.evaluation) == 30


# --------------------------------------------------------------------------------------------------
# The cache
# --------------------------------------------------------------------------------------------------
def test_a_second_load_reads_no_picture(pets, reads):
    first = load(pets)
    assert len(reads) == 30 and len(set(reads)) == 30
    assert digests(load(pets)) == digests(first) and len(reads) == 30
    assert len(list((pets.parent / "data").glob("*.cache"))) == 2


@pytest.mark.parametrize("change", ["content", "date", "add", "remove", "rename", "label"])
def test_a_changed_folder_is_read_again(pets, reads, change):
    path, moment = pets / "ünï" / "0.png", 1_000_000_000
    load(pets)
    if change == "content":
        picture("white").save(path)
    elif change == "date":
        os.utime(path, (moment, moment))
    elif change == "add":
        picture("white").save(pets / "ünï" / "new.png")
    elif change == "remove":
        path.unlink()
    elif change == "rename":
        path.rename(path.with_name("new.png"))
    else:
        path.rename(pets / "cat 9" / "was ünï.png")
    reads.clear()
    after = load(pets)
    assert reads and digests(after) == digests(load(pets, data_dir="elsewhere"))


@pytest.mark.parametrize("damage", ["empty", "cut", "flip", "list", "tensor", "foreign", "code"])
def test_a_damaged_or_foreign_cache_is_made_again(pets, reads, damage):
    """Nothing in it is run."""
    before = load(pets)
    for cache in (pets.parent / "data").glob("*.cache"):
        content = bytearray(cache.read_bytes())
        if damage == "empty":
            cache.write_bytes(b"")
        elif damage == "cut":
            cache.write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            content[len(content) // 2] ^= 1
            cache.write_bytes(content)
        elif damage == "list":
            torch.save([1, 2], cache)
        elif damage == "tensor":
            torch.save(torch.zeros(3), cache)
        elif damage == "foreign":
            torch.save({"format_version": 4, "weights": {}}, cache)
        else:
            torch.save({"key": Evil()}, cache)
    assert digests(load(pets)) == digests(before) and len(reads) == 60
    assert not os.path.exists("ran")
    assert digests(load(pets)) == digests(before) and len(reads) == 60


def test_folders_of_the_same_name_have_their_own_caches(pets, reads, tmp_path):
    other = tmp_path / "other" / "my pets"
    shutil.copytree(pets, other)
    picture("white").save(other / "ünï" / "0.png")
    first, second = load(pets), load(other)
    assert len(reads) == 60 and digests(first) != digests(second)
    again = digests(load(pets)), digests(load(other))
    assert again == (digests(first), digests(second)) and len(reads) == 60


def test_what_could_not_be_read_is_tried_again(pets, monkeypatch):
    """The reason may be gone, and the file's date and size the same."""
    real = classifier.read_image

    def refusing(path):
        if path.endswith("0.png"):
            raise UserError("Permission denied")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(classifier, "read_image", refusing)
        data = load(pets)
        assert len(data.train) + len(data.evaluation) == 27
    data = load(pets)
    assert len(data.train) + len(data.evaluation) == 30


def test_nothing_is_written_into_the_folder_of_pictures(pets, monkeypatch):
    before = all_files(pets)
    load(pets)
    assert all_files(pets) == before
    monkeypatch.chdir(pets)  # so that --data-dir lies in it
    load(".")
    assert all_files(pets) == before


@pytest.mark.parametrize("obstacle", ["read-only", "a file", "full disk", "long name"])
def test_without_a_place_for_the_cache_the_pictures_are_read(
    pets, reads, monkeypatch, obstacle, capsys
):
    def full(*_, **__):
        raise UserError("the cache could not be written: No space left on device")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    if obstacle == "read-only":
        os.mkdir("data")
        monkeypatch.setattr(Path, "touch", refuse)
    elif obstacle == "a file":
        open("data", "w").close()
    elif obstacle == "long name":
        pets = pets.rename(pets.parent / ("x" * 250))
    else:
        monkeypatch.setattr(classifier, "save_atomically", full)
    first = load(pets)
    assert digests(load(pets)) == digests(first) and len(reads) == 60
    assert ("No space left" in capsys.readouterr().err) == (obstacle == "full disk")
    assert os.path.isfile("data") or os.listdir("data") == []


def test_two_processes_at_once_read_each_picture_once(pets, reads):
    fork = multiprocessing.get_context("fork")
    found, barrier = fork.Queue(), fork.Barrier(2)

    def load_both():
        barrier.wait()
        load(pets)
        found.put(len(reads))

    processes = [fork.Process(target=load_both) for _ in range(2)]
    for process in processes:
        process.start()
    assert sum(found.get(timeout=60) for _ in processes) == 30
    for process in processes:
        process.join()


def test_a_stop_while_reading_is_immediate(pets, monkeypatch):
    """The pictures that are left are not read first; no cache of a part is kept."""
    monkeypatch.setattr(classifier, "usable_cpus", lambda: 1)
    paths, real = [], classifier.read_image

    def stopping(path):
        paths.append(path)
        if len(paths) == 3:
            raise classifier.Stopped(2)
        return real(path)

    monkeypatch.setattr(classifier, "read_image", stopping)
    with pytest.raises(classifier.Stopped):
        load(pets)
    assert len(paths) < 27 and os.listdir("data") == []


# --------------------------------------------------------------------------------------------------
# From training to prediction
# --------------------------------------------------------------------------------------------------
def test_train_evaluate_and_predict_speak_the_classes(pets, capsys):
    """27 pictures do not crash a batch of 128."""
    code, out, _ = run(capsys, "--mode", "train", *QUICK, "--dataset", pets, "--json")
    assert code == 0 and rows(out)[-1]["model_path"] == "my pets_model.pth"
    model = ("--model-path", "my pets_model.pth")
    evaluate = ("--mode", "evaluate", *model, "--json", "--no-mlflow")
    code, out, _ = run(capsys, *evaluate)
    assert code == 0 and tuple(rows(out)[0]["per_class"]) == PETS
    image = ("--image", pets / "ünï" / "0.png")
    code, out, _ = run(capsys, "--mode", "predict", *model, "--json", *image)
    assert code == 0 and {name for name, _ in json.loads(out)["top"]} == set(PETS)
    code, _, err = run(capsys, *evaluate, "--dataset", "digits")
    assert code == 1 and "was trained on" in err
    moved = pets.rename(pets.parent / "moved")
    code, _, err = run(capsys, *evaluate)
    assert code == 1 and "name them with --dataset" in err.splitlines()[-1]
    assert run(capsys, *evaluate, "--dataset", moved)[0] == 0


def test_evaluate_reads_the_test_pictures_only(pets, reads, capsys):
    run(capsys, "--mode", "train", *QUICK, "--dataset", pets, "--data-dir", "there")
    reads.clear()
    flags = ("--model-path", "my pets_model.pth", "--data-dir", "new", "--no-mlflow", "--json")
    code, out, _ = run(capsys, "--mode", "evaluate", *flags)
    assert code == 0 and len(reads) == len(load(pets).evaluation)


def test_a_hundred_classes(tmp_path, capsys):
    for number in range(100):
        folder = tmp_path / "many" / f"class {number}"
        folder.mkdir(parents=True)
        for each in range(2):
            noise(8 + each, 8).save(folder / f"{each}.png")
    assert run(capsys, "--mode", "train", *QUICK, "--dataset", tmp_path / "many")[0] == 0
    flags = ("--model-path", "many_model.pth", "--json", "--no-mlflow")
    code, out, _ = run(capsys, "--mode", "evaluate", *flags)
    assert code == 0 and list(rows(out)[0]["per_class"]) == [f"class {n}" for n in range(100)]


def test_class_names_that_are_no_utf8(pets, capsys):
    try:
        os.rename(os.fsencode(pets / "ünï"), os.fsencode(pets) + b"/caf\xe9")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    code, out, err = run(capsys, "--mode", "train", *QUICK, "--dataset", pets, "--json")
    assert code == 0, err
    flags = ("--model-path", "my pets_model.pth", "--json", "--no-mlflow")
    code, out, _ = run(capsys, "--mode", "evaluate", *flags)
    names = list(rows(out)[0]["per_class"])
    assert code == 0 and len(names) == 3 and "\n".join(names).encode() and names[0][:3] == "caf"


@pytest.mark.slow
def test_mlflow_knows_the_folder_by_its_name(pets, tmp_path, capsys):
    assert run(capsys, "--mode", "train", *QUICK[:-1], "--dataset", pets)[0] == 0
    _, _, (found,) = runs_of(tmp_path / "mlflow.db", "my pets")
    assert found.inputs.dataset_inputs[0].dataset.name == "my pets"
    assert found.info.status == "FINISHED"


@pytest.mark.parametrize("flags,flip", [((), True), (("--no-flip",), False)])
def test_flips_can_be_switched_off(pets, capsys, flags, flip):
    run(capsys, "--mode", "train", *QUICK, "--epochs", 1, "--dataset", pets, *flags)
    assert classifier.load_model("my pets_model.pth").flip is flip


# --------------------------------------------------------------------------------------------------
# --init-from
# --------------------------------------------------------------------------------------------------
def weights_at_start(pets, cpu, *flags):
    """The network before its first update."""
    config = classifier.parse_config([*QUICK, "--dataset", str(pets), *map(str, flags)])
    return classifier.Training(config, load(pets), cpu).model.state_dict()


def test_init_from_keeps_the_last_layer_of_the_same_classes(pets, trained, cpu, tmp_path):
    saved = torch.load(trained, weights_only=True)
    others = saved["weights"]
    others["head.weight"] = others["head.weight"][:3].clone()
    torch.save(saved | {"class_names": list(load(pets).class_names)}, tmp_path / "start.pth")
    started = weights_at_start(pets, cpu, "--init-from", tmp_path / "start.pth")
    assert all(torch.equal(started[name], others[name]) for name in others)


def test_init_from_starts_at_the_nearest_mean_of_other_classes(pets, trained, cpu):
    """By cosine, of the features before the last layer."""
    data = load(pets)
    started = weights_at_start(pets, cpu, "--init-from", trained)
    others = weights(trained)
    for name in set(others) - {"head.weight"}:
        assert torch.equal(started[name], others[name]), name
    model = classifier.load_model(trained).model
    seen = []
    model.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(data.train.images)
    directions = seen[0] / seen[0].norm(dim=1, keepdim=True)
    means = torch.stack([directions[data.train.labels == label].mean(0) for label in range(3)])
    cosines = F.cosine_similarity(directions[:, None], means[None], dim=2)
    answers = (seen[0] @ started["head.weight"].T).argmax(1)
    chosen = cosines[torch.arange(len(answers)), answers]
    assert (cosines.max(1).values - chosen).max() < 1e-6 and len(set(answers.tolist())) == 3
    norms = started["head.weight"].norm(dim=1).mean(), others["head.weight"].norm(dim=1).mean()
    assert math.isclose(*norms, rel_tol=1e-5)


def test_init_from_with_classes_that_look_alike(pets, trained, cpu):
    """The means of identical pictures have no direction of their own."""
    config = classifier.parse_config([*QUICK, "--dataset", str(pets), "--init-from", str(trained)])
    data = load(pets)
    data.train.images[:] = 100
    model = classifier.Training(config, data, cpu).model
    assert model.head.weight.isfinite().all()


def test_init_from_another_network_says_which_flags(pets, trained, capsys):
    flags = ("--mode", "train", *QUICK, "--dataset", pets)
    code, _, err = run(capsys, *flags, "--width", "16", "--init-from", trained)
    assert code == 1 and "its width is 8; leave --width out" in err.splitlines()[-1]
    code, _, err = run(capsys, *flags, "--init-from", "missing.pth")
    assert code == 1 and "missing.pth: no such model" in err.splitlines()[-1]
