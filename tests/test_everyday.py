"""Folders, pictures and machines as people have them."""

import functools
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import unicodedata
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LOGGED, ROOT, TINY, encoded, noise, rows, run, runs_of
from PIL import Image, ImageCms

import classifier
from classifier import CifarNet, Config, UserError, load_data, pictures_below, predict, read_image

QUICK = ["--mode", "train", "--width", 8, "--epochs", 1, "--num-workers", 0, "--device", "cpu"]


def picture(path, colour, seed):
    """Saves a picture of its own: a colour with a seeded stripe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (60, 45), colour)
    image.paste(
        (seed * 9 % 256, seed * 31 % 256, seed * 57 % 256), (seed % 40, 5, seed % 40 + 15, 40)
    )
    image.save(path)
    return path


def classes_in(folder, first=0, count=4):
    for label, colour in (("cats", "red"), ("dogs", "blue")):
        for number in range(first, first + count):
            picture(folder / label / f"{number}.png", colour, number)


# --- Compiled gradients ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [20, 26, 32])
def test_compiled_gradients_are_the_plain_ones(size):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 3, size, size), dtype=torch.uint8)
    net, labels = CifarNet(4, 10, classifier.pixel_statistics(images)), torch.arange(16) % 10
    found = []
    for each in (net, torch.compile(net)):
        net.zero_grad()
        F.cross_entropy(each(images), labels).backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()


# --- The Python API -------------------------------------------------------------------------------


def sources_of(path):
    content = path.read_bytes()
    return [
        *(str(path), path, content, bytearray(content), memoryview(content), io.BytesIO(content)),
        *(open(path, "rb"), Image.open(path), np.asarray(Image.open(path))),
        next(entry for entry in os.scandir(path.parent) if entry.name == path.name),
    ]


def test_one_picture_in_any_form_has_one_answer(trained, tmp_path):
    path = picture(tmp_path / "one" / "a.png", "red", 3)
    (expected,) = predict(path, model_path=trained)
    for source in sources_of(path):
        (found,) = predict(source, model_path=trained)
        assert (found.label, found.confidence) == (expected.label, expected.confidence), source
    together = predict(sources_of(path), model_path=trained)
    assert [each.error for each in together] == 10 * [None]
    assert [each.image for each in together][2:9] == list(range(2, 9))
    json.dumps([each.image for each in together[1:-1] if isinstance(each.image, int)])


@pytest.mark.parametrize(
    "source",
    [
        None,
        5,
        [5],
        [None],
        io.StringIO("text"),
        np.array(5),
        np.zeros((4, 4)),
        torch.zeros(3, 4, 4),
    ],
)
def test_what_is_no_picture_is_one_type_error(trained, source):
    with pytest.raises(TypeError, match="a picture must be a path, bytes, an open binary file"):
        predict(source, model_path=trained)


def test_a_picture_opened_as_text_is_a_type_error(trained, tmp_path):
    path = picture(tmp_path / "a.png", "red", 1)
    with open(path) as file, pytest.raises(TypeError, match="an open binary file"):
        predict(file, model_path=trained)


def test_a_damaged_archive_is_one_picture_without_an_answer(trained, tmp_path):
    good = picture(tmp_path / "a.png", "red", 1)

    def read():
        raise zipfile.BadZipFile("Bad CRC-32 for file 'b.png'")

    found = predict([SimpleNamespace(read=read), good], model_path=trained)
    assert "Bad CRC-32" in found[0].error and found[1].label


def test_a_closed_file_is_one_picture_without_an_answer(trained, tmp_path):
    path = picture(tmp_path / "a.png", "red", 1)
    with open(path, "rb") as closed:
        pass
    found = predict([closed, path], model_path=trained)
    assert "closed file" in found[0].error and found[1].label


def test_an_array_of_paths_is_many_pictures(trained, tmp_path):
    path = str(picture(tmp_path / "a.png", "red", 1))
    found = predict(np.array([path, path]), model_path=trained)
    assert [each.label for each in found] == 2 * [predict(path, model_path=trained)[0].label]


@pytest.mark.slow
def test_a_forked_process_predicts(trained, tmp_path):
    script = """
import os, sys
from classifier import predict
from PIL import Image
picture = Image.effect_noise((200, 200), 80).convert("RGB")
first = predict([picture] * 70, model_path=sys.argv[1])
if child := os.fork():
    sys.exit(os.waitpid(child, 0)[1])
