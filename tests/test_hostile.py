"""Hostile and broken content in a bucket: nothing is executed, memory stays bounded, and one clean line names it."""

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from helpers import (
    MODEL,
    SCRIPT,
    SPLIT,
    TRAIN_CONFIG,
    arguments,
    assert_one_error_line,
    results,
    run_tool,
    thresholds,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import models
import train_segmentation_model_prediction_thresholds as script
from gcp_utils import Blob, BucketError, open_bucket
from image_utils import DatasetError

EXPECTED = (DatasetError, BucketError, models.ModelError)
MEGABYTES = 300  # what no case may take more
ARGS = script.parse_arguments(arguments("bucket"))


@pytest.fixture(autouse=True)
def sealed(tmp_path, monkeypatch):
    """A folder of the test's own, where nothing but bucket and tmp may be afterwards, and bounded memory and time."""
    monkeypatch.chdir(tmp_path)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use now
    before, start = memory("VmRSS"), time.monotonic()
    yield
    assert memory("VmHWM") - before < MEGABYTES
    assert time.monotonic() - start < 60
    assert {path.name for path in tmp_path.iterdir()} <= {"bucket", "tmp", "no_tensorflow", "counted"}


def memory(kind):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def error_line(call, capsys, *words):
    """What the user reads of the error that a call must raise."""
    with pytest.raises(EXPECTED) as caught:
        call()
    capsys.readouterr()
    script.fail(3, caught.value)
    output = capsys.readouterr()
    assert output.out == ""
    line = output.err.removesuffix("\n")
    assert line.startswith("error: ") and line.isprintable() and len(line) < 2500
    for word in words:
        assert word in line
    return line


# ---------------------------------------------------------------------------------------------------------------
# YAML

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{of}'] * 10)}]\n" for of, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{of}'] * 10)}]}}\n" for of, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CALL = "!!python/object/apply:os.system ['touch owned']"
HOSTILE_YAML = {
    "a Python call": f"dataset_config: {CALL}",
    "a Python call in a key": f"dataset_config: {{? {CALL} : 1}}",
    "a Python call elsewhere": f"dataset_config: {{target_size: [9, 9]}}\nother: {CALL}",
    "a Python name": "dataset_config: {target_size: !!python/name:os.system }",
    "a Python module": "dataset_config: !!python/module:antigravity ",
    "a Python object": "dataset_config: !!python/object/new:subprocess.Popen [[touch, owned]]",
    "an unknown tag": "dataset_config: !<tag:example.com,2000:x> {target_size: [9, 9]}",
    "nested without end": "dataset_config: " + "[" * 20_000,
    "nested and closed": "dataset_config: " + "[" * 400 + "]" * 400,
    "nested mappings": "dataset_config: " + "{a: " * 20_000,
    "nested lists in lines": "dataset_config:\n" + "".join(" " * n + "-\n" for n in range(600)),
    "aliases of aliases": f"{LAUGHS}dataset_config: {{target_size: *i}}",
    "merges of merges": f"{MERGES}dataset_config: *i",
    "a list that holds itself": "dataset_config: &a {target_size: [9, 9], b: [*a]}",
    "a key that holds itself": "&a ? *a : 1",
    "a huge integer": f"dataset_config: {{target_size: [{'9' * 5000}, 9]}}",
    "a huge hexadecimal integer": f"dataset_config: {{target_size: [9, 9], x: 0x{'f' * 200_000}}}",
    "a huge sexagesimal integer": f"dataset_config: {{target_size: [9, 9], x: 1{':59' * 80_000}}}",
    "a date that is none": "dataset_config: {target_size: 2001-99-99}",
    "a date by force": "dataset_config: {target_size: !!timestamp never}",
    "an empty integer": 'dataset_config: {target_size: !!int ""}',
    "a truth value by force": "dataset_config: {target_size: !!bool perhaps}",
    "a binary that is none": "dataset_config: {target_size: !!binary '%%%'}",
    "keys that cannot be": "dataset_config: {[a, b]: 1}",
    "not UTF-8": b"dataset_config: \xff\xfe\x00",
    "control characters": "dataset_config: {target_size: \x1b[2J}",
    "an escape sequence in a value": r'dataset_config: {target_size: "\e[2J\e]0;owned\a\u202e\n\r"}',
    "an escape sequence in a tag": 'dataset_config: !<\\x1b[2J> "x"',
    "a null byte": "dataset_config:\0 {target_size: [9, 9]}",
    "several documents": "dataset_config: {target_size: [9, 9]}\n---\nx: 1",
    "nothing": "",
    "a list": "- dataset_config",
    "a section that is a text": "dataset_config: target_size",
    "no target_size": "dataset_config: {size: [9, 9]}",
    "one number": "dataset_config: {target_size: 9}",
    "three numbers": "dataset_config: {target_size: [9, 9, 1]}",
    "a negative number": "dataset_config: {target_size: [-9, 9]}",
    "zero": "dataset_config: {target_size: [0, 9]}",
    "NaN": "dataset_config: {target_size: [.nan, 9]}",
    "infinity": "dataset_config: {target_size: [.inf, 9]}",
    "a fraction": "dataset_config: {target_size: [9.0, 9]}",
    "truth values": "dataset_config: {target_size: [true, true]}",
    "dates": "dataset_config: {target_size: [2001-01-01, 2001-01-01]}",
    "texts": "dataset_config: {target_size: ['9', '9']}",
    "a huge size": "dataset_config: {target_size: [1000000, 1000000]}",
    "a long list": f"dataset_config: {{target_size: [{'9, ' * 9000}]}}",
}


