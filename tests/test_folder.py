"""`--dataset FOLDER`: people's own pictures as a data set, and `--init-from`."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import classifier
from classifier import DataSettings, UserError, framings, load_data, read_image, to_pixels
from test_pixels import encoded, noise

QUICK = ["--mode", "train", "--width", "8", "--epochs", "2", "--num-workers", "0", "--device", "cpu", "--no-mlflow"]


def picture(colour, number=0):
    return Image.blend(noise(50, 40), Image.new("RGB", (50, 40), colour), 0.7 + number / 1000)


@pytest.fixture
def pets(tmp_path):
    """30 pictures of three classes, whose names need care."""
    root = tmp_path / "my pets"
    for name, colour in (("cat 10", "red"), ("cat 9", "green"), ("ünï", "blue")):
        (root / name / "more").mkdir(parents=True)
        for number in range(10):
            picture(colour, number).save(root / name / ("more" if number % 2 else ".") / f"{number}.png")
    (root / ".hidden").mkdir()
    (root / "readme.txt").write_text("hello")
    return root


def load(root, **more):
    return load_data(DataSettings(dataset=str(root), **more))


def test_subfolders_are_classes_and_a_tenth_is_the_test(pets, capsys):
    data = load(pets)
    assert data.class_names == ("cat 9", "cat 10", "ünï") and data.evaluation_name == "test"
    assert data.train.labels.bincount().tolist() == [9, 9, 9] and data.evaluation.labels.bincount().tolist() == [1, 1, 1]
    assert data.train.labels[:9].unique().numel() > 1              # in no order: --limit-images takes the first
    assert capsys.readouterr().err == ""


def test_pictures_are_letterboxed_as_predict_does(pets):
    data = load(pets)
    seen = {tuple(image.flatten().tolist()) for split in (data.train, data.evaluation) for image in split.images}
    path = pets / "ünï" / "more" / "3.png"
    assert tuple(to_pixels(framings(read_image(path), False, True)[0]).flatten().tolist()) in seen and len(seen) == 30


def test_the_split_depends_on_names_alone(pets):
    before = load(pets).evaluation
    noise(9, 9).save(pets / "ünï" / "zzz.png")
    after = load(pets).evaluation
    assert torch.equal(before.images[:2], after.images[:2])
    (pets.parent / "elsewhere").mkdir()
    moved = pets.rename(pets.parent / "elsewhere" / "pets")
    assert torch.equal(load(moved).evaluation.images, after.images)


def test_train_and_test_folders(pets):
    (pets / "train").mkdir()
    for name in ("cat 10", "cat 9", "ünï"):
        (pets / name).rename(pets / "train" / name)
    (pets / "test" / "cat 9").mkdir(parents=True)
    picture("green", 77).save(pets / "test" / "cat 9" / "a.png")
    data = load(pets)
    assert len(data.train) == 30 and data.evaluation.labels.tolist() == [0]
    (pets / "test" / "dog").mkdir()
    picture("green").save(pets / "test" / "dog" / "a.png")
    with pytest.raises(UserError, match="test has classes that .*train lacks: dog"):
        load(pets)


def test_bad_pictures_are_named_left_out_and_counted(pets, capsys):
    (pets / "ünï" / "empty.png").write_bytes(b"")
    (pets / "ünï" / "cut.jpg").write_bytes(encoded(noise(90, 90), "JPEG")[:900])
    data = load(pets)
    told = capsys.readouterr().err
    assert len(data.train) + len(data.evaluation) == 30
    assert "empty.png: the file is empty" in told and "cut.jpg" in told and " could not be read and are left out" in told


def test_what_makes_no_classes_is_said(pets, tmp_path, capsys):
    (pets / "nothing in it").mkdir()
    (pets / "one").mkdir()
    picture("white").save(pets / "one" / "only.png")
    data = load(pets)
    told = capsys.readouterr().err
    assert "nothing in it: no pictures" in told and "class one: no picture to test on" in told
    assert data.class_names == ("cat 9", "cat 10", "one", "ünï") and (data.train.labels == 2).sum() == 1
    (pets / "One").mkdir()
    picture("white").save(pets / "One" / "only.png")
    with pytest.raises(UserError, match="several folders called .*ne but for capitals"):
        load(pets)
    (tmp_path / "bare" / "a").mkdir(parents=True)
    picture("white").save(tmp_path / "bare" / "a" / "1.png")
    for root in (tmp_path / "bare", tmp_path / "bare" / "a"):
        with pytest.raises(UserError, match="at least two subfolders"):
            load(root)
    (tmp_path / "bare" / "b").mkdir()
    (tmp_path / "bare" / "b" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match="no picture of b could be read"):
        load(tmp_path / "bare")
    picture("white").save(tmp_path / "bare" / "b" / "1.png")
    with pytest.raises(UserError, match="leaves no picture to test on"):
        load(tmp_path / "bare")


def run(capsys, *argv):
    code = classifier.main([str(each) for each in argv])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_train_evaluate_and_predict_speak_the_classes(pets, capsys):
    """27 pictures do not crash a batch of 128."""
    code, out, _ = run(capsys, *QUICK, "--dataset", pets, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["model_path"] == "my pets_model.pth"
    code, out, _ = run(capsys, "--mode", "evaluate", "--model-path", "my pets_model.pth", "--json", "--no-mlflow")
    assert code == 0 and list(json.loads(out)["per_class"]) == ["cat 9", "cat 10", "ünï"]
    code, out, _ = run(capsys, "--mode", "predict", "--model-path", "my pets_model.pth", "--json", "--image",
                       pets / "ünï" / "0.png")
    assert code == 0 and {name for name, _ in json.loads(out)["top"]} == {"cat 9", "cat 10", "ünï"}
    code, _, err = run(capsys, "--mode", "evaluate", "--model-path", "my pets_model.pth", "--dataset", "digits")
    assert code == 1 and "was trained on" in err
    moved = pets.rename(pets.parent / "moved")
    code, _, err = run(capsys, "--mode", "evaluate", "--model-path", "my pets_model.pth", "--no-mlflow")
    assert code == 1 and "--dataset" in err.splitlines()[-1]
    assert run(capsys, "--mode", "evaluate", "--model-path", "my pets_model.pth", "--no-mlflow", "--dataset", moved)[0] == 0


@pytest.mark.parametrize("count", [2, 100])
def test_two_classes_or_a_hundred(tmp_path, count, capsys):
    for number in range(count):
        folder = tmp_path / "many" / f"class {number}"
        folder.mkdir(parents=True)
        for each in range(2):
            noise(8 + each, 8).save(folder / f"{each}.png")
    code, out, _ = run(capsys, *QUICK, "--dataset", tmp_path / "many", "--json")
    assert code == 0
    code, out, _ = run(capsys, "--mode", "evaluate", "--model-path", "many_model.pth", "--json", "--no-mlflow")
    assert len(json.loads(out)["per_class"]) == count


def test_mlflow_knows_the_folder_by_its_name(pets, capsys):
    import mlflow
    assert classifier.main([*QUICK[:-1], "--dataset", str(pets)]) == 0
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    found, = client.search_runs([client.get_experiment_by_name("my pets").experiment_id])
    assert found.inputs.dataset_inputs[0].dataset.name == "my pets" and found.info.status == "FINISHED"


def test_flips_can_be_switched_off(pets, capsys):
    for flags, mirrors in (([], True), (["--no-flip"], False)):
        run(capsys, *QUICK, "--dataset", pets, *flags)
        assert classifier.load_model("my pets_model.pth").mirrors is mirrors


def test_an_impossible_dataset_is_exit_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        classifier.parse_config(["--dataset", "no such folder"])
    assert stopped.value.code == 2 and "--dataset" in capsys.readouterr().err


def weights_at_start(pets, *flags):
    """The network before its first update."""
    config = classifier.parse_config([*QUICK, "--dataset", str(pets), *map(str, flags)])
    data = load(pets)
    return classifier.build_training(config, data, classifier.Runtime(torch.device("cpu"))).state.model.state_dict()


def test_init_from_takes_all_weights_and_the_last_layer_of_common_classes(pets, trained, tmp_path):
    saved = torch.load(trained, weights_only=True)
    torch.save(saved | {"class_names": ["ünï", *"abcdefghi"]}, tmp_path / "start.pth")
    fresh = weights_at_start(pets)
    started = weights_at_start(pets, "--init-from", tmp_path / "start.pth")
    for name, tensor in started.items():
        if name != "head.weight":
            assert torch.equal(tensor, saved["weights"][name]), name
    assert torch.equal(started["head.weight"][2], saved["weights"]["head.weight"][0])
    assert torch.equal(started["head.weight"][:2], fresh["head.weight"][:2])
    assert not np.allclose(fresh["blocks.0.convs.0.weight"], started["blocks.0.convs.0.weight"])


def test_init_from_another_network_says_which_flags(pets, trained, capsys):
    for flags in (["--width", "16"], ["--depth", "3"]):
        code, _, err = run(capsys, *QUICK, *flags, "--dataset", pets, "--init-from", trained)
        assert code == 1 and "--width 8 --depth 2" in err.splitlines()[-1]
    code, _, err = run(capsys, *QUICK, "--dataset", pets, "--init-from", "missing.pth")
    assert code == 1 and "--init-from: missing.pth" in err.splitlines()[-1]
