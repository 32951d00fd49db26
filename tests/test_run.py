"""The tool as its users meet it: a process, a bucket, a result."""

import fcntl
import io
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import termios

import numpy as np
import pytest
import yaml
from chaos_proxy import ChaosProxy
from fake_gcs import get_object, put_object
from helpers import (
    ENDINGS,
    MODEL,
    MODEL_ID,
    ROOT,
    SMALL_CHUNKS,
    SPLIT,
    arguments,
    assert_done,
    assert_one_error_line,
    blobs_and_masks,
    fetched,
    finish,
    lines_of,
    results,
    run_here,
    run_tool,
    start,
    thresholds,
    upload,
    write_split,
)
from PIL import Image

import chunks
import configuration
import models
from errors import EXIT_CODES, ExpectedError

NUMBERS = ("thresholds_training_output", "thresholds_training_history", "num_pixels")


def git(*command, folder=ROOT):
    return subprocess.check_output(["git", "-C", folder, *command], text=True).strip()


def test_the_result_is_complete(counted_template):
    (result,) = results(counted_template / "bucket")
    metadata, system = result["metadata"], result["metadata_system"]
    created = metadata["created_datetime"]
    assert re.fullmatch(r"\d{8}T\d{6}Z", created)
    edited = git("status", "--porcelain", "--untracked-files=no")
    config = yaml.safe_load((counted_template / "bucket" / MODEL / "config.yaml").read_text())
    expected = {
        "message": "näive — note",
        "gcp_bucket": "bucket",
        "num_classes": 2,
        "target_size": [96, 64],
        "git_hash": git("rev-parse", "HEAD") + "-dirty" * bool(edited),
        "dataset_directory": "dataset-tiny/validation",
        "model_id": MODEL_ID,
        "batch_size": 4,
        "dataset_config": {"target_size": [96, 64]},
        "train_config": config["train_config"],
        "class_folders": {"class0": "class_0", "class1": "class_1"},
        "num_images": 11,
        "num_pixels": 11 * 64 * 96,
        "random-module-global-seed": None,
        "numpy_random_global_seed": None,
        "tf_random_global_seed": None,
        "thresholds_training_configuration": {
            "opt_bounds": models.OPT_BOUNDS,
            "opt_method": models.OPT_METHOD,
            "opt_tol": models.OPT_TOL,
            "opt_options": models.OPT_OPTIONS,
            "opt_class_metric": "iou_score",
            "opt_dataset_generator": "dataset-tiny/validation",
            "opt_dataset_downsample_factor": 1.0,
        },
    }
    assert {name: metadata[name] for name in expected} == expected
    assert metadata["elapsed_minutes"] > 0
    (way,) = metadata["counted_with"]
    assert (way["images"], way["batch_size"], way["gpu"]) == (11, 4, None)
    assert way["libraries"]["numpy"] == system["Lib_versions_info"]["numpy"] == np.__version__

    folder = counted_template / "bucket" / MODEL
    names = {f"model_thresholds_{created}{ending}" for ending in ENDINGS}
    assert {path.name for path in folder.glob("model_thresholds_*")} == names
    *_, where, what_next = (counted_template / "stdout").read_text().splitlines()
    assert where == f"Result: bucket/{MODEL}/model_thresholds_{created}.yaml"
    assert f"--trained-thresholds-id model_thresholds_{created}.yaml" in what_next


# ---------------------------------------------------------------------------------------------------------------
# Kept counts


@pytest.mark.parametrize("metric", ["f1_score", "iou_score_at_recall_0.9"])
def test_a_rerun_with_another_metric_needs_no_tensorflow(counted, no_tensorflow, metric):
    command = arguments("bucket", optimizing_class_metric=metric, batch_size=3)
    process = run_tool(*command, cwd=counted, PYTHONPATH=no_tensorflow)
    assert_done(process)
    first, result = results(counted / "bucket")
    assert result["metadata"]["thresholds_training_configuration"]["opt_class_metric"] == metric
    for name, output in result["metadata"]["thresholds_training_output"].items():
        assert (output["guaranteed_recall"] is not None) == metric.endswith("_at_recall_0.9")
        if metric == "f1_score":  # IoU and F1 have the same optimum
            assert output["x"] == thresholds(first)[name]
    assert result["metadata"]["batch_size"] == 3
    assert result["metadata"]["counted_with"] == first["metadata"]["counted_with"]


