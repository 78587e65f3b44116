"""Whatever lies in a folder of pictures: no traceback, no gigabytes, good ones are answered."""

import functools
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import PIL
import pytest
from conftest import ROOT, encoded, noise, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import classifier
from classifier import MAX_PIXELS, MAX_SCANS, UserError, jpeg_scans, read_image

MODES = ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I"]
READ = ["AVIF", "PPM", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP"]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of what a file claims
        yield


def every_format():
    """Small pictures of every format and mode that Pillow writes: (name, bytes)."""
    Image.init()
    picture, found = noise(40, 30), {}
    for kind in sorted(Image.SAVE):
        for mode in (*MODES, "I;16", "F"):
            try:
                gray = picture.convert("L") if mode in ("I;16", "LA", "PA") else picture
                found[f"{kind} {mode}"] = encoded(gray.convert(mode), kind)
            except Exception:  # any: not every format has every mode
                continue
    return found


CORPUS = every_format()


@pytest.fixture
def answered(monkeypatch):
    """A function that tells if a picture is read; if not, that is said in one line.

    No more pixels than promised are decoded: those of what is handed over to be decoded, which of a
    large JPEG is a fraction.
    """
    sizes, real = [], classifier.to_rgb

    def recorded(image):
        sizes.append(image.width * image.height)
        return real(image)

    def answer(data):
        sizes.clear()
        try:
            image = read_image(data)
            assert image.mode == "RGB"
            classifier.photo_letterbox(image)
            classifier.center_squares(image, True)
            return True
        except UserError as error:
            assert str(error).strip() and len(str(error).splitlines()) == 1
            return False
        finally:
            assert all(size <= MAX_PIXELS for size in sizes)

    monkeypatch.setattr(classifier, "to_rgb", recorded)
    return answer


def test_every_format_and_mode_is_read_or_refused_in_words(answered):
    assert len(CORPUS) > 80
    read = {name for name, data in CORPUS.items() if answered(data)}
    assert {name.split()[0] for name in read} == set(READ)
    unread = {name for name in CORPUS if name.split()[0] in READ} - read
    # Pillow 12 and older do not read what they themselves write in this one.
    assert unread <= ({"TIFF YCbCr"} if int(PIL.__version__.split(".")[0]) < 13 else set())


@pytest.mark.parametrize("kind", ["EPS", "JPEG2000", "ICO", "TGA", "ICNS", "DIB"])
def test_only_formats_that_people_have_are_read(kind):
    """Pillow runs EPS, which is a program, and is slow or unbounded in some others."""
    with pytest.raises(UserError, match="JPEG, .*PNG, .*TIFF"):
        read_image(CORPUS[f"{kind} RGB"])


@pytest.mark.parametrize("kind", READ)
def test_truncated_and_flipped(kind, answered):
    rng = np.random.default_rng(0)
    for name, data in CORPUS.items():
        if name.split()[0] == kind:
            for tenth in range(10):
                answered(data[: len(data) * tenth // 10])
            for _ in range(10):
                flipped = np.frombuffer(data, np.uint8).copy()
                flipped[rng.integers(0, len(data), 3)] ^= 1 << rng.integers(0, 8, 3, dtype=np.uint8)
                answered(flipped.tobytes())


FUZZ = st.tuples(
    st.sampled_from([name for name in sorted(CORPUS) if name.split()[0] in READ]),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
@given(FUZZ)
def test_generated_files(answered, recipe):
    """Cut and overwritten at random: 5,000 files."""
    name, share, changes = recipe
    size = len(CORPUS[name])
    data = bytearray(CORPUS[name][: max(1, round(size * (share if share < 0.5 else 1)))])
    for place, value in changes:
        data[int(place * len(data))] = value
    answered(bytes(data))


def test_giants_one_pixel_wide(answered):
    for size in ((1, 100_000), (65_000, 1), (30_000, 2)):
        assert answered(encoded(Image.new("RGB", size)))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        bytes(range(7, 207)),
        np.random.default_rng(0).bytes(200),
    ],
)
def test_broken_exif(exif, answered):
    for kind in ("JPEG", "WEBP", "PNG"):
        assert answered(encoded(noise(20, 20), kind, exif=exif))


def test_broken_colour_profiles(answered):
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        assert answered(encoded(noise(20, 20), kind, icc_profile=b"no profile" * 50))


# JPEGs. One with several scans is put together at full size, however small it is asked for.
START, FRAMES, SCAN, END = b"\xff\xd8", (b"\xff\xc0", b"\xff\xc2"), b"\xff\xda", b"\xff\xd9"
PLAIN = encoded(noise(64, 64), "JPEG")
PROGRESSIVE = encoded(noise(64, 64), "JPEG", progressive=True)


def resized(jpeg, width, height):
    """A JPEG that claims another size."""
    place = max(jpeg.find(frame) for frame in FRAMES) + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


def first_scan(jpeg):
    """A progressive JPEG that ends after its first scan, as it may."""
    return jpeg[: jpeg.index(b"\xff\xc4", jpeg.index(SCAN))] + END


def repeated(jpeg, count, between=b""):
    """A JPEG with its last scan so many times more, after some bytes that follow its first scan."""
    first = len(first_scan(jpeg)) - 2
    scan = jpeg[jpeg.rindex(SCAN) : -2]
    return jpeg[:first] + between + jpeg[first:-2] + count * scan + END


def one_of_three(jpeg):
    """A gray JPEG that claims three channels and has only the first."""
    place = jpeg.index(FRAMES[0])
    channels = bytes([3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    size = jpeg[place + 4 : place + 9]
    return jpeg[: place + 2] + struct.pack(">H", 17) + size + channels + jpeg[place + 13 :]


def with_thumbnail(jpeg, thumbnail):
    exif = b"Exif\0\0" + thumbnail
    return START + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + jpeg[2:]


def comment(content):
    return b"\xff\xfe" + struct.pack(">H", 2 + len(content)) + content


def test_scans_are_counted():
    """Those of the picture itself, not of a preview in its EXIF or behind it."""
    assert jpeg_scans(PLAIN) == jpeg_scans(with_thumbnail(PLAIN, PLAIN)) == 1
    assert jpeg_scans(PLAIN + PROGRESSIVE) == 1
    assert jpeg_scans(with_thumbnail(PLAIN, PROGRESSIVE)) == 1
    real = PROGRESSIVE.count(SCAN)
    assert 2 < real == jpeg_scans(PROGRESSIVE) == jpeg_scans(with_thumbnail(PROGRESSIVE, PLAIN))
    assert jpeg_scans(repeated(PROGRESSIVE, 300)) == real + 300
    restarts = encoded(noise(64, 64), "JPEG", restart_marker_blocks=1)
    assert b"\xff\xd0" in restarts and jpeg_scans(restarts) == 1


@pytest.mark.parametrize(
    "between",
    [
        b"",
        comment(END),
        comment(END + SCAN),
        b"\xff\x01" + comment(END),
        b"\xff" + comment(END),
        b"\xff\xd0" + comment(END),
    ],
    ids=["plainly", "end in a comment", "scan too", "after TEM", "after a fill byte", "after RST"],
)
def test_many_scans_are_refused_wherever_they_hide(between):
    """Each takes as long as the whole picture; libjpeg reads all of these files."""
    few, many = (repeated(PROGRESSIVE, count, between) for count in (MAX_SCANS - 30, 300))
    Image.open(io.BytesIO(many)).load()
    assert read_image(few).size == (64, 64)
    with pytest.raises(UserError, match=rf"JPEG with \d+ scans: more than {MAX_SCANS}"):
        read_image(many)


def test_jpegs_that_are_put_together_at_full_size_are_refused_by_their_header(answered):
    """13,300 x 13,300 coefficients in three channels take a gigabyte, with one scan as with ten."""
    gray = encoded(noise(64, 64, "L"), "JPEG")
    for jpeg in (PROGRESSIVE, first_scan(PROGRESSIVE), one_of_three(gray)):
        assert answered(jpeg)
        assert answered(resized(jpeg, 100, 100))
        with pytest.raises(UserError, match="13300x13300 pixels: more than 25 million"):
            read_image(resized(jpeg, 13_300, 13_300))


def test_photos_of_200_megapixels_are_read(answered):
    """At an eighth of their size; a cut one is refused for that, not for its size."""
    phone = resized(PLAIN, 16_320, 12_240)
    assert answered(phone)  # libjpeg fills what is missing with gray
    assert read_image(phone).size == (680, 510)
    with pytest.raises(UserError, match="truncated"):
        read_image(phone[:-40])
    with pytest.raises(UserError, match="17000x17000 pixels: more than 250 million"):
        read_image(resized(PLAIN, 17_000, 17_000))


def tiled_tiff(tile):
    """A gray TIFF of 16 x 16 pixels in one tile of `tile` x `tile`, deflated."""
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(tile)) for _ in range(tile)) + packer.flush()
    entries = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile}
    entries |= {324: 8 + 2 + 12 * 10 + 4, 325: len(body)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return b"II*\0" + struct.pack("<IH", 8, 10) + table + bytes(4) + body


def run_length_bmp(width, height, runs):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    start = 14 + len(header) + 1024
    return (
        b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + header + bytes(1024) + runs
    )


def test_small_files_do_not_unpack_to_more_than_their_picture(answered):
    """A TIFF's tiles are decoded whole; Pillow's loop over run lengths fills 25 million bytes."""
    assert answered(tiled_tiff(64))
    with pytest.raises(UserError, match="more than 25 million"):
        read_image(tiled_tiff(5120))
    with pytest.raises(UserError, match="run-length"):
        read_image(run_length_bmp(4_000, 5, b"\1\0\0\0"))


def peak_megabytes(tmp_path, trained, paths):
    """Peak memory of a process that answers these pictures, one at a time, and how many it read."""
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    command = [sys.executable, ROOT / "classifier.py", "--mode", "predict", "--device", "cpu"]
    command += ["--model-path", trained, "--json", "--image", "-"]
    one_cpu = functools.partial(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))})
    with open(tmp_path / "list.txt") as names, open(tmp_path / "out.txt", "w") as out:
        process = subprocess.Popen(command, stdin=names, stdout=out, preexec_fn=one_cpu)
        _, _, usage = os.wait4(process.pid, 0)
    answers = rows((tmp_path / "out.txt").read_text())
    return usage.ru_maxrss / 1024, sum("label" in answer for answer in answers)


