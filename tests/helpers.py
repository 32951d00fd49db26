"""Helpers for several test files: the tool as a process, buckets, tiny datasets, and checks of results and errors."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import yaml
from fake_gcs import create_bucket, get_object, list_objects, put_object
from PIL import Image

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


def run_tool(*arguments, cwd, script=SCRIPT, timeout=300, **environment):
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


def run_here(patch, *given, code=0):
    """Run the script's `main` in this process, with a pytest.MonkeyPatch; it must end with this exit code."""
    import train_segmentation_model_prediction_thresholds as script

    with patch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, given)])
        patch.setattr(script, "last_words", [], raising=False)  # for signals, which only a process of its own gets
        assert script.main() == code


def published(process):
    """Where a run has put its YAML, as it says."""
    return re.search(r"(?m)^Result: (.+)$", process.stdout)[1]


def start(*given, cwd, script=SCRIPT, **options):
    """Start the script; `environment=` is added to this process's, other options go to Popen."""
    environment = {**os.environ, **{name: str(value) for name, value in options.pop("environment", {}).items()}}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, script, *map(str, given)], cwd=cwd, env=environment, **options)


def finish(process):
    """Wait for a process; returns subprocess.CompletedProcess."""
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(condition, process):
    """Wait; returns at once when the process ends."""
    deadline = time.monotonic() + 300
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "what is waited for does not come"
        time.sleep(0.003)


def shortened(path, **constants):
    """Change constants at the top of a copied module."""
    text = path.read_text()
    for name, value in constants.items():
        text, changed = re.subn(rf"(?m)^{name} = \S+", f"{name} = {value}", text)
        assert changed == 1
    path.write_text(text)


def tf_config(task=("worker", 1), **cluster):
    return json.dumps({"cluster": cluster, "task": dict(zip(("type", "index"), task, strict=True))})


def results(bucket, model=MODEL_ID):
    """All results in a directory bucket, oldest first."""
    return [yaml.safe_load(path.read_text()) for path in sorted(Path(bucket, "models", model).glob("*.yaml"))[1:]]


ENDINGS = (".yaml", ".png", "_slices.png", "_curves.csv")  # of the files of a result


def thresholds(result):
    return result["final_trained_prediction_thresholds"]


def upload(server, directory, bucket, prefix=""):
    create_bucket(server, bucket)
    for path in sorted(Path(directory).rglob("*")):
        if path.is_file():
            put_object(server, bucket, prefix + path.relative_to(directory).as_posix(), path.read_bytes())


class GoogleBucket:
    """The files of a directory in a real server, behind a proxy."""

    def __init__(self, proxy, template, name):
        self.server, self.proxy, self.name, self.address = proxy.server, proxy, name, f"gs://{name}"
        self.environment = {"STORAGE_EMULATOR_HOST": proxy.url}
        upload(self.server, template, name)
        self.given = set(list_objects(self.server, name))

    def contents(self):
        """What is new in it: bytes by name."""
        new = set(list_objects(self.server, self.name)) - self.given
        return {name: get_object(self.server, self.name, name) for name in new}

    def replace(self, name, data):
        put_object(self.server, self.name, name, data)

    def fetched(self):
        paths = (re.search(r"/o/([^?]*)\?.*alt=media", request.path) for request in list(self.proxy.requests))
        return [unquote(path[1]) for path in paths if path]


class DirectoryBucket:
    """The same for a directory."""

    environment = {}

    def __init__(self, directory):
        self.directory, self.address = directory, str(directory)
        self.given = {name for name in self._names() if "model_thresholds_" not in name}

    def _names(self):
        return [path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*") if path.is_file()]

    def contents(self):
        return {name: (self.directory / name).read_bytes() for name in set(self._names()) - self.given}

    def replace(self, name, data):
        (self.directory / name).write_bytes(data)


def whole_results(bucket):
    """Check that all that is new in a bucket is whole; returns the content of the YAML files, oldest first."""
    contents = bucket.contents()
    for name, data in contents.items():
        assert re.fullmatch(rf"{MODEL}/model_thresholds_\d{{8}}T\d{{6}}Z(\.yaml|\.png|_slices\.png|_curves\.csv)", name)
        if name.endswith(".png"):
            Image.open(io.BytesIO(data)).verify()
        if name.endswith(".csv"):
            assert data.endswith(b"\n") and len({line.count(b",") for line in data.splitlines()}) == 1
    found = []
    for name in sorted(contents):
        if name.endswith(".yaml"):
            assert {name.replace(".yaml", ending) for ending in ENDINGS} <= set(contents)
            found.append(yaml.safe_load(contents[name]))
            assert list(found[-1]) == ["final_trained_prediction_thresholds", "metadata", "metadata_system"]
            assert set(found[-1]["metadata_system"]) == {"System_info", "Lib_versions_info"}
    return found


def assert_one_error_line(process, code, *words):
    assert process.returncode == code, process.stderr
    lines = [line for line in process.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def write_split(folder, images, masks):
    """Write uint8 images, shape (n, height, width), and masks, shape (n, height, width, classes), as a split."""
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        for subfolder, pixels in [
            ("images", image),
            *((f"masks/class_{c}", mask[..., c]) for c in range(mask.shape[-1])),
        ]:
            (folder / subfolder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / subfolder / f"slice_{i:04d}.png")


def blobs_and_masks(n, height, width, classes, seed=0):
    """Images of noisy bright discs, one per class, and their masks, as `write_split` takes them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    masks = np.zeros((n, height, width, classes), np.uint8)
    for i in range(n):
        for c in range(classes):
            cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(5, height / 3)
            masks[i, ..., c] = (y - cy) ** 2 + (x - cx) ** 2 < r**2
    images = 60 + 50 * masks.sum(axis=-1) + rng.normal(0, 25, (n, height, width))
    return np.clip(images, 0, 255).astype(np.uint8), masks
