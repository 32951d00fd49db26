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
import time
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from chaos_proxy import ChaosProxy
from fake_gcs import get_object, list_objects, put_object
from helpers import (
    ENDINGS,
    MODEL,
    MODEL_ID,
    ROOT,
    SCRIPT,
    SPLIT,
    arguments,
    assert_one_error_line,
    blobs_and_masks,
    published,
    results,
    run_here,
    run_tool,
    shortened,
    thresholds,
    upload,
    write_split,
)
from PIL import Image
from workers import Cluster

import configuration
import models
import train_segmentation_model_prediction_thresholds as script
from counts import Counts
from errors import EXIT_CODES, ExpectedError, UsageError
from gcp_utils import open_bucket
from image_utils import draw_subset
from results import publish

MASKS = ("masks/class_0", "masks/class_1")


def git(*command, folder=ROOT):
    return subprocess.check_output(["git", "-C", folder, *command], text=True).strip()


def test_the_result_is_complete(counted_template):
    (result,) = results(counted_template / "bucket")
    metadata, system = result["metadata"], result["metadata_system"]
    assert metadata["message"] == "näive — note"
    assert metadata["gcp_bucket"] == "bucket"
    assert re.fullmatch(r"\d{8}T\d{6}Z", metadata["created_datetime"])
    assert metadata["num_classes"] == 2
    assert metadata["target_size"] == [96, 64]
    edited = git("status", "--porcelain", "--untracked-files=no")
    assert metadata["git_hash"] == git("rev-parse", "HEAD") + "-dirty" * bool(edited)
    assert metadata["elapsed_minutes"] > 0
    assert metadata["dataset_directory"] == "dataset-tiny/validation"
    assert metadata["model_id"] == MODEL_ID
    assert metadata["batch_size"] == 4
    assert metadata["dataset_config"] == {"target_size": [96, 64]}
    config = yaml.safe_load((counted_template / "bucket" / MODEL / "config.yaml").read_text())
    assert metadata["train_config"] == config["train_config"]
    assert metadata["class_folders"] == {"class0": "class_0", "class1": "class_1"}
    assert (metadata["num_images"], metadata["num_pixels"]) == (11, 11 * 64 * 96)
    for name in ("random-module-global-seed", "numpy_random_global_seed", "tf_random_global_seed"):
        assert metadata[name] is None
    assert metadata["thresholds_training_configuration"] == {
        "opt_bounds": models.OPT_BOUNDS,
        "opt_method": models.OPT_METHOD,
        "opt_tol": models.OPT_TOL,
        "opt_options": models.OPT_OPTIONS,
        "opt_class_metric": "iou_score",
        "opt_dataset_generator": "dataset-tiny/validation",
        "opt_dataset_downsample_factor": 1.0,
    }
    assert system["System_info"]["gpu"] is None
    assert system["Lib_versions_info"] == metadata["counted_with"]["libraries"]
    assert system["Lib_versions_info"]["numpy"] == np.__version__

    stem = f"model_thresholds_{metadata['created_datetime']}"
    folder = counted_template / "bucket" / MODEL
    assert {path.name for path in folder.glob("model_thresholds_*")} == {stem + ending for ending in ENDINGS}
    *_, where, what_next = (counted_template / "stdout").read_text().splitlines()
    assert where == f"Result: bucket/{MODEL}/{stem}.yaml"
    assert what_next.endswith(f"--trained-thresholds-id {stem}.yaml")


def rerun(counted, no_tensorflow, **others):
    return run_tool(*arguments("bucket", **others), cwd=counted, PYTHONPATH=no_tensorflow)


@pytest.mark.parametrize("metric", ["f1_score", "matthews_corrcoef", "iou_score_at_recall_0.9"])
def test_a_rerun_with_another_metric_needs_no_tensorflow(counted, no_tensorflow, metric):
    process = rerun(counted, no_tensorflow, optimizing_class_metric=metric, batch_size=3)
    assert process.returncode == 0, process.stderr
    first, result = results(counted / "bucket")
    assert result["metadata"]["thresholds_training_configuration"]["opt_class_metric"] == metric
    for name, output in result["metadata"]["thresholds_training_output"].items():
        assert (output["guaranteed_recall"] is not None) == metric.endswith("_at_recall_0.9")
        if metric == "f1_score":  # IoU and F1 have the same optimum
            assert output["x"] == thresholds(first)[name]
    assert result["metadata"]["batch_size"] == 3
    assert result["metadata"]["counted_with"] == first["metadata"]["counted_with"]
    assert result["metadata"]["counted_with"]["batch_size"] == 4


