"""Fixtures for several test files. Templates are made once and shared by all workers of pytest-xdist."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import helpers
import pytest
import yaml
from chaos_proxy import ChaosProxy
from fake_gcs import fake_gcs_server
from helpers import (
    MODEL_ID,
    ROOT,
    SCRIPT,
    SPLIT,
    TRAIN_CONFIG,
    arguments,
    assert_done,
    blobs_and_masks,
    results,
    run_tool,
    thresholds,
    write_split,
)


@pytest.fixture(autouse=True)
def no_process_is_left():
    """End what a test started, also if it failed or took too long."""
    yield
    while helpers.started:
        process = helpers.started.pop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """Make a folder once for all workers: `make_once(name, fill)` calls `fill(folder)` and returns it; read only."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def make(name, fill):
        folder, partial = base / name, base / f"{name}.partial"
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                partial.mkdir()
                fill(partial)
                partial.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def sandbox():
    """The sandbox bucket that `make sandbox` builds; read only."""
    subprocess.run([sys.executable, ROOT / "tests/build_sandbox.py"], cwd=ROOT, check=True, timeout=900)
    return ROOT / "sandbox"


@pytest.fixture(scope="session")
def tiny_bucket_template(make_once):
    """A bucket directory: 11 images of 96 x 64, two classes, a whole-model HDF5 of a small network, random weights."""

    def fill(bucket):
        import network

        tf = network.import_tensorflow()
        import segmentation_models

        dataset, model = bucket / "datasets/dataset-tiny", bucket / "models" / MODEL_ID
        write_split(dataset / "validation", *blobs_and_masks(11, 64, 96, 2, seed=1))
        (dataset / "config.yaml").write_text(yaml.safe_dump({"dataset_config": {"target_size": [96, 64]}}))
        model.mkdir(parents=True)
        (model / "config.yaml").write_text(yaml.safe_dump({"train_config": TRAIN_CONFIG}))
        tf.keras.utils.set_random_seed(7)
        parameters = TRAIN_CONFIG["segmentation_model"]["model_parameters"]
        random = parameters | {"encoder_weights": None, "classes": 2, "input_shape": (None, None, 1)}
        tiny = segmentation_models.Unet(**random)
        tiny.compile("adam", "binary_crossentropy")
        with warnings.catch_warnings(action="ignore"):  # this file format is old: users have it
            tiny.save(model / "model.hdf5")

    return make_once("template", fill)


@pytest.fixture(scope="session")
def tiny_network(tiny_bucket_template):
    """The network of the tiny bucket, as tf.keras itself loads it."""
    import network

    tf = network.import_tensorflow()
    return tf.keras.models.load_model(tiny_bucket_template / "models" / MODEL_ID / "model.hdf5", compile=False)


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
    """The folder of a first run on the tiny bucket, with that bucket, and what it wrote to stdout in a file."""
    folder = tmp_path_factory.getbasetemp() / "counted"
    folder.mkdir()
    shutil.copytree(tiny_bucket_template, folder / "bucket")
    process = run_tool(*arguments("bucket", batch_size=4, message="näive — note"), cwd=folder)
    assert_done(process)
    (folder / "stdout").write_text(process.stdout)
    return Path(shutil.copytree(folder, folder.with_name("counted_template")))


@pytest.fixture
def counted(counted_template):
    """A folder for one test with the tiny bucket and its kept counts, which know their path, as after a first run."""
    folder = counted_template.with_name("counted")
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(counted_template, folder))


@pytest.fixture(scope="session")
def many_images(make_once, tiny_bucket_template):
    """The tiny bucket with 120 smaller images, and the thresholds of an undisturbed run."""

    def fill(folder):
        for name in ("template", "bucket"):
            bucket = Path(shutil.copytree(tiny_bucket_template, folder / name))
            shutil.rmtree(bucket / SPLIT)
            write_split(bucket / SPLIT, *blobs_and_masks(120, 32, 64, 2))
            (bucket / "datasets/dataset-tiny/config.yaml").write_text("dataset_config: {target_size: [64, 32]}")
        assert_done(run_tool(*arguments("bucket", batch_size=4), cwd=folder))

    folder = make_once("many", fill)
    return folder / "template", thresholds(results(folder / "bucket")[0])


@pytest.fixture(scope="session")
def server():
    """A storage server for all tests of a worker: each takes buckets of its own."""
    with fake_gcs_server() as url:
        yield url


@pytest.fixture
def proxy(server):
    with ChaosProxy(server) as proxy:
        yield proxy


@pytest.fixture
def copied_script(tmp_path):
    """The tool's files only, outside any checkout."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder / SCRIPT.name
