"""The sandbox is a bucket like those of users, and its build can be interrupted and repeated."""

import subprocess
import sys

import build_sandbox
import numpy as np
import pytest
import yaml
from build_sandbox import DATASET_ID, MODEL_ID, ROOT
from PIL import Image

import network

SPLITS = ("train", "validation", "test")
CLASSES = ("class_0", "class_1", "class_2")


def read_folder(folder):
    """File name -> pixels."""
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def dataset(sandbox):
    return sandbox / "datasets" / DATASET_ID


def test_configurations_in_the_bucket_are_those_in_configs(sandbox, dataset):
    for path, name in [
        (dataset / "config.yaml", "dataset-sandbox.yaml"),
        (sandbox / "models" / MODEL_ID / "config.yaml", "train-sandbox.yaml"),
    ]:
        assert yaml.safe_load(path.read_text()) == yaml.safe_load((ROOT / "configs" / name).read_text())


@pytest.mark.parametrize("split", SPLITS)
def test_each_image_has_a_mask_of_each_class(dataset, split):
    width, height = yaml.safe_load((dataset / "config.yaml").read_text())["dataset_config"]["target_size"]
    assert width != height  # otherwise no test would notice if the two were swapped
    images = read_folder(dataset / split / "images")
    assert all(image.shape == (height, width) and image.dtype == np.uint8 for image in images.values())
    assert sorted(folder.name for folder in (dataset / split / "masks").iterdir()) == list(CLASSES)
    for class_folder in CLASSES:
        masks = read_folder(dataset / split / "masks" / class_folder)
        assert masks.keys() == images.keys()
        assert all(mask.shape == (height, width) and mask.dtype == np.uint8 for mask in masks.values())
        assert set(np.unique(list(masks.values()))) == {0, 1}


def test_the_subsets_of_the_documented_commands_have_enough_images_for_an_interval(dataset):
    assert 0.1 * len(list((dataset / "validation/images").iterdir())) >= 20
    assert 0.5 * len(list((dataset / "test/images").iterdir())) >= 20


def test_splits_share_no_slice(dataset):
    images = [image for split in SPLITS for image in read_folder(dataset / split / "images").items()]
    assert len({name.rpartition("-")[2] for name, _ in images}) == len(images)
    with_something = [pixels.tobytes() for _, pixels in images if pixels.any()]
    assert len(set(with_something)) == len(with_something) > 700


def test_classes_are_grey_matter_white_matter_and_their_boundary(dataset):
    image, grey, white, boundary = (
        np.stack(list(read_folder(dataset / "validation" / folder).values()))
        for folder in ("images", *(f"masks/{name}" for name in CLASSES))
    )
    grey, white, boundary = (mask.astype(bool) for mask in (grey, white, boundary))
    assert not (grey & white).any()
    assert not (boundary & ~grey & ~white).any()
    assert (boundary & grey).any() and (boundary & white).any()
    assert image[white].mean() > image[grey].mean() > image[~grey & ~white].mean()


def test_model_is_a_whole_compiled_keras_model(sandbox):
    tf = network.import_tensorflow()
    model = tf.keras.models.load_model(sandbox / "models" / MODEL_ID / "model.hdf5")
    assert model.input_shape == (None, None, None, 1)
    assert model.output_shape[-1] == len(CLASSES)
    assert model.loss.__name__ == "binary_crossentropy"
    assert model.optimizer.name == "Adam"
    assert model.layers[-1].activation.__name__ == "sigmoid"


def test_a_complete_sandbox_is_not_built_again(sandbox):
    def state():
        return {path: path.stat().st_mtime_ns for path in sorted(sandbox.glob("*/*/**/*")) if path.is_file()}

    before = state()
    process = subprocess.run(
        [sys.executable, ROOT / "tests/build_sandbox.py"], capture_output=True, text=True, timeout=120
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == f"{sandbox} is complete and up to date\n"
    assert state() == before


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("value: 1\n")
    return path


def write_value(folder, config):
    (folder / "value").write_text(str(config["value"]))


def test_a_changed_configuration_rebuilds_the_folder_and_removes_what_was_made_from_it(tmp_path, config):
    dataset, model = tmp_path / "bucket/datasets/d", tmp_path / "bucket/models/m"
    model.mkdir(parents=True)
    assert build_sandbox.build(dataset, config, write_value)
    assert not build_sandbox.build(dataset, config, write_value, outdates=model)
    assert model.exists()
    config.write_text("value: 2\n")
    assert build_sandbox.build(dataset, config, write_value, outdates=model)
    assert (dataset / "value").read_text() == "2"
    assert not model.exists()


def test_an_interrupted_build_changes_nothing(tmp_path, config):
    folder = tmp_path / "bucket/datasets/d"
    folder.parent.mkdir(parents=True)
    build_sandbox.build(folder, config, write_value)
    config.write_text("value: 2\n")

    def interrupted(new, config):
        (new / "value").write_text("half of i")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_sandbox.build(folder, config, interrupted)
    assert (folder / "value").read_text() == "1"
    assert build_sandbox.build(folder, config, write_value)
    assert (folder / "value").read_text() == "2"


def test_leftovers_of_a_killed_build_are_removed(tmp_path):
    (tmp_path / ".building-x/new").mkdir(parents=True)
    with build_sandbox.only_builder_in(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_second_builder_waits_for_the_first(tmp_path):
    code = "import build_sandbox as b, pathlib, sys\nwith b.only_builder_in(pathlib.Path(sys.argv[1])): pass"
    with build_sandbox.only_builder_in(tmp_path):
        second = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT / "tests")
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(5)
    assert second.wait(60) == 0