def test_a_rerun_keeps_what_the_counts_were_made_with(counted, monkeypatch):
    (path,) = (counted / "tmp/counts").glob("*.npz")
    counts = Counts.load(path)
    made_with = {**counts.counted_with, "gpu": "Tesla P100-PCIE-16GB", "batch_size": 7}
    replace(counts, counted_with=made_with).save(path)
    monkeypatch.chdir(counted)
    run_here(monkeypatch, *arguments("bucket", batch_size=3))
    result = results("bucket")[-1]
    assert result["metadata"]["counted_with"] == made_with
    assert result["metadata_system"]["System_info"]["gpu"] == "Tesla P100-PCIE-16GB"


def test_runs_in_the_same_second_give_a_result_each(counted, no_tensorflow):
    before = results(counted / "bucket")
    metrics = ["iou_score", "f1_score", "f2_score", "iou_score"]
    environment = {**os.environ, "PYTHONPATH": str(no_tensorflow)}
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *arguments("bucket", optimizing_class_metric=metric)],
            cwd=counted,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for metric in metrics
    ]
    for process in running:
        assert process.wait(300) == 0, process.stderr.read()
    new = results(counted / "bucket")[len(before) :]
    found = [result["metadata"]["thresholds_training_configuration"]["opt_class_metric"] for result in new]
    assert sorted(found) == sorted(metrics)
    folder = counted / "bucket/models" / MODEL_ID
    stems = {path.name.removesuffix(".yaml") for path in folder.glob("model_thresholds_*.yaml")}
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "model.hdf5"} | {
        stem + ending for stem in stems for ending in ENDINGS
    }
    assert not list((counted / "tmp/results").iterdir())


def test_a_result_is_never_overwritten_and_ends_with_its_yaml(tmp_path, monkeypatch):
    bucket, folder = open_bucket(str(tmp_path), tmp_path / "tmp/objects"), tmp_path / MODEL
    folder.mkdir(parents=True)
    taken = {}
    for second in range(4):
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + second))
        taken[folder / f"model_thresholds_{stamp}{ENDINGS[second]}"] = f"mine {second}"
    for path, content in taken.items():
        path.write_text(content)
    files = {ending: b"new" for ending in ENDINGS[1:]}
    created = []

    def create(name, data, create=bucket.create):
        created.append(name)
        create(name, data)

    monkeypatch.setattr(bucket, "create", create)
    name = publish(bucket, MODEL_ID, {"metadata": {"created_datetime": None}}, files, tmp_path / "tmp/results")
    assert all(path.read_text() == content for path, content in taken.items())
    path = tmp_path / name
    assert path not in taken
    assert created[-1] == name
    assert path.name == f"model_thresholds_{yaml.safe_load(path.read_text())['metadata']['created_datetime']}.yaml"
    for ending in files:
        assert path.with_name(path.name.replace(".yaml", ending)).read_bytes() == b"new"
    assert not list((tmp_path / "tmp/results").iterdir())


def test_damaged_counts_are_noticed(counted, no_tensorflow):
    (path,) = (counted / "tmp/counts").glob("*.npz")
    data = path.read_bytes()
    path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    process = rerun(counted, no_tensorflow)
    assert "TensorFlow was imported" in process.stderr  # it set out to count again


def recolour(path):
    pixels = np.array(Image.open(path))
    pixels[3, 5] ^= 1
    Image.fromarray(pixels).save(path)


def edit_yaml(path, edit):
    content = yaml.safe_load(path.read_text())
    edit(content)
    path.write_text(yaml.safe_dump(content))


def stacks(*names):
    return lambda bucket: edit_yaml(
        bucket / "datasets/dataset-tiny/config.yaml",
        lambda c: c["dataset_config"].update(dataset_split={"validation": list(names)}),
    )


