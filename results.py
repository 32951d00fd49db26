"""The result: the content of the YAML, what the screen shows, tables as data, and publishing without overwriting."""

import csv
import io
import math
import os
import platform
import shlex
import shutil
import subprocess
import time
import unicodedata
import uuid
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import yaml

import models
import network
import terminal
from confidence import FEWEST_BLOCKS, LEVEL, REPLICATES, Confidence, GuaranteedRecall, StackResult
from counts import BLOCK_STEP, BLOCK_THRESHOLDS, THRESHOLDS
from errors import BucketError, printable

CURVE_STEP = 2  # the file of the curves has a row for every second of BLOCK_THRESHOLDS; 0.5 is one of them
LOWEST_IN_CURVES = 1e-6  # and none below, except where the trained threshold is near
TABLE_WIDTH = 80
UNSIGNED, SIGNED = "{:.{}f}".format, "{:+.{}f}".format
UNEQUAL = 0.8  # stacks worth less than this part of their number weigh too differently to count them only

# What the field calls a metric, on axes and in the table; the others go by their own names.
LABELS = {
    "iou_score": "IoU",
    "f1_score": "F1",
    "f2_score": "F2",
    "binary_accuracy_tfkeras": "accuracy",
    "binary_accuracy_sm": "accuracy",
    "balanced_accuracy": "balanced acc.",
    "matthews_corrcoef": "MCC",
}


class ClassResult(NamedTuple):
    """The result for one class."""

    name: str  # class0, class1, ...
    folder: str  # of its masks
    trained: models.TrainedThreshold
    curve: models.ClassCurve
    confidence: Confidence
    guaranteed_recall: GuaranteedRecall | None  # None unless the metric asks for a recall
    stacks: list  # of confidence.StackResult, worst first
    kind: str = "stacks"  # of the blocks, as in confidence.Blocks

    @property
    def title(self):
        return f"{self.name} ({self.folder})"

    @property
    def worth(self):
        """How many equal stacks these are worth, in words; None where they are worth about their number."""
        number, worth = self.confidence.blocks, self.confidence.worth
        if worth is None or worth >= UNEQUAL * number:
            return None
        return f"{number} {self.kind}, worth {worth:.1f}"


# ---------------------------------------------------------------------------------------------------------------
# The YAML


def describe(arguments, inputs, counts, results, started, warnings):
    """The content of the YAML, in plain Python values; `publish` sets its created_datetime.

    `arguments` is the command line by name, `inputs` the entry script's Inputs, `counts` a counts.Counts, `results` a
    list of ClassResult, `started` the `time.monotonic()` at the beginning, `warnings` every warning that was shown.
    """
    metric = arguments["optimizing_class_metric"].name
    return {
        "final_trained_prediction_thresholds": {result.name: result.trained.x for result in results},
        "metadata": {
            "message": arguments["message"],
            "gcp_bucket": arguments["gcp_bucket"],
            "created_datetime": None,
            "run_id": uuid.uuid4().hex,
            "num_classes": len(results),
            "target_size": inputs.target_size,
            "git_hash": git_hash(),
            "elapsed_minutes": round((time.monotonic() - started) / 60, 2),
            "dataset_directory": arguments["dataset_directory"],
            "model_id": arguments["model_id"],
            "batch_size": arguments["batch_size"],
            "dataset_config": inputs.dataset_config,
            "train_config": inputs.train_config,
            "num_images": counts.images,
            "num_pixels": int(counts.histogram[0].sum()),
            "subset_seed": inputs.seed,
            "class_folders": {result.name: result.folder for result in results},
            "warnings": warnings,
            "thresholds_training_configuration": {
                "opt_bounds": models.OPT_BOUNDS,
                "opt_method": models.OPT_METHOD,
                "opt_tol": models.OPT_TOL,
                "opt_options": models.OPT_OPTIONS,
                "opt_class_metric": metric,
                "opt_dataset_generator": arguments["dataset_directory"],
                "opt_dataset_downsample_factor": arguments["dataset_downsample_factor"],
            },
            "thresholds_training_output": {result.name: _describe_class(result, metric) for result in results},
            "thresholds_training_history": {
                result.name: {f"{n}_threshold_metric": point for n, point in enumerate(result.trained.history)}
                for result in results
            },
            "counted_with": counts.counted_with,
            "confidence": {
                "level": LEVEL,
                "replicates": REPLICATES,
                "blocks": inputs.blocks.number,
                "kind_of_blocks": inputs.blocks.kind,
                "speaks_of": inputs.blocks.speaks_of,
            },
            "random-module-global-seed": arguments["random_module_global_seed"],
            "numpy_random_global_seed": arguments["numpy_random_global_seed"],
            "tf_random_global_seed": arguments["tf_random_global_seed"],
        },
        "metadata_system": {
            "System_info": {
                "platform": platform.platform(),
                "machine": platform.machine(),
                "cpu_count": os.cpu_count(),
                "python": platform.python_version(),
            },
            "Lib_versions_info": network.versions(),
        },
    }


