"""Two gloo processes on the CPU do what one does, and end cleanly."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from conftest import LOGGED, ROOT, TINY, free_port, rows, runs_of, same, weights

import classifier
from classifier import Config, Runtime, Split, Training

pytestmark = pytest.mark.slow

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PROGRAM = ROOT / "classifier.py"
FUNCTION = ROOT / "tests" / "two_processes.py"  # its first argument names one of this file
EPOCHS = 40


def torchrun(folder, *argv, script=PROGRAM, launcher=TWO):
    """The finished run; with `launcher` empty it is an ordinary process."""
    return subprocess.run(
        [sys.executable, *launcher, script, *map(str, argv)],
        cwd=folder,
        text=True,
        capture_output=True,
    )


class Started:
    """torchrun in the background, in `folder`, by which its processes and theirs can be told."""

    def __init__(self, folder, *argv, launcher=TWO, script=PROGRAM):
        self.folder = folder
        with open(folder / "out", "a") as out, open(folder / "err", "a") as err:
            self.agent = subprocess.Popen(
                [sys.executable, *launcher, script, *map(str, argv)],
                cwd=folder,
                stdout=out,
                stderr=err,
            )

    def epochs(self):
        found = rows((self.folder / "out").read_text())
        return [record["epoch"] for record in found if record["event"] == "epoch"]

    def err(self):
        return (self.folder / "err").read_text()

    def ranks(self):
        """The training processes, by rank."""
        children = psutil.Process(self.agent.pid).children()
        return sorted(children, key=lambda child: int(child.environ()["RANK"]))

    def left(self):
        """Processes that still work in the folder, but for the agent and this one."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return set(found) - {self.agent.pid, os.getpid()}


def wait_for(condition):
    """Until it holds; a minute or two if all goes well."""
    for _ in range(6000):
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def without_gaps(epochs):
    """Every epoch is there; one that a kill hit may be there twice."""
    steps = {after - before for before, after in zip(epochs, epochs[1:], strict=False)}
    return epochs[0] == 1 and epochs[-1] == EPOCHS and steps <= {0, 1}


def test_one_result_one_file_one_run_and_evaluate_agrees(tmp_path, cli):
    done = torchrun(tmp_path, "--mode", "train", *LOGGED, "--accumulate-grad-steps", 2, "--json")
    assert done.returncode == 0 and "FutureWarning" not in done.stderr, done.stderr
    *epochs, result = rows(done.stdout)
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["digits_model.pth", "mlartifacts", "mlflow.db"]
    (run,) = runs_of(tmp_path / "mlflow.db")[2]
    assert run.data.params["run_world_size"] == "2"
    assert run.data.params["run_effective_batch"] == "128"
    assert run.data.params["run_backend"] == "gloo"
    assert float(run.data.params["run_peak_lr"]) == 0.0192
    evaluate = ["--mode", "evaluate", "--no-mlflow", "--json", "--model-path", "digits_model.pth"]
    alone, together = cli(*evaluate), torchrun(tmp_path, *evaluate)
    for found in (alone, together):
        assert found.returncode == 0, found.stderr
        (row,) = rows(found.stdout)
        assert row["test_accuracy"] == pytest.approx(result["test_accuracy"], abs=1 / 64 + 1e-9)
        assert row["test_loss"] == pytest.approx(result["test_loss"], rel=1e-4)


def train_with_fixed_statistics(*argv):
    """BatchNorm in eval mode: its statistics alone would depend on how a batch is divided."""
    classifier.CifarNet.train = lambda self, mode=True: torch.nn.Module.train(self, False)
    return classifier.main(["--mode", "train", *argv])


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    plain = ["--shift", 0, "--cutout", 0, "--letterbox-share", 0, "--no-flip", "--lr", 0.01]
    flags = ["train_with_fixed_statistics", *TINY, *plain, "--no-amp", "--model-path"]
    for launcher, batch, name in (([], 64, "one.pth"), (TWO, 32, "two.pth")):
        more = [name, "--batch-size", batch]
        done = torchrun(tmp_path, *flags, *more, script=FUNCTION, launcher=launcher)
        assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one.pth"), weights(tmp_path / "two.pth")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)


def digits(count):
    return classifier.load_data(classifier.Config(dataset="digits", limit_images=count))


def buffers(runtime):
    """A BatchNorm layer's statistics after `average_buffers`, and its counter."""
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean[:] = torch.tensor([1.0, 2.0]) * (1 + 2 * runtime.rank)
    runtime.average_buffers(norm)
    return norm.running_mean.tolist(), int(norm.num_batches_tracked)


def exchanges(runtime):
    """Updates, and how often gradients were exchanged, in six micro-batches, three an update."""
    config = Config(width=2, batch_size=4, accumulate_grad_steps=3, num_workers=0)
    training, buckets = Training(config, digits(48), runtime), []

    def count(_, bucket):
        buckets.append(bucket.index())
        work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    training.replica.register_comm_hook(None, count)
    training.train_epoch()
    return training.updates, buckets.count(0)


