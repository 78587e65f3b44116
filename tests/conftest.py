"""Fixtures: a tiny CIFAR-10 in its real format, a CPU runtime, a trained model, a command line."""

import hashlib
import io
import json
import os
import pickle
import shlex
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of tiny networks, threads only wait for each other
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import classifier  # noqa: E402

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# Digits and a narrow network: a training of these takes about a second.
LOGGED = shlex.split(
    "--dataset digits --width 8 --limit-images 320 --epochs 2 --batch-size 32 --num-workers 0 "
    "--device cpu"
)
TINY = [*LOGGED, "--no-mlflow"]


def run(capsys, *argv):
    """Exit code, stdout and stderr of `main` with these words."""
    code = classifier.main([str(each) for each in argv])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def rows(out):
    """The JSON Lines in `out`."""
    return [json.loads(line) for line in out.splitlines()]


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def same(a, b):
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def interrupted(monkeypatch, capsys, *argv, after=2):
    """A training that is stopped in the epoch that follows `after`."""
    real, epochs = classifier.Training.train_epoch, []

    def stopping(training):
        if len(epochs) == after:
            raise classifier.Stopped(15)
        epochs.append(training.epoch)
        return real(training)

    with monkeypatch.context() as patch:
        patch.setattr(classifier.Training, "train_epoch", stopping)
        return run(capsys, "--mode", "train", *argv)


def runs_of(database, experiment="digits"):
    """MLflow's client, the experiment and its runs, oldest first."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{database}")
    found = client.get_experiment_by_name(experiment)
    order = ["attributes.start_time ASC"]
    return client, found, client.search_runs([found.experiment_id], order_by=order)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def encoded(image, kind="PNG", **options):
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width, height, mode="RGB"):
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def bomb(width=30000, height=30000):
    """A PNG that claims this size."""
    header = encoded(Image.new("1", (1, 1)))
    start = header.index(b"IHDR")
    chunk = b"IHDR" + struct.pack(">II", width, height) + header[start + 12 : start + 17]
    return header[:start] + chunk + struct.pack(">I", zlib.crc32(chunk)) + header[start + 21 :]


def pytest_configure(config):
    # A cluster's. Not at import: the processes of torchrun, which import this file, have their own.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    config.addinivalue_line("markers", "slow: takes long; left out unless asked for with -m slow")
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_collection_modifyitems(config, items):
    skip_cuda = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(skip_cuda)
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test in a folder of its own, without what the caller's environment says about MLflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(classifier, "TRACKING_PATIENCE", 600.0)  # machines may be busy
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    yield
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]  # MLflow's own, which the next module's fixtures would find


@pytest.fixture
def cpu():
    return classifier.Runtime(torch.device("cpu"))


def write_tiny_cifar(root: Path) -> dict[str, str]:
    """60 images in CIFAR-10's file format, each class a colour; the files' md5 sums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng, sums = np.random.default_rng(0), {}
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        labels = list(range(10))
        colours = np.array([[25 * label, 255 - 25 * label, 128] for label in labels])
        colours = colours.repeat(1024, 1)
        data = (colours + rng.integers(-20, 20, colours.shape)).clip(0, 255).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    for file in folder.iterdir():
        sums[file.name] = hashlib.md5(file.read_bytes()).hexdigest()
    return sums


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch):
    """A data folder with the tiny files; torchvision's md5 check stays on, with their sums."""
    from torchvision.datasets import CIFAR10

    root = tmp_path / "tiny"
    sums = write_tiny_cifar(root)
    monkeypatch.setattr(
        CIFAR10, "train_list", [[name, sums[name]] for name, _ in CIFAR10.train_list]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [[name, sums[name]] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A model file of digits, trained for a moment."""
    path = tmp_path_factory.mktemp("trained") / "model.pth"
    flags = ["--epochs", "15", "--cutout", "0", "--letterbox-share", "0"]
    assert classifier.main(["--mode", "train", *TINY, *flags, "--model-path", str(path)]) == 0
    return path


@pytest.fixture
def cli(tmp_path):
    """Runs classifier.py as its user does, in the test's folder."""

    def start(*argv, env=None, timeout=600, **options):
        command = [sys.executable, str(ROOT / "classifier.py"), *map(str, argv)]
        options |= {"text": True, "capture_output": True, "timeout": timeout}
        return subprocess.run(command, cwd=tmp_path, env=os.environ | (env or {}), **options)

    return start


@pytest.fixture(scope="session")
def real_cifar():
    """The folder of the real CIFAR-10, where there is one."""
    root = Path(os.environ.get("CIFAR10_DIR", ROOT / "data"))
    if not (root / "cifar-10-batches-py" / "data_batch_1").exists():
        pytest.skip("no CIFAR-10 in CIFAR10_DIR or data/")
    return root