def write_config(tmp_path, name, content):
    path = tmp_path / "bucket" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_bucket("bucket", tmp_path / "tmp/objects")


def target_size(bucket):
    return script.read_target_size(script.read_config(bucket, "config.yaml", "dataset_config"), "bucket/config.yaml")


@pytest.mark.parametrize("what", HOSTILE_YAML)
def test_hostile_yaml(what, tmp_path, capsys):
    bucket = write_config(tmp_path, "config.yaml", HOSTILE_YAML[what])
    error_line(lambda: target_size(bucket), capsys, "bucket/config.yaml")


@pytest.mark.parametrize(
    "content",
    [
        "dataset_config: {target_size: [1, 1], target_size: [9, 9]}",
        "dataset_config: {target_size: [9, 9], x: .nan, y: 2001-01-01, z: !!set {a, b}, 1: 2, 2001-01-01: 3, ~: 4}",
        "x: &x {target_size: [9, 9]}\ndataset_config: {<<: *x}",
        'dataset_config: {target_size: [9, 9], x: "\\ud800\\e[2J"}',
        "\ufeffdataset_config: {target_size: [9, 9]}",
    ],
)
def test_odd_yaml_that_is_fine(content, tmp_path):
    bucket = write_config(tmp_path, "config.yaml", content)
    assert target_size(bucket) == [9, 9]
    config = script.read_config(bucket, "config.yaml", "dataset_config")
    text = yaml.dump({"dataset_config": config}, Dumper=script.PlainDumper, allow_unicode=True).encode()
    assert b"\x1b" not in text
    assert yaml.safe_load(text)["dataset_config"]["target_size"] == [9, 9]
    weights = Blob("model.hdf5", 1, "1")
    script.Inference([], [], [9, 9], {"segmentation_model": config}, weights).counts_path()


def test_a_configuration_of_100_megabytes_is_not_read(tmp_path, capsys):
    bucket = write_config(tmp_path, "config.yaml", "")
    os.truncate(tmp_path / "bucket/config.yaml", 100_000_000)
    error_line(lambda: target_size(bucket), capsys, "bucket/config.yaml has 100,000,000 bytes")


@pytest.mark.parametrize("seed", ["many", -1, 2**32, 1.0, float("nan"), True, [1], {"a": 1}, "\x1b[2J" * 99])
def test_shuffle_seeds_of_a_wrong_type(seed, capsys):
    config = {"validation_data_shuffle_seed": seed}
    error_line(lambda: script.subset_seed(ARGS, config), capsys, "shuffle seed", "config.yaml")


# ---------------------------------------------------------------------------------------------------------------
# The network that a configuration asks for