def _describe_class(result, metric_name):
    trained, confidence, guaranteed = result.trained, result.confidence, result.guaranteed_recall
    return {
        "x": trained.x,
        "success": trained.success,
        "status": trained.status,
        "message": trained.message,
        "nfev": trained.nfev,
        "fun": 1 - trained.metric,
        "metric": trained.metric,
        "metric_at_half": trained.metric_at_half,
        "gain": confidence.gain,
        "gain_unclear": confidence.gain_unclear,
        "expected_metric": confidence.expected_metric,
        "x_confidence_interval": confidence.x_interval,
        "metric_confidence_interval": confidence.metric_interval,
        "gain_confidence_interval": confidence.gain_interval,
        "next_stack_interval": confidence.next_stack_interval,
        "why_no_next_stack": confidence.why_no_next_stack,
        "constraint_value": confidence.constraint_value,
        "constraint_confidence_interval": confidence.constraint_interval,
        "blocks": confidence.blocks,
        "worth": confidence.worth,
        "why_no_interval": confidence.reason,
        "guaranteed_recall": None if guaranteed is None else asdict(guaranteed),
        "equally_good_thresholds": trained.best_stretch,
        "warnings": warnings(result, metric_name),
    }


def git_hash():
    """The commit of this file's checkout, or of the copy that was sent to a VM; None elsewhere.

    It ends with `-dirty` if a tracked file was edited.
    """
    here = Path(__file__).resolve().parent
    # A checkout of another user: whoever runs its Python trusts it already.
    git = ["git", "-c", "safe.directory=*", "-C", here]
    try:
        if (here / ".git").exists():
            command = [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
            return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()
        return (here / ".git_hash").read_text().strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class PlainDumper(yaml.CSafeDumper):
    """Writes equal values in full each time, because people find anchors and aliases hard to read."""

    def ignore_aliases(self, data):
        return True

    def represent_text(self, text):  # libyaml refuses half of a surrogate pair, as in a message that is not UTF-8
        return self.represent_str(text.encode(errors="backslashreplace").decode())


PlainDumper.add_representer(str, PlainDumper.represent_text)


def to_yaml(content):
    """YAML of plain Python values, with escapes for characters that steer a terminal."""
    return yaml.dump(content, Dumper=PlainDumper, sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------------------------------------------------------
# What the screen shows


def what_intervals_rest_on(blocks):
    """A sentence that says where the intervals of a run come from; `blocks` is a confidence.Blocks."""
    if blocks.number < FEWEST_BLOCKS:
        return f"No intervals: they would come from {blocks.number} {blocks.kind} only, and {FEWEST_BLOCKS} are needed."
    return (
        f"The 95 % intervals are computed from how {blocks.number} {blocks.kind} differ. They hold for "
        f"{blocks.speaks_of}."
    )


def label(metric_name):
    """What axes and table call a metric: IoU for iou_score, precision for precision_at_recall_0.95."""
    value = metric_name.partition("_at_")[0]
    return LABELS.get(value, value)


def table(results, metric_name):
    """The lines of the table: two for each class, values in the first and 95 % intervals in the second."""
    rows = [
        ("class", "threshold", label(metric_name), "expected", "next stack", "gain"),
        ("(folder)", "95 % interval", "95 % interval", "", "95 % range", "over 0.5"),
        *(row for result in results for row in _rows(result)),
    ]
    others = sum(max(map(columns, column)) + 2 for column in list(zip(*rows, strict=True))[1:])
    rows = [(shortened(first, max(TABLE_WIDTH - others, 9)), *cells) for first, *cells in rows]
    widths = [max(map(columns, column)) for column in zip(*rows, strict=True)]
    without = (result.confidence for result in results if result.confidence.why_no_next_stack)
    reasons = dict.fromkeys(of.why_no_next_stack for of in without if of.why_no_next_stack != of.reason)
    return [
        "",
        f"Best thresholds for {metric_name}:",
        "",
        *("  ".join(map(_filled, row, widths)).rstrip() for row in rows),
        "",
        "Intervals and expected values are for all pixels of new images together,",
        "the range of the next stack is for one new stack on its own.",
        *(f"No range for the next stack: {reason}" for reason in reasons),
        *(f"{result.name}: {result.worth} of equal weight" for result in results if result.worth),
        "",
    ]


def _rows(result):
    """The two rows of a class in the table."""
    trained, confidence = result.trained, result.confidence
    threshold, its_interval = texts(trained.x, confidence.x_interval, threshold_text)
    value, interval = texts(trained.metric, confidence.metric_interval)
    expected, _ = texts(confidence.expected_metric, confidence.metric_interval)
    _, next_stack = texts(None, confidence.next_stack_interval)
    gain, _ = texts(confidence.gain, confidence.gain_interval, SIGNED)
    unclear = "(unclear)" * confidence.gain_unclear
    return [
        (result.name, threshold, value, expected, "", gain),
        (f"({result.folder})", its_interval, interval, "", next_stack, unclear),
    ]


def _filled(cell, width):
    return cell + " " * (width - columns(cell))


def texts(value, limits, form=UNSIGNED):
    """A value and its interval as two texts, with as many decimals as the interval carries; "-" for None.

    `form` takes a number and the number of decimals, and gives a text.
    """
    decimals = 4
    if limits is not None and limits[0] < limits[1]:
        decimals = min(max(1 - math.floor(math.log10(limits[1] - limits[0])), 2), 6)  # two digits of the width
    return (
        "-" if value is None else form(value, decimals),
        "-" if limits is None else " to ".join(form(limit, decimals) for limit in limits),
    )


def threshold_text(threshold, decimals=5):
    """A threshold in (0, 1) as text; near 0 or 1 with more decimals, which show the distance to it."""
    if threshold < 0.001:
        return f"{threshold:.3g}"
    return f"{threshold:.{max(decimals, 1 - math.floor(math.log10(min(threshold, 1 - threshold))))}f}"


def columns(text):
    """How many columns of a terminal the text takes: Chinese characters take two, combining accents none."""
    return sum((1 + (unicodedata.east_asian_width(c) in "WF")) * (not unicodedata.combining(c)) for c in text)


def shortened(text, room, width_of=columns):
    """The text without its middle where it is wider than `room`; what steers a terminal is escaped."""
    cut = text = printable(text)
    length = len(text)
    while width_of(cut) > room and length > 1:
        length -= 1
        cut = f"{text[: (length + 1) // 2]}…{text[len(text) - length // 2 :]}"
    return cut


def about_split(dataset_directory):
    """A list with a warning for a split on which, by its name, the network was trained; else an empty list."""
    if dataset_directory.rpartition("/")[2].lower() not in ("train", "training"):
        return []
    return [
        f"{dataset_directory}: the network was trained on these images. What it reaches here says nothing about other "
        "images, and the thresholds may not suit them: take validation or test"
    ]


def _reached(result, metric):
    """What the metric's constraint demands, as the images at hand have it: the beginning of a sentence."""
    value, interval = texts(result.confidence.constraint_value, result.confidence.constraint_interval)
    return f"{result.title}: {metric.constraint_name} is {value} here (95 % interval {interval})"


def _may_miss(result, metric):
    interval = result.confidence.constraint_interval
    return interval is not None and interval[0] < metric.level


def remarks(result, metric_name):
    """Sentences that explain the numbers of a class in the table."""
    sentences, guaranteed, metric = [], result.guaranteed_recall, models.class_metric(metric_name)
    if metric.constraint and not _may_miss(result, metric):
        sentences.append(f"{_reached(result, metric)}: {float(metric.level):g} was asked for")
    if not result.trained.allowed_at_half:
        sentences.append(
            f"{result.title}: 0.5 does not reach the level that was asked for, so there is no gain over it"
        )
    if guaranteed and guaranteed.threshold is not None:
        sentences.append(
            f"{result.title}: threshold {threshold_text(guaranteed.threshold)} guarantees recall "
            f"{guaranteed.level:g} on average over new {result.kind} with the class. The price: to be safe with "
            f"{guaranteed.blocks} {result.kind}, it keeps recall {guaranteed.recall:.3f} here, at precision "
            f"{guaranteed.precision:.3f}"
        )
    return sentences


def warnings(result, metric_name):
    """Sentences that warn of relying on the numbers of a class in the table."""
    confidence, guaranteed, metric = result.confidence, result.guaranteed_recall, models.class_metric(metric_name)
    sentences = list(result.trained.warnings)
    if confidence.reason:
        sentences.append(f"{result.title}: no interval can be given: {confidence.reason}")
    if confidence.gain_unclear:
        _, interval = texts(None, confidence.gain_interval, SIGNED)
        sentences.append(f"{result.title}: not shown to be better than 0.5 ({interval} in {label(metric_name)})")
    if _may_miss(result, metric):
        sentences.append(
            f"{_reached(result, metric)}: new images may miss the {float(metric.level):g} that was asked for, as they "
            "do for about half of the thresholds chosen so"
        )
    if guaranteed and guaranteed.threshold is None:
        sentences.append(f"{result.title}: no recall can be guaranteed: {guaranteed.reason}")
    return sentences


def influence(results):
    """A sentence for each class where one stack alone moves threshold or metric by more than half of its interval."""
    sentences = []
    for result in results:
        trained, confidence = result.trained, result.confidence
        known = [stack for stack in result.stacks if stack.x_without is not None and not confidence.reason]
        stack = max(known, key=lambda stack, result=result: _shift(result, stack), default=None)
        if stack and _shift(result, stack) > 0.5:
            x, x_before = (texts(of, confidence.x_interval, threshold_text)[0] for of in (stack.x_without, trained.x))
            at_x, before = (texts(of, confidence.metric_interval)[0] for of in (stack.metric_without, trained.metric))
            sentences.append(
                f"{result.title}: much of this result comes from {stack.stack} alone: without it the threshold is {x} "
                f"instead of {x_before}, and the metric {at_x} instead of {before}"
            )
    return sentences


def _shift(result, stack):
    """How far the result of a class moves without a stack: the larger of two shifts, in widths of their intervals."""
    trained, confidence = result.trained, result.confidence
    of_x, of_metric = (max(high - low, 1e-9) for low, high in (confidence.x_interval, confidence.metric_interval))
    return max(abs(stack.x_without - trained.x) / of_x, abs(stack.metric_without - trained.metric) / of_metric)


# ---------------------------------------------------------------------------------------------------------------
# Tables as data


def curves_csv(results):
    """The curves as CSV: for each class a row per threshold, at some 800 thresholds and the trained one.

    `trained` is 1 in the row of the trained threshold. The limits of the 95 % band of the metric that was optimised are
    empty where there is none. Returns bytes.
    """
    header = ["class", "folder", "threshold", "trained", "tp", "fp", "fn", "tn"]
    rows = [[*header, *models.CLASS_METRICS, "band_low", "band_high"]]
    for result in results:
        limits = _band_limits(result)
        indices = sorted(limits)
        counts = [count[indices] for count in (result.curve.tp, result.curve.fp, result.curve.fn, result.curve.tn)]
        metrics = [metric(*counts) for metric in models.CLASS_METRICS.values()]
        numbers = zip(*(column.tolist() for column in (*counts, *metrics)), strict=True)
        for index, of_threshold in zip(indices, numbers, strict=True):
            first = result.name, result.folder, float(THRESHOLDS[index]), int(index == result.trained.index)
            rows.append([*first, *of_threshold, *(limits[index] or ("", ""))])
    return _csv(rows)


def _band_limits(result):
    """(low, high) of the 95 % band by index into THRESHOLDS, for all rows of a class; None where there is no band."""
    trained, confidence = result.trained, result.confidence
    lowest = min(LOWEST_IN_CURVES, trained.x / 10)
    coarse = [j for j in range(0, len(BLOCK_THRESHOLDS), CURVE_STEP) if BLOCK_THRESHOLDS[j] >= lowest]
    limits = dict.fromkeys(j * BLOCK_STEP for j in coarse)
    if confidence.band_low is not None:
        limits = {j * BLOCK_STEP: (float(confidence.band_low[j]), float(confidence.band_high[j])) for j in coarse}
    return limits | {trained.index: confidence.metric_interval}


def stacks_csv(results):
    """What each stack does at the trained threshold, and without it, as CSV: a row for each class and stack; bytes."""
    rows = [["class", "folder", *StackResult._fields]]
    for result in results:
        rows += [[result.name, result.folder, *stack] for stack in result.stacks]
    return _csv(rows)


def _csv(rows):
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue().encode(errors="backslashreplace")


# ---------------------------------------------------------------------------------------------------------------
# Publishing


def publish(bucket, model_id, description, files, folder):
    """Upload the files, then the YAML, under a timestamp that no other result has: now, or the next free second.

    All of it is written to the disk before the first upload, and is left there if an upload fails. The YAML is uploaded
    last, so that there is never a YAML without its figures. A full disk is only a warning.

    Parameters
    ----------
    bucket : as gcp_utils.open_bucket gives
    model_id : str
    description : dict
        From `describe`; its created_datetime is set here.
    files : dict of str to bytes
        The other files, by the end of their names, as in "_slices.png".
    folder : Path
        The folder on the disk.

    Returns
    -------
    str
        The name of the YAML in the bucket.

    Raises
    ------
    BucketError
        Not all could be uploaded; the message says where the result is kept and how to upload it.
    """
    created = datetime.now(UTC)
    while True:
        timestamp = f"{created:%Y%m%dT%H%M%SZ}"
        description["metadata"]["created_datetime"] = timestamp
        stem = f"model_thresholds_{timestamp}"
        files = {**files, ".yaml": to_yaml(description).encode()}
        if _upload(bucket, model_id, {stem + ending: content for ending, content in files.items()}, folder):
            return f"models/{model_id}/{stem}.yaml"
        created += timedelta(seconds=1)


def _upload(bucket, model_id, contents, folder):
    """Create the files, in this order, in the model's folder; False if another run has taken one of their names."""
    staged = _stage(contents, folder)
    try:
        for name, content in contents.items():
            bucket.create(f"models/{model_id}/{name}", content)
        free = True
    except FileExistsError:
        free = False
    except BucketError as error:
        raise BucketError(_kept(error, staged, bucket, model_id)) from error
    if staged:
        shutil.rmtree(staged, ignore_errors=True)
    return free


def _kept(error, staged, bucket, model_id):
    if not staged:
        return str(error)
    copy = "gcloud storage cp --no-clobber" if bucket.url("").startswith("gs://") else "cp -n"
    target = shlex.quote(bucket.url(f"models/{model_id}/"))
    return f"{error}; the result is kept in {staged}, upload it with: {copy} {staged}/* {target}"


def _stage(contents, folder):
    """Write the files into a new folder in `folder` and return it; where that fails, warn and return None."""
    staged = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (staged := folder / uuid.uuid4().hex).mkdir()
        for name, content in contents.items():
            (staged / name).write_bytes(content)
    except OSError as error:
        terminal.warn(
            f"no copy of the result can be kept in {folder} ({error.strerror or error}): make room there, or make it "
            "writable; the result is uploaded nevertheless"
        )
        if staged:
            shutil.rmtree(staged, ignore_errors=True)
        return None
    return staged
