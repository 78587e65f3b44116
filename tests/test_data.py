"""Data sets, the loader, samplers; downloads of CIFAR-10 from servers of the test's own."""

import contextlib
import functools
import hashlib
import http.server
import io
import itertools
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run
from torchvision.datasets import CIFAR10

import classifier
from classifier import (
    BatchSampler,
    Config,
    Runtime,
    Split,
    UserError,
    build_loader,
    load_data,
    loader_options,
)

DIGITS = Config(dataset="digits")
ONE = Runtime(torch.device("cpu"))


def part(rank, world_size):
    return Runtime(torch.device("cpu"), rank=rank, world_size=world_size)


# --------------------------------------------------------------------------------------------------
# The loader and its samplers
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device,pinned", [("cpu", False), ("cuda", True)])
def test_memory_is_pinned_for_cuda(device, pinned):
    assert loader_options(0, Runtime(torch.device(device)))["pin_memory"] is pinned


def test_a_pools_process_starts_no_workers(monkeypatch):
    monkeypatch.setattr(classifier, "usable_cpus", lambda: 4)
    assert loader_options(None, ONE)["num_workers"] == 4
    daemon = SimpleNamespace(daemon=True)
    monkeypatch.setattr(multiprocessing, "current_process", lambda: daemon)
    assert loader_options(None, ONE)["num_workers"] == 0


def test_no_shared_memory_means_no_workers(monkeypatch):
    def lock():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(multiprocessing, "Lock", lock)
    assert loader_options(None, ONE)["num_workers"] == 0


def test_workers_are_forked_where_that_works(monkeypatch):
    """Else Python 3.14 sends all images through /dev/shm, where a container has 64 MB."""
    monkeypatch.setattr(sys, "platform", "linux")
    default = multiprocessing.get_start_method()
    try:
        multiprocessing.set_start_method("spawn", force=True)
        split = Split(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4))
        sampler = BatchSampler(4, Config(batch_size=2), ONE)
        loader = build_loader(split, sampler, loader_options(1, ONE))
        assert loader.multiprocessing_context.get_start_method() == "fork"
    finally:
        multiprocessing.set_start_method(default, force=True)
    for system in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", system)
        assert "multiprocessing_context" not in loader_options(1, ONE)


@pytest.mark.parametrize("cpus,local,expected", [(2, 1, 2), (64, 1, 8), (64, 4, 2), (1, 4, 0)])
def test_automatic_workers(monkeypatch, cpus, local, expected):
    monkeypatch.setattr(classifier, "usable_cpus", lambda: cpus)
    runtime = Runtime(torch.device("cpu"), local_world_size=local)
    assert loader_options(None, runtime)["num_workers"] == expected


def batches(workers, epoch=0, seed=0):
    images = torch.arange(100 * 3 * 4, dtype=torch.uint8).view(100, 3, 2, 2)
    sampler = BatchSampler(100, Config(batch_size=8, seed=seed), ONE)
    sampler.epoch = epoch
    split = Split(images, torch.arange(100))
    loader = build_loader(split, sampler, loader_options(workers, ONE))
    return [[each.clone() for each in batch] for batch in loader]


def test_batches_do_not_depend_on_workers():
    for zero, two in zip(batches(0), batches(2), strict=True):
        assert all(map(torch.equal, zero, two))


def test_a_batch_is_what_its_indices_say():
    for images, labels, indices in batches(0):
        assert torch.equal(labels, indices)
        assert images.shape == (8, 3, 2, 2) and images.dtype == torch.uint8
        assert torch.equal(images[:, 0, 0, 0], (indices * 12).to(torch.uint8))


