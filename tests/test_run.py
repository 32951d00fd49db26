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
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from chaos_proxy import ChaosProxy
from helpers import (
    MODEL,
    MODEL_ID,
    ROOT,
    SCRIPT,
    SPLIT,
    arguments,
    assert_one_error_line,
    blobs_and_masks,
    results,
    run_tool,
    thresholds,
    upload,
    write_split,
)
from fake_gcs import fake_gcs_server, get_object, list_objects, put_object
from PIL import Image

import models
import train_segmentation_model_prediction_thresholds as script
from counts import GRID
from image_utils import draw_subset

MASKS = ("masks/class_0", "masks/class_1")


def test_the_result_is_complete_and_true(counted_template, tiny_network):
    folder, process = counted_template
    (result,) = results(folder / "bucket")
    metadata, system = result["metadata"], result["metadata_system"]
    assert metadata["message"] == "näive — note"
    assert metadata["gcp_bucket"] == "bucket"
    assert re.fullmatch(r"\d{8}T\d{6}Z", metadata["created_datetime"])
    assert (folder / f"bucket/models/{MODEL_ID}/model_thresholds_{metadata['created_datetime']}.yaml").exists()
    assert metadata["num_classes"] == 2
    assert metadata["target_size"] == [96, 64]
    head = subprocess.check_output(["git", "-C", ROOT, "rev-parse", "HEAD"], text=True).strip()
    assert metadata["git_hash"] == head
    assert 0 < metadata["elapsed_minutes"] < 3
    assert metadata["dataset_directory"] == "dataset-tiny/validation"
    assert metadata["model_id"] == MODEL_ID
    assert metadata["batch_size"] == 4
    assert metadata["dataset_config"] == {"target_size": [96, 64]}
    assert metadata["train_config"]["validation_data_shuffle_seed"] == 12345
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
    assert system["Lib_versions_info"]["tensorflow"] == "2.21.0"

    # The thresholds against brute force over every threshold, with Keras' own probabilities.
    split = folder / "bucket/datasets/dataset-tiny/validation"
    names = sorted(path.name for path in (split / "images").iterdir())
    images = np.stack([np.asarray(Image.open(split / "images" / name)) for name in names])
    x = (images * (1 / 255)).astype(np.float32)[..., None]
    padded = np.concatenate([x, x[-1:]])  # steps of four, as in the run
    p = np.concatenate([tiny_network.predict_on_batch(padded[i : i + 4]) for i in (0, 4, 8)])[:11]
    for c in range(2):
        truth = np.stack([np.asarray(Image.open(split / f"masks/class_{c}" / name)) for name in names]) == 1

        bins = np.ceil(p[..., c] * GRID).astype(int)
        above = [np.bincount(bins[truth == t], minlength=GRID + 1)[::-1].cumsum()[::-1] for t in (0, 1)]
        fp, tp = (np.append(count[1:], 0) for count in above)
        iou = tp / (truth.sum() + fp)
        output = metadata["thresholds_training_output"][f"class{c}"]
        k = round(output["x"] * GRID)
        assert output["x"] == k / GRID == thresholds(result)[f"class{c}"]
        assert iou[k] == iou.max() == output["metric"]
        assert output["fun"] == 1 - output["metric"]
        assert output["metric_at_half"] == iou[GRID // 2]
        assert output["success"] is True
        assert output["status"] == 0
        history = metadata["thresholds_training_history"][f"class{c}"]
        assert len(history) == output["nfev"]
        for n in range(output["nfev"]):
            threshold, metric = history[f"{n}_threshold_metric"]
            assert metric == iou[round(threshold * GRID)]
        plain = output["plain_minimize_scalar"]
        assert plain["metric"] == iou[round(plain["x"] * GRID)] <= output["metric"]
        for words in (f"class{c}", f"{output['x']:.5f}", f"{output['metric']:.4f}", f"{iou[GRID // 2]:.4f}"):
            assert words in process.stdout
    for suffix in (".png", "_slices.png"):
        (figure,) = (folder / "bucket/models" / MODEL_ID).glob(f"model_thresholds_*Z{suffix}")
        Image.open(figure).verify()
    assert "model_thresholds_" in process.stdout.splitlines()[-1]


def rerun(counted, no_tensorflow, **others):
    return run_tool(*arguments("bucket", **others), cwd=counted, PYTHONPATH=no_tensorflow)


def test_a_rerun_needs_no_tensorflow_and_every_metric_works(counted, no_tensorflow):
    for metric in models.CLASS_METRICS:
        process = rerun(counted, no_tensorflow, optimizing_class_metric=metric, batch_size=3)
        assert process.returncode == 0, process.stderr
        result = results(counted / "bucket")[-1]
        assert result["metadata"]["thresholds_training_configuration"]["opt_class_metric"] == metric
        if metric == "f1_score":  # IoU and F1 have the same optimum
            assert thresholds(result) == thresholds(results(counted / "bucket")[0])


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
        assert process.wait(60) == 0, process.stderr.read()
    new = results(counted / "bucket")[len(before) :]
    found = [result["metadata"]["thresholds_training_configuration"]["opt_class_metric"] for result in new]
    assert sorted(found) == sorted(metrics)
    folder = counted / "bucket/models" / MODEL_ID
    stems = {path.name.removesuffix(".yaml") for path in folder.glob("model_thresholds_*.yaml")}
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "model.hdf5"} | {
        stem + suffix for stem in stems for suffix in (".yaml", ".png", "_slices.png")
    }
    assert not list((counted / "tmp/results").iterdir())


