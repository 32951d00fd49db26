"""What goes back: the table and the sentences on the screen, the curves as data, the git hash, and the upload."""

import csv
import io
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from test_figures import NOTHING, result, stack

import results
from confidence import Blocks, GuaranteedRecall
from errors import BucketError
from gcp_utils import open_bucket
from models import class_metric

IOU, LIMITED = class_metric("iou_score"), class_metric("precision_at_recall_0.9")
KEPT = GuaranteedRecall(0.9, 11, None, 0.2, 0.5, 0.976)


# The screen


@pytest.mark.parametrize("metric", ["iou_score", "balanced_accuracy", "precision_at_recall_0.9"])
def test_the_table_of_three_classes_fits_a_terminal_and_its_columns_are_straight(metric):
    unclear = {"gain_interval": (-0.512, 0.487), "x_interval": (0.581, 0.62), "worth": 4.6}
    folders = "裂纹", "m" * 60, "e\N{COMBINING ACUTE ACCENT}"
    lines = results.table(
        [result(f"class{i}", folder, x=0.6, **unclear) for i, folder in enumerate(folders)], class_metric(metric)
    )
    assert max(len(line.replace("\N{COMBINING ACUTE ACCENT}", "")) for line in lines) <= 80
    before = [line.partition("0.581")[0] for line in lines if "0.581 to 0.620" in line]
    # In columns of a terminal, a Chinese character takes two, and an accent none.
    assert len(before[0]) + 2 == len(before[1]) == len(before[2]) - 1


def test_the_table_says_what_is_known():
    shown = result(x_interval=(0.41, 0.59), gain=0.04, gain_interval=(-0.12, 0.2), worth=4.61)
    few = result("class1", **NOTHING | {"why_no_next_stack": "too few stacks"})
    runs = result("class2", worth=9.9, **NOTHING)
    text = "\n".join(results.table([shown, few, runs], IOU))
    for words in ("0.41 to 0.59", "0.48 to 0.96", "+0.04\n", "class0: 11 stacks, worth 4.6", "these are runs"):
        assert words in text
    assert text.count("worth") == text.count("(unclear)") == text.count("No range") == 1


def test_numbers_have_the_digits_that_their_interval_carries():
    assert results.number_text(0.86991, (0.8362, 0.8963)) == "0.870"
    assert results.interval_text((0.8362, 0.8963)) == "0.836 to 0.896"
    assert results.interval_text((0.1, 0.9)) == "0.10 to 0.90"
    assert results.interval_text((0.4, 0.4)) == "0.4000 to 0.4000"
    assert (results.number_text(0.5, None), results.interval_text(None)) == ("0.5000", "-")
    assert results.interval_text((1e-7, 0.3), results.threshold_text) == "1e-07 to 0.30"


def test_a_threshold_as_text_is_never_0_or_1():
    for threshold in (2.0**-40, 1.234e-6, 0.0123, 0.98765, 0.9999, 1 - 2.0**-24):
        shown = float(results.threshold_text(threshold, 2))
        assert abs(shown - threshold) <= 0.06 * min(threshold, 1 - threshold)


def test_what_the_screen_says_of_a_class():
    level = {"constraint_value": 0.9004, "constraint_interval": (0.81, 0.96), "gain": None, "gain_interval": None}
    limited = result(guaranteed=KEPT, **level)
    told = "\n".join(results.explanations(limited, LIMITED))
    assert "recall is 0.90 here (95 % interval 0.81 to 0.96): 0.9 was asked for" in told
    for words in ("0.5 does not reach", "0.20000 guarantees recall 0.9 ", "keeps recall 0.976", "precision 0.500"):
        assert words in told
    (warned,) = results.doubts(limited, LIMITED)
    assert "new images may miss the 0.9 of recall that was asked for" in warned
    safe = result(constraint_value=0.95, constraint_interval=(0.91, 0.98))
    assert results.doubts(safe, LIMITED) == []

    nothing = GuaranteedRecall(0.9, 3, "S7 loses too much")
    sentences = results.doubts(result(guaranteed=nothing, warned=["doubtful"], **NOTHING), IOU)
    assert [sentence.rpartition(": ")[2] for sentence in sentences] == ["doubtful", "too few stacks", nothing.reason]
    (unclear,) = results.doubts(result(gain_interval=(-0.83, 0.22)), IOU)
    assert "not shown to be better than 0.5 (-0.83 to +0.22" in unclear
    assert results.doubts(result(), IOU) == results.explanations(result(), IOU) == []


def test_the_stack_that_moves_a_result_is_named():
    intervals = {"x_interval": (0.55, 0.65), "metric_interval": (0.7, 0.9)}
    little = stack("S1", 0.5, 0.5, x_without=0.64, metric_without=0.81)
    much = stack("S2", 0.5, 0.5, x_without=0.6, metric_without=0.92)
    assert results.influence([result(stacks=[little._replace(x_without=0.62)], **intervals)]) == []
    (sentence,) = results.influence([result(stacks=[little, much], **intervals), result(stacks=[much], **NOTHING)])
    for words in ("class0 (class_0)", "S2", "0.60", "0.92 instead of 0.80"):
        assert words in sentence