@pytest.mark.slow
def test_the_largest_pictures_take_less_than_350_megabytes(trained, tmp_path):
    """Those of one decoder, beside what a process takes for a small picture."""
    side = int(MAX_PIXELS**0.5)
    deflate, lossless = {"compression": "tiff_deflate"}, {"lossless": True}
    pictures = {
        "RGBA.png": {},
        "RGB.webp": lossless,
        "P.gif": {},
        "L.bmp": {},
        "I;16.tiff": deflate,
        "CMYK.tiff": deflate,
        "RGB.jpg": {"progressive": True, "subsampling": 0},
        "1.png": {},
        "I.tiff": deflate,
        "F.tiff": deflate,
    }
    for name, options in pictures.items():
        Image.new(name.split(".")[0], (side, side)).save(tmp_path / name, **options)
    Image.new("RGB", (15_000, 15_000), "red").save(tmp_path / "phone.jpg", quality=30)
    paths = [tmp_path / name for name in (*pictures, "phone.jpg")]
    noise(100, 100).save(tmp_path / "small.png")
    small, read = peak_megabytes(tmp_path, trained, [tmp_path / "small.png"])
    large, all_read = peak_megabytes(tmp_path, trained, paths)
    assert read == 1 and all_read == len(paths)
    assert large - small < 350


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pictures(trained, tmp_path):
    photo = tmp_path / "photo.jpg"
    noise(500, 375).save(photo)
    few, many = (peak_megabytes(tmp_path, trained, count * [photo]) for count in (100, 1000))
    assert (few[1], many[1]) == (100, 1000)
    assert many[0] < few[0] + 50