again = predict([picture] * 70, model_path=sys.argv[1])
os._exit([a.label for a in again] != [a.label for a in first])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", script, trained]
    assert subprocess.run(command, env=environment, timeout=60).returncode == 0


# --- Folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train,test", [("Training", "Testing"), ("train", "val"), ("Train", "TEST"), ("train", "valid")]
)
def test_usual_names_of_splits(tmp_path, capsys, train, test):
    classes_in(tmp_path / "set" / train, 0, 4)
    classes_in(tmp_path / "set" / test, 10, 2)
    data = load_data(Config(dataset=str(tmp_path / "set")))
    assert data.class_names == ("cats", "dogs")
    assert (len(data.train), len(data.evaluation)) == (8, 4)
    assert f"{train}, testing on " in capsys.readouterr().err


def test_what_is_not_used_beside_the_splits_is_told(tmp_path, capsys):
    for number, split in enumerate(("train", "test", "validation", "extra")):
        classes_in(tmp_path / "set" / split, 10 * number, 2)
    picture(tmp_path / "set" / "train" / "sheet.png", "white", 1)
    with pytest.raises(UserError, match="at least two"):  # extra/ may be a class like train/
        load_data(Config(dataset=str(tmp_path / "set" / "train" / "cats")))
    shutil.rmtree(tmp_path / "set" / "extra")
    data = load_data(Config(dataset=str(tmp_path / "set")))
    assert (len(data.train), len(data.evaluation)) == (4, 4)
    err = capsys.readouterr().err
    assert "validation is not used" in err and "pictures beside the classes' folders" in err


def test_splits_without_classes_are_refused(tmp_path):
    for split in ("train", "test"):
        picture(tmp_path / "set" / split / "a.png", "red", 1)
    with pytest.raises(UserError, match="train needs a subfolder for each class"):
        load_data(Config(dataset=str(tmp_path / "set")))


def test_a_class_may_be_called_train(tmp_path):
    for number, label in enumerate(("train", "car")):
        for each in range(3):
            picture(tmp_path / "set" / label / f"{each}.png", "red", 10 * number + each)
    assert load_data(Config(dataset=str(tmp_path / "set"))).class_names == ("car", "train")


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "@Recycle"])
def test_folders_that_systems_make_are_no_classes(tmp_path, name):
    classes_in(tmp_path / "set")
    picture(tmp_path / "set" / name / "old.png", "green", 1)
    picture(tmp_path / "set" / "cats" / name / "thumb.png", "green", 2)
    data = load_data(Config(dataset=str(tmp_path / "set")))
    assert data.class_names == ("cats", "dogs") and len(data.train) + len(data.evaluation) == 8


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    classes_in(tmp_path / "set")
    picture(tmp_path / "disk" / "far.png", "red", 20)
    (tmp_path / "set" / "cats" / "phone").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "set" / "cats")
    found = [os.path.basename(path) for path in pictures_below(tmp_path / "set" / "cats")]
    assert sorted(found) == ["0.png", "1.png", "2.png", "3.png", "far.png"]


def test_copies_are_told(tmp_path, capsys):
    classes_in(tmp_path / "set" / "train", 0, 4)
    classes_in(tmp_path / "set" / "test", 10, 2)
    load_data(Config(dataset=str(tmp_path / "set")))
    assert "also" not in capsys.readouterr().err
    copied = tmp_path / "set" / "test" / "cats" / "copy.png"
    shutil.copy(tmp_path / "set" / "train" / "cats" / "1.png", copied)
    twice = tmp_path / "set" / "train" / "dogs" / "9.png"
    shutil.copy(tmp_path / "set" / "train" / "cats" / "2.png", twice)
    load_data(Config(dataset=str(tmp_path / "set")))
    err = capsys.readouterr().err
    assert f"1 of 5 test pictures are also training pictures: {copied}" in err
    assert f"1 pictures are also in another class: {twice}" in err


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    for form, first in (("NFC", 0), ("NFD", 10)):
        for label, colour in (("Möwe", "red"), ("Bär", "blue")):
            for number in range(first, first + 3):
                folder = tmp_path / "set" / unicodedata.normalize(form, label)
                picture(folder / f"{number}.png", colour, number)
    data = load_data(Config(dataset=str(tmp_path / "set")))
    assert set(data.class_names) == {"Bär", "Möwe"} and len(data.class_names) == 2
    assert len(data.train) + len(data.evaluation) == 12


