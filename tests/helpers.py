"""What several test files use: the tool as a process, buckets, tiny data sets, and how an error must look."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from fake_gcs import create_bucket, put_object
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