PARAMETERS = TRAIN_CONFIG["segmentation_model"]["model_parameters"]
HOSTILE_NETWORKS = {
    "no section": {},
    "a text": {"segmentation_model": "Unet"},
    "a list": {"segmentation_model": ["Unet"]},
    "no parameters": {"segmentation_model": {"model_name": "Unet"}},
    "parameters that are a text": {"segmentation_model": {"model_name": "Unet", "model_parameters": "x"}},
    **{
        f"model_name {name!r}": {"segmentation_model": {"model_name": name, "model_parameters": PARAMETERS}}
        for name in (None, 1, ["Unet"], {"Unet": 1}, "__class__", "set_framework", "os", "\x1b[2J", "U" * 9000)
    },
    **{
        f"{name}: {str(value)[:40]!r}": {
            "segmentation_model": {"model_name": "Unet", "model_parameters": PARAMETERS | {name: value}}
        }
        for name, value in [
            ("backbone_name", None),
            ("backbone_name", "../../etc/passwd"),
            ("backbone_name", ["resnet18"]),
            ("backbone_name", "\x1b]0;owned\x07"),
            ("classes", 10**9),
            ("classes", "2"),
            ("classes", [2]),
            ("classes", "\x1b[2J" * 999),
            ("decoder_filters", [10**9] * 5),
            ("decoder_filters", [64] * 9000),
            ("decoder_filters", [-1] * 5),
            ("decoder_filters", [float("nan")] * 5),
            ("decoder_filters", 10**9),
            ("decoder_filters", "many"),
            ("decoder_filters", [[64], [64]]),
            ("input_shape", [10**9, 10**9, 1]),
            ("input_shape", [64, 64, 3]),
            ("input_shape", "none"),
            ("input_shape", []),
            ("input_shape", [33, 33, 1]),
            ("activation", {"class_name": "Lambda", "config": {"function": "os.system"}}),
            ("activation", {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}),
            ("activation", "os.system"),
            ("activation", "deserialize"),
            ("activation", 3),
            ("decoder_block_type", "\x1b[2J"),
            ("encoder_features", [10**6]),
            ("encoder_features", ["no such layer"] * 4),
            ("no_such_parameter\x1b[2J", 1),
            (3, 4),
        ]
    },
}


@pytest.fixture(scope="module")
def network():
    """A very small network, to load weights into."""
    layers = network.import_tensorflow().keras.layers
    x = image = layers.Input((None, None, 1))
    for layer in (layers.Conv2D(4, 3), layers.BatchNormalization(), layers.Conv2D(2, 1, activation="sigmoid")):
        x = layer(x)
    return network.import_tensorflow().keras.Model(image, x)


@pytest.fixture(scope="module")
def its_weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.hdf5"
    network.compile("adam", "binary_crossentropy")
    network.save(path)
    return path


@pytest.fixture(scope="module")
def weights(tiny_bucket_template):
    return tiny_bucket_template / MODEL / "model.hdf5"


@pytest.mark.parametrize("what", HOSTILE_NETWORKS)
def test_hostile_network_configurations(what, weights, capsys):
    config = HOSTILE_NETWORKS[what]
    script.Inference([], [], [9, 9], config, Blob("model.hdf5", 1, "1")).counts_path()
    error_line(lambda: models.build_network(config, 2, weights), capsys)


@pytest.mark.parametrize(
    ("name", "value"),
    [("weights", "/nowhere/x.h5"), ("encoder_weights", "imagenet"), ("encoder_weights", "https://example.com/x.h5"),
     ("layers", "os")],
)  # fmt: skip
def test_weights_come_from_the_bucket_alone(name, value, weights, monkeypatch):
    def no(*_, **__):
        raise AssertionError("a connection that nobody asked for")

    monkeypatch.setattr("socket.socket.connect", no)
    monkeypatch.setenv("HOME", "/nowhere")
    config = {"segmentation_model": {"model_name": "Unet", "model_parameters": PARAMETERS | {name: value}}}
    models.build_network(config, 2, weights)


# ---------------------------------------------------------------------------------------------------------------
# HDF5


def first_kernel(file):
    return "model_weights/" + file["model_weights"].visititems(lambda name, item: name if "kernel" in name else None)


def replaced(make):
    """Put something else in the place of the first weights."""

    def change(path):
        with h5py.File(path, "r+") as file:
            name = first_kernel(file)
            shape = file[name].shape
            del file[name]
            make(file, name, shape, path)

    return change


