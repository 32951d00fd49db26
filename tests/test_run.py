"""The tool as its users meet it: a process, a bucket, a result."""

import fcntl
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_gcs import put_object
from helpers import (
    ENDINGS,
    MODEL,
    MODEL_ID,
    ROOT,
    SCRIPT,
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
    start_program,
    thresholds,
    upload,
    write_split,
)

import chunks
import models
from errors import EXIT_CODES, ExpectedError


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


def test_a_rerun_with_another_metric_needs_no_tensorflow(counted, no_tensorflow):
    command = arguments("bucket", optimizing_class_metric="f1_score", batch_size=3)
    process = run_tool(*command, cwd=counted, PYTHONPATH=no_tensorflow)
    assert_done(process)
    first, result = results(counted / "bucket")
    assert result["metadata"]["thresholds_training_configuration"]["opt_class_metric"] == "f1_score"
    assert thresholds(result) == thresholds(first)  # IoU and F1 have the same optimum
    assert result["metadata"]["batch_size"] == 3
    assert result["metadata"]["counted_with"] == first["metadata"]["counted_with"]


def change_a_byte(path):
    """The file keeps its size and its time."""
    before, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def other_model(bucket):
    """Another model whose file is as large and as old."""
    change_a_byte(Path(shutil.copytree(bucket / MODEL, bucket / "models/another-model"), "model.hdf5"))


def restored(bucket):
    """All files are copies, as after a restore: new times, the same content."""
    bucket.rename(bucket.with_name("old"))
    shutil.copytree(bucket.with_name("old"), bucket, copy_function=shutil.copyfile)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def name_stacks(bucket, *stacks):
    edit(
        bucket / DATASET, "dataset_config:", f"dataset_config:\n  dataset_split: {{validation: [{', '.join(stacks)}]}}"
    )