def recolour(path):
    """Change one pixel of a picture in place; the file keeps its size and its time."""
    before, pixels = path.stat(), np.array(Image.open(path))
    for i in range(pixels.size):
        changed, file = pixels.copy(), io.BytesIO()
        changed.flat[i] ^= 1
        Image.fromarray(changed).save(file, "PNG")
        if len(file.getvalue()) == before.st_size:
            break
    path.write_bytes(file.getvalue())
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def other_weights(path, source):
    """Write the weights of `source` with another bias, as large and as old as the source."""
    import h5py

    before = source.stat()
    if path != source:
        shutil.copytree(source.parent, path.parent)
    with h5py.File(path, "r+") as file:
        file["model_weights/final_conv/final_conv/bias:0"][:] += 1
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit_yaml(path, *keys, **settings):
    content = yaml.safe_load(path.read_text())
    section = next(iter(content.values()))
    for key in keys:
        section = section[key]
    section.update(settings)
    path.write_text(yaml.safe_dump(content))


def edit_dataset(bucket, **settings):
    edit_yaml(bucket / "datasets/dataset-tiny/config.yaml", **settings)


def edit_network(bucket, **parameters):
    edit_yaml(bucket / MODEL / "config.yaml", "segmentation_model", "model_parameters", **parameters)


def copied(bucket):
    """All files are copies, as after a restore: new times, the same content."""
    bucket.rename(bucket.with_name("old"))
    shutil.copytree(bucket.with_name("old"), bucket, copy_function=shutil.copyfile)


STACKS = [f"slice_000{i}" for i in range(5)]
MASKS = f"{SPLIT}/masks/class_1"
WEIGHTS = f"{MODEL}/model.hdf5"
OTHER = "models/another-model/model.hdf5"
CHANGES = {  # whether it is to be counted again, what changes, and what changes in the command
    "an image, its time restored": (True, lambda b: recolour(b / SPLIT / "images/slice_0003.png"), {}),
    "a mask, its time restored": (True, lambda b: recolour(b / SPLIT / "masks/class_1/slice_0003.png"), {}),
    "the weights, their time restored": (True, lambda b: other_weights(b / WEIGHTS, b / WEIGHTS), {}),
    "a model as large and old": (True, lambda b: other_weights(b / OTHER, b / WEIGHTS), {"model": "another-model"}),
    "the network": (True, lambda b: edit_network(b, activation="softmax"), {}),
    "a name": (True, lambda b: [p.rename(p.with_name("z.png")) for p in list(b.rglob("slice_0000.png"))], {}),
    "a class folder": (True, lambda b: (b / SPLIT / "masks/class_0").rename(b / SPLIT / "masks/class_2"), {}),
    "the stacks": (True, lambda b: edit_dataset(b, dataset_split={"validation": STACKS}), {}),
    "a subset": (True, lambda b: None, {"dataset_downsample_factor": 0.5}),
    "only the times": (False, lambda b: [path.touch() for path in b.rglob("*.*")], {}),
    "only the places on the disk": (False, copied, {}),
    "a stack without an image": (False, lambda b: edit_dataset(b, dataset_split={"validation": ["none"]}), {}),
    "how it was trained": (False, lambda b: edit_yaml(b / MODEL / "config.yaml", epochs=99), {}),
    "a file beside the model": (False, lambda b: (b / MODEL / "plots.png").write_bytes(b"?"), {}),
}


def needs_inference(monkeypatch, folder, **others):
    """Whether a run would count; it ends there."""

    def refuse(*_):
        raise ExpectedError("here it counts")

    monkeypatch.setattr(chunks, "counted_chunks", refuse)
    process = run_here(*arguments("bucket", **others), cwd=folder)
    assert ("no inference needed" in process.stdout) == (process.returncode == 0), process.stderr
    assert process.returncode == 0 or "here it counts" in process.stderr, process.stderr
    return process.returncode != 0


