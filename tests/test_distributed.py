"""Two gloo processes on the CPU do what one does."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

pytestmark = pytest.mark.slow


def torchrun(tmp_path, *argv, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*command, str(ROOT / "classifier.py"), *argv], cwd=tmp_path, text=True, capture_output=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


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
    python = [sys.executable]
    two = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start, batch, name in ((python, "64", "one.pth"), (two, "32", "two.pth")):
        done = subprocess.run([*start, "equal.py", str(ROOT), "--mode", "train", *flags, "--batch-size", batch,
                               "--model-path", name], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True)["weights"] for name in ("one.pth", "two.pth"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)


LEAVE = '''
import sys, time, torch
sys.path.insert(0, sys.argv[1])
import classifier as c
with c.open_runtime(c.RunSettings(device="cpu")) as runtime:
    runtime.sum(torch.ones(3))
    time.sleep(2 * runtime.is_main)
    done = time.time()
with open(f"rank{runtime.rank}", "w") as file:                     # on stdout the two would write into each other
    print(done, time.time(), file=file)
'''


def test_processes_leave_together(tmp_path):
    (tmp_path / "leave.py").write_text(LEAVE)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           "leave.py", str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    main, other = ([float(time) for time in (tmp_path / f"rank{rank}").read_text().split()] for rank in (0, 1))
    assert other[0] < main[0] - 1 and other[1] >= main[0]


def test_predict_says_that_it_runs_in_one_process(tmp_path, trained):
    done = torchrun(tmp_path, "--mode", "predict", "--model-path", str(trained), "--image", "x.png")
    assert done.returncode != 0 and "runs in one process" in done.stderr