def test_order_depends_on_seed_and_epoch():
    def order_of(seed, epoch):
        return tuple(torch.cat([batch[2] for batch in batches(0, epoch, seed)]).tolist())

    orders = {order_of(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4 and order_of(0, 0) in orders


@pytest.mark.parametrize(
    "count,size,world",
    [
        *((100, 8, 1), (100, 8, 2), (101, 8, 3), (5, 8, 1), (5, 8, 2), (16, 8, 2)),
        *((255, 128, 1), (232, 128, 1), (1151, 128, 1), (1160, 128, 1)),
    ],
)
def test_training_shares_are_disjoint_and_equal(count, size, world):
    config = Config(batch_size=size)
    samplers = [BatchSampler(count, config, part(rank, world)) for rank in range(world)]
    shares = [list(sampler) for sampler in samplers]
    assert len({tuple(map(len, share)) for share in shares}) == 1
    assert [len(sampler) for sampler in samplers] == [len(share) for share in shares]
    everything = np.concatenate([batch for share in shares for batch in share])
    assert len(set(everything)) == len(everything)
    lengths = {len(batch) for share in shares for batch in share}
    least = count // world // 10 if count // world > 9 * size else len(shares[0])
    assert len(lengths) == 1 and max(lengths) <= size
    assert count // world * world - len(everything) <= world * least
    seen = set()
    for sampler, epoch in itertools.product(samplers, range(30)):
        sampler.epoch = epoch
        seen |= set(np.concatenate(list(sampler)).tolist())
    assert seen == set(range(count))  # the dropped ones are others each time


# --------------------------------------------------------------------------------------------------
# Data sets, their limits and held-out images
# --------------------------------------------------------------------------------------------------
def as_set(split):
    return {image.numpy().tobytes() for image in split.images}


def test_digits_need_no_download():
    data = load_data(DIGITS)
    assert data.train.images.shape == (1438, 3, 32, 32) and not data.flip
    assert data.evaluation.images.shape == (359, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8 and data.train.images.max() == 255
    assert set(data.train.labels.tolist()) == set(range(10))
    assert data.class_names == tuple("0123456789")


def test_a_limit_tests_a_seeded_sample_of_all_classes(tiny_cifar):
    whole = load_data(DIGITS).evaluation
    data, again = (load_data(Config(dataset="digits", limit_images=200)) for _ in range(2))
    assert (len(data.train), len(data.evaluation), data.evaluation_name) == (200, 40, "test")
    assert data.evaluation.digest == again.evaluation.digest
    assert as_set(data.evaluation) < as_set(whole)
    assert set(data.evaluation.labels.tolist()) == set(range(10))
    assert len(load_data(cifar(tiny_cifar, limit_images=2)).evaluation) == 1  # never none


def test_holdout_is_taken_from_the_training_images():
    data, again = (load_data(Config(dataset="digits", holdout=200)) for _ in range(2))
    assert (len(data.train), len(data.evaluation), data.evaluation_name) == (1238, 200, "holdout")
    assert data.evaluation.digest == again.evaluation.digest
    assert not as_set(data.train) & as_set(data.evaluation)
    assert not as_set(load_data(DIGITS).evaluation) & as_set(data.evaluation)
    with pytest.raises(UserError, match="--holdout 1438: leaves none of 1438"):
        load_data(Config(dataset="digits", holdout=1438))


def test_digest_tells_data_apart():
    train = load_data(DIGITS).train
    relabelled = Split(train.images, train.labels.flip(0))
    digests = [each.digest for each in (train, train.take(slice(1000)), relabelled)]
    assert len(set(digests)) == 3 and train.take(slice(None)).digest == digests[0]


def cifar(root, *urls, **more):
    """Settings for CIFAR-10 in `root`, without mirrors from a port that nobody listens at."""
    return Config(data_dir=str(root), data_url=urls or ("http://127.0.0.1:9/no",), **more)


def test_cifar_files_become_arrays(tiny_cifar):
    data = load_data(cifar(tiny_cifar))
    assert data.train.images.shape == (50, 3, 32, 32) and data.class_names[3] == "cat"
    assert data.evaluation.images.shape == (10, 3, 32, 32)
    folder = tiny_cifar / "cifar-10-batches-py"
    names = [f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]
    for split, files in zip((data.train, data.evaluation), names, strict=True):
        raw = [pickle.loads((folder / name).read_bytes()) for name in files]
        pixels = np.concatenate([each["data"] for each in raw]).reshape(-1, 3, 32, 32)  # the format
        np.testing.assert_array_equal(split.images.numpy(), pixels)
        assert split.labels.tolist() == [label for each in raw for label in each["labels"]]


def test_evaluation_needs_no_training_images(tiny_cifar):
    data = load_data(cifar(tiny_cifar), training=False)
    assert (len(data.train), len(data.evaluation)) == (0, 10)
    held = load_data(cifar(tiny_cifar, holdout=20), training=False)
    assert (len(held.train), len(held.evaluation)) == (30, 20)


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove"])
def test_a_damaged_file_is_told_and_nothing_is_lost(tiny_cifar, damage, capsys):
    file = tiny_cifar / "cifar-10-batches-py" / "data_batch_3"
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-5] if damage == "truncate" else content[:-5] + b"12345")
    with pytest.raises(UserError):
        load_data(cifar(tiny_cifar))
    assert "cifar-10-batches-py: files are missing or damaged" in capsys.readouterr().err
    assert len(list((tiny_cifar / "cifar-10-batches-py").iterdir())) == 7 - (damage == "remove")


def test_real_files(real_cifar):
    data = load_data(Config(data_dir=str(real_cifar)))
    assert len(data.train) == 50_000 and len(data.evaluation) == 10_000
    assert torch.bincount(data.train.labels).tolist() == [5000] * 10


# --------------------------------------------------------------------------------------------------
# Downloads
# --------------------------------------------------------------------------------------------------
class Clock:
    """Stands in for `time`: its monotonic clock goes on only when somebody says so."""

    now, looks = 0.0, 0

    def monotonic(self):
        self.looks += 1
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(classifier, "time", fake)
    return fake


@pytest.fixture
def tarball(tiny_cifar, monkeypatch):
    """The tiny files packed as the official tarball is, its md5 known to torchvision."""
    path = tiny_cifar / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        packed.add(tiny_cifar / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    shutil.rmtree(tiny_cifar / "cifar-10-batches-py")
    return path


@pytest.fixture
def server(tarball, tmp_path, clock):
    """Serves files and misbehaves in several ways; `asked` are the paths that were asked for."""
    folder, release, asked = tmp_path / "www", threading.Event(), []
    folder.mkdir()
    os.replace(tarball, folder / "good.tar.gz")
    (folder / "bad.tar.gz").write_bytes(b"not a tarball")
    (folder / "page.html").write_text("<html>please log in</html>")
    whole = (folder / "good.tar.gz").read_bytes()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def start(self):
            """Promises the whole file."""
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()

        def drip(self, rate):
            """So many bytes in each second of the fake clock, which waits for the client's look."""
            mine, looks = len(asked), clock.looks
            self.start()
            for piece in range(0, len(whole), rate):
                while clock.looks == looks:
                    if release.wait(0.001) or len(asked) > mine:  # the client asks elsewhere
                        return
                looks = clock.looks
                clock.now += 1
                self.wfile.write(whole[piece : piece + rate])

        def do_GET(self):
            asked.append(self.path)
            name, _, number = self.path[1:].partition("/")
            if name == "drip":
                self.drip(int(number))
            elif name == "silent":
                release.wait(20)
            elif name == "redirect":
                self.send_response(302)
                self.send_header("Location", "/good.tar.gz")
                self.end_headers()
            elif name in ("cut", "stall", "signal"):
                self.start()
                self.wfile.write(whole[: len(whole) // 2])
                if name == "signal":
                    os.kill(os.getpid(), signal.SIGINT)
                if name != "cut":
                    release.wait(20)
            else:
                super().do_GET()

        def handle(self):
            try:
                super().handle()
            except OSError:  # the client has left
                self.close_connection = True

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{running.server_port}", asked=asked)
        release.set()
        running.shutdown()


def images_from(server, root, *names):
    """How many training images come into `root` from these places, tried in order."""
    return len(load_data(cifar(root, *(f"{server.url}/{name}" for name in names))).train)


def test_the_default_ends_with_the_official_server():
    first, *_, last = Config().data_url
    assert last == CIFAR10.url and first != last
    assert all(url.startswith("https://") for url in Config().data_url)


def test_tarball_already_there_needs_no_network(tarball):
    assert len(load_data(cifar(tarball.parent)).train) == 50
    assert (tarball.parent / "cifar-10-batches-py" / "data_batch_1").exists() and tarball.exists()


def test_mirrors_are_tried_in_order(server, tmp_path, capsys):
    """No server, what is missing, another file, an HTML page, half a file: none of it is kept."""
    names = ("missing", "bad.tar.gz", "page.html", "cut", "good.tar.gz", "never-asked")
    urls = ("http://127.0.0.1:9/nobody-listens", *(f"{server.url}/{name}" for name in names))
    assert len(load_data(cifar(tmp_path / "new", *urls)).train) == 50
    told = capsys.readouterr().err
    assert told.count("failed:") == 5 and "refused" in told and "404" in told
    assert told.count("the connection broke after") == 1 and told.count("md5 differs") == 2
    assert server.asked == [f"/{name}" for name in names[:-1]]
    assert sorted(os.listdir(tmp_path / "new")) == ["cifar-10-batches-py"]
    assert len(load_data(cifar(tmp_path / "new")).train) == 50  # now without a server


def test_what_fails_the_md5_is_neither_unpacked_nor_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(UserError, match="md5 differs"):
        images_from(server, tmp_path / "new", "good.tar.gz")
    assert os.listdir(tmp_path / "new") == []


def test_a_redirect_is_followed(server, tmp_path):
    assert images_from(server, tmp_path / "new", "redirect") == 50
    assert server.asked == ["/redirect", "/good.tar.gz"]


@pytest.mark.parametrize("name", ["silent", "stall"])
def test_silence_ends_a_try(server, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(classifier, "MIRROR_SILENCE", 3.0)
    assert images_from(server, tmp_path / "new", name, "good.tar.gz") == 50
    assert "timed out" in capsys.readouterr().err


def test_a_drip_is_left_for_the_next(server, tmp_path, capsys):
    assert images_from(server, tmp_path / "new", "drip/1000", "good.tar.gz") == 50
    told = capsys.readouterr().err
    assert re.search(r"^ *slow \(1 kB/s, [\d:]+ left\): trying the next$", told, re.MULTILINE)
    assert "failed" not in told and server.asked == ["/drip/1000", "/good.tar.gz"]


def test_a_server_that_is_fast_enough_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "MIRROR_LEAST_RATE", 2000)
    assert images_from(server, tmp_path / "new", "drip/4000", "good.tar.gz") == 50
    assert server.asked == ["/drip/4000"]


def test_slow_servers_get_a_second_turn_after_the_others(server, tmp_path, capsys):
    names = ("drip/1000", "missing", "drip/4000")
    assert images_from(server, tmp_path / "new", *names) == 50
    assert server.asked == [f"/{name}" for name in (*names, "drip/1000")]
    assert capsys.readouterr().err.count("failed:") == 1


def test_the_only_server_is_not_left_for_being_slow(server, tmp_path, capsys):
    assert images_from(server, tmp_path / "new", "drip/1000") == 50
    assert server.asked == ["/drip/1000"] and "slow" not in capsys.readouterr().err


class Endless(contextlib.nullcontext):
    """An answer that promises so many bytes and goes on for ever: here, for 3 MB."""

    sent = 0

    def __enter__(self):
        self.headers = {"Content-Length": str(self.enter_result)}
        return self

    def read1(self, size):
        self.sent += size
        return bytes(size) if self.sent < 3_000_000 else b""


@pytest.mark.parametrize("promised", [1_000_000, 10**12])
def test_a_server_that_sends_for_ever_does_not_fill_the_disk(tmp_path, monkeypatch, promised):
    monkeypatch.setattr(classifier.urllib.request, "urlopen", lambda *_, **__: Endless(promised))
    with pytest.raises(ValueError):
        classifier.download("http://x", tmp_path / "file", True)
    assert (tmp_path / "file").stat().st_size < 2_000_000


def test_a_stop_leaves_nothing_half_made(server, tmp_path, capsys):
    """Ctrl-C while the server says nothing more."""
    flags = ("--data-dir", tmp_path / "new", "--data-url", f"{server.url}/signal", "--no-mlflow")
    code, out, err = run(capsys, *flags)
    assert (code, out) == (130, "") and err.splitlines()[-1] == "stopped by SIGINT"
    assert os.listdir(tmp_path / "new") == []


@pytest.fixture
def large(server, tmp_path):
    """Address and content of a file that comes in many pieces."""
    content = os.urandom(10_000_000)
    (tmp_path / "www" / "large").write_bytes(content)
    return f"{server.url}/large", content


def test_a_log_gets_the_time_left_once(large, clock, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(clock, "monotonic", itertools.count(0.0, 6.0).__next__)
    classifier.download(large[0], tmp_path / "file", True)
    assert (tmp_path / "file").read_bytes() == large[1]
    first, second = capsys.readouterr().err.splitlines()
    assert large[0] in first and re.fullmatch(r" *\d:\d\d:\d\d left", second)


def test_a_terminal_gets_a_bar(large, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    classifier.download(large[0], tmp_path / "file", True)
    told = terminal.getvalue()
    assert "\r" in told and "B/s" in told and " left" not in told


def count_images(root, url, barrier, found):
    barrier.wait()
    found.put(len(load_data(cifar(root, url)).train))


def test_two_processes_at_once_download_once(server, tmp_path):
    fork = multiprocessing.get_context("fork")  # the tiny files' md5 sums come along
    found, barrier = fork.Queue(), fork.Barrier(2)
    words = (tmp_path / "new", f"{server.url}/good.tar.gz", barrier, found)
    processes = [fork.Process(target=count_images, args=words) for _ in range(2)]
    for process in processes:
        process.start()
    assert [found.get(timeout=60) for _ in processes] == [50, 50]
    for process in processes:
        process.join()
    assert server.asked == ["/good.tar.gz"]
    assert sorted(os.listdir(tmp_path / "new")) == ["cifar-10-batches-py"]


def test_damaged_file_is_replaced_where_a_mirror_has_it(server, tmp_path):
    images_from(server, tmp_path / "new", "good.tar.gz")
    (tmp_path / "new" / "cifar-10-batches-py" / "test_batch").write_bytes(b"broken")
    assert images_from(server, tmp_path / "new", "good.tar.gz") == 50


def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_read_only_folder(server, tmp_path, monkeypatch):
    """The data is downloaded for this run only; a tarball that lies there is used."""
    folder = tmp_path / "read only"
    folder.mkdir()
    monkeypatch.setattr(Path, "touch", refuse)
    assert images_from(server, folder, "good.tar.gz") == 50 and os.listdir(folder) == []
    shutil.copy(tmp_path / "www" / "good.tar.gz", folder / "cifar-10-python.tar.gz")
    assert len(load_data(cifar(folder)).train) == 50
    assert os.listdir(folder) == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@127.0.0.1:9/a",
        "http://me:hunter2@127.0.0.1/a",
        "http://127.0.0.1:9/a?key=hunter2",
        "nonsense://me:hunter2@127.0.0.1/a",
    ],
)
def test_passwords_of_mirrors_are_not_told(capsys, url):
    code, out, err = run(capsys, "--data-dir", "new", "--data-url", url, "--no-mlflow")
    assert code == 1 and "127.0.0.1" in err and "hunter2" not in err + out


def test_a_mirror_gets_its_password(server, tmp_path, monkeypatch):
    real, seen = classifier.urllib.request.urlopen, []

    def recorded(request, **options):
        seen.append(request)
        return real(request, **options)

    monkeypatch.setattr(classifier.urllib.request, "urlopen", recorded)
    url = f"{server.url}/good.tar.gz".replace("//", "//me:p%40ss@")
    assert len(load_data(cifar(tmp_path / "new", url)).train) == 50
    (request,) = seen
    assert request.get_header("Authorization") == "Basic bWU6cEBzcw=="  # me:p@ss
    assert "me:" not in request.full_url


def test_the_first_command_trains_although_its_first_server_is_a_drip(
    server, tmp_path, monkeypatch, capsys
):
    """Without --data-url; a drip, a page and a good server stand in for the default's."""
    places = ("drip/1000", "page.html", "good.tar.gz")
    stand_ins = dict(zip(Config().data_url, places, strict=True))
    real = classifier.urllib.request.urlopen

    def routed(request, **options):
        request.full_url = f"{server.url}/{stand_ins[request.full_url]}"
        return real(request, **options)

    monkeypatch.setattr(classifier.urllib.request, "urlopen", routed)
    small = ("--width", 8, "--epochs", 1, "--num-workers", 0, "--device", "cpu", "--no-mlflow")
    code, out, err = run(capsys, "--mode", "train", *small)
    assert code == 0 and "trying the next" in err and "50 training images" in err
    assert classifier.load_model(tmp_path / "cifar10_model.pth").temperature == pytest.approx(
        0.54, abs=1e-4
    )
    assert "airplane" in run(capsys, "--mode", "evaluate", "--device", "cpu", "--no-mlflow")[1]
    assert sorted(os.listdir(tmp_path / "data")) == ["cifar-10-batches-py"]