CHANGES = {
    "an image": (True, lambda bucket: recolour(bucket / SPLIT / "images/slice_0003.png")),
    "a mask": (True, lambda bucket: recolour(bucket / SPLIT / "masks/class_1/slice_0003.png")),
    "the weights": (True, lambda bucket: (bucket / MODEL / "model.hdf5").touch()),
    "the network": (
        True,
        lambda bucket: edit_yaml(
            bucket / MODEL / "config.yaml",
            lambda c: c["train_config"]["segmentation_model"]["model_parameters"].update(activation="softmax"),
        ),
    ),
    "a name": (
        True,
        lambda bucket: [path.rename(path.with_name("z.png")) for path in list(bucket.rglob("slice_0000.png"))],
    ),
    "a class folder's name": (
        True,
        lambda bucket: (bucket / SPLIT / "masks/class_0").rename(bucket / SPLIT / "masks/class_2"),
    ),
    "target_size": (
        True,
        lambda bucket: edit_yaml(
            bucket / "datasets/dataset-tiny/config.yaml", lambda c: c["dataset_config"].update(target_size=[64, 96])
        ),
    ),
    "the blocks": (True, stacks(*(f"slice_000{i}" for i in range(5)))),
    "stacks without an image": (False, stacks("elsewhere")),
    "something else in the configuration": (
        False,
        lambda bucket: edit_yaml(bucket / MODEL / "config.yaml", lambda c: c["train_config"].update(epochs=99)),
    ),
    "another file of the model": (False, lambda bucket: (bucket / MODEL / "plots.png").write_bytes(b"?")),
}


def counts_path(factor=1.0):
    return script.find_inputs("bucket", "dataset-tiny/validation", MODEL_ID, factor, None, Cluster()).counts_path()


@pytest.mark.parametrize("what", CHANGES)
def test_counts_are_used_exactly_as_long_as_what_they_depend_on_stays(counted, monkeypatch, what):
    monkeypatch.chdir(counted)
    counts_again, change = CHANGES[what]
    assert counts_path().exists()
    change(counted / "bucket")
    assert counts_path().exists() != counts_again


def test_another_subset_is_counted_again(counted, no_tensorflow):
    process = rerun(counted, no_tensorflow, dataset_downsample_factor=0.5)
    assert "TensorFlow was imported" in process.stderr
    assert "Using 6 of them, drawn with seed 12345." in process.stdout


def test_another_list_of_thresholds_is_counted_again(counted, monkeypatch):
    monkeypatch.chdir(counted)
    assert counts_path().exists()
    monkeypatch.setattr(script, "THRESHOLDS", script.THRESHOLDS[:-1])
    assert not counts_path().exists()


def test_the_subset_is_drawn_with_the_argument_else_the_configured_else_a_fixed_seed():
    names = [f"slice {i}" for i in range(100)]
    drawn = {seed: draw_subset(names, 0.1, seed) for seed in (1, 2, 12345)}
    assert all(len(subset) == 10 == len(set(subset)) for subset in drawn.values())
    assert draw_subset(names, 0.1, 1) == drawn[1] != drawn[2]
    assert draw_subset(names, 1.0, 1) == names
    assert len(draw_subset(names[:30], 0.1, 1)) == 3
    assert len(draw_subset(names[:3], 0.01, 1)) == 1

    config = {"validation_data_shuffle_seed": 5, "test_data_shuffle_seed": 6, "training_data_shuffle_seed": 7}
    seed = configuration.subset_seed
    assert seed(config, "validation", None) == 5
    assert seed(config, "test", None) == 6
    assert seed(config, "train", None) == seed({}, "validation", None) == 1234
    assert seed(config, "test", 9) == 9
    assert seed(config, "test", 0) == 0  # a seed like any other
    assert seed({"test_data_shuffle_seed": 0}, "test", None) == 0


def test_seeds_do_what_they_say(counted, monkeypatch):
    monkeypatch.chdir(counted)

    def random_after(seed, numpy_seed=0, tf_seed=0):
        seeds = {"random_module_global_seed": seed, "numpy_random_global_seed": numpy_seed}
        run_here(
            monkeypatch, *arguments("bucket", dataset_downsample_factor=0.1, **seeds, tf_random_global_seed=tf_seed)
        )
        return random.random()

    assert random_after(2) != random_after(0)
    assert random_after(0) == random.Random(0).random()
    assert np.random.random() == np.random.RandomState(0).random()
    shutil.rmtree("tmp/counts")
    random_after(0, tf_seed=5)  # inference again, for which TensorFlow is seeded
    tf = pytest.importorskip("tensorflow")
    assert tf.compat.v1.get_seed(None)[0] == 5
    shutil.rmtree("tmp/counts")
    random_after(0, 4)
    assert tf.compat.v1.get_seed(None)[0] == 0
    metadata = results("bucket")[-1]["metadata"]
    assert metadata["random-module-global-seed"] == 0
    assert metadata["numpy_random_global_seed"] == metadata["subset_seed"] == 4
    assert metadata["tf_random_global_seed"] == 0
    assert metadata["num_images"] == 2


