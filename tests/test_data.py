"""Data sets, the tuned loader, samplers; downloads against a server of the test's own."""
import functools
import http.server
import multiprocessing
import os
import tarfile
import threading

import numpy as np
import pytest
import torch

import classifier
from classifier import BatchSampler, DataSettings, Runtime, Split, UserError, build_loader, load_data, loader_options

DIGITS = DataSettings(dataset="digits")
ONE = Runtime(torch.device("cpu"))


def part(rank, world_size):
    return Runtime(torch.device("cpu"), rank=rank, world_size=world_size)


@pytest.mark.parametrize("workers,device,expected", [
    (0, "cpu", {"num_workers": 0, "pin_memory": False}),
    (2, "cpu", {"num_workers": 2, "pin_memory": False, "persistent_workers": True, "prefetch_factor": 4}),
    (3, "cuda", {"num_workers": 3, "pin_memory": True, "persistent_workers": True, "prefetch_factor": 4})])
def test_loader_options(workers, device, expected):
    assert loader_options(workers, Runtime(torch.device(device))) == expected


@pytest.mark.parametrize("cpus,local,expected", [(2, 1, 2), (64, 1, 8), (64, 4, 2), (1, 4, 0)])
def test_automatic_workers(monkeypatch, cpus, local, expected):
    monkeypatch.setattr(classifier, "usable_cpus", lambda: cpus)
    assert loader_options(None, Runtime(torch.device("cpu"), local_world_size=local))["num_workers"] == expected


def batches(workers, epoch=0, seed=0):
    split = Split(torch.arange(100 * 3 * 4, dtype=torch.uint8).view(100, 3, 2, 2), torch.arange(100))
    sampler = BatchSampler(100, 8, ONE, shuffle=True, seed=seed)
    sampler.epoch = epoch
    return [[each.clone() for each in batch]
            for batch in build_loader(split, sampler, loader_options(workers, ONE))]


def test_batches_do_not_depend_on_workers():
    for zero, two in zip(batches(0), batches(2), strict=True):
        assert all(map(torch.equal, zero, two))


def test_a_batch_is_what_its_indices_say():
    for images, labels, indices in batches(0):
        assert torch.equal(labels, indices) and images.shape == (8, 3, 2, 2) and images.dtype == torch.uint8
        assert torch.equal(images[:, 0, 0, 0], (indices * 12).to(torch.uint8))


def test_order_depends_on_seed_and_epoch():
    order = {(seed, epoch): torch.cat([batch[2] for batch in batches(0, epoch, seed)]).tolist()
             for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(map(tuple, order.values()))) == 4
    assert order[0, 0] == torch.cat([batch[2] for batch in batches(0)]).tolist()


@pytest.mark.parametrize("count,size,world", [(100, 8, 1), (100, 8, 2), (101, 8, 3), (5, 8, 1), (5, 8, 2), (16, 8, 2)])
def test_training_shares_are_disjoint_and_equal(count, size, world):
    shares = [list(BatchSampler(count, size, part(rank, world), shuffle=True)) for rank in range(world)]
    assert len({tuple(map(len, share)) for share in shares}) == 1
    everything = np.concatenate([batch for share in shares for batch in share])
    assert len(set(everything)) == len(everything)
    assert all(len(share) == len(BatchSampler(count, size, part(0, world), True)) for share in shares)
    if count // world >= size:          # a whole batch remains, so all are whole
        assert all(len(batch) == size for share in shares for batch in share)
        assert count - len(everything) < world * size
    else:
        assert len(everything) == count // world * world


@pytest.mark.parametrize("count,world", [(100, 1), (101, 2), (7, 3), (2, 3)])
def test_evaluation_shares_leave_nothing_out(count, world):
    indices = [index for rank in range(world) for batch in BatchSampler(count, 8, part(rank, world), shuffle=False)
               for index in batch.tolist()]
    assert sorted(indices) == list(range(count))


def test_digits_need_no_download():
    data = load_data(DIGITS)
    assert data.train.images.shape == (1438, 3, 32, 32) and data.evaluation.images.shape == (359, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8 and data.train.images.max() == 255 and not data.mirrors
    assert set(data.train.labels.tolist()) == set(range(10)) and data.class_names == tuple("0123456789")


def test_limit_and_holdout():
    limited = load_data(DataSettings(dataset="digits", limit_images=100))
    assert (len(limited.train), len(limited.evaluation), limited.evaluation_name) == (100, 20, "test")
    data, again = (load_data(DataSettings(dataset="digits", holdout=200)) for _ in range(2))
    assert (len(data.train), len(data.evaluation), data.evaluation_name) == (1238, 200, "holdout")
    assert torch.equal(data.evaluation.images, again.evaluation.images)
    train, held = ({image.numpy().tobytes() for image in split.images} for split in (data.train, data.evaluation))
    test = {image.numpy().tobytes() for image in load_data(DIGITS).evaluation.images}
    assert not train & held and not test & held
    with pytest.raises(UserError, match="--holdout"):
        load_data(DataSettings(dataset="digits", holdout=1438))


def test_digest_tells_data_apart():
    data = load_data(DIGITS)
    digests = [data.train.digest, data.evaluation.digest, data.train.take(slice(1000)).digest]
    assert len(set(digests)) == 3 and data.train.take(slice(None)).digest == digests[0]


def cifar(root, **more):
    return DataSettings(data_dir=str(root), **({"data_url": ("http://127.0.0.1:9/none",)} | more))


def test_cifar_files_become_arrays(tiny_cifar):
    data = load_data(cifar(tiny_cifar))
    assert data.train.images.shape == (50, 3, 32, 32) and data.evaluation.images.shape == (10, 3, 32, 32)
    assert data.class_names[3] == "cat"
    red = data.evaluation.images[:, 0].float().mean((1, 2))
    assert torch.equal(red.argsort(), data.evaluation.labels.argsort())        # channels first, rows in order


def test_missing_cifar_names_the_three_ways_out(tiny_cifar, tmp_path):
    with pytest.raises(UserError) as error:
        load_data(cifar(tmp_path / "elsewhere"))
    for words in ("cifar-10-python.tar.gz", "elsewhere", "--data-url", "--dataset digits"):
        assert words in str(error.value)


@pytest.mark.parametrize("damage", ["truncate", "alter", "remove"])
def test_damaged_file_is_named_and_nothing_is_lost(tiny_cifar, damage, capsys):
    file = tiny_cifar / "cifar-10-batches-py" / "data_batch_3"
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-5] if damage == "truncate" else content[:-5] + b"12345")
    with pytest.raises(UserError):
        load_data(cifar(tiny_cifar))
    told = capsys.readouterr().err
    assert "data_batch_3" in told and "data_batch_1" not in told
    assert len(list((tiny_cifar / "cifar-10-batches-py").iterdir())) == 7 - (damage == "remove")