def test_a_class_called_unknown_is_told(tmp_path, capsys):
    for label, colour in (("cat", "red"), ("unknown", "blue")):
        for number in range(3):
            picture(tmp_path / "set" / label / f"{number}.png", colour, number)
    assert run(capsys, *QUICK, "--no-mlflow", "--dataset", "set", "--model-path", "m.pth")[0] == 0
    words = ("--mode", "predict", "--model-path", "m.pth", "--image", "set/cat")
    assert "unknown" not in run(capsys, *words)[2]
    assert "the class unknown and the answer unknown" in run(capsys, *words, "--threshold", 0.5)[2]


# --- Pictures -------------------------------------------------------------------------------------


def chunk(kind, data, flip=0):
    sum = zlib.crc32(kind + data) ^ flip
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", sum)


def png(width, height, depth, colour, rows, *extra):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = [
        chunk(b"IHDR", header),
        *extra,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("extra", [(0x128, 2, 2, b"2\0"), (0x132, 5, 1, b"\1\0\0\0\1\0\0\0")])
def test_a_wrong_tag_beside_the_orientation(extra):
    """Pillow's own rotation fails with it (python-pillow/Pillow#8965)."""
    tag, kind, count, value = extra
    inline, behind = (value, b"") if len(value) <= 4 else (struct.pack("<I", 38), value)
    table = struct.pack("<HHHIHH", 2, 0x112, 3, 1, 6, 0) + struct.pack("<HHI", tag, kind, count)
    table += inline.ljust(4, b"\0") + bytes(4)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + table + behind
    assert read_image(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)).size == (20, 40)


@pytest.mark.parametrize("number", range(1, 9))
def test_each_orientation_is_pillows(number):
    from PIL import ImageOps

    image, exif = noise(40, 20), Image.Exif()
    exif[0x112] = number
    data = encoded(image, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert read_image(data).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2 << 20))),
        chunk(b"iTXt", b"XML\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
        chunk(b"tEXt", b"a\0b", 1),
        chunk(b"pHYs", bytes(9), 1),
    ],
)
def test_a_png_whose_pixels_are_whole_is_read(extra):
    rows = (b"\0" + bytes((200, 100, 50)) * 40) * 40
    assert read_image(png(40, 40, 8, 2, rows, extra)).getpixel((9, 9)) == (200, 100, 50)


def test_transparent_colours_in_the_files_own_depth():
    def transparent(*values):
        return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))

    two_bits = png(4, 1, 2, 0, b"\0\x80", transparent(2))
    four_bits = png(2, 1, 4, 0, b"\0\x50", transparent(5))
    deep = png(
        1, 1, 16, 2, b"\0" + struct.pack(">3H", 1000, 2000, 3000), transparent(1000, 2000, 3000)
    )
    for data in (two_bits, four_bits, deep):
        assert read_image(data).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("alpha", [0, 255])