# ---------------------------------------------------------------------------------------------------------------
# gs://


def test_the_documented_commands_work_as_written(sandbox, server, tmp_path):
    upload(server, sandbox, "sandbox")
    before = set(list_objects(server, "sandbox"))
    for command, part in (
        (
            "--gcp-bucket gs://sandbox --dataset-directory dataset-composite_0123/validation "
            "--model-id segmentation-model-composite_0123_20200321T154533Z --batch-size 16 "
            "--optimizing-class-metric iou_score --dataset-downsample-factor 0.1",
            0.1,
        ),
        (
            "--gcp-bucket gs://sandbox --dataset-directory dataset-composite_0123/test "
            "--model-id segmentation-model-composite_0123_20200321T154533Z --batch-size 16 "
            "--optimizing-class-metric f1_score --dataset-downsample-factor 0.5",
            0.5,
        ),
    ):
        process = run_tool(*command.split(), cwd=tmp_path, STORAGE_EMULATOR_HOST=server)
        assert process.returncode == 0, process.stderr
        assert all(line.startswith("warning: ") for line in process.stderr.splitlines())
        split = command.split()[3]
        url = published(process)
        assert url.startswith("gs://sandbox/models/segmentation-model-composite_0123_20200321T154533Z/model_thr")
        result = yaml.safe_load(get_object(server, "sandbox", url.removeprefix("gs://sandbox/")))
        total = len(list((sandbox / "datasets" / split / "images").iterdir()))
        assert result["metadata"]["num_images"] == int(np.ceil(part * total))
        assert set(thresholds(result)) == {"class0", "class1", "class2"}
    new = sorted(set(list_objects(server, "sandbox")) - before)
    assert sorted(re.sub(r".*_\d{8}T\d{6}Z", "", name) for name in new) == sorted(2 * ENDINGS)
    assert before < set(list_objects(server, "sandbox"))


def test_only_what_is_needed_is_fetched_and_only_once(tiny_bucket, server, tmp_path):
    (tiny_bucket / MODEL / "model_thresholds_20200101T000000Z.yaml").write_text("old: 1")
    (tiny_bucket / MODEL / "plots").mkdir()
    (tiny_bucket / MODEL / "plots/loss.png").write_bytes(b"?")
    write_split(tiny_bucket / "datasets/dataset-tiny/train", *blobs_and_masks(2, 64, 96, 2))
    upload(server, tiny_bucket, "only-what-is-needed", "folder/in/bucket/")
    with ChaosProxy(server) as proxy:

        def fetched(**others):
            del proxy.requests[:]
            process = run_tool(
                *arguments("gs://only-what-is-needed/folder/in/bucket", **others),
                cwd=tmp_path,
                STORAGE_EMULATOR_HOST=proxy.url,
            )
            assert process.returncode == 0, process.stderr
            names = [re.search(r"/o/([^?]*)\?.*alt=media", request.path) for request in proxy.requests]
            return sorted(unquote(name[1]).removeprefix("folder/in/bucket/") for name in names if name)

        first = fetched(dataset_downsample_factor=0.5)
        images = [name for name in first if "/images/" in name]
        assert len(images) == 6
        expected = [name.replace("/images/", f"/{part}/") for name in images for part in ("images", *MASKS)]
        configs = [f"{MODEL}/config.yaml", "datasets/dataset-tiny/config.yaml"]
        assert first == sorted([*expected, *configs, f"{MODEL}/model.hdf5"])
        assert fetched(dataset_downsample_factor=0.5, optimizing_class_metric="recall") == []
        changed = images[2].replace("/images/", "/masks/class_0/")
        data = get_object(server, "only-what-is-needed", f"folder/in/bucket/{changed}")
        put_object(server, "only-what-is-needed", f"folder/in/bucket/{changed}", data)
        assert fetched(dataset_downsample_factor=0.5) == [changed]