@pytest.fixture
def tarball(tiny_cifar, monkeypatch):
    """The tiny files packed as the official tarball is, its md5 known to torchvision; the folder is gone."""
    import hashlib
    import shutil

    from torchvision.datasets import CIFAR10
    path = tiny_cifar / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        packed.add(tiny_cifar / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    shutil.rmtree(tiny_cifar / "cifar-10-batches-py")
    return path


@pytest.fixture
def server(tarball, tmp_path):
    """Serves good.tar.gz, bad.tar.gz, page.html; keeps /silent waiting."""
    folder = tmp_path / "www"
    folder.mkdir()
    os.replace(tarball, folder / "good.tar.gz")
    (folder / "bad.tar.gz").write_bytes(b"not a tarball")
    (folder / "page.html").write_text("<html>please log in</html>")
    release = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/silent":
                release.wait(20)
            elif self.path == "/cut":                              # promises more than it sends
                whole = (folder / "good.tar.gz").read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(whole)))
                self.end_headers()
                self.wfile.write(whole[:len(whole) // 2])
            else:
                super().do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        release.set()
        running.shutdown()


def test_tarball_already_there_needs_no_network(tarball):
    assert len(load_data(cifar(tarball.parent)).train) == 50
    assert (tarball.parent / "cifar-10-batches-py" / "data_batch_1").exists() and tarball.exists()


def test_mirrors_are_tried_in_order(server, tmp_path, capsys):
    urls = tuple(f"{server}/{name}" for name in ("missing.tar.gz", "bad.tar.gz", "page.html", "cut",
                                                  "good.tar.gz"))
    assert len(load_data(cifar(tmp_path / "new", data_url=urls)).train) == 50
    told = capsys.readouterr().err
    assert told.count("failed:") == 4 and "404" in told
    assert sorted(os.listdir(tmp_path / "new")) == ["cifar-10-batches-py"]
    assert len(load_data(cifar(tmp_path / "new")).train) == 50                 # now without a server


def test_two_processes_that_download_into_one_folder_at_once(server, tmp_path):
    fork = multiprocessing.get_context("fork")                     # the tiny files' md5 sums come along
    found, both = fork.Queue(), fork.Barrier(2)

    def load():
        both.wait()
        found.put(len(load_data(cifar(tmp_path / "new", data_url=(f"{server}/good.tar.gz",))).train))
    processes = [fork.Process(target=load) for _ in range(2)]
    for process in processes:
        process.start()
    assert [found.get(timeout=60) for _ in processes] == [50, 50]
    for process in processes:
        process.join()
    assert sorted(os.listdir(tmp_path / "new")) == ["cifar-10-batches-py"]


def test_damaged_file_is_replaced_where_a_mirror_has_it(server, tmp_path):
    load_data(cifar(tmp_path / "new", data_url=(f"{server}/good.tar.gz",)))
    file = tmp_path / "new" / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(b"broken")
    assert len(load_data(cifar(tmp_path / "new", data_url=(f"{server}/good.tar.gz",))).evaluation) == 10


def test_silent_server_is_given_up(server, tmp_path, monkeypatch):
    waited, original = [], classifier.socket.setdefaulttimeout

    def shorter(seconds):
        waited.append(seconds)
        original(seconds and 0.3)

    monkeypatch.setattr(classifier.socket, "setdefaulttimeout", shorter)
    with pytest.raises(UserError, match="timed out"):
        load_data(cifar(tmp_path / "new", data_url=(f"{server}/silent",)))
    assert waited == [30, None]


def test_passwords_of_mirrors_are_not_told(tiny_cifar, tmp_path, capsys):
    assert classifier.main(["--data-dir", str(tmp_path / "x"), "--data-url", "http://me:hunter2@127.0.0.1:9/a?key=hunter2",
                            "--no-mlflow"]) == 1
    streams = capsys.readouterr()
    assert "hunter2" not in streams.err + streams.out and "127.0.0.1:9" in streams.err


def test_read_only_folder_with_a_tarball(tarball, monkeypatch):
    monkeypatch.setattr(classifier.os, "access", lambda *_: False)
    assert len(load_data(cifar(tarball.parent)).train) == 50
    assert sorted(os.listdir(tarball.parent)) == [tarball.name]


def test_real_files(real_cifar):
    data = load_data(DataSettings(data_dir=str(real_cifar)))
    assert len(data.train) == 50_000 and len(data.evaluation) == 10_000
    assert torch.bincount(data.train.labels).tolist() == [5000] * 10