@pytest.mark.parametrize("what", CHANGES)
def test_counts_are_used_exactly_as_long_as_what_they_depend_on_stays(counted, monkeypatch, what):
    again, change, others = CHANGES[what]
    assert not needs_inference(monkeypatch, counted)
    change(counted / "bucket")
    assert needs_inference(monkeypatch, counted, **others) == again


@pytest.mark.parametrize("length", [0, 5000, None])
def test_damaged_counts_are_counted_again(counted, monkeypatch, length):
    (path,) = (counted / "tmp/counts").glob("*.npz")
    data = path.read_bytes()
    path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:] if length is None else data[:length])
    assert needs_inference(monkeypatch, counted)


def test_seeds_do_what_they_say(counted):
    def random_after(seed, **seeds):
        command = arguments("bucket", dataset_downsample_factor=0.1, random_module_global_seed=seed, **seeds)
        process = run_here(*command, cwd=counted)
        assert_done(process)
        return random.random()

    zeros = {"numpy_random_global_seed": 0, "tf_random_global_seed": 0}
    assert random_after(2, **zeros) != random_after(0, **zeros)
    assert random_after(0, **zeros) == random.Random(0).random()
    assert np.random.random() == np.random.RandomState(0).random()
    shutil.rmtree(counted / "tmp/counts")
    random_after(0, numpy_random_global_seed=4, tf_random_global_seed=5)
    tf = pytest.importorskip("tensorflow")
    assert tf.compat.v1.get_seed(None)[0] == 5
    metadata = results(counted / "bucket")[-1]["metadata"]
    assert metadata["random-module-global-seed"] == 0
    assert metadata["numpy_random_global_seed"] == metadata["subset_seed"] == 4
    assert metadata["tf_random_global_seed"] == 5
    assert metadata["num_images"] == 2
    config = {"validation_data_shuffle_seed": 0, "test_data_shuffle_seed": 6}
    given = [("validation", None), ("test", None), ("test", 0), ("train", None)]
    assert [configuration.subset_seed(config, *one) for one in given] == [0, 6, 0, 1234]


# ---------------------------------------------------------------------------------------------------------------
# gs://


def test_only_what_is_needed_is_fetched_and_only_once(tiny_bucket, server, tmp_path):
    (tiny_bucket / MODEL / "model_thresholds_20200101T000000Z.yaml").write_text("old: 1")
    write_split(tiny_bucket / "datasets/dataset-tiny/train", *blobs_and_masks(2, 64, 96, 2))
    upload(server, tiny_bucket, "only-what-is-needed", "folder/in/bucket/")
    with ChaosProxy(server) as proxy:

        def fetched_by_a_run(**others):
            del proxy.requests[:]
            command = arguments("gs://only-what-is-needed/folder/in/bucket", dataset_downsample_factor=0.5, **others)
            process = run_tool(*command, cwd=tmp_path, STORAGE_EMULATOR_HOST=proxy.url)
            assert_done(process)
            return sorted(name.removeprefix("folder/in/bucket/") for name in fetched(proxy))

        first = fetched_by_a_run()
        images = [name for name in first if "/images/" in name]
        assert len(images) == 6
        parts = ("images", "masks/class_0", "masks/class_1")
        expected = [name.replace("/images/", f"/{part}/") for name in images for part in parts]
        configs = [f"{MODEL}/config.yaml", "datasets/dataset-tiny/config.yaml"]
        assert first == sorted([*expected, *configs, WEIGHTS])
        assert fetched_by_a_run(optimizing_class_metric="recall") == []
        changed = images[2].replace("/images/", "/masks/class_0/")
        data = get_object(server, "only-what-is-needed", f"folder/in/bucket/{changed}")
        put_object(server, "only-what-is-needed", f"folder/in/bucket/{changed}", data)
        assert fetched_by_a_run() == [changed]


# ---------------------------------------------------------------------------------------------------------------
# Errors: each kind through a whole run once; what makes an input bad is tested in its own room


