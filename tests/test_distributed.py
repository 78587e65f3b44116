"""Two gloo processes on the CPU do what one does, and end together."""
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, TINY

import classifier
from test_modes import same, weights

pytestmark = pytest.mark.slow

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(tmp_path, *argv):
    return subprocess.run([sys.executable, *TWO, str(ROOT / "classifier.py"), *argv], cwd=tmp_path, text=True,
                          capture_output=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


class Started:
    """torchrun in the background, in `folder`, which its processes and theirs can be told by."""

    def __init__(self, folder, *argv, launcher=TWO, script=ROOT / "classifier.py"):
        self.folder = folder
        with open(folder / "out", "a") as out, open(folder / "err", "a") as err:
            self.agent = subprocess.Popen([sys.executable, *launcher, str(script), *map(str, argv)], cwd=folder, stdout=out,
                                          stderr=err, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def epochs(self):
        lines = (self.folder / "out").read_text().splitlines()
        return [record["epoch"] for record in map(json.loads, lines) if record["event"] == "epoch"]

    def err(self):
        return (self.folder / "err").read_text()

    def ranks(self):
        """The training processes, by rank."""
        children = psutil.Process(self.agent.pid).children()
        return sorted(children, key=lambda child: int(child.environ()["RANK"]))

    def left(self):
        """Processes that still work in the folder, but for the agent and this one."""
        def folder_of(process):
            try:
                return process.cwd()
            except psutil.Error:
                return None
        return [process for process in psutil.process_iter()
                if process.pid not in (self.agent.pid, os.getpid()) and folder_of(process) == str(self.folder)]


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
    return found


def test_one_result_one_file_one_run_and_evaluate_agrees(tmp_path, cli):
    flags = [word for word in TINY if word != "--no-mlflow"]
    done = torchrun(tmp_path, "--mode", "train", *flags, "--accumulate-grad-steps", "2", "--json")
    assert done.returncode == 0 and "FutureWarning" not in done.stderr, done.stderr
    *epochs, result = [json.loads(line) for line in done.stdout.splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["digits_model.pth", "mlartifacts", "mlflow.db"]
    import mlflow
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert run.data.params["run_world_size"] == "2" and run.data.params["run_effective_batch"] == "128"
    evaluate = ["--mode", "evaluate", "--dataset", "digits", "--no-mlflow", "--json"]
    alone, together = cli(*evaluate), torchrun(tmp_path, *evaluate)
    for found in (alone, together):
        assert found.returncode == 0, found.stderr
        row = json.loads(found.stdout)
        assert row["test_accuracy"] == pytest.approx(result["test_accuracy"], abs=1 / 64 + 1e-9)


EQUAL = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import classifier as c
c.CifarNet.train = lambda self, mode=True: torch.nn.Module.train(self, False)      # BatchNorm in eval mode
sys.exit(c.main(sys.argv[2:]))
"""


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    (tmp_path / "equal.py").write_text(EQUAL)
    flags = [*TINY, "--no-amp", "--shift", "0", "--cutout", "0", "--letterbox-share", "0", "--no-flip",
             "--eval-every", "0", "--lr", "0.01"]
    for start, batch, name in (([], "64", "one.pth"), (TWO, "32", "two.pth")):
        done = subprocess.run([sys.executable, *start, "equal.py", str(ROOT), "--mode", "train", *flags, "--batch-size", batch,
                               "--model-path", name], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True)["weights"] for name in ("one.pth", "two.pth"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)


# What holds within a training of two processes; each writes what it found.
FACTS = '''
import json, sys, time, torch
sys.path.insert(0, sys.argv[1])
import classifier as c
from dataclasses import replace
found = {}
with c.open_runtime(c.RunSettings(device="cpu")) as runtime:
    rank = runtime.rank
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean[:] = torch.tensor([1.0, 2.0]) * (1 + 2 * rank)
    c.share_buffers(norm, runtime)
    found["mean"], found["counted"] = norm.running_mean.tolist(), int(norm.num_batches_tracked)
    found["from_main"] = runtime.from_main({"rank": rank, "tensor": torch.tensor(rank)})["tensor"].item()
    order = []
    for local in (rank, 0):                                         # on one machine, then on two
        with replace(runtime, local_rank=local).by_turns():
            time.sleep(0.3 * runtime.is_main)
            order.append(time.time())
    found["order"] = order

    model = c.build_model(c.ModelSettings(width=2), 10, c.pixel_statistics(torch.randint(256, (50, 3, 32, 32))))
    replica, calls = c.distribute(model, runtime), []
    def count(_, bucket):
        calls.append(bucket.index())
        return c.dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda each: each.value()[0])
    replica.register_comm_hook(None, count)
    split = c.Split(torch.randint(256, (48, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (48,)))
    sampler = c.BatchSampler(48, 4, runtime, shuffle=True)
    settings = c.TrainSettings(accumulate_grad_steps=3, freeze_after=1.0, start_size=32)
    state = c.TrainState(model, replica, c.build_optimizer(model, settings, 24), 10**6, 48, runtime)
    c.train_epoch(state, c.build_loader(split, sampler, c.loader_options(0, runtime)), len(sampler), settings, 0, True,
                  runtime)
    found["updates"], found["exchanges"] = state.updates, calls.count(0)
    found["seen"] = int(state.losses.isfinite().sum())

    half = replace(runtime, amp_dtype=torch.float16)
    layer = torch.nn.Linear(3, 2, bias=False)
    state = c.TrainState(layer, c.distribute(layer, half), c.Muon([{"params": [layer.weight], "peak_lr": 0.1,
                         "momentum": 0.9}]), 10, 1, half)
    for factor in (1.0, float("inf") if rank else 1.0, 1.0):        # the second overflows in one process only
        state.scaler.scale(state.replica(torch.ones(4, 3)).sum() * factor).backward()
        state.update()
    found["scaler"] = state.skipped, state.updates, state.scaler.get_scale(), layer.weight.tolist()
    found["rate"] = c.resolved_settings(c.Config(), runtime, {}, c.CompileReport(False, ""), c.ImageData(
        "", (), split, split), True)
    time.sleep(1 * runtime.is_main)
    done = time.time()
with open(f"rank{rank}", "w") as file:                             # on stdout the two would write into each other
    json.dump(found | {"done": done, "left": time.time()}, file)
'''


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    (folder / "facts.py").write_text(FACTS)
    done = subprocess.run([sys.executable, *TWO, "facts.py", str(ROOT)], cwd=folder, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}").read_text()) for rank in (0, 1)]


def test_batchnorm_statistics_become_their_mean(facts):
    assert [found["mean"] for found in facts] == 2 * [[2.0, 4.0]] and facts[0]["counted"] == 0


def test_all_get_what_the_main_process_has(facts):
    assert [found["from_main"] for found in facts] == [0, 0]


def test_the_main_process_comes_before_the_others(facts):
    (main, main_again), (other, other_again) = (found["order"] for found in facts)
    assert main <= other and main_again <= other_again


def test_gradients_are_exchanged_once_an_update(facts):
    for found in facts:
        assert (found["updates"], found["exchanges"]) == (2, 2)     # of 6 micro-batches


def test_an_overflow_in_one_process_is_skipped_in_both(facts):
    one, other = (found["scaler"] for found in facts)
    assert one == other and one[:3] == [1, 2, 2.0**15]


def test_both_know_the_loss_of_each_image(facts):
    assert facts[0]["seen"] == facts[1]["seen"] and facts[0]["seen"] > 30            # those between bars apart


def test_the_batch_of_all_drives_the_rate_and_is_logged(facts):
    rate = facts[1]["rate"]
    assert rate["run_effective_batch"] == 256 and rate["run_world_size"] == 2 and rate["run_backend"] == "gloo"
    assert rate["run_peak_lr"] == 2 * classifier.TrainSettings().lr


def test_processes_leave_together(facts):
    assert facts[1]["done"] < facts[0]["done"] - 0.5 and facts[1]["left"] >= facts[0]["done"]


EPOCHS = 40


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A training of two processes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    done = torchrun(folder, "--mode", "train", *TINY, "--epochs", str(EPOCHS))
    assert done.returncode == 0, done.stderr
    return folder / "digits_model.pth"


def test_torchrun_restarts_what_was_killed(tmp_path, straight):
    """Three SIGKILLs at random moments to a random process: no epoch is lost, and the weights are those without."""
    flags = [flag for flag in TINY if flag != "--no-mlflow"]
    run = Started(tmp_path, "--mode", "train", *flags, "--epochs", EPOCHS, "--num-workers", 1, "--json", "--resume",
                  launcher=[*TWO, "--max-restarts", "3"])
    draw = random.Random(0)
    for _ in range(3):
        before = len(run.epochs())
        wait_for(lambda: len(run.epochs()) > before)
        time.sleep(draw.uniform(0, 0.5))
        draw.choice(run.ranks()).kill()
    assert run.agent.wait(120) == 0, run.err()
    epochs = run.epochs()
    assert epochs[0] == 1 and epochs[-1] == EPOCHS and {b - a for a, b in zip(epochs, epochs[1:])} <= {0, 1}
    assert run.err().count("going on after epoch") == 3
    assert same(weights(tmp_path / "digits_model.pth"), weights(straight))
    wait_for(lambda: not run.left(), 30)
    import mlflow
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    steps = [each.step for each in client.get_metric_history(found.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(1, EPOCHS + 1)) and found.info.status == "FINISHED"


FAILING = """
import os, sys
sys.path.insert(0, sys.argv[1])
import classifier as c
real = c.train_epoch
def train_epoch(state, *rest):
    if state.epoch == 3 and os.environ["RANK"] == "1":
        raise KeyError("a bug")
    return real(state, *rest)
c.train_epoch = train_epoch
sys.exit(c.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("what", ["SIGTERM to 0", "SIGTERM to 1", "SIGINT to 1", "SIGKILL to 0", "SIGTERM to torchrun",
                                  "a bug"])
def test_one_ends_and_all_end(tmp_path, what):
    """Within 30 s, nothing half-written, no process left, and the run can be resumed."""
    (tmp_path / "failing.py").write_text(FAILING)
    script, first = (("failing.py", [ROOT]) if what == "a bug" else (ROOT / "classifier.py", []))
    run = Started(tmp_path, *first, "--mode", "train", *TINY, "--epochs", 4000, "--num-workers", 1, "--json", script=script)
    wait_for(lambda: 3 in run.epochs())
    if what != "a bug":
        name, _, target = what.split()
        process = run.agent if target == "torchrun" else run.ranks()[int(target)]
        process.send_signal(getattr(signal, name))
    assert run.agent.wait(30) != 0
    wait_for(lambda: not run.left(), 30)
    errors = re.findall(r"^\[rank\d\]: (\w+Error)", run.err(), re.MULTILINE)               # of tracebacks
    assert errors == ["KeyError"] * (what == "a bug"), run.err()
    assert ("go on with" in run.err()) == (what in ("SIGTERM to 0", "SIGTERM to torchrun")), run.err()
    assert {each.name for each in tmp_path.iterdir()} - {"failing.py"} <= {"out", "err", "digits_model.pth.resume",
                                                                           ".digits_model.pth.lock"}
    assert torch.load(tmp_path / "digits_model.pth.resume", weights_only=True)["history"]


def agents(folders, argv, rendezvous):
    """torchrun on two machines: two agents, a folder each, that meet over loopback."""
    return [Started(folder, *argv, launcher=["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                                             *rendezvous(number)]) for number, folder in enumerate(folders)]


def test_two_machines(tmp_path, straight):
    """One writes, though each has a disk of its own; resumed, the other gets from it where it stood."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = ["--mode", "train", *TINY, "--epochs", EPOCHS, "--json", "--resume"]
    both = agents(folders, argv, lambda number: ["--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port",
                                                 str(port)])
    wait_for(lambda: 3 in both[0].epochs())
    both[1].ranks()[0].kill()
    assert both[0].agent.wait(60) and both[1].agent.wait(60)
    assert (folders[0] / "digits_model.pth.resume").exists()
    again = agents(folders, argv, lambda number: ["--rdzv-backend", "static", "--node-rank", str(number), "--rdzv-endpoint",
                                                  f"127.0.0.1:{port}"])
    assert [each.agent.wait(120) for each in again] == [0, 0], again[0].err() + again[1].err()
    assert "going on after epoch" in again[0].err() and again[0].epochs()[-1] == EPOCHS and not again[1].epochs()
    assert sorted(os.listdir(folders[0])) == ["digits_model.pth", "err", "out"]
    assert sorted(os.listdir(folders[1])) == ["err", "out"]
    assert same(weights(folders[0] / "digits_model.pth"), weights(straight))


def test_two_agents_meet_at_an_endpoint(tmp_path, straight, monkeypatch):
    """torch's c10d rendezvous, as on machines that share a disk; a process is killed, and both agents restart theirs."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = agents([tmp_path, tmp_path], ["--mode", "train", *TINY, "--epochs", EPOCHS, "--json", "--resume"], lambda _: [
        "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "7", "--rdzv-endpoint", f"127.0.0.1:{port}"])
    wait_for(lambda: 3 in both[0].epochs())
    both[1].ranks()[0].kill()
    assert [each.agent.wait(120) for each in both] == [0, 0], both[0].err()
    epochs = both[0].epochs()
    assert epochs[0] == 1 and epochs[-1] == EPOCHS and {b - a for a, b in zip(epochs, epochs[1:])} <= {0, 1}
    assert same(weights(tmp_path / "digits_model.pth"), weights(straight))


def test_machines_with_other_data_are_refused(tmp_path):
    """The second process's folder has a picture less."""
    (tmp_path / "other.py").write_text("""
import os, sys
sys.path.insert(0, sys.argv[1])
import classifier as c
real = c.load_data
def load_data(settings):
    data = real(settings)
    return data if os.environ["RANK"] == "0" else c.replace(data, train=data.train.take(slice(1, None)))
c.load_data = load_data
sys.exit(c.main(sys.argv[2:]))
""")
    run = Started(tmp_path, ROOT, "--mode", "train", *TINY, script="other.py")
    assert run.agent.wait(60) != 0 and "has other images than the main process" in run.err()
    assert "[rank" not in run.err()


def test_compiled_under_torchrun(tmp_path):
    done = torchrun(tmp_path, "--mode", "train", *TINY, "--compile")
    assert done.returncode == 0 and ("compiled: True" in done.stderr or "torch.compile failed" in done.stderr), done.stderr


def test_predict_says_that_it_runs_in_one_process(tmp_path, trained):
    done = torchrun(tmp_path, "--mode", "predict", "--model-path", str(trained), "--image", "x.png")
    assert done.returncode != 0 and "runs in one process" in done.stderr