def test_a_bitmap_without_alpha_is_opaque(alpha):
    rows = bytes([10, 20, 200, alpha]) * 16
    head = struct.pack("<IiiHHIIiiII", 108, 4, 4, 1, 32, 3, 64, 2835, 2835, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    data = b"BM" + struct.pack("<IHHI", 122 + 64, 0, 0, 122) + head + rows
    assert read_image(data).getpixel((0, 0)) == (200, 20, 10)


@pytest.mark.parametrize(
    "image,expected",
    [
        (Image.fromarray(np.array([[0, 4095]], np.uint16)), [0, 255]),  # 12 bits in 16
        (Image.fromarray(np.array([[0, 65535]], np.uint16)), [0, 255]),
        (Image.fromarray(np.array([[0, 0.5, 1.02]], np.float32)), [0, 128, 255]),
    ],
)
def test_gray_levels_of_many_bits(image, expected):
    found = [value for value, *_ in np.asarray(read_image(image))[0].tolist()]
    assert found == expected


def test_white_may_come_first():
    values = np.array([[0, 65535]], np.uint16)
    data = encoded(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert np.asarray(read_image(data))[0, :, 0].tolist() == [255, 0]


def with_other_primaries():
    """sRGB's profile with the primaries of Adobe RGB (D50)."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    values = {b"rXYZ": (0.60974, 0.31111, 0.01947), b"gXYZ": (0.20528, 0.62567, 0.06087)}
    values[b"bXYZ"] = (0.14919, 0.06322, 0.74457)
    for number in range(struct.unpack_from(">I", data, 128)[0]):
        tag, place, _ = struct.unpack_from(">4sII", data, 132 + 12 * number)
        if tag in values:
            struct.pack_into(">3i", data, place + 8, *(round(65536 * each) for each in values[tag]))
    return bytes(data)


def test_colour_profiles_become_srgb():
    image, wide = Image.new("RGB", (64, 64), (180, 60, 60)), with_other_primaries()
    srgb = ImageCms.createProfile("sRGB")
    expected = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(wide)), srgb)
    own = ImageCms.ImageCmsProfile(srgb).tobytes()
    for profile, right in ((wide, expected), (own, image), (wide[:300], image)):
        found = read_image(encoded(image, icc_profile=profile))
        assert found.getpixel((9, 9)) == right.getpixel((9, 9))
    assert expected.getpixel((9, 9)) != (180, 60, 60)


def test_a_pixmap_is_read_and_a_large_one_of_text_is_refused():
    assert read_image(b"P3 2 1 255 200 100 50 0 0 0 ").getpixel((0, 0)) == (200, 100, 50)
    with pytest.raises(UserError, match="million"):
        read_image(b"P3 2000 1000 255 1 2 3 ")


def test_what_is_special_about_a_tiff_is_told(capfd):
    data = encoded(noise(40, 40), "TIFF").replace(struct.pack("<HHIH", 258, 3, 3, 0)[:8], b"", 0)
    image = bytearray(data)
    position = image.index(struct.pack("<HH", 277, 3))  # samples per pixel
    image[position + 8] = 5
    with pytest.raises(UserError, match="a TIFF with .* bits and compression 1 is not supported"):
        read_image(bytes(image))
    broken = encoded(noise(40, 40), "TIFF", compression="tiff_lzw")
    with pytest.raises(UserError, match="pixels cannot be decoded"):
        read_image(broken[:8] + bytes(200) + broken[208:])
    assert capfd.readouterr().err == ""


def test_heic_needs_pillow_heif(monkeypatch):
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1"
    monkeypatch.setattr(classifier, "heif_formats", lambda _: ())
    with pytest.raises(UserError, match="pip install pillow-heif"):
        read_image(data)


# --- Streams and machines -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_other_signals_stop_like_sigterm(tmp_path, name):
    command = [
        sys.executable,
        ROOT / "classifier.py",
        "--mode",
        "train",
        *LOGGED,
        "--epochs",
        "3000",
    ]
    number, streams = getattr(signal, name), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    usual = functools.partial(signal.signal, number, signal.SIG_DFL)  # nohup may run the tests
    process = subprocess.Popen(command, **streams, text=True, preexec_fn=usual)
    for line in process.stdout:
        if line.split()[:1] == ["2"]:
            break
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and "continue with: python" in err
    _, _, (found,) = runs_of(tmp_path / "mlflow.db")
    assert found.info.status == "KILLED"


@pytest.mark.slow
def test_nohup_goes_on(tmp_path):
    command = ["nohup", sys.executable, ROOT / "classifier.py", "--mode", "train", *TINY]
    process = subprocess.Popen([*command, "--epochs", "60"], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    assert "after 60 epochs" in process.communicate(timeout=100)[0] and process.returncode == 0


@pytest.mark.slow
def test_a_closed_stderr_leaves_json_alone(trained, tmp_path):
    good = picture(tmp_path / "a.png", "red", 1)
    (tmp_path / "bad.png").touch()
    words = f"--mode predict --json --model-path {trained} --image {good} {tmp_path}/bad.png"
    command = f"{sys.executable} {ROOT}/classifier.py {words} 2>&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 1 and len(list(map(json.loads, done.stdout.splitlines()))) == 2


def test_a_home_folder_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = "--mode predict --model-path=~/m.pth --data-dir=~/d --save-inputs=~/s --image ~/a.png"
    config = classifier.parse_config([*words.split(), "--init-from=~/i.pth"])
    paths = config.model_path, config.data_dir, config.save_inputs, *config.image, config.init_from
    assert [os.path.relpath(path, tmp_path) for path in paths] == [
        "m.pth",
        "d",
        "s",
        "a.png",
        "i.pth",
    ]


@pytest.mark.parametrize("rank", ["", "0", "1", "7"])
def test_a_rank_without_a_world_means_nothing(trained, tmp_path, capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    path = picture(tmp_path / "a.png", "red", 1)
    code, out, _ = run(capsys, "--mode", "predict", "--model-path", trained, "--image", path)
    assert code == 0 and str(path) in out


def test_numbers_of_processes_that_are_none(capsys, monkeypatch, trained):
    monkeypatch.setenv("WORLD_SIZE", "many")
    code, out, err = run(capsys, "--mode", "evaluate", "--model-path", trained)
    assert (code, out) == (1, "") and "WORLD_SIZE='many' in the environment is not a number" in err


# --- MLflow ---------------------------------------------------------------------------------------


def test_a_launchers_run_is_used_and_left_open(capsys, monkeypatch, tmp_path):
    import mlflow

    uri = f"sqlite:///{tmp_path}/theirs.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("theirs")
    started = client.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    assert run(capsys, "--mode", "train", *LOGGED, "--model-path", "a.pth")[0] == 0
    monkeypatch.setenv("MLFLOW_RUN_ID", started)
    assert run(capsys, "--mode", "train", *LOGGED)[0] == 0
    found = {each.info.run_id: each for each in client.search_runs([experiment])}
    assert len(found) == 2 and found[started].info.status == "RUNNING"
    assert "test/accuracy" in found[started].data.metrics

    def times(name):
        return len(client.get_metric_history(started, name))

    before = times("train/loss"), times("test/accuracy")
    monkeypatch.setenv("MLFLOW_RUN_ID", started)  # MLflow has removed it from this process
    code, out, _ = run(capsys, "--mode", "train", *LOGGED, "--seed", 1, "--json")
    assert code == 0 and (times("train/loss"), times("test/accuracy")) == (
        before[0] + 2,
        before[1] + 2,
    )
    percent = 100 * rows(out)[-1]["test_accuracy"]
    latest = client.get_run(started).data.metrics["test/accuracy"]
    assert latest == pytest.approx(percent, abs=0.01)  # a job's second work is not taken for known


def test_a_launchers_run_that_is_gone_is_replaced_by_one_that_ends(capsys, monkeypatch, tmp_path):
    import mlflow

    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    code, _, err = run(capsys, "--mode", "train", *LOGGED)
    assert code == 0 and "is gone: logging to a new one" in err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert found.info.status == "FINISHED"


def test_a_launchers_run_outlives_a_model_that_cannot_be_stored(capsys, monkeypatch, tmp_path):
    import mlflow

    def refuse(**_):
        raise PermissionError("no credentials")

    monkeypatch.setattr("mlflow.pyfunc.log_model", refuse)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    started = client.create_run(client.create_experiment("digits")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", started)
    code, _, err = run(capsys, "--mode", "train", *LOGGED)
    assert code == 0 and "MLflow did not store the model: no credentials\n" in err
    assert client.get_run(started).info.status == "RUNNING"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["feature%2Flogin", "what?", "a#b", "a b"])
def test_folders_with_signs_keep_their_runs(tmp_path, name):
    folder = tmp_path / "work" / name
    folder.mkdir(parents=True)
    command = [sys.executable, ROOT / "classifier.py", "--mode", "train", *LOGGED]
    assert subprocess.run(command, cwd=folder).returncode == 0
    assert (folder / "mlflow.db").stat().st_size and list(folder.rglob("confusion_matrix.png"))
    assert os.listdir(tmp_path / "work") == [name]


def test_a_database_that_is_down_costs_no_time(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = time.monotonic()
    code, _, err = run(
        capsys, "--mode", "train", *LOGGED, "--tracking-uri", f"postgresql://u@127.0.0.1:{port}/db"
    )
    assert code == 0 and "cannot log to MLflow at" in err and time.monotonic() - started < 60


@pytest.mark.parametrize("names", [("猫", "犬"), ("$$", "$a"), ("cat", "dog")])
def test_class_names_that_the_font_lacks(names):
    confusion = torch.eye(2).long()
    found = classifier.Evaluation(1.0, 0.5, None, 0.1, 1.0, confusion, 1.0)
    figure = found.files(names)["confusion_matrix.png"]()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    plain = [name.replace("$", r"\$") for name in names]
    assert labels == (["class 0", "class 1"] if "猫" in names else plain)
    figure.savefig(io.BytesIO())
