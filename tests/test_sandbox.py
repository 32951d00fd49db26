"""The sandbox is a bucket like those of users, the documented commands work on it, and its build may be interrupted."""

import re
import sys

import build_sandbox
import numpy as np
import pytest
import yaml
from build_sandbox import DATASET_ID, MODEL_ID, ROOT
from fake_gcs import get_object, list_objects
from helpers import ENDINGS, assert_done, finish, start_program, thresholds, upload
from PIL import Image

SPLITS = ("train", "validation", "test")
CLASSES = ("class_0", "class_1", "class_2")


def read_folder(folder):
    """File name -> pixels."""
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


def test_each_image_has_a_mask_of_each_class_and_splits_share_no_slice(sandbox):
    dataset, images = sandbox / "datasets" / DATASET_ID, {}
    width, height = yaml.safe_load((dataset / "config.yaml").read_text())["dataset_config"]["target_size"]
    assert width != height  # otherwise no test would notice if the two were swapped
    for split in SPLITS:
        own = read_folder(dataset / split / "images")
        assert {(image.shape, image.dtype.name) for image in own.values()} == {((height, width), "uint8")}
        masks = [read_folder(dataset / split / "masks" / name) for name in CLASSES]
        for of_class in masks:
            assert of_class.keys() == own.keys()
            assert set(np.unique(list(of_class.values()))) == {0, 1}
        grey, white, boundary = (np.stack(list(of_class.values())).astype(bool) for of_class in masks)
        assert not (grey & white).any() and not (boundary & ~grey & ~white).any()
        image = np.stack(list(own.values()))
        assert image[white].mean() > image[grey].mean() > image[~grey & ~white].mean()
        assert not images.keys() & own.keys()
        images |= own
    assert len({name.rpartition("-")[2] for name in images}) == len(images)
    with_something = [pixels.tobytes() for pixels in images.values() if pixels.any()]
    assert len(set(with_something)) == len(with_something) > 700


def test_the_documented_commands_work_as_written(sandbox, server, tmp_path):
    upload(server, sandbox, "sandbox")
    before = set(list_objects(server, "sandbox"))
    commands = re.findall(
        r"(?m)^python3 (train_\S+\.py) (--gcp-bucket gs://sandbox .*)$", (ROOT / "README.md").read_text()
    )
    assert len(commands) == 2
    for script, words in commands:
        words = words.split()
        split, part = words[3], float(words[-1])
        environment = {"STORAGE_EMULATOR_HOST": server}
        process = finish(start_program(sys.executable, ROOT / script, *words, cwd=tmp_path, environment=environment))
        assert_done(process)
        url = re.search(r"(?m)^Result: (.+)$", process.stdout)[1]
        assert url.startswith(f"gs://sandbox/models/{MODEL_ID}/model_thresholds_")
        result = yaml.safe_load(get_object(server, "sandbox", url.removeprefix("gs://sandbox/")))
        total = len(list((sandbox / "datasets" / split / "images").iterdir()))
        assert result["metadata"]["num_images"] == int(np.ceil(part * total)) >= 20
        assert set(thresholds(result)) == {"class0", "class1", "class2"}
    after = set(list_objects(server, "sandbox"))
    assert before < after
    assert sorted(re.sub(r".*_\d{8}T\d{6}Z", "", name) for name in after - before) == sorted(2 * ENDINGS)


def test_a_folder_is_built_anew_when_its_configuration_changed_and_completely_or_not_at_all(tmp_path):
    dataset, model, config = tmp_path / "bucket/datasets/d", tmp_path / "bucket/models/m", tmp_path / "config.yaml"
    model.mkdir(parents=True)

    def write_value(folder, config):
        (folder / "value").write_text(str(config["value"]))
        if config["value"] == 2:
            raise KeyboardInterrupt

    config.write_text("value: 1\n")
    assert build_sandbox.build(dataset, config, write_value)
    assert not build_sandbox.build(dataset, config, write_value, outdates=model)
    config.write_text("value: 2\n")
    with pytest.raises(KeyboardInterrupt):
        build_sandbox.build(dataset, config, write_value, outdates=model)
    assert (dataset / "value").read_text() == "1" and model.exists()
    config.write_text("value: 3\n")
    assert build_sandbox.build(dataset, config, write_value, outdates=model)
    assert (dataset / "value").read_text() == "3"
    assert not model.exists()  # what was made from the old one