def test_where_intervals_come_from_and_what_a_training_split_is_worth():
    blocks = Blocks(None, 11, "stacks", [], "further stacks like these 11", [])
    assert all(words in results.what_intervals_rest_on(blocks) for words in ("how 11 stacks", blocks.speaks_of))
    assert "No intervals" in results.what_intervals_rest_on(Blocks(None, 3, "stacks", [], "none", []))
    assert results.about_split("dataset-a/train") and not results.about_split("dataset-train/validation")


# Tables as data


def test_the_curves_as_data_go_as_far_as_the_threshold_and_have_a_band_where_it_is_known():
    near_zero, unknown = result(folder="a, b", x=3e-8), result("class1", "裂纹", **NOTHING)
    found = list(csv.DictReader(io.StringIO(results.curves_csv([near_zero, unknown]).decode())))
    for shown, lowest in ((near_zero, 3e-9), (unknown, 1e-6)):
        of_class = [row for row in found if row["class"] == shown.name]
        assert {row["folder"] for row in of_class} == {shown.folder} and "0.5" in [row["threshold"] for row in of_class]
        assert [float(row["threshold"]) for row in of_class if row["trained"] == "1"] == [shown.trained.x]
        assert lowest <= float(of_class[0]["threshold"]) < 2 * lowest
        assert all((row["band_low"] == "") == (shown is unknown) for row in of_class)


# The git hash


def test_the_git_hash_is_of_a_checkout_even_of_another_user_or_from_a_file_or_none(copied_script):
    folder = copied_script.parent

    def git_hash():
        program = "import results; print(results.git_hash())"
        environment = {**os.environ, "SUDO_UID": ""}
        return subprocess.check_output([sys.executable, "-c", program], cwd=folder, text=True, env=environment).strip()

    def git(*command):
        return subprocess.check_output(["git", "-C", folder, *command], text=True).strip()

    assert git_hash() == "None"
    (folder / ".git_hash").write_text("0123abc-dirty\n")
    assert git_hash() == "0123abc-dirty"
    git("init", "--quiet")
    git("add", "*.py")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "all")
    head = git("rev-parse", "HEAD")
    if os.getuid() == 0:
        for path in (folder, folder / ".git"):
            shutil.chown(path, 12345)
    assert git_hash() == head
    (folder / "chunks.py").write_text("edited")
    assert git_hash() == f"{head}-dirty"


# The upload

FILES = {".png": b"new", "_curves.csv": b"new"}


def upload(bucket, folder):
    return results.upload(bucket, "m", {"metadata": {"created_datetime": None, "run_id": "0a1b"}}, FILES, folder)


def test_a_result_takes_the_next_free_second_without_waiting_and_overwrites_nothing(tmp_path):
    bucket, folder = open_bucket(str(tmp_path), tmp_path / "objects"), tmp_path / "models/m"
    folder.mkdir(parents=True)
    now = int(time.time())
    taken = []
    for second in range(91):  # as after a clock that was set back
        stem = f"model_thresholds_{datetime.fromtimestamp(now + second, UTC):%Y%m%dT%H%M%SZ}"
        taken.append(folder / f"{stem}{('.png', '_curves.csv', '.yaml')[second % 3]}")
        taken[-1].write_text("mine")
    path = tmp_path / upload(bucket, tmp_path / "kept")
    assert {path.read_text() for path in taken} == {"mine"}
    created = yaml.safe_load(path.read_text())["metadata"]["created_datetime"]
    assert created == f"{datetime.fromtimestamp(now + 91, UTC):%Y%m%dT%H%M%SZ}"
    assert path.name == f"model_thresholds_{created}.yaml"
    for ending, content in FILES.items():
        assert path.with_name(path.name.replace(".yaml", ending)).read_bytes() == content
    assert not (tmp_path / "kept").exists()


class FullBucket:
    """A bucket that takes one file and refuses the next."""

    def __init__(self):
        self.created = []

    def url(self, name):
        return f"gs://full/{name}"

    def create(self, name, data):
        self.created.append(name)
        if len(self.created) > 1:
            raise BucketError("no permission")


def test_a_failed_upload_keeps_the_result_and_says_how_to_upload_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bucket = FullBucket()
    with pytest.raises(BucketError, match=r"no permission; .* gcloud storage cp .*gs://full/models/m/$") as caught:
        upload(bucket, Path("results"))
    assert [name.rpartition("Z")[2] for name in bucket.created] == [".png", "_curves.csv"]  # the YAML comes last
    kept = Path(str(caught.value).split("kept in ")[1].split(",")[0])
    assert not kept.is_absolute()
    assert {path.name.rpartition("Z")[2] for path in kept.iterdir()} == {".png", "_curves.csv", ".yaml"}

    Path("models").touch()
    with pytest.raises(BucketError, match="no permission; the result cannot be kept in models/0a1b either"):
        upload(FullBucket(), Path("models"))
    with pytest.raises(BucketError, match=r"cannot be written.* upload it with: cp -n here/0a1b/\* models/m$"):
        upload(open_bucket(".", None), Path("here"))