def virtual(file, name, shape, path):
    layout = h5py.VirtualLayout(shape, "f4")
    layout[...] = h5py.VirtualSource("/etc/passwd", "x", shape)
    file.create_virtual_dataset(name, layout)


def edited(edit):
    def change(path):
        with h5py.File(path, "r+") as file:
            edit(file["model_weights"])

    return change


def with_layer(key):
    def edit(group):
        layer = next(name for name in group.attrs["layer_names"] if len(group[name].attrs["weight_names"]))
        key(group, layer)

    return edited(edit)


def repeat_weights(group, layer):
    names = group[layer].attrs["weight_names"]
    del group[layer].attrs["weight_names"]
    for number in range(200):
        group[layer].attrs[f"weight_names{number}"] = np.repeat(names[:1], 500)


def rename_weights(name):
    def edit(group, layer):
        group[layer].attrs["weight_names"] = np.array([name], "S")

    return with_layer(edit)


def soft_loop(group, layer):
    del group[layer]
    group[layer] = h5py.SoftLink(f"/model_weights/{layer.decode() if isinstance(layer, bytes) else layer}")


HOSTILE_HDF5 = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("weights"),
    "a pickle": lambda path: path.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR."),
    "a ZIP file": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)),
    "the signature alone": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"),
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "all but the last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "the head alone": lambda path: os.truncate(path, 500),
    "no groups": lambda path: h5py.File(path, "w").close(),
    "an external link": replaced(lambda f, name, shape, path: f.__setitem__(name, h5py.ExternalLink("/x.h5", "/x"))),
    "an external link to itself": replaced(
        lambda f, name, shape, path: f.__setitem__(name, h5py.ExternalLink(path.name, name))
    ),
    "a soft link to itself": replaced(lambda f, name, shape, path: f.__setitem__(name, h5py.SoftLink(f"/{name}"))),
    "a dangling soft link": replaced(lambda f, name, shape, path: f.__setitem__(name, h5py.SoftLink("/nothing"))),
    "a layer that is a link to itself": with_layer(soft_loop),
    "external storage": replaced(
        lambda f, name, shape, path: f.create_dataset(name, shape, "f4", external=[("/etc/passwd", 0, 2**20)])
    ),
    "a virtual dataset": replaced(virtual),
    "a huge shape": replaced(lambda f, name, shape, path: f.create_dataset(name, (2**40,), "f4", chunks=(1024,))),
    "a compression bomb": replaced(
        lambda f, name, shape, path: f.create_dataset(name, data=np.zeros(2**24, "f4"), compression="gzip")
    ),
    "weights that are compressed": replaced(
        lambda f, name, shape, path: f.create_dataset(name, shape, "f4", compression="gzip", chunks=shape)
    ),
    "weights that are texts": replaced(lambda f, name, shape, path: f.create_dataset(name, shape, h5py.string_dtype())),
    "weights that are references": replaced(lambda f, name, shape, path: f.create_dataset(name, shape, h5py.ref_dtype)),
    "weights that are records": replaced(
        lambda f, name, shape, path: f.create_dataset(name, shape, np.dtype([("a", "f4"), ("b", "f4")]))
    ),
    "weights that are a group": replaced(lambda f, name, shape, path: f.create_group(name)),
    "weights of another shape": replaced(
        lambda f, name, shape, path: f.create_dataset(name, data=np.zeros(int(np.prod(shape)), "f4"))
    ),
    "complex weights": replaced(lambda f, name, shape, path: f.create_dataset(name, shape, "c8")),
    "missing weights": replaced(lambda f, name, shape, path: None),
    "one layer's weights named 100,000 times": with_layer(repeat_weights),
    "a name that climbs out": rename_weights("../../../x"),
    "an absolute name": rename_weights("/etc/passwd"),
    "an empty name": rename_weights(""),
    "an escape sequence as a name": rename_weights("\x1b]0;owned\x07"),
    "a name that is not UTF-8": with_layer(
        lambda group, layer: group[layer].attrs.__setitem__("weight_names", np.array([b"\xff\xfe"]))
    ),
    "no layer_names": edited(lambda group: group.attrs.__delitem__("layer_names")),
    "layer_names that is a number": edited(lambda group: group.attrs.__setitem__("layer_names", 3)),
    "layer_names of numbers": edited(lambda group: group.attrs.__setitem__("layer_names", np.arange(9))),
    "layer_names that repeat": edited(
        lambda group: group.attrs.__setitem__("layer_names", np.repeat(group.attrs["layer_names"][-1:], 500))
    ),
    "no weight_names": with_layer(lambda group, layer: group[layer].attrs.__delitem__("weight_names")),
    "keras_version that is a number": edited(lambda group: group.attrs.__setitem__("keras_version", [[3]])),
}


