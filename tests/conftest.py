"""Fixtures: a tiny CIFAR-10 in its real file format, a CPU runtime, a trained model, and the command line."""
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import classifier  # noqa: E402

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# Digits and a narrow network: a training of these takes about a second.
TINY = ["--dataset", "digits", "--width", "8", "--limit-images", "320", "--epochs", "2", "--batch-size", "32",
        "--num-workers", "0", "--device", "cpu", "--no-mlflow"]


def pytest_configure(config):
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
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    yield
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]            # MLflow's own, which the next module's fixtures would find


@pytest.fixture
def cpu():
    return classifier.Runtime(torch.device("cpu"))


def write_tiny_cifar(root: Path, per_file: int = 10) -> dict[str, str]:
    """60 images in CIFAR-10's file format, each class a colour; the files' md5 sums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng, sums = np.random.default_rng(0), {}
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        labels = [number % 10 for number in range(per_file)]
        colours = np.array([[25 * label, 255 - 25 * label, 128] for label in labels]).repeat(1024, 1)
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
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, sums[name]] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A model file of digits, trained for a moment."""
    path = tmp_path_factory.mktemp("trained") / "model.pth"
    assert classifier.main(["--mode", "train", *TINY, "--epochs", "15", "--cutout", "0", "--letterbox-share", "0",
                            "--model-path", str(path)]) == 0
    return path


@pytest.fixture
def cli(tmp_path):
    """Runs classifier.py as its user does, in the test's folder."""
    def run(*argv, env=None, timeout=300, **options):
        return subprocess.run([sys.executable, str(ROOT / "classifier.py"), *map(str, argv)], cwd=tmp_path, text=True,
                              capture_output=True, env=os.environ | (env or {}), timeout=timeout, **options)
    return run


@pytest.fixture(scope="session")
def real_cifar():
    """The folder of the real CIFAR-10, where there is one."""
    root = Path(os.environ.get("CIFAR10_DIR", ROOT / "data"))
    if not (root / "cifar-10-batches-py" / "data_batch_1").exists():
        pytest.skip("no CIFAR-10 in CIFAR10_DIR or data/")
    return root