def test_a_failed_upload_keeps_the_result_and_the_next_run_needs_no_inference(
    tiny_bucket, no_tensorflow, server, tmp_path
):
    upload(server, tiny_bucket, "failed-upload")
    before = list_objects(server, "failed-upload")
    with ChaosProxy(server, permissions=("get", "list")) as proxy:
        command = arguments("gs://failed-upload")
        process = run_tool(*command, cwd=tmp_path, STORAGE_EMULATOR_HOST=proxy.url)
        assert_one_error_line(process, 4, "storage.objects.create", "roles/storage.objectCreator", "gcloud storage cp")
        assert list_objects(server, "failed-upload") == before
        kept = tmp_path / re.search(r"kept in (\S+),", process.stderr)[1]
        (kept_yaml,) = kept.glob("*.yaml")
        assert {path.name.removeprefix(kept_yaml.stem) for path in kept.iterdir()} == set(ENDINGS)
        proxy.permissions = ("get", "list", "create")
        process = run_tool(*command, cwd=tmp_path, STORAGE_EMULATOR_HOST=proxy.url, PYTHONPATH=no_tensorflow)
        assert process.returncode == 0, process.stderr
        name = published(process).removeprefix("gs://failed-upload/")
        result = yaml.safe_load(get_object(server, "failed-upload", name))
        assert thresholds(result) == thresholds(yaml.safe_load(kept_yaml.read_text()))
        assert not any(request.operation == "other" for request in proxy.requests)


# ---------------------------------------------------------------------------------------------------------------
# Errors: each kind through a whole run once; what makes an input bad is tested in its own room


USAGE = [
    (["--batch-size", "0"], "--batch-size"),
    (["--batch-size", "65537"], "--batch-size"),
    (["--batch-size", "many"], "--batch-size"),
    (["--dataset-downsample-factor", "0"], "--dataset-downsample-factor"),
    (["--dataset-downsample-factor", "1.01"], "--dataset-downsample-factor"),
    (["--dataset-downsample-factor", "nan"], "--dataset-downsample-factor"),
    (["--optimizing-class-metric", "iou"], "iou_score"),
    (["--optimizing-class-metric", "precision_at_recall_1.5"], "precision_at_recall_0.95"),
    (["--optimizing-class-metric", "binary_cross_entropy"], "does not depend on a threshold"),
    (["--numpy-random-global-seed", "-1"], "--numpy-random-global-seed"),
    (["--numpy-random-global-seed", str(2**32)], "--numpy-random-global-seed"),
    (["--dataset-directory", "dataset-tiny"], "--dataset-directory"),
    (["--model-id", "models/m"], "--model-id"),
    (["--bach-size", "3"], "there is no argument --bach-size (perhaps --batch-size is meant); see --help"),
    (["--epochs=3"], "there is no argument --epochs; see --help"),
]