@pytest.mark.parametrize("what", HOSTILE_HDF5)
def test_hostile_hdf5(what, network, its_weights, tmp_path, capsys):
    (tmp_path / "bucket").mkdir()
    path = Path(shutil.copy(its_weights, tmp_path / "bucket/model.hdf5"))
    HOSTILE_HDF5[what](path)
    before = network.get_weights()
    if what == "keras_version that is a number":  # Keras does not mind
        models._load_weights(network, path)
        return
    line = error_line(lambda: models._load_weights(network, path), capsys)
    assert "root:" not in line
    for old, new in zip(before, network.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_deeply_nested_groups_are_not_walked(network, its_weights, tmp_path):
    (tmp_path / "bucket").mkdir()
    path = Path(shutil.copy(its_weights, tmp_path / "bucket/model.hdf5"))
    with h5py.File(path, "r+") as file:
        group = file["model_weights"]
        for _ in range(5000):
            group = group.create_group("g")
        file["model_weights/circle"] = file["model_weights"]
    start = time.monotonic()
    models._load_weights(network, path)
    assert time.monotonic() - start < 10


# ---------------------------------------------------------------------------------------------------------------
# Whole runs


def limited(*given, cwd, **environment):
    """Run the script where it gets no more than 4 GB of addresses."""
    return subprocess.run(
        [sys.executable, SCRIPT, *given],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)),
    )


def spoil(name, content):
    def change(bucket):
        path = bucket / name
        if path.exists():
            path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