def overflow(runtime):
    """What float16's scaler does where the second of three gradients overflows in rank 1 alone."""
    half = replace(runtime, amp_dtype=torch.float16)
    data = digits(48)
    training = Training(Config(width=2, num_workers=0), data, half)
    for factor in (1.0, float("inf") if half.rank else 1.0, 1.0):
        loss = training.replica(data.train.images[:4]).sum() * factor
        training.scaler.scale(loss).backward()
        training.update()
    scale, weight = training.scaler.get_scale(), training.model.head.weight
    return training.skipped, training.updates, scale, weight.tolist()


def evaluations(runtime):
    """For several numbers of images: the figures of all processes and those of one alone."""
    data = digits(1200)
    torch.manual_seed(0)
    net = classifier.CifarNet(2, 10, classifier.pixel_statistics(data.train.images))
    found = []
    for count in (1, 131):  # of one image, a process has no share
        part = replace(data, evaluation=data.evaluation.take(slice(count)), flip=False)
        pair = [
            classifier.evaluate(net, part, each, True, 1.0)
            for each in (runtime, Runtime(runtime.device))
        ]
        found.append([[*each.record("test").values(), each.confusion.tolist()] for each in pair])
    return found


FACTS = {
    "buffers": buffers,
    "exchanges": exchanges,
    "overflow": overflow,
    "evaluations": evaluations,
    "from_main": lambda runtime: runtime.from_main({"rank": runtime.rank})["rank"],
}


def write_facts():
    """What holds within two processes; each writes what it found."""
    with classifier.open_runtime(Config(device="cpu", amp=False)) as runtime:
        found = {name: fact(runtime) for name, fact in FACTS.items()}
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    found["gloo_threads"] = [name for name in threads if "gloo" in name]
    Path(f"rank{runtime.rank}").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """By name, what both ranks found."""
    folder = tmp_path_factory.mktemp("facts")
    done = torchrun(folder, "write_facts", script=FUNCTION)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((folder / f"rank{rank}").read_text()) for rank in (0, 1)]
    return {name: [found[name] for found in ranks] for name in ranks[0]}


def test_batchnorm_statistics_become_their_mean(facts):
    assert facts["buffers"] == 2 * [[[2.0, 4.0], 0]]


def test_all_get_what_the_main_process_has(facts):
    assert facts["from_main"] == [0, 0]


def test_gradients_are_exchanged_once_an_update(facts):
    assert facts["exchanges"] == 2 * [[2, 2]]


def test_an_overflow_in_one_process_is_skipped_in_both(facts):
    one, other = facts["overflow"]
    assert one == other and one[:3] == [1, 2, 2.0**15]


def test_processes_evaluate_each_image_once(facts):
    one, other = facts["evaluations"]
    assert one == other
    for together, alone in one:
        assert together[:-1] == pytest.approx(alone[:-1], rel=1e-4) and together[-1] == alone[-1]


def test_gloo_has_ended_before_the_process_does(facts):
    """One of its threads can abort a process that is ending (pytorch/pytorch#179291)."""
    assert facts["gloo_threads"] == [[], []]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A training of two processes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    done = torchrun(folder, "--mode", "train", *TINY, "--epochs", EPOCHS)
    assert done.returncode == 0, done.stderr
    return folder / "digits_model.pth"