@pytest.mark.parametrize(("extra", "words"), USAGE)
def test_wrong_arguments_are_usage_errors(extra, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", *arguments("bucket"), *extra])
    with pytest.raises(UsageError, match=re.escape(words)):
        script.parse_arguments()


@pytest.mark.parametrize("missing", ["--gcp-bucket", "--dataset-directory", "--model-id"])
def test_required_arguments_are_required(missing, monkeypatch):
    given = arguments("bucket")
    del given[given.index(missing) : given.index(missing) + 2]
    monkeypatch.setattr(sys, "argv", ["x", *given])
    with pytest.raises(UsageError, match=missing):
        script.parse_arguments()


def test_a_mistyped_required_argument_is_named(monkeypatch):
    given = [word.replace("--model-id", "--model_id") for word in arguments("bucket")]
    monkeypatch.setattr(sys, "argv", ["x", *given])
    with pytest.raises(UsageError, match=r"there is no argument --model_id \(perhaps --model-id is meant\)"):
        script.parse_arguments()


def test_a_usage_error_is_one_line(tmp_path):
    assert_one_error_line(run_tool(*arguments("bucket", batch_size=0), cwd=tmp_path), 2, "--batch-size")
    assert not list(tmp_path.iterdir())


def test_help_says_every_argument_default_metric_and_exit_code(tmp_path):
    text = " ".join(run_tool("--help", cwd=tmp_path, COLUMNS=100).stdout.split())
    for words in (
        "--gcp-bucket",
        "gs://name",
        "default: 16",
        "default: iou_score",
        "default: 1.0",
        *models.METRIC_NAMES,
        *(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()),
    ):
        assert words.lower() in text.lower()
    assert set(EXIT_CODES) == {*range(7), 129, 130, 143}


BAD_INPUT = {
    "an unknown dataset": ({"dataset": "dataset-none/validation"}, None, "datasets/dataset-none/config.yaml"),
    "an unknown split": ({"dataset": "dataset-tiny/verification"}, None, "dataset-tiny/verification"),
    "a mask without its image": (
        {},
        lambda b: (b / SPLIT / "images/slice_0004.png").unlink(),
        "images/slice_0004.png",
    ),
    "no masks": ({}, lambda b: shutil.rmtree(b / SPLIT / "masks"), "has no masks"),
    "a folder in place of an image": (
        {},
        lambda b: (b / SPLIT / "images/x").mkdir() or ((b / SPLIT / "images/x/y.png").write_bytes(b"?")),
        "out of place",
    ),
    "a text file": ({}, lambda b: (b / SPLIT / "images/notes.txt").write_text("?"), "notes.txt"),
    "a configuration without its section": (
        {},
        lambda b: (b / MODEL / "config.yaml").write_text("training: 1"),
        "train_config",
    ),
    "no weights": ({}, lambda b: (b / MODEL / "model.hdf5").unlink(), "model.hdf5"),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_is_found_before_anything_is_fetched(tiny_bucket, monkeypatch, tmp_path, what):
    others, spoil, words = BAD_INPUT[what]
    if spoil:
        spoil(tiny_bucket)
    monkeypatch.chdir(tmp_path)
    given = {"dataset": "dataset-tiny/validation", "model": MODEL_ID} | others
    with pytest.raises(ExpectedError, match=re.escape(words)) as caught:
        script.find_inputs("bucket", given["dataset"], given["model"], 1.0, None, Cluster())
    assert caught.value.exit_code == 3


RUNS_THAT_FAIL = {  # early: before TensorFlow is imported
    "an unknown model": (True, {"model": "m"}, None, "models/m/config.yaml"),
    "a configuration that is no YAML": (
        True,
        {},
        lambda b: (b / "datasets/dataset-tiny/config.yaml").write_text("dataset_config: {"),
        "not valid YAML",
    ),
    "an image without its mask": (
        True,
        {},
        lambda b: (b / SPLIT / "masks/class_1/slice_0003.png").unlink(),
        "masks/class_1/slice_0003.png",
    ),
    "weights of another network": (
        False,
        {},
        lambda b: edit_yaml(
            b / MODEL / "config.yaml",
            lambda c: c["train_config"]["segmentation_model"]["model_parameters"].update(backbone_name="resnet34"),
        ),
        f"{MODEL}/model.hdf5",
    ),
    "a truncated image": (
        False,
        {},
        lambda b: os.truncate(b / SPLIT / "masks/class_0/slice_0002.png", 90),
        "masks/class_0/slice_0002.png cannot be decoded",
    ),
}


@pytest.mark.parametrize("what", RUNS_THAT_FAIL)
def test_a_run_on_bad_input_ends_with_one_error_line(tiny_bucket, no_tensorflow, tmp_path, what):
    early, others, spoil, words = RUNS_THAT_FAIL[what]
    if spoil:
        spoil(tiny_bucket)
    process = run_tool(*arguments("bucket", **others), cwd=tmp_path, **({"PYTHONPATH": no_tensorflow} if early else {}))
    assert_one_error_line(process, 3, words)
    assert not list((tiny_bucket / MODEL).glob("model_thresholds_*"))


def test_an_unknown_bucket_is_a_bucket_error(server, tmp_path):
    assert_one_error_line(run_tool(*arguments("nowhere"), cwd=tmp_path), 4, "nowhere")
    process = run_tool(*arguments("gs://nowhere"), cwd=tmp_path, STORAGE_EMULATOR_HOST=server)
    assert_one_error_line(process, 4, "gs://nowhere")


def test_a_class_that_does_not_converge_ends_the_run(counted, no_tensorflow, copied_script):
    science = copied_script.with_name("models.py")
    science.write_text(re.sub(r"(?m)^OPT_OPTIONS = .*", 'OPT_OPTIONS = {"maxiter": 3}', science.read_text()))
    before = sorted((counted / "bucket" / MODEL).iterdir())
    process = run_tool(*arguments("bucket"), cwd=counted, script=copied_script, PYTHONPATH=no_tensorflow)
    assert_one_error_line(process, 5, "class0 (class_0)", "maxiter", "OPT_TOL", "models.py")
    assert sorted((counted / "bucket" / MODEL).iterdir()) == before


def test_a_bug_says_that_it_is_one_and_keeps_its_report(counted, no_tensorflow, copied_script):
    room = copied_script.with_name("results.py")
    room.write_text(room.read_text().replace("def table(results, metric_name):", "def table():"))
    process = run_tool(*arguments("bucket"), cwd=counted, script=copied_script, PYTHONPATH=no_tensorflow)
    assert process.returncode == 1
    (report,) = (counted / "tmp").glob("bug_*.txt")
    first, *traceback = process.stderr.splitlines()
    assert first.startswith("error: ") and f"tmp/{report.name}" in first
    assert traceback[-1].startswith("TypeError: table()") and traceback[-1] in report.read_text()


def test_the_git_hash_is_of_the_checkout_or_from_a_file_or_none(copied_script):
    folder = copied_script.parent

    def git_hash():
        program = "import results; print(results.git_hash())"
        return subprocess.check_output([sys.executable, "-c", program], cwd=folder, text=True).strip()

    assert git_hash() == "None"
    (folder / ".git_hash").write_text("0123abc-dirty\n")
    assert git_hash() == "0123abc-dirty"
    git("init", "--quiet", folder=folder)
    git("add", "*.py", folder=folder)
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "all", folder=folder)
    head = git("rev-parse", "HEAD", folder=folder)
    (folder / "untracked").touch()
    assert git_hash() == head
    (folder / "counts.py").write_text((folder / "counts.py").read_text() + "# edited")
    assert git_hash() == f"{head}-dirty"


# ---------------------------------------------------------------------------------------------------------------
# The screen, and interruptions


def run_in_terminal(*command, cwd, script=SCRIPT, until=None, number=None):
    """Run in a pseudo-terminal, and send a signal once what it shows matches `until`.

    Returns the exit code and all that was written to the terminal.
    """
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, script, *command], cwd=cwd, stdin=terminal, stdout=terminal, stderr=terminal
    )
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
    return process.wait(60), screen