DATASET_CONFIG = "datasets/dataset-tiny/config.yaml"
HOSTILE_RUNS = {
    "a Python call": (spoil(DATASET_CONFIG, f"dataset_config: {CALL}"), 3, DATASET_CONFIG),
    "merges of merges": (spoil(DATASET_CONFIG, f"{MERGES}dataset_config: *i"), 3, DATASET_CONFIG),
    "100 MB": (lambda bucket: os.truncate(bucket / MODEL / "config.yaml", 100_000_000), 3, f"{MODEL}/config.yaml"),
    "an escape sequence in a value": (
        spoil(DATASET_CONFIG, r'dataset_config: {target_size: "\e]0;owned\a\e[2J\nerror: none"}'), 3, DATASET_CONFIG
    ),
    "an escape sequence in a seed": (
        spoil(f"{MODEL}/config.yaml", r'train_config: {validation_data_shuffle_seed: "\e[2J\r"}'), 3, "shuffle seed"
    ),
    "an escape sequence in a name": (spoil(f"{SPLIT}/images/\x1b[2J\x07.png", b"x"), 4, "images/\\x1b[2J\\x07.png"),
    "a newline in a name": (spoil(f"{SPLIT}/images/a\nerror: b.png", b"x"), 4, "images/a\\nerror: b.png"),
    "a name that is not UTF-8": (spoil(f"{SPLIT}/images/\udcff.png", b"x"), 4, "\\udcff.png"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_RUNS)
def test_a_run_on_hostile_content_ends_with_one_clean_line(what, counted, no_tensorflow):
    change, code, words = HOSTILE_RUNS[what]
    change(counted / "bucket")
    before = sorted((counted / "bucket").rglob("*"))
    process = limited(*arguments("bucket"), cwd=counted, PYTHONPATH=str(no_tensorflow))
    assert_one_error_line(process, code, words)
    assert (process.stderr + process.stdout).replace("\n", "").isprintable()
    assert sorted((counted / "bucket").rglob("*")) == before


def test_a_run_on_odd_content_gives_the_same_result_and_stays_clean(tiny_bucket, counted_template, tmp_path):
    """Code in the model's HDF5, steering characters in folder names and YAML, a screen that knows no Unicode."""
    tf = network.import_tensorflow()
    layers = tf.keras.layers
    owned = tf.keras.Sequential([layers.Input((1,)), layers.Lambda(lambda x: __import__("os").system("touch owned"))])
    with h5py.File(tiny_bucket / MODEL / "model.hdf5", "r+") as file:
        del file.attrs["model_config"]
        file.attrs["model_config"] = owned.to_json()
    assert "Lambda" in owned.to_json()
    (tmp_path / "owned").unlink()  # to build it was to run it
    (tiny_bucket / SPLIT / "masks/class_1").rename(tiny_bucket / SPLIT / "masks/class_1\u202e $\\frac{ \u4e2d")
    config = yaml.safe_load((tiny_bucket / MODEL / "config.yaml").read_text())
    config["train_config"]["note"] = "\x1b[2J\ud800"
    (tiny_bucket / MODEL / "config.yaml").write_text(yaml.safe_dump(config))
    process = run_tool(
        *arguments("bucket", batch_size=4, message="\x1b]0;owned\x07"), cwd=tmp_path, PYTHONIOENCODING="latin-1"
    )
    assert process.returncode == 0, process.stderr
    assert all(line.startswith("warning: ") for line in process.stderr.splitlines())
    assert (process.stdout + process.stderr).replace("\n", "").isprintable()
    (text,) = (path.read_text() for path in (tiny_bucket / MODEL).glob("model_thresholds_*.yaml"))
    assert "\x1b" not in text
    (result,) = results(tiny_bucket)
    assert result["metadata"]["message"] == "\x1b]0;owned\x07"
    assert thresholds(result) == thresholds(results(counted_template[0] / "bucket")[0])


# ---------------------------------------------------------------------------------------------------------------
# Fuzzing

fuzzed = settings(max_examples=1000, deadline=None, derandomize=True, database=None)
kinds = st.sampled_from(["flip", "cut", "repeat", "insert"])
mutations = st.lists(st.tuples(st.floats(0, 1), kinds, st.binary(max_size=9)), min_size=1, max_size=4)


def mutate(data, steps):
    for where, how, extra in steps:
        position = int(where * (len(data) - 1))
        match how:
            case "flip":
                data = data[:position] + bytes(b ^ 0x55 for b in extra) + data[position + len(extra) :]
            case "cut":
                data = data[:position] + data[position + 8 * len(extra) :]
            case "repeat":
                data = data[:position] + data[position // 2 :]
            case "insert":
                data = data[:position] + extra + data[position:]
        data = data or b"\0"
    return data


def attempt(call):
    """Call; whatever is raised must be an error of ours, which is shown in one line."""
    try:
        return call()
    except EXPECTED as error:
        assert "error: " + script.printable(error) == f"error: {script.printable(str(error))}"
        assert str(error)
        return None


class OneFile:
    """As much of a bucket as read_config needs."""

    def __init__(self, data):
        self.data = data

    def stat(self, name):
        return Blob(name, len(self.data), "1")

    def read(self, blob):
        return self.data

    def url(self, name):
        return f"gs://bucket/{name}"


soup = st.text(alphabet="a:&*[]{}-?!<>|'\" \n\t0123456789.e~%@`\\", max_size=60).map(str.encode)
seeds = [text.encode() for text in map(str, HOSTILE_YAML.values()) if len(text) < 1000]


@fuzzed
@given(st.binary(max_size=99) | st.builds(mutate, st.sampled_from(seeds), mutations) | soup)
def test_fuzz_yaml(data):
    bucket = OneFile(b"dataset_config: " + data if b"dataset_config" not in data else data)
    size = attempt(lambda: target_size(bucket))
    assert size is None or (len(size) == 2 and all(0 < edge <= 2**14 for edge in size))
    config = attempt(lambda: script.read_config(bucket, "config.yaml", "dataset_config"))
    if config is not None:  # it goes into names and results without an error
        script.Inference([], [], [9, 9], {"segmentation_model": config}, Blob("model.hdf5", 1, "1")).counts_path()
        text = yaml.dump(config, Dumper=script.PlainDumper, allow_unicode=True).encode()
        assert len(text) < 10_000_000
