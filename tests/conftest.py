"""What the tests share: the tool as a process, the sandbox, a tiny bucket, and a real GCS server."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_gcs import create_bucket, put_object
from PIL import Image

import train_segmentation_model_prediction_thresholds as script
from gcp_utils import open_bucket
from image_utils import pair_images_and_masks

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_segmentation_model_prediction_thresholds.py"
MODEL_ID = "segmentation-model-tiny"
MODEL = f"models/{MODEL_ID}"
SPLIT = "datasets/dataset-tiny/validation"
TRAIN_CONFIG = {
    "segmentation_model": {
        "model_name": "Unet",
        "model_parameters": {
            "backbone_name": "resnet18",
            "encoder_weights": "imagenet",
            "decoder_filters": [8, 8, 8, 4, 4],
            "activation": "sigmoid",
        },
    },
    "loss": "cross_entropy",
    "optimizer": "adam",
    "validation_data_shuffle_seed": 12345,
    "test_data_shuffle_seed": 123456,
}


def run_tool(*arguments, cwd, script=SCRIPT, timeout=120, **environment):
    """Run the script as a user does; returns subprocess.CompletedProcess with text output."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def arguments(bucket, dataset="dataset-tiny/validation", model=MODEL_ID, **others):
    """The command line for a bucket: `batch_size=4` becomes `--batch-size 4`."""
    named = {"gcp_bucket": bucket, "dataset_directory": dataset, "model_id": model, **others}
    return [part for name, value in named.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def tf_config(task=("worker", 1), **cluster):
    return json.dumps({"cluster": cluster, "task": dict(zip(("type", "index"), task, strict=True))})


def results(bucket, model=MODEL_ID):
    """All results in a directory bucket, oldest first."""
    return [yaml.safe_load(path.read_text()) for path in sorted(Path(bucket, "models", model).glob("*.yaml"))[1:]]


def thresholds(result):
    return result["final_trained_prediction_thresholds"]


def upload(server, directory, bucket, prefix=""):
    create_bucket(server, bucket)
    for path in sorted(Path(directory).rglob("*")):
        if path.is_file():
            put_object(server, bucket, prefix + path.relative_to(directory).as_posix(), path.read_bytes())


def assert_one_error_line(process, code, *words):
    assert process.returncode == code, process.stderr
    lines = [line for line in process.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def write_split(folder, images, masks):
    """images: uint8 (n, h, w); masks: uint8 (n, h, w, classes)."""
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        for subfolder, pixels in [
            ("images", image),
            *((f"masks/class_{c}", mask[..., c]) for c in range(mask.shape[-1])),
        ]:
            (folder / subfolder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / subfolder / f"slice_{i:04d}.png")


def blobs_and_masks(n, height, width, classes, seed=0):
    """Noisy bright discs and their masks: something that a network could learn."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    masks = np.zeros((n, height, width, classes), np.uint8)
    for i in range(n):
        for c in range(classes):
            cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(5, height / 3)
            masks[i, ..., c] = (y - cy) ** 2 + (x - cx) ** 2 < r**2
    images = 60 + 50 * masks.sum(axis=-1) + rng.normal(0, 25, (n, height, width))
    return np.clip(images, 0, 255).astype(np.uint8), masks


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
def counted(counted_template, tmp_path, monkeypatch):
    """A folder of its own with the tiny bucket and its cached counts, as after a first run."""
    folder = tmp_path / "counted"
    shutil.copytree(counted_template[0] / "bucket", folder / "bucket")
    # Copies are other files to the tool, so the counts get the name that it looks for.
    monkeypatch.chdir(folder)
    train_config = yaml.safe_load((folder / "bucket" / MODEL / "config.yaml").read_text())["train_config"]
    bucket = open_bucket("bucket", folder / "tmp/objects")
    class_folders, samples = pair_images_and_masks(bucket.list(SPLIT), SPLIT, bucket.url, folder / "problems.txt")
    weights = bucket.stat(f"{MODEL}/model.hdf5")
    path = folder / script.Inference(samples, class_folders, [96, 64], train_config, weights).counts_path()
    path.parent.mkdir(parents=True)
    shutil.copy(next((counted_template[0] / "tmp/counts").iterdir()), path)
    return folder


@pytest.fixture
def copied_script(tmp_path):
    """The tool as files alone, outside any checkout."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder / SCRIPT.name
