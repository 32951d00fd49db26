"""A hostile or broken config.yaml executes nothing, takes limited memory, and one clean error line names it."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import MODEL, SCRIPT, SPLIT, arguments, assert_one_error_line, results, run_tool, thresholds
from hostile import attempt, error_line, mutate, mutations, sealed_folder
from hypothesis import given, settings
from hypothesis import strategies as st

import configuration
from blobs import Blob
from confidence import Blocks
from gcp_utils import open_bucket
from results import to_yaml
from train_segmentation_model_prediction_thresholds import Inputs


@pytest.fixture(autouse=True)
def sealed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with sealed_folder(tmp_path):
        yield


def name_counts(config):
    """A configuration of a network must go into the name of the cached counts, whatever it holds."""
    weights, blocks = Blob("model.hdf5", 1, "1"), Blocks(np.zeros(0, np.int64), 0, "stacks", "nothing")
    train_config = {"segmentation_model": config}
    Inputs(None, {}, train_config, weights, [9, 9], [], [], blocks, 1, Path("tmp/problems.txt")).counts_path()


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
    config = configuration.read_config(bucket, "config.yaml", "dataset_config")
    return configuration.target_size(config, "bucket/config.yaml")


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
    config = configuration.read_config(bucket, "config.yaml", "dataset_config")
    text = to_yaml({"dataset_config": config}).encode()
    assert b"\x1b" not in text
    assert yaml.safe_load(text)["dataset_config"]["target_size"] == [9, 9]
    name_counts(config)


def test_a_configuration_of_100_megabytes_is_not_read(tmp_path, capsys):
    bucket = write_config(tmp_path, "config.yaml", "")
    os.truncate(tmp_path / "bucket/config.yaml", 100_000_000)
    error_line(lambda: target_size(bucket), capsys, "bucket/config.yaml has 100,000,000 bytes")


@pytest.mark.parametrize("seed", ["many", -1, 2**32, 1.0, float("nan"), True, [1], {"a": 1}, "\x1b[2J" * 99])
def test_shuffle_seeds_of_a_wrong_type(seed, capsys):
    config = {"validation_data_shuffle_seed": seed}
    error_line(lambda: configuration.subset_seed(config, "validation", None), capsys, "shuffle seed", "config.yaml")


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
        timeout=300,
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
    "an escape sequence in a value": (
        spoil(DATASET_CONFIG, r'dataset_config: {target_size: "\e]0;owned\a\e[2J\nerror: none"}'),
        3,
        DATASET_CONFIG,
    ),
    "a newline in a name": (spoil(f"{SPLIT}/images/a\nerror: b.png", b"x"), 4, "images/a\\nerror: b.png"),
}


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
    """Steering characters in folder names and YAML, a screen that knows no Unicode."""
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
    assert thresholds(result) == thresholds(results(counted_template / "bucket")[0])


# ---------------------------------------------------------------------------------------------------------------
# What the rest of the tool asks of it


def test_the_stacks_of_a_split():
    stacks = configuration.stacks
    config = {"dataset_split": {"validation": ["a", 12], "test": "a", "train": [["a"], None, "b"]}}
    assert stacks(config, "validation") == ["a", "12"]
    assert stacks(config, "test") == stacks({}, "test") == stacks({"dataset_split": 3}, "test") == []
    assert stacks(config, "train") == ["b"]


@pytest.mark.parametrize("size", [[1, 2**14], [96, 64]])
def test_target_sizes(size):
    assert configuration.target_size({"target_size": size}, "x") == size


# ---------------------------------------------------------------------------------------------------------------
# Fuzzing

fuzzed = settings(max_examples=500, deadline=None, derandomize=True, database=None)


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
    config = attempt(lambda: configuration.read_config(bucket, "config.yaml", "dataset_config"))
    if config is not None:  # it goes into names and results without an error
        name_counts(config)
        text = to_yaml(config).encode()
        assert len(text) < 10_000_000
