"""Helpers for several test files: the tool as a process, buckets, tiny datasets, and checks of results and errors."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock
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
PARAMETERS = {
    "backbone_name": "resnet18",
    "encoder_weights": "imagenet",
    "decoder_filters": [8, 8, 8, 4, 4],
    "activation": "sigmoid",
}
TRAIN_CONFIG = {
    "segmentation_model": {"model_name": "Unet", "model_parameters": PARAMETERS},
    "loss": "cross_entropy",
    "validation_data_shuffle_seed": 12345,
}
SMALL_CHUNKS = {  # four of the images of the fixture many_images, each kept as soon as it is counted
    "chunks.CHUNK_PIXELS": 2**13,
    "train_segmentation_model_prediction_thresholds.CHECKPOINT_SECONDS": 0,
}

# Starts the tool as its own last lines do, with other values in place of some of its modules' settings.
WITH_SETTINGS = """
import importlib, json, os, sys
root, settings, sys.argv[1:] = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
sys.path.insert(0, root)
import terminal
terminal.prepare()
for name, value in settings.items():
    module, _, attribute = name.rpartition(".")
    module = importlib.import_module(module)
    getattr(module, attribute)  # an error if there is no such setting
    setattr(module, attribute, value)
import train_segmentation_model_prediction_thresholds as script
code = script.main()
sys.stdout.flush()
os._exit(code)
"""
started = []  # processes, which a fixture ends after each test


def start_program(*command, cwd, environment=None, signals="--default-signal=HUP", **options):
    """Start a process in a group of its own, with pipes, in text mode; returns subprocess.Popen.

    `environment` is added to this process's. `signals` goes to env(1); SIGHUP is not ignored, even where it is here.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True} | options
    environment = {**os.environ, **{name: str(value) for name, value in (environment or {}).items()}}
    process = subprocess.Popen(["env", signals, *map(str, command)], cwd=cwd, env=environment, **options)
    started.append(process)
    return process


def start(*given, cwd, settings=None, **options):
    """Start the tool as a user does, or with settings: {"chunks.CHUNK_PIXELS": 2**14}; else as `start_program`."""
    command = [SCRIPT] if settings is None else ["-c", WITH_SETTINGS, ROOT, json.dumps(settings)]
    return start_program(sys.executable, *command, *given, cwd=cwd, **options)


def finish(process, timeout=300):
    """Wait for a process; returns subprocess.CompletedProcess."""
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_tool(*given, cwd, settings=None, **environment):
    """`start` and `finish` in one."""
    return finish(start(*given, cwd=cwd, settings=settings, environment=environment))


def arguments(bucket, dataset="dataset-tiny/validation", model=MODEL_ID, **others):
    """The command line for a bucket: `batch_size=4` becomes `--batch-size 4`."""
    named = {"gcp_bucket": bucket, "dataset_directory": dataset, "model_id": model, **others}
    return [part for name, value in named.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def run_here(*given, cwd):
    """What `run_tool` does and returns, but in this process, which is quicker."""
    import train_segmentation_model_prediction_thresholds as script

    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", [str(SCRIPT), *map(str, given)])
    with argv, contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = script.main()
    return subprocess.CompletedProcess(given, code, out.getvalue(), err.getvalue())


def wait_until(condition, process):
    """Wait; returns at once when the process ends."""
    while not condition() and process.poll() is None:
        time.sleep(0.003)


def results(bucket, model=MODEL_ID):
    """All results in a directory bucket, oldest first."""
    return [yaml.safe_load(path.read_text()) for path in sorted(Path(bucket, "models", model).glob("*.yaml"))[1:]]


ENDINGS = (".yaml", ".png", "_slices.png", "_curves.csv", "_stacks.csv")  # of the files of a result


def thresholds(result):
    return result["final_trained_prediction_thresholds"]


def upload(server, directory, bucket, prefix=""):
    create_bucket(server, bucket)
    for path in sorted(Path(directory).rglob("*")):
        if path.is_file():
            put_object(server, bucket, prefix + path.relative_to(directory).as_posix(), path.read_bytes())


def fetched(proxy):
    """The names of the objects that were fetched through a ChaosProxy."""
    paths = (re.search(r"/o/([^?]*)\?.*alt=media", request.path) for request in list(proxy.requests))
    return [unquote(path[1]) for path in paths if path]


class GoogleBucket:
    """The files of a directory in a real server, behind a proxy."""

    def __init__(self, proxy, template, name):
        self.server, self.name, self.address = proxy.server, name, f"gs://{name}"
        self.environment = {"STORAGE_EMULATOR_HOST": proxy.url}
        upload(self.server, template, name)
        self.given = set(list_objects(self.server, name))

    def contents(self):
        """What is new in it: bytes by name."""
        new = set(list_objects(self.server, self.name)) - self.given
        return {name: get_object(self.server, self.name, name) for name in new}


def whole_results(bucket):
    """Check that all that is new in a GoogleBucket is whole; its YAML files, oldest first."""
    contents = bucket.contents()
    for name, data in contents.items():
        assert re.fullmatch(rf"{MODEL}/model_thresholds_\d{{8}}T\d{{6}}Z({'|'.join(map(re.escape, ENDINGS))})", name)
        if name.endswith(".png"):
            Image.open(io.BytesIO(data)).verify()
    names = sorted(name for name in contents if name.endswith(".yaml"))
    assert {name.replace(".yaml", ending) for name in names for ending in ENDINGS} <= set(contents)
    found = [yaml.safe_load(contents[name]) for name in names]
    for result in found:
        assert list(result) == ["final_trained_prediction_thresholds", "metadata", "metadata_system"]
    return found


def lines_of(process):
    """What the tool wrote to stderr, without what TensorFlow writes before it knows how much to log."""
    return [line for line in process.stderr.splitlines() if not re.match(r"[IWE]\d{4} |WARNING: All log", line)]


def assert_done(process):
    """The process ended well, and wrote only warnings to stderr."""
    assert process.returncode == 0, process.stderr
    assert all(line.startswith("warning: ") for line in lines_of(process)), process.stderr


def assert_one_error_line(process, code, *words):
    """The process ended with this code, and all on stderr, besides warnings, is one line with these words."""
    assert process.returncode == code, process.stderr
    (line,) = (line for line in lines_of(process) if not line.startswith("warning: "))
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def write_split(folder, images, masks):
    """Write uint8 images, shape (n, height, width), and masks, shape (n, height, width, classes), as a split."""
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        pictures = {"images": image} | {f"masks/class_{c}": mask[..., c] for c in range(mask.shape[-1])}
        for subfolder, pixels in pictures.items():
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


def predict(network, images, batch_size):
    """Probabilities from tf.keras, in batches of one size as in the pass, because their last bit may depend on it."""
    x = (images * (1 / 255)).astype(np.float32)[..., None]
    padded = np.concatenate([x, np.repeat(x[-1:], -len(x) % batch_size, axis=0)])
    return network.predict(padded, batch_size=batch_size, verbose=0)[: len(x)]