def test_torchrun_restarts_what_was_killed(tmp_path, straight):
    """Three SIGKILLs at random moments to a random process lose no epoch and change no weight."""
    flags = ["--mode", "train", *LOGGED, "--epochs", EPOCHS, "--num-workers", 1]
    launcher = [*TWO, "--max-restarts", "3"]
    run = Started(tmp_path, *flags, "--json", "--resume", launcher=launcher)
    draw = random.Random(0)
    for number in range(3):
        before = len(run.epochs())
        wait_for(lambda before=before: len(run.epochs()) > before)
        time.sleep(draw.uniform(0, 0.5))
        draw.choice(run.ranks()).kill()
        wait_for(lambda n=number: run.err().count("continuing after epoch") > n)
    assert run.agent.wait(600) == 0, run.err()
    assert without_gaps(run.epochs()) and run.err().count("continuing after epoch") == 3
    assert same(weights(tmp_path / "digits_model.pth"), weights(straight))
    wait_for(lambda: not run.left())
    client, _, (found,) = runs_of(tmp_path / "mlflow.db")
    steps = [each.step for each in client.get_metric_history(found.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(1, EPOCHS + 1)) and found.info.status == "FINISHED"


def train_with_a_bug(*argv):
    """Rank 1 fails in the fourth epoch."""
    real = classifier.Training.train_epoch

    def train_epoch(training):
        if training.epoch == 3 and os.environ["RANK"] == "1":
            raise KeyError("a bug")
        return real(training)

    classifier.Training.train_epoch = train_epoch
    return classifier.main(["--mode", "train", *argv])


@pytest.mark.parametrize("what", ["SIGTERM to torchrun", "SIGKILL to rank 0", "a bug in rank 1"])
def test_one_ends_and_all_end(tmp_path, what):
    """Nothing half-written, no process left, and the run can be resumed."""
    bug = what == "a bug in rank 1"
    script, first = (FUNCTION, ["train_with_a_bug"]) if bug else (PROGRAM, ["--mode", "train"])
    flags = [*TINY, "--epochs", 4000, "--num-workers", 1, "--json"]
    run = Started(tmp_path, *first, *flags, script=script)
    wait_for(lambda: 3 in run.epochs())
    if what == "SIGTERM to torchrun":
        run.agent.send_signal(signal.SIGTERM)
    elif not bug:
        run.ranks()[0].kill()
    assert run.agent.wait(600) != 0
    wait_for(lambda: not run.left())
    errors = re.findall(r"^\[rank\d\]: (\w+Error)", run.err(), re.MULTILINE)  # of tracebacks
    assert errors == ["KeyError"] * bug, run.err()
    if what == "SIGTERM to torchrun":
        assert "continue with" in run.err()
    names = {"out", "err", "digits_model.pth.resume", ".digits_model.pth.lock"}
    names |= {"digits_model.pth.resume.tmp"} if "SIGKILL" in what else set()  # of a save it hit
    assert {each.name for each in tmp_path.iterdir()} <= names
    assert torch.load(tmp_path / "digits_model.pth.resume", weights_only=True)["history"]


def two_machines(folders, argv, *rendezvous, ranks=True):
    """Two agents of one process each, a folder each, that meet over loopback."""
    machines = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    started = []
    for number, folder in enumerate(folders):
        rank = ["--node-rank", str(number)] if ranks else []
        started.append(Started(folder, *argv, launcher=[*machines, *rendezvous, *rank]))
    return started


RESUMED = ["--mode", "train", *TINY, "--epochs", EPOCHS, "--json", "--resume"]


def test_two_machines(tmp_path, straight):
    """One writes, though each has a disk of its own; the other gets from it where to continue."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    port = str(free_port())
    place = ["--master-addr", "127.0.0.1", "--master-port", port]
    both = two_machines(folders, RESUMED, *place)
    wait_for(lambda: 3 in both[0].epochs())
    both[1].ranks()[0].kill()
    assert both[0].agent.wait(600) and both[1].agent.wait(600)
    assert (folders[0] / "digits_model.pth.resume").exists()
    place = ["--rdzv-backend", "static", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    again = two_machines(folders, RESUMED, *place)
    errors = again[0].err() + again[1].err()
    assert [each.agent.wait(600) for each in again] == [0, 0], errors
    assert "continuing after epoch" in again[0].err() and again[0].epochs()[-1] == EPOCHS
    assert not again[1].epochs()
    assert sorted(os.listdir(folders[0])) == ["digits_model.pth", "err", "out"]
    assert sorted(os.listdir(folders[1])) == ["err", "out"]
    assert same(weights(folders[0] / "digits_model.pth"), weights(straight))


def test_two_agents_meet_at_an_endpoint(tmp_path, straight, monkeypatch):
    """As on machines that share a disk; after a kill, both agents restart their processes."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    place = ["--rdzv-backend", "c10d", "--rdzv-id", "7", "--max-restarts", "3"]
    place += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    both = two_machines([tmp_path, tmp_path], RESUMED, *place, ranks=False)
    wait_for(lambda: 3 in both[0].epochs())
    both[1].ranks()[0].kill()
    assert [each.agent.wait(600) for each in both] == [0, 0], both[0].err()
    assert without_gaps(both[0].epochs())
    assert same(weights(tmp_path / "digits_model.pth"), weights(straight))


def train_with_other_data(*argv):
    """Rank 1 has an image less."""
    real = classifier.load_data

    def load_data(*args):
        data = real(*args)
        if os.environ["RANK"] == "0":
            return data
        return replace(data, train=Split(data.train.images[1:], data.train.labels[1:]))

    classifier.load_data = load_data
    return classifier.main(["--mode", "train", *argv])


def test_machines_with_other_data_are_refused(tmp_path):
    done = torchrun(tmp_path, "train_with_other_data", *TINY, script=FUNCTION)
    assert done.returncode != 0 and "has other images than the main process" in done.stderr
    assert "[rank" not in done.stderr  # no traceback


def test_compiled_under_torchrun(tmp_path):
    done = torchrun(tmp_path, "--mode", "train", *TINY, "--epochs", 1, "--compile")
    assert done.returncode == 0 and "compiled: True" in done.stderr, done.stderr
    assert classifier.load_model(tmp_path / "digits_model.pth").dataset == "digits"
