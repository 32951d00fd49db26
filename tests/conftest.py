"""The fixtures that several test files use."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import MODEL_ID, ROOT, SCRIPT, TRAIN_CONFIG, arguments, blobs_and_masks, run_tool, write_split


@pytest.fixture(scope="session")
def sandbox():
    """The sandbox bucket that `make sandbox` builds; read only."""
    subprocess.run([sys.executable, ROOT / "tests/build_sandbox.py"], cwd=ROOT, check=True, timeout=900)
    return ROOT / "sandbox"


@pytest.fixture(scope="session")
def tiny_network():
    """A small network with random weights, as tf.keras builds it."""
    import network

    tf = network.import_tensorflow()
    import segmentation_models

    tf.keras.utils.set_random_seed(7)
    parameters = TRAIN_CONFIG["segmentation_model"]["model_parameters"] | {"encoder_weights": None}
    return segmentation_models.Unet(
        **parameters | {"decoder_filters": tuple(parameters["decoder_filters"])}, classes=2, input_shape=(None, None, 1)
    )


@pytest.fixture(scope="session")
def tiny_bucket_template(tmp_path_factory, tiny_network):
    bucket = tmp_path_factory.mktemp("template") / "bucket"
    dataset, model = bucket / "datasets/dataset-tiny", bucket / "models" / MODEL_ID
    write_split(dataset / "validation", *blobs_and_masks(11, 64, 96, 2, seed=1))
    (dataset / "config.yaml").write_text(yaml.safe_dump({"dataset_config": {"target_size": [96, 64]}}))
    model.mkdir(parents=True)
    (model / "config.yaml").write_text(yaml.safe_dump({"train_config": TRAIN_CONFIG}))
    tiny_network.compile("adam", "binary_crossentropy")
    tiny_network.save(model / "model.hdf5")
    return bucket


@pytest.fixture
def tiny_bucket(tiny_bucket_template, tmp_path):
    """A bucket directory of its own: 11 images of 96 x 64, two classes, a whole-model HDF5 with random weights."""
    return Path(shutil.copytree(tiny_bucket_template, tmp_path / "bucket"))


@pytest.fixture
def no_tensorflow(tmp_path):
    """PYTHONPATH under which an import of TensorFlow ends the process."""
    folder = tmp_path / "no_tensorflow"
    folder.mkdir()
    (folder / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    return folder


@pytest.fixture(scope="session")
def counted_template(tmp_path_factory, tiny_bucket_template):
    """The tiny bucket after a first run, with the folder of that run."""
    folder = tmp_path_factory.mktemp("counted")
    shutil.copytree(tiny_bucket_template, folder / "bucket")
    process = run_tool(*arguments("bucket", batch_size=4, message="näive — note"), cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder, process


@pytest.fixture
def counted(counted_template, tmp_path):
    """A folder of its own with the tiny bucket and its cached counts, as after a first run."""
    return Path(shutil.copytree(counted_template[0], tmp_path / "counted"))


@pytest.fixture
def copied_script(tmp_path):
    """The tool as files alone, outside any checkout."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder / SCRIPT.name