USAGE = [
    (["--batch-size", "0"], "--batch-size"),
    (["--batch-size", "many"], "--batch-size"),
    (["--dataset-downsample-factor", "0"], "--dataset-downsample-factor"),
    (["--dataset-downsample-factor", "nan"], "--dataset-downsample-factor"),
    (["--optimizing-class-metric", "iou"], "iou_score"),
    (["--optimizing-class-metric", "precision_at_recall_1.5"], "precision_at_recall_0.95"),
    (["--numpy-random-global-seed", "-1"], "--numpy-random-global-seed"),
    (["--dataset-directory", "dataset-tiny"], "--dataset-directory"),
    (["--model-id", "models/m"], "--model-id"),
    (["--bach-size", "3"], "--bach-size"),
]


@pytest.mark.parametrize(("extra", "words"), USAGE)
def test_wrong_arguments_are_usage_errors(extra, words, tmp_path):
    assert_one_error_line(run_here(*arguments("bucket"), *extra, cwd=tmp_path), 2, words)
    assert not list(tmp_path.iterdir())


def test_required_arguments_are_required(tmp_path):
    assert_one_error_line(run_tool(cwd=tmp_path), 2, "--gcp-bucket", "--dataset-directory", "--model-id")


def test_help_says_every_argument_default_metric_and_exit_code(tmp_path):
    text = " ".join(run_tool("--help", cwd=tmp_path, COLUMNS=100).stdout.split())
    codes = [f"{code} {meaning}" for code, meaning in EXIT_CODES.items()]
    defaults = ("default: 16", "default: iou_score", "default: 1.0")
    for words in ("--gcp-bucket", "gs://name", *defaults, *models.METRIC_NAMES, *codes):
        assert words.lower() in text.lower()
    assert set(EXIT_CODES) == {*range(7), 129, 130, 143}