def test_a_terminal_gets_progress_bars_and_no_noise(tiny_bucket, tmp_path):
    code, screen = run_in_terminal(*arguments("bucket"), cwd=tmp_path)
    assert code == 0, screen
    assert "11/11" in screen
    assert "images/s" in screen
    for noise in ("oneDNN", "cuda", "WARNING", "absl", "Segmentation Models"):
        assert noise not in screen


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_an_interrupted_run_says_so_and_continues_later(tmp_path, many_images, copied_script, number, code):
    """A checkpoint of 30 s is not waited for: `number` comes once some batches are counted."""
    bucket = tmp_path / "bucket"
    shutil.copytree(many_images[0], bucket)
    shortened(copied_script, CHECKPOINT_SECONDS=0.01)
    exit_code, screen = run_in_terminal(
        *arguments("bucket", batch_size=1), cwd=tmp_path, script=copied_script, until=r"[2-9]\d/120", number=number
    )
    assert exit_code == code
    assert "error: interrupted" in screen.splitlines()[-1]
    assert "Traceback" not in screen
    assert not list((bucket / MODEL).glob("model_thresholds_*"))
    again = run_tool(*arguments("bucket", batch_size=1), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    done = int(re.search(r"Continuing after (\d+) of 120 images", again.stdout)[1])
    assert 0 < done < 120
    assert f"Counting the probabilities of {120 - done} images" in again.stdout
    (resumed,) = results(bucket)
    (undisturbed,) = results(many_images[0].parent / "bucket")
    for key in ("thresholds_training_output", "thresholds_training_history", "num_pixels"):
        assert resumed["metadata"][key] == undisturbed["metadata"][key]