def test_a_result_is_never_overwritten(counted, no_tensorflow):
    folder = counted / "bucket/models" / MODEL_ID
    taken = []
    for second in range(20):
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + second))
        taken.append(folder / f"model_thresholds_{stamp}{['.yaml', '.png', '_slices.png'][second % 3]}")
        taken[-1].write_text("mine")
    process = rerun(counted, no_tensorflow)
    assert process.returncode == 0, process.stderr
    assert all(path.read_text() == "mine" for path in taken)
    published = counted / process.stdout.split()[-1]
    assert published > taken[-1].with_suffix(".yaml")
    assert yaml.safe_load(published.read_text())["metadata"]["created_datetime"] in published.name


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        lambda data: data[: len(data) // 3] + b"x" + data[len(data) // 3 + 1 :],
    ],
)
def test_damaged_counts_are_noticed(counted, no_tensorflow, damage):
    (path,) = (counted / "tmp/counts").glob("*.npz")
    data = path.read_bytes()
    path.write_bytes(damage(data))
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
    "something else in the configuration": (
        False,
        lambda bucket: edit_yaml(bucket / MODEL / "config.yaml", lambda c: c["train_config"].update(epochs=99)),
    ),
    "another file of the model": (False, lambda bucket: (bucket / MODEL / "plots.png").write_bytes(b"?")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_counts_are_used_exactly_as_long_as_what_they_depend_on_stays(counted, no_tensorflow, what):
    counts_again, change = CHANGES[what]
    assert rerun(counted, no_tensorflow).returncode == 0
    change(counted / "bucket")
    process = rerun(counted, no_tensorflow)
    assert (process.returncode, "TensorFlow was imported" in process.stderr) == (int(counts_again), counts_again)


def test_another_subset_is_counted_again(counted, no_tensorflow):
    process = rerun(counted, no_tensorflow, dataset_downsample_factor=0.5)
    assert "TensorFlow was imported" in process.stderr
    assert "Using 6 of them, drawn with seed 12345." in process.stdout


def test_the_subset_is_drawn_with_the_argument_else_the_configured_else_a_fixed_seed(counted):
    names = [f"slice {i}" for i in range(100)]
    drawn = {seed: draw_subset(names, 0.1, seed) for seed in (1, 2, 12345)}
    assert all(len(subset) == 10 == len(set(subset)) for subset in drawn.values())
    assert draw_subset(names, 0.1, 1) == drawn[1] != drawn[2]
    assert draw_subset(names, 1.0, 1) == names
    assert len(draw_subset(names[:30], 0.1, 1)) == 3
    assert len(draw_subset(names[:3], 0.01, 1)) == 1

    def seed(split, train_config, *extra):
        args = script.parse_arguments([*arguments("b", dataset=f"d/{split}"), *extra])
        return script.subset_seed(args, train_config)

    config = {"validation_data_shuffle_seed": 5, "test_data_shuffle_seed": 6, "training_data_shuffle_seed": 7}
    assert seed("validation", config) == 5
    assert seed("test", config) == 6
    assert seed("train", config) == seed("validation", {}) == 1234
    assert seed("test", config, "--numpy-random-global-seed", "9") == 9


def test_seeds_do_what_they_say(counted, monkeypatch):
    monkeypatch.chdir(counted)

    def random_after(seed):
        seeds = {"random_module_global_seed": seed, "numpy_random_global_seed": 4, "tf_random_global_seed": 5}
        script.run(script.parse_arguments(arguments("bucket", dataset_downsample_factor=0.1, **seeds)))
        return random.random()

    def random_after_inference(seed):  # for which Keras draws as well
        shutil.rmtree("tmp/counts")
        return random_after(seed)

    assert random_after_inference(2) != random_after_inference(3) == random_after_inference(3)
    assert random_after(3) == random.Random(3).random()
    tf = network.import_tensorflow()
    assert np.random.random() == np.random.RandomState(4).random()
    assert tf.compat.v1.get_seed(None)[0] == 5
    metadata = results(counted / "bucket")[-1]["metadata"]
    assert metadata["random-module-global-seed"] == 3
    assert metadata["numpy_random_global_seed"] == metadata["subset_seed"] == 4
    assert metadata["tf_random_global_seed"] == 5
    assert metadata["num_images"] == 2


# ---------------------------------------------------------------------------------------------------------------
# gs://


def test_the_documented_commands_work_as_written(sandbox, tmp_path):
    with fake_gcs_server() as server:
        upload(server, sandbox, "sandbox")
        before = set(list_objects(server, "sandbox"))
        for command, images in (
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
            assert process.stderr == ""
            split = command.split()[3]
            url = process.stdout.split()[-1]
            assert url.startswith("gs://sandbox/models/segmentation-model-composite_0123_20200321T154533Z/model_thr")
            result = yaml.safe_load(get_object(server, "sandbox", url.removeprefix("gs://sandbox/")))
            total = len(list((sandbox / "datasets" / split / "images").iterdir()))
            assert result["metadata"]["num_images"] == int(np.ceil(images * total))
            assert set(thresholds(result)) == {"class0", "class1", "class2"}
        new = sorted(set(list_objects(server, "sandbox")) - before)
        assert [re.sub(r".*_\d{8}T\d{6}Z", "", name) for name in new] == [".png", ".yaml", "_slices.png"] * 2
        assert before < set(list_objects(server, "sandbox"))


def test_only_what_is_needed_is_fetched_and_only_once(tiny_bucket, tmp_path):
    (tiny_bucket / MODEL / "model_thresholds_20200101T000000Z.yaml").write_text("old: 1")
    (tiny_bucket / MODEL / "plots").mkdir()
    (tiny_bucket / MODEL / "plots/loss.png").write_bytes(b"?")
    write_split(tiny_bucket / "datasets/dataset-tiny/train", *blobs_and_masks(2, 64, 96, 2))
    with fake_gcs_server() as server, ChaosProxy(server) as proxy:
        upload(server, tiny_bucket, "bkt", "folder/in/bucket/")

        def fetched(**others):
            del proxy.requests[:]
            process = run_tool(
                *arguments("gs://bkt/folder/in/bucket", **others), cwd=tmp_path, STORAGE_EMULATOR_HOST=proxy.url
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
        data = get_object(server, "bkt", f"folder/in/bucket/{changed}")
        put_object(server, "bkt", f"folder/in/bucket/{changed}", data)
        assert fetched(dataset_downsample_factor=0.5) == [changed]


def test_a_failed_upload_keeps_the_result_and_the_next_run_needs_no_inference(tiny_bucket, no_tensorflow, tmp_path):
    with fake_gcs_server() as server, ChaosProxy(server, permissions=("get", "list")) as proxy:
        upload(server, tiny_bucket, "bkt")
        before = list_objects(server, "bkt")
        process = run_tool(*arguments("gs://bkt"), cwd=tmp_path, STORAGE_EMULATOR_HOST=proxy.url)
        assert_one_error_line(process, 4, "storage.objects.create", "roles/storage.objectCreator", "gcloud storage cp")
        assert list_objects(server, "bkt") == before
        kept = re.search(r"kept in (\S+),", process.stderr)[1]
        names = sorted(path.name for path in (tmp_path / kept).iterdir())
        assert [name[33:] for name in names] == [".png", ".yaml", "_slices.png"]
        (kept_yaml,) = (tmp_path / kept).glob("*.yaml")
        proxy.permissions = ("get", "list", "create")
        process = run_tool(
            *arguments("gs://bkt"), cwd=tmp_path, STORAGE_EMULATOR_HOST=proxy.url, PYTHONPATH=no_tensorflow
        )
        assert process.returncode == 0, process.stderr
        name = process.stdout.split()[-1].removeprefix("gs://bkt/")
        assert thresholds(yaml.safe_load(get_object(server, "bkt", name))) == thresholds(
            yaml.safe_load(kept_yaml.read_text())
        )
        assert not any(request.operation == "other" for request in proxy.requests)


# ---------------------------------------------------------------------------------------------------------------
# Errors


USAGE = [
    (["--batch-size", "0"], "--batch-size"),
    (["--batch-size", "many"], "--batch-size"),
    (["--dataset-downsample-factor", "0"], "--dataset-downsample-factor"),
    (["--dataset-downsample-factor", "1.01"], "--dataset-downsample-factor"),
    (["--dataset-downsample-factor", "nan"], "--dataset-downsample-factor"),
    (["--optimizing-class-metric", "iou"], "iou_score"),
    (["--optimizing-class-metric", "binary_cross_entropy"], "does not depend on a threshold"),
    (["--numpy-random-global-seed", "-1"], "--numpy-random-global-seed"),
    (["--dataset-directory", "dataset-tiny"], "--dataset-directory"),
    (["--model-id", "models/m"], "--model-id"),
    (["--bach-size", "3"], "--bach-size"),
]


@pytest.mark.parametrize(("extra", "words"), USAGE)
def test_wrong_arguments_are_usage_errors(tmp_path, extra, words):
    assert_one_error_line(run_tool(*arguments("bucket"), *extra, cwd=tmp_path), 2, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["--gcp-bucket", "--dataset-directory", "--model-id"])
def test_required_arguments_are_required(tmp_path, missing):
    given = arguments("bucket")
    del given[given.index(missing) : given.index(missing) + 2]
    assert_one_error_line(run_tool(*given, cwd=tmp_path), 2, missing)


def test_help_tells_every_argument_default_and_metric(tmp_path):
    text = " ".join(run_tool("--help", cwd=tmp_path, COLUMNS=100).stdout.split())
    for words in (
        "--gcp-bucket",
        "gs://name",
        "Default: 16",
        "Default: iou_score",
        "Default: 1.0",
        *models.CLASS_METRICS,
    ):
        assert words in text


def save(pixels, path, **options):
    Image.fromarray(pixels).save(path, **options)


PIXELS = np.full((64, 96), 7, np.uint8)
BAD_INPUT = {
    "an unknown dataset": ({"dataset": "dataset-none/validation"}, None, "datasets/dataset-none/config.yaml"),
    "an unknown split": ({"dataset": "dataset-tiny/verification"}, None, "dataset-tiny/verification"),
    "an unknown model": ({"model": "m"}, None, "models/m/config.yaml"),
    "an image without its mask": (
        {},
        lambda b: (b / SPLIT / "masks/class_1/slice_0003.png").unlink(),
        "masks/class_1/slice_0003.png",
    ),
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
    "an empty file": ({}, lambda b: (b / SPLIT / "images/slice_0002.png").write_bytes(b""), "slice_0002.png"),
    "a huge file": (
        {},
        lambda b: os.truncate(b / SPLIT / "images/slice_0002.png", 2**24),
        "slice_0002.png has 16,777,216 bytes",
    ),
    "no target_size": (
        {},
        lambda b: (b / "datasets/dataset-tiny/config.yaml").write_text("dataset_config: {size: [96, 64]}"),
        "target_size",
    ),
    "a configuration that is no YAML": (
        {},
        lambda b: (b / "datasets/dataset-tiny/config.yaml").write_text("dataset_config: {"),
        "not valid YAML",
    ),
    "a configuration without its section": (
        {},
        lambda b: (b / MODEL / "config.yaml").write_text("training: 1"),
        "train_config",
    ),
    "no weights": ({}, lambda b: (b / MODEL / "model.hdf5").unlink(), "model.hdf5"),
}
BAD_INPUT_FOUND_LATE = {
    "another size": ({}, lambda b: save(PIXELS[:32], b / SPLIT / "images/slice_0002.png"), "96 x 32 pixels"),
    "colour": ({}, lambda b: save(np.dstack([PIXELS] * 3), b / SPLIT / "images/slice_0002.png"), "greyscale"),
    "16 bits": ({}, lambda b: save(PIXELS.astype(np.uint16), b / SPLIT / "images/slice_0002.png"), "greyscale"),
    "no image": ({}, lambda b: (b / SPLIT / "images/slice_0002.png").write_bytes(b"?" * 99), "cannot be decoded"),
    "a truncated image": (
        {},
        lambda b: os.truncate(b / SPLIT / "masks/class_0/slice_0002.png", 90),
        "masks/class_0/slice_0002.png cannot be decoded",
    ),
    "another format than its name": (
        {},
        lambda b: save(PIXELS, b / SPLIT / "images/slice_0002.png", format="TIFF"),
        "is a TIFF file",
    ),
    "weights of another network": (
        {},
        lambda b: edit_yaml(
            b / MODEL / "config.yaml",
            lambda c: c["train_config"]["segmentation_model"]["model_parameters"].update(backbone_name="resnet34"),
        ),
        "do not fit",
    ),
    "weights that are no HDF5": ({}, lambda b: (b / MODEL / "model.hdf5").write_bytes(b"?" * 99), "model.hdf5"),
    "a class without a pixel": (
        {},
        lambda b: [save(0 * PIXELS, path) for path in (b / SPLIT / "masks/class_1").iterdir()],
        "class1 (class_1) cannot be trained",
    ),
}


@pytest.mark.parametrize("what", [*BAD_INPUT, *BAD_INPUT_FOUND_LATE])
def test_bad_input_is_one_error_line(tiny_bucket, no_tensorflow, tmp_path, what):
    others, spoil, words = (BAD_INPUT | BAD_INPUT_FOUND_LATE)[what]
    if spoil:
        spoil(tiny_bucket)
    early = {"PYTHONPATH": no_tensorflow} if what in BAD_INPUT else {}
    process = run_tool(*arguments("bucket", **others), cwd=tmp_path, **early)
    assert_one_error_line(process, 3, words)
    assert not list((tiny_bucket / MODEL).glob("model_thresholds_*"))


def test_unknown_buckets_are_bucket_errors(tmp_path):
    assert_one_error_line(run_tool(*arguments("nowhere"), cwd=tmp_path), 4, "nowhere")
    with fake_gcs_server() as server:
        process = run_tool(*arguments("gs://nowhere"), cwd=tmp_path, STORAGE_EMULATOR_HOST=server)
        assert_one_error_line(process, 4, "gs://nowhere")


def test_a_class_that_does_not_converge_ends_the_run(counted, no_tensorflow, copied_script):
    science = copied_script.with_name("models.py")
    science.write_text(re.sub(r"(?m)^OPT_OPTIONS = .*", 'OPT_OPTIONS = {"maxiter": 3}', science.read_text()))
    before = sorted((counted / "bucket" / MODEL).iterdir())
    process = run_tool(*arguments("bucket"), cwd=counted, script=copied_script, PYTHONPATH=no_tensorflow)
    assert_one_error_line(process, 5, "class0 (class_0)", "maxiter", "OPT_TOL", "models.py")
    assert sorted((counted / "bucket" / MODEL).iterdir()) == before


def test_the_git_hash_comes_from_a_file_where_there_is_no_checkout(counted, no_tensorflow, copied_script):
    for content, expected in ((None, None), ("0123abc-dirty\n", "0123abc-dirty")):
        if content:
            copied_script.with_name(".git_hash").write_text(content)
        process = run_tool(*arguments("bucket"), cwd=counted, script=copied_script, PYTHONPATH=no_tensorflow)
        assert process.returncode == 0, process.stderr
        assert results(counted / "bucket")[-1]["metadata"]["git_hash"] == expected


# ---------------------------------------------------------------------------------------------------------------
# The screen, and interruptions


def run_in_terminal(*command, cwd, until=None, number=None):
    """Run in a pseudo-terminal, and send a signal once what it shows matches `until`.

    Returns the exit code and all that was written to the terminal.
    """
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *command], cwd=cwd, stdin=terminal, stdout=terminal, stderr=terminal
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_so_and_goes_on_later(tmp_path, tiny_bucket_template, number, code):
    bucket = tmp_path / "bucket"
    shutil.copytree(tiny_bucket_template, bucket)
    shutil.rmtree(bucket / SPLIT)
    write_split(bucket / SPLIT, *blobs_and_masks(500, 64, 96, 2))
    exit_code, screen = run_in_terminal(
        *arguments("bucket", batch_size=4), cwd=tmp_path, until=r"[1-9]\d\d/500", number=number
    )
    assert exit_code == code
    assert "error: interrupted" in screen.splitlines()[-1]
    assert "Traceback" not in screen
    assert not list((bucket / MODEL).glob("model_thresholds_*"))
    again = run_tool(*arguments("bucket", batch_size=4), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    done = int(re.search(r"Going on after (\d+) of 500 images", again.stdout)[1])
    assert 100 <= done < 500
    assert f"Counting the probabilities of {500 - done} images" in again.stdout
    resumed = results(bucket)[-1]
    shutil.rmtree(tmp_path / "tmp")
    assert run_tool(*arguments("bucket", batch_size=4), cwd=tmp_path).returncode == 0
    for key in ("thresholds_training_output", "thresholds_training_history"):
        assert resumed["metadata"][key] == results(bucket)[-1]["metadata"][key]