BAD_INPUT = {
    "an unknown model": ({"model": "segmentation-model-tine"}, lambda b: None, 3, f"there are {MODEL_ID}"),
    "an unknown dataset": ({"dataset": "dataset-none/validation"}, lambda b: None, 3, "there are dataset-tiny"),
    "an unknown split": ({"dataset": "dataset-tiny/verification"}, lambda b: None, 3, "there are validation"),
    "no dataset at all": ({}, lambda b: shutil.rmtree(b / "datasets"), 3, "datasets: it holds no folders"),
    "no bucket": ({}, lambda b: shutil.rmtree(b), 4, "bucket"),
    "a mask without its image": ({}, lambda b: (b / SPLIT / "images/slice_0004.png").unlink(), 3, "slice_0004.png"),
    "an image without its mask": ({}, lambda b: (b / MASKS / "slice_0003.png").unlink(), 3, "class_1/slice_0003.png"),
    "no masks": ({}, lambda b: shutil.rmtree(b / SPLIT / "masks"), 3, "masks"),
    "a text file": ({}, lambda b: (b / SPLIT / "images/notes.txt").write_text("?"), 3, "notes.txt"),
    "no YAML": ({}, lambda b: (b / MODEL / "config.yaml").write_text("a: {"), 3, f"{MODEL}/config.yaml"),
    "no such section": ({}, lambda b: (b / MODEL / "config.yaml").write_text("training: 1"), 3, "train_config"),
    "no weights": ({}, lambda b: (b / WEIGHTS).unlink(), 3, WEIGHTS),
    "weights of another network": ({}, lambda b: edit_network(b, backbone_name="resnet34"), 3, WEIGHTS),
    "a cut mask": ({}, lambda b: os.truncate(b / MASKS / "slice_0002.png", 90), 3, "class_1/slice_0002.png"),
    "another target_size": ({}, lambda b: edit_dataset(b, target_size=[64, 96]), 3, "96 x 64"),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_a_run_on_bad_input_ends_with_one_error_line(tiny_bucket, tmp_path, what):
    others, spoil, code, words = BAD_INPUT[what]
    spoil(tiny_bucket)
    assert_one_error_line(run_here(*arguments("bucket", **others), cwd=tmp_path), code, words)
    assert not list(tmp_path.glob("bucket/models/*/model_thresholds_*"))
    assert not list(tmp_path.glob("tmp/counts/*"))


def test_all_bad_files_are_named_in_one_error(tiny_bucket, tmp_path):
    bad = [tiny_bucket / SPLIT / "images" / f"slice_{i:04d}.png" for i in (1, 5, 9)]
    for path in bad:
        os.truncate(path, 90)
    process = run_tool(*arguments("bucket"), cwd=tmp_path, settings={"chunks.CHUNK_PIXELS": 2**14})
    assert_one_error_line(process, 3, "3 ", "tmp/problems_dataset-tiny_validation.txt")
    problems = (tmp_path / "tmp/problems_dataset-tiny_validation.txt").read_text()
    assert [path.name in problems for path in bad] == [True] * 3


def test_a_class_that_does_not_converge_ends_the_run(counted, no_tensorflow):
    before = sorted((counted / "bucket" / MODEL).iterdir())
    settings = {"models.OPT_OPTIONS": {"maxiter": 3}}
    process = run_tool(*arguments("bucket"), cwd=counted, settings=settings, PYTHONPATH=no_tensorflow)
    assert_one_error_line(process, 5, "class0 (class_0)", "maxiter", "OPT_TOL", "models.py")
    assert sorted((counted / "bucket" / MODEL).iterdir()) == before


def test_a_bug_says_that_it_is_one_and_keeps_its_traceback(counted):
    process = run_tool(*arguments("bucket"), cwd=counted, settings={"results.table": None})
    assert process.returncode == 1
    first, *traceback = [line for line in lines_of(process) if not line.startswith("warning: ")]
    assert first.startswith("error: this is a bug in this program")
    assert any("in publish" in line for line in traceback)
    assert traceback[-1] == "TypeError: 'NoneType' object is not callable"


# ---------------------------------------------------------------------------------------------------------------
# The screen, and interruptions


def run_in_terminal(*command, cwd, until=None, number=None, settings=None):
    """Run in a pseudo-terminal, and send a signal once what it shows matches `until`.

    Returns the exit code and all that was written to the terminal.
    """
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = start(*command, cwd=cwd, settings=settings, **streams)
    os.close(terminal)
    screen = ""
    while True:
        try:
            screen += os.read(main, 65536).decode()
        except OSError:  # the other end is closed
            break
        if until and re.search(until, screen):
            process.send_signal(number)
            until = None
    os.close(main)
    return finish(process).returncode, screen


def test_a_terminal_gets_progress_bars_and_no_noise(tiny_bucket, tmp_path):
    code, screen = run_in_terminal(*arguments("bucket"), cwd=tmp_path)
    assert code == 0, screen
    assert "11/11" in screen
    assert "images/s" in screen
    assert len(re.findall(r"\r\x1b\[K +\d+  threshold", screen)) > 6  # each evaluation in place of the one before
    assert "Segmentation Models" not in screen


def test_an_interrupted_run_says_so_and_continues_later(tmp_path, many_images):
    bucket = tmp_path / "bucket"
    shutil.copytree(many_images[0], bucket)
    command = arguments("bucket", batch_size=1)
    stop = {"until": r"[2-9]\d/120", "number": signal.SIGINT}
    code, screen = run_in_terminal(*command, cwd=tmp_path, settings=SMALL_CHUNKS, **stop)
    assert code == 130, screen
    kept = int(re.search(r"error: interrupted; .* the counts of (\d+) of 120 images, are kept", screen)[1])
    assert 0 < kept < 120
    assert "Traceback" not in screen
    assert not list((bucket / MODEL).glob("model_thresholds_*"))
    again = run_tool(*command, cwd=tmp_path, settings=SMALL_CHUNKS)
    assert_done(again)
    assert f"Continuing after {kept} of 120 images" in again.stdout
    assert f"Counting the probabilities of {120 - kept} images" in again.stdout
    (resumed,), (undisturbed,) = results(bucket), results(many_images[0].parent / "bucket")
    assert {name: resumed["metadata"][name] for name in NUMBERS} == {
        name: undisturbed["metadata"][name] for name in NUMBERS
    }
