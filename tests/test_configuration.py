"""The two config.yaml: read as they are written, else one sentence says what to write."""

import collections

import numpy as np
import pytest
import yaml
from helpers import ROOT

import configuration
from errors import ConfigurationError
from gcp_utils import Blob

CASES = ROOT / "tests/cases"


class OneFile:
    """As much of a bucket as read_config needs."""

    def __init__(self, data):
        self.data = data if isinstance(data, bytes) else data.encode()

    def stat(self, name):
        return Blob(name, len(self.data))

    def read(self, blob):
        return self.data

    def url(self, name):
        return f"gs://bucket/{name}"


def read(data, section="dataset_config"):
    """The section of a file, and the warnings."""
    warnings = []
    return configuration.read_config(OneFile(data), "config.yaml", section, warnings.append), warnings


def target_size(data):
    return configuration.target_size(read(data)[0], "gs://bucket/config.yaml")


# ---------------------------------------------------------------------------------------------------------------
# YAML as people and programs write it


def test_stacks_are_named_as_they_are_written():
    config, warnings = read((CASES / "dataset_config_as_people_write_it.yaml").read_bytes())
    names = ["0010", "0018", "2020-03-01", "2020_01", "1.10", "12:10", "1e3", "no", "null", "P01.tif", "p02"]
    assert configuration.stacks(config, "validation", warnings.append) == [*names, "stacks/P03"] and warnings == []
    assert config == {"target_size": [96, 64], "dataset_split": {"validation": [*names, "stacks/P03"]}}
    assert yaml.safe_load(yaml.safe_dump(config)) == config  # so the result repeats them


@pytest.mark.parametrize("split", ["[a, b]", "{validation: a}", "{validation: [{name: a}]}", "{train: [a]}", "3", "~"])
def test_stacks_in_another_form_are_a_warning(split):
    config, warnings = read(f"dataset_config: {{dataset_split: {split}}}")
    assert configuration.stacks(config, "validation", warnings.append) == []
    (warning,) = warnings
    assert configuration.stacks({}, "validation", pytest.fail) == []  # a file without dataset_split
    assert "runs of slices" in warning and "write dataset_split: {validation: [<stack>, <stack>, ...]}" in warning


def test_what_yaml_dump_makes_of_python_is_read_where_it_is_plain():
    config, warnings = read((CASES / "train_config_as_yaml_dump_writes_it.yaml").read_bytes(), "train_config")
    assert config["segmentation_model"]["model_parameters"]["decoder_filters"] == [8, 8, 8, 4, 4] and warnings == []
    dumped = yaml.dump({"dataset_config": {"target_size": (96, 64), "nested": [(1, (2, "a"))]}})
    assert read(dumped)[0] == {"target_size": [96, 64], "nested": [[1, [2, "a"]]]}


@pytest.mark.parametrize(
    "value, kind, word",
    [
        (collections.OrderedDict(a=1), "OrderedDict", "dict(x)"),
        (np.float32(0.5), "numpy", "x.item()"),
        (np.arange(3), "numpy", "x.tolist()"),
    ],
)
def test_other_values_of_python_are_named_with_their_line(value, kind, word):
    with pytest.raises(ConfigurationError) as caught:
        read(yaml.dump({"dataset_config": {"a": 1, "b": value}}))
    assert str(caught.value).startswith("gs://bucket/config.yaml is not valid YAML, correct it: line 3: !!python/")
    assert kind in str(caught.value) and word in str(caught.value)


def test_a_key_that_is_there_twice_is_a_warning():
    config, warnings = read("dataset_config:\n  a: {b: 1}\n  c: {b: 2}\n  a: 3")
    assert config == {"a": 3, "c": {"b": 2}}
    assert warnings == ["gs://bucket/config.yaml, line 4: a is there twice: the last one counts"]


def test_a_configuration_may_list_every_image_but_is_no_data():
    names = "\n".join(f"  - P01-{number:06}.tif" for number in range(100_000))
    assert len(read(f"dataset_config:\n  images:\n{names}")[0]["images"]) == 100_000
    with pytest.raises(ConfigurationError, match="5,000,000 bytes, too many for a configuration"):
        read(bytes(5_000_000))


CALL = "!!python/object/apply:os.system ['touch owned']"
INVALID_YAML = {
    "a Python call": f"dataset_config: {CALL}",
    "a Python call in a key": f"dataset_config: {{? {CALL} : 1}}",
    "a Python call elsewhere": f"dataset_config: {{}}\nother: {CALL}",
    "nested without end": "dataset_config: " + "[" * 20_000,
    "a huge integer": f"dataset_config: {{target_size: [{'9' * 5000}, 9]}}",
    "a date that is none": "dataset_config: {target_size: 2001-99-99}",
    "a truth value by force": "dataset_config: {target_size: !!bool perhaps}",
    "not UTF-8": b"dataset_config: \xff\xfe\x00",
    "several documents": "dataset_config: {target_size: [9, 9]}\n---\nx: 1",
    "a list": "- dataset_config",
    "a section that is a text": "dataset_config: target_size",
}


@pytest.mark.parametrize("what", INVALID_YAML)
def test_invalid_yaml_is_one_error_and_executes_nothing(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        read(INVALID_YAML[what])
    assert str(caught.value).startswith("gs://bucket/config.yaml") and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("size", ["[96.0, 64.]", "['96', '64']", "96 x 64", "96, 64", "'(96,64)'", "[96, '64']"])
def test_a_target_size_in_another_form_is_named_with_what_to_write(size):
    with pytest.raises(ConfigurationError, match=r"needs target_size: .*: write target_size: \[96, 64\]"):
        target_size(f"dataset_config:\n  target_size: {size}")


@pytest.mark.parametrize("seed", ["many", -1, 2**32, 1.0, float("nan"), True, [1]])
def test_shuffle_seeds_of_a_wrong_type(seed):
    with pytest.raises(ConfigurationError, match=r"shuffle seed .* in the model's config.yaml must be an integer"):
        configuration.subset_seed({"validation_data_shuffle_seed": seed}, "validation", None)


def test_the_seed_is_the_users_else_the_configured_else_a_fixed_one():
    config = {"validation_data_shuffle_seed": 3, "test_data_shuffle_seed": 4}
    asked = ("validation", 0), ("test", None), ("train", None)
    seeds = [configuration.subset_seed(config, split, seed) for split, seed in asked]
    assert seeds == [0, 4, configuration.SUBSET_SEED]