MASKS = f"{SPLIT}/masks/class_1"
WEIGHTS, CONFIG, DATASET = f"{MODEL}/model.hdf5", f"{MODEL}/config.yaml", "datasets/dataset-tiny/config.yaml"
CHANGES = {  # whether it is to be counted again, what changes, and what changes in the command
    "an image, its time restored": (True, lambda b: change_a_byte(b / SPLIT / "images/slice_0003.png"), {}),
    "a mask, its time restored": (True, lambda b: change_a_byte(b / MASKS / "slice_0003.png"), {}),
    "the weights, their time restored": (True, lambda b: change_a_byte(b / WEIGHTS), {}),
    "the model": (True, other_model, {"model": "another-model"}),
    "the network": (True, lambda b: edit(b / CONFIG, "sigmoid", "softmax"), {}),
    "a name": (True, lambda b: [p.rename(p.with_name("z.png")) for p in list(b.rglob("slice_0000.png"))], {}),
    "a class folder": (True, lambda b: (b / SPLIT / "masks/class_0").rename(b / SPLIT / "masks/class_2"), {}),
    "the stacks": (True, lambda b: name_stacks(b, *(f"slice_000{i}" for i in range(5))), {}),
    "a subset": (True, lambda b: None, {"dataset_downsample_factor": 0.5}),
    "damaged counts": (True, lambda b: os.truncate(next(b.parent.glob("tmp/counts/*")), 5000), {}),
    "only the times and places on the disk": (False, restored, {}),
    "a stack without an image": (False, lambda b: name_stacks(b, "none"), {}),
    "how it was trained": (False, lambda b: edit(b / CONFIG, "loss:", "epochs: 99\n  loss:"), {}),
    "another metric": (False, lambda b: None, {"optimizing_class_metric": "recall_at_precision_0.01"}),
    "a slash behind a name": (False, lambda b: None, {"model": f"{MODEL_ID}/"}),
    "a file beside the model": (False, lambda b: (b / MODEL / "plots.png").write_bytes(b"?"), {}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_counts_are_used_exactly_as_long_as_what_they_depend_on_stays(counted, monkeypatch, what):
    def refuse(*_):
        raise ExpectedError("here it counts")

    monkeypatch.setattr(chunks, "count_job", refuse)
    again, change, others = CHANGES[what]
    change(counted / "bucket")
    process = run_here(*arguments("bucket", **others), cwd=counted)
    if again:
        assert_one_error_line(process, ExpectedError.exit_code, "here it counts")
    else:
        assert_done(process)
        assert "no inference needed" in process.stdout and "guarantee" not in process.stdout + process.stderr


def test_seeds_do_what_they_say(counted):
    seeds = {"random_module_global_seed": 0, "numpy_random_global_seed": 4, "tf_random_global_seed": 5}
    command = arguments("bucket", dataset_downsample_factor=0.1, **seeds)
    name_stacks(counted / "bucket", *(f"slice_{i:04d}" for i in range(11)))
    assert_done(process := run_here(*command, cwd=counted))
    assert "without an image" not in process.stderr  # those of the whole split
    import tensorflow as tf  # not before the tool did

    assert tf.compat.v1.get_seed(None)[0] == 5
    # Without the network, which draws numbers of its own, and in a process where nothing else does.
    then = "import random; print(script.main(), random.random(), script.np.random.random())"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {SCRIPT.stem} as script; {then}"
    process = finish(start_program(sys.executable, "-c", code, *command, cwd=counted))
    drawn = random.Random(0).random(), np.random.RandomState(4).random()
    assert process.stdout.splitlines()[-1] == f"0 {drawn[0]} {drawn[1]}", process.stderr
    metadata = results(counted / "bucket")[-1]["metadata"]
    assert metadata["random-module-global-seed"] == 0
    assert metadata["numpy_random_global_seed"] == metadata["subset_seed"] == 4
    assert metadata["tf_random_global_seed"] == 5
    assert metadata["num_images"] == 2


# ---------------------------------------------------------------------------------------------------------------
# gs://


def test_only_what_is_needed_is_fetched_and_only_once(tiny_bucket, proxy, tmp_path, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    (tiny_bucket / MODEL / "model_thresholds_20200101T000000Z.yaml").write_text("old: 1")
    write_split(tiny_bucket / "datasets/dataset-tiny/train", *blobs_and_masks(2, 64, 96, 2))
    upload(proxy.server, tiny_bucket, "only-what-is-needed", "folder/in/bucket/")

    def fetched_by_a_run(**others):
        proxy.requests.clear()
        command = arguments("gs://only-what-is-needed/folder/in/bucket", dataset_downsample_factor=0.5, **others)
        assert_done(run_here(*command, cwd=tmp_path))
        return sorted(name.removeprefix("folder/in/bucket/") for name in fetched(proxy))

    first = fetched_by_a_run()
    images = [name for name in first if "/images/" in name]
    assert len(images) == 6
    parts = ("images", "masks/class_0", "masks/class_1")
    expected = [name.replace("/images/", f"/{part}/") for name in images for part in parts]
    assert first == sorted([*expected, CONFIG, DATASET, WEIGHTS])
    assert fetched_by_a_run(optimizing_class_metric="recall") == []
    changed = images[2].replace("/images/", "/masks/class_0/")
    data = (tiny_bucket / changed).read_bytes()
    put_object(proxy.server, "only-what-is-needed", f"folder/in/bucket/{changed}", data)
    assert fetched_by_a_run() == [changed]


def test_a_disk_without_room_for_the_files_is_an_error_before_any_is_fetched(tiny_bucket, proxy, tmp_path):
    upload(proxy.server, tiny_bucket, "no-room")
    settings = {"google_bucket.ROOM_TO_SPARE": 10**18}
    process = run_tool(*arguments("gs://no-room"), cwd=tmp_path, settings=settings, STORAGE_EMULATOR_HOST=proxy.url)
    assert_one_error_line(process, 4, "for which the disk lacks 999,999,")
    assert not [name for name in fetched(proxy) if name.startswith(SPLIT)]


# ---------------------------------------------------------------------------------------------------------------
# Errors: each kind through a whole run once; what makes an input bad is tested in its own room


def test_wrong_arguments_are_usage_errors(tmp_path):
    for flag, value, words in (
        ("--batch-size", 0, "must be at least 1 and at most 65536, not 0"),
        ("--batch-size", "many", "invalid int value: 'many'; see --help"),
        ("--bach-size", 3, "unrecognized arguments"),
        ("--dataset-directory", "dataset-tiny", "must be <dataset ID>/<split>, not 'dataset-tiny'"),
        ("--dataset-downsample-factor", "nan", "must be above 0 and at most 1, not nan"),
        ("--gcp-bucket", "\udcff", "must be text in UTF-8"),  # what Python makes of bytes that are not UTF-8
        ("--message", "\udcff", "must be text in UTF-8"),
        ("--model-id", "a/b", "must be the name of a folder, not 'a/b'"),
        ("--numpy-random-global-seed", -1, "must be at least 0"),
        ("--optimizing-class-metric", "iou", "did you mean iou_score?"),
    ):
        assert_one_error_line(run_here(*arguments("bucket"), flag, value, cwd=tmp_path), 2, flag, words)
    assert_one_error_line(run_here(cwd=tmp_path), 2, "--gcp-bucket", "--dataset-directory", "--model-id")
    assert not list(tmp_path.iterdir())


def test_help_says_every_argument_default_metric_and_exit_code(tmp_path):
    text = " ".join(run_tool("--help", cwd=tmp_path, COLUMNS=100).stdout.split())
    codes = [f"{code} {meaning}" for code, meaning in EXIT_CODES.items()]
    defaults = ("default: 16", "default: iou_score", "default: 1.0")
    for words in ("--gcp-bucket", "gs://name", *defaults, *models.METRIC_NAMES, *codes):
        assert words.lower() in text.lower()
    assert set(EXIT_CODES) == {*range(7), 129, 130, 143}


BAD_INPUT = {
    "an unknown model": ({"model": "segmentation-model-tine"}, lambda b: None, 3, f"it has {MODEL_ID}"),
    "an unknown dataset": ({"dataset": "dataset-none/validation"}, lambda b: None, 3, "it has dataset-tiny"),
    "an unknown split": ({"dataset": "dataset-tiny/verification"}, lambda b: None, 3, "it has validation"),
    "no bucket": ({}, lambda b: shutil.rmtree(b), 4, "bucket"),
    "a mask without its image": ({}, lambda b: (b / SPLIT / "images/slice_0004.png").unlink(), 3, "slice_0004.png"),
    "no YAML": ({}, lambda b: (b / CONFIG).write_text("a: {"), 3, CONFIG),
    "no weights": ({}, lambda b: (b / WEIGHTS).unlink(), 3, WEIGHTS),
    "weights of another network": ({}, lambda b: edit(b / CONFIG, "resnet18", "resnet34"), 3, WEIGHTS),
    "another target_size": ({}, lambda b: edit(b / DATASET, "- 96\n  - 64", "- 64\n  - 96"), 3, "96 x 64"),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_a_run_on_bad_input_ends_with_one_error_line(tiny_bucket, tmp_path, what):
    others, spoil, code, words = BAD_INPUT[what]
    spoil(tiny_bucket)
    assert_one_error_line(run_here(*arguments("bucket", **others), cwd=tmp_path), code, words)
    assert not list(tmp_path.glob("bucket/models/*/model_thresholds_*"))
    assert not list(tmp_path.glob("tmp/counts/*"))


def test_all_bad_files_are_named_in_one_error(tiny_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_PIXELS", 2**14)
    monkeypatch.setattr(f"{SCRIPT.stem}.CHECKPOINT_SECONDS", 0)
    bad = {path: path.read_bytes() for path in (tiny_bucket / SPLIT / "images").glob("*[159].png")}
    for path in bad:
        os.truncate(path, 90)
    process = run_here(*arguments("bucket"), cwd=tmp_path)
    assert_one_error_line(process, 3, "3 ", "tmp/problems_dataset-tiny_validation.txt")
    problems = (tmp_path / "tmp/problems_dataset-tiny_validation.txt").read_text()
    assert [path.name in problems for path in bad] == [True] * 3
    for path, content in bad.items():
        path.write_bytes(content)
    assert_done(run_here(*arguments("bucket"), cwd=tmp_path))
    assert results(tiny_bucket)[0]["metadata"]["num_images"] == 11  # nothing was kept of a run that failed


def test_a_class_that_does_not_converge_ends_the_run(counted, monkeypatch):
    monkeypatch.setattr(models, "OPT_OPTIONS", {"maxiter": 3})
    process = run_here(*arguments("bucket"), cwd=counted)
    assert_one_error_line(process, 5, "class0 (class_0)", "maxiter", "OPT_TOL", "models.py")
    assert len(results(counted / "bucket")) == 1


def test_a_bug_says_that_it_is_one_and_keeps_its_traceback(counted):
    process = run_tool(*arguments("bucket"), cwd=counted, settings={"results.table": None})
    assert process.returncode == 1
    first, *traceback = [line for line in lines_of(process) if not line.startswith("warning: ")]
    assert first.startswith("error: this is a bug in this program")
    assert any("in publish" in line for line in traceback)
    assert traceback[-1] == "TypeError: 'NoneType' object is not callable"


# ---------------------------------------------------------------------------------------------------------------
# The screen, and an interruption


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


def test_a_terminal_shows_progress_and_an_interrupted_run_continues_later(tmp_path, many_images):
    bucket = Path(shutil.copytree(many_images[0], tmp_path / "bucket"))
    command = arguments("bucket", batch_size=1)
    stop = {"until": r"[2-9]\d/120", "number": signal.SIGINT}
    code, screen = run_in_terminal(*command, cwd=tmp_path, settings=SMALL_CHUNKS, **stop)
    assert code == 130, screen
    assert "images/s" in screen
    kept = int(re.search(r"error: interrupted; .* the counts of (\d+) of 120 images are kept", screen)[1])
    assert 0 < kept < 120
    assert "Traceback" not in screen
    assert not results(bucket)
    (bucket / SPLIT / "images/slice_0119.png").touch()  # it is not counted yet
    code, screen = run_in_terminal(*command, cwd=tmp_path, settings=SMALL_CHUNKS)
    assert code == 0, screen
    assert f"Continuing after {kept} of 120 images" in screen
    assert f"Counting the probabilities of {120 - kept} images" in screen
    assert "120/120" in screen
    assert len(re.findall(r"\r\x1b\[K +\d+  threshold", screen)) > 6  # each evaluation in place of the one before
    assert "Segmentation Models" not in screen
    (result,) = results(bucket)
    assert thresholds(result) == many_images[1]
