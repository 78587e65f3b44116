"""Whatever lies in a folder of pictures: no traceback, no hanging, no gigabytes, and the good ones are answered."""
import io
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import classifier
from classifier import UserError, predict, read_image
from test_pixels import encoded, noise

MODES = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings(action="ignore"):                 # Pillow's, of what a file claims
        yield


def every_format():
    """Small pictures of every format and mode that Pillow writes: (name, bytes)."""
    Image.init()
    picture, found = noise(40, 30), {}
    for kind in sorted(Image.SAVE):
        for mode in MODES:
            try:
                image = picture if mode == "RGB" else (picture.convert("L").convert(mode) if mode in ("I;16", "LA", "PA")
                                                       else picture.convert(mode))
                found[f"{kind} {mode}"] = encoded(image, kind)
            except Exception:           # any: not every format has every mode
                continue
    return found


CORPUS = every_format()


def answered(data):
    """Whether a picture is read; what cannot be read must say so in one line, within 2 seconds."""
    started = time.monotonic()
    try:
        image = read_image(data)
        assert image.mode == "RGB"
        classifier.framings(image, True, True)
        return True
    except UserError as error:
        assert str(error).strip()
        return False
    finally:
        assert time.monotonic() - started < 2


def test_the_corpus_is_one():
    assert len(CORPUS) > 80 and {"PNG RGBA", "JPEG CMYK", "GIF P", "TIFF F", "WEBP RGB"} <= CORPUS.keys()


def test_every_format_and_mode_is_read_or_refused_in_words():
    read = {name for name, data in CORPUS.items() if answered(data)}
    assert {"PNG RGBA", "PNG 1", "PNG I;16", "JPEG CMYK", "GIF P", "TIFF F", "TIFF LAB", "WEBP RGB", "BMP L"} <= read
    unread = {name.split()[0] for name in CORPUS} - {name.split()[0] for name in read}
    assert unread <= {"EPS", "PDF", "PALM", "BUFR", "GRIB", "HDF5", "WMF"}, "formats that Pillow writes and does not read"


@pytest.mark.parametrize("name", sorted(CORPUS))
def test_truncated_at_every_tenth(name):
    for tenth in range(10):
        answered(CORPUS[name][:len(CORPUS[name]) * tenth // 10])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "ICO", "JPEG2000", "PPM", "TGA"])
def test_flipped_bits(kind):
    rng = np.random.default_rng(0)
    for name, data in CORPUS.items():
        if name.split()[0] == kind:
            for _ in range(10):
                flipped = np.frombuffer(data, np.uint8).copy()
                flipped[rng.integers(0, len(data), 3)] ^= 1 << rng.integers(0, 8, 3, dtype=np.uint8)
                answered(flipped.tobytes())


def test_drawings_are_not_run():
    """Pillow hands EPS, which is a program, to Ghostscript."""
    assert not answered(CORPUS["EPS RGB"])
    with pytest.raises(UserError, match="EPS"):
        read_image(CORPUS["EPS RGB"])


def test_giants_one_pixel_wide():
    for size in ((1, 100_000), (65_000, 1), (30_000, 2)):
        assert answered(encoded(Image.new("RGB", size)))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
                                  bytes(range(7, 207)), np.random.default_rng(0).bytes(200)])
def test_broken_exif(exif):
    for kind in ("JPEG", "WEBP", "PNG"):
        assert answered(encoded(noise(20, 20), kind, exif=exif))


def test_broken_colour_profiles():
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        assert answered(encoded(noise(20, 20), kind, icc_profile=b"no profile" * 50))


def test_a_folder_of_everything(trained, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(3):
        noise(20, 20).save(folder / f"good {number}.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    (folder / "jpeg.png").write_bytes(encoded(noise(20, 20), "JPEG"))
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    code = classifier.main(["--mode", "predict", "--model-path", str(trained), "--json", "--image", str(folder),
                            str(folder / "folder.png")])
    rows = {Path(row["image"]).name: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert code == 1
    assert {name for name, row in rows.items() if "label" in row} == {*(f"good {n}.png" for n in range(3)), "jpeg.png"}
    assert len(rows) == 11


FUZZ = st.tuples(st.sampled_from(sorted(CORPUS)), st.floats(0, 1),
                 st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8))


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(FUZZ)
def test_generated_files(recipe):
    """Cut and overwritten at random: 5,000 files, each within 2 s."""
    name, share, changes = recipe
    data = bytearray(CORPUS[name][:max(1, round(len(CORPUS[name]) * (share if share < 0.5 else 1)))])
    for place, value in changes:
        data[int(place * len(data))] = value
    answered(bytes(data))


@pytest.mark.slow
def test_large_pictures_stay_within_two_seconds_and_a_gigabyte(trained, tmp_path):
    """The largest that are read, of all kinds, in a process of its own."""
    import subprocess
    import sys

    from conftest import ROOT
    side = int(classifier.MAX_PIXELS ** 0.5)
    for mode, kind in (("RGBA", "png"), ("RGB", "webp"), ("P", "gif"), ("L", "bmp"), ("I;16", "tiff"), ("CMYK", "tiff"),
                       ("RGB", "jpg"), ("1", "png"), ("F", "tiff")):
        options = {"compression": "tiff_deflate"} if kind == "tiff" else {"lossless": True} if kind == "webp" else {}
        Image.new(mode, (side, side)).save(tmp_path / f"{mode[0]}-{mode[-1]}.{kind}", **options)
    Image.new("RGB", (13_000, 13_000), "red").save(tmp_path / "phone.jpg", quality=30)
    code = ("import classifier, resource, sys, time, pathlib; classifier.torch.set_num_threads(1)\n"
            "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
            "    started = time.perf_counter()\n"
            f"    answer, = classifier.predict(path, model_path={str(trained)!r})\n"
            "    print(path.name, answer.error, time.perf_counter() - started, classifier.Runtime("
            "classifier.torch.device('cpu')).peak_memory_mb(), sep='\\t')")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in tmp_path.glob("*.*"):
        if path.is_file():
            path.rename(folder / path.name)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(folder)], cwd=ROOT, text=True,
                          capture_output=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 10, done.stderr
    print(*rows, sep="\n")
    for name, error, seconds, memory in rows:
        assert error == "None" and float(seconds) < 2 and float(memory) < 1000, (name, error, seconds, memory)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pictures(trained, tmp_path):
    import subprocess
    import sys

    from conftest import ROOT
    (tmp_path / "photo.jpg").write_bytes(encoded(noise(500, 375), "JPEG"))
    peaks = []
    for count in (300, 3000):
        code = ("import classifier, os\n"
                f"classifier.main(['--mode', 'predict', '--model-path', {str(trained)!r}, '--image', "
                f"*{count} * [{str(tmp_path / 'photo.jpg')!r}]])\n"
                "print(classifier.Runtime(classifier.torch.device('cpu')).peak_memory_mb())")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
        peaks.append(float(done.stdout.splitlines()[-1]))
        assert len(done.stdout.splitlines()) == count + 1
    assert peaks[1] < peaks[0] + 50, peaks


def test_bytes_of_any_kind_are_answered_or_refused(trained):
    for answer in predict([b"", b"\xff\xd8\xff", io.BytesIO(b"x").getvalue(), CORPUS["PNG 1"]], model_path=trained):
        assert bool(answer.error) is not bool(answer.label)
