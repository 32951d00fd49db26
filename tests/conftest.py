"""Fixtures for several test files."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import MODEL_ID, ROOT, SCRIPT, TRAIN_CONFIG, arguments, blobs_and_masks, memory, run_tool, write_split


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
    """A bucket directory for one test: 11 images of 96 x 64, two classes, a whole-model HDF5 with random weights."""
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
    """A folder for one test with the tiny bucket and its cached counts, as after a first run."""
    return Path(shutil.copytree(counted_template[0], tmp_path / "counted"))


@pytest.fixture
def copied_script(tmp_path):
    """The tool's files without a checkout around them."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder / SCRIPT.name


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    """Run a test in its tmp_path, with limited memory; it may leave nothing there but what a run may leave."""
    monkeypatch.chdir(tmp_path)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak VmHWM to what is in use now
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < 300
    assert {path.name for path in tmp_path.iterdir()} <= {"bucket", "tmp", "no_tensorflow", "counted"}
