"""The result: the content of the YAML, what the screen shows, tables as data, and an upload that overwrites nothing."""

import csv
import io
import math
import os
import platform
import shlex
import subprocess
import time
import unicodedata
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

import models
import network
from confidence import FEWEST_BLOCKS, LEVEL, REPLICATES, Confidence, GuaranteedRecall, StackResult
from counts import BLOCK_STEP, THRESHOLDS
from errors import BucketError

IN_CURVES = range(0, len(THRESHOLDS), 4 * BLOCK_STEP)  # indices of the rows in the file of the curves; 0.5 is one
LOWEST_IN_CURVES = 1e-6  # of the rows; a tenth of the trained threshold, where that is lower
TABLE_WIDTH = 80
UNEQUAL = 0.8  # where stacks are worth less than this part of their number, the screen says what they are worth

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
    kind: str  # of the blocks, as in confidence.Blocks

    @property
    def title(self):
        return f"{self.name} ({self.folder})"

    @property
    def worth_text(self):
        """How many equal stacks these are worth, in words; None where they are worth about their number."""
        number, worth = self.confidence.blocks, self.confidence.worth
        return f"{number} {self.kind}, worth {worth:.1f}" if worth and worth < UNEQUAL * number else None

    def x_text(self, value):
        """A threshold of this class as text, with the digits that the interval of x carries."""
        return number_text(value, self.confidence.x_interval, threshold_text)

    def metric_text(self, value):
        """The same for a metric."""
        return number_text(value, self.confidence.metric_interval)


# ---------------------------------------------------------------------------------------------------------------
# The YAML


def describe(arguments, inputs, counts, results, start, warned):
    """The content of the YAML, in plain Python values; `upload` sets its created_datetime.

    `arguments` is the command line by name, `inputs` the entry script's Inputs, `counts` a counts.Counts, `results` a
    list of ClassResult, `start` the `time.monotonic()` at the beginning, `warned` every warning that was shown.
    """
    metric = arguments["optimizing_class_metric"]
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
            "elapsed_minutes": round((time.monotonic() - start) / 60, 2),
            "dataset_directory": arguments["dataset_directory"],
            "model_id": arguments["model_id"],
            "batch_size": arguments["batch_size"],
            "dataset_config": inputs.dataset_config,
            "train_config": inputs.train_config,
            "num_images": counts.images,
            "num_pixels": int(counts.histogram[0].sum()),
            "subset_seed": inputs.seed,
            "class_folders": {result.name: result.folder for result in results},
            "warnings": warned,
            "thresholds_training_configuration": {
                "opt_bounds": models.OPT_BOUNDS,
                "opt_method": models.OPT_METHOD,
                "opt_tol": models.OPT_TOL,
                "opt_options": models.OPT_OPTIONS,
                "opt_class_metric": metric.name,
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
            "Lib_versions_info": network.library_versions(),
        },
    }


def _describe_class(result, metric):
    trained, confidence, guaranteed = result.trained, result.confidence, result.guaranteed_recall
    return {
        "x": trained.x,
        **trained.outcome,
        "nfev": len(trained.history),
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
        "why_no_interval": confidence.why_no_interval,
        "guaranteed_recall": None if guaranteed is None else guaranteed._asdict(),
        "equally_good_thresholds": trained.best_stretch,
        "warnings": doubts(result, metric),
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


# ---------------------------------------------------------------------------------------------------------------
# What the screen shows


def what_intervals_rest_on(blocks):
    """A sentence that says where the intervals from these confidence.Blocks come from."""
    if blocks.number < FEWEST_BLOCKS:
        return f"No intervals: they would come from {blocks.number} {blocks.kind} only, and {FEWEST_BLOCKS} are needed."
    return (
        f"The 95 % intervals are computed from how {blocks.number} {blocks.kind} differ. They hold for "
        f"{blocks.speaks_of}."
    )


def label(metric):
    """What axes and table call a ClassMetric: IoU for iou_score, precision for precision_at_recall_0.95."""
    value = metric.name.partition("_at_")[0]
    return LABELS.get(value, value)


def table(results, metric):
    """The lines of the table: two for each class, values in the first and 95 % intervals in the second."""
    rows = [
        ("class", "threshold", label(metric), "expected", "next stack", "gain"),
        ("(folder)", "95 % interval", "95 % interval", "", "95 % range", "over 0.5"),
        *(row for result in results for row in _rows(result)),
    ]
    names, *columns = zip(*rows, strict=True)
    columns = [_padded(column) for column in columns]
    room = max(TABLE_WIDTH - sum(2 + len(column[0]) for column in columns), 9)
    names = _padded([shortened(name, room) for name in names])
    intervals = [result.confidence for result in results]
    reasons = {one.why_no_next_stack for one in intervals} - {one.why_no_interval for one in intervals}
    return [
        "",
        f"Best thresholds for {metric.name}:",
        "",
        *("  ".join(row).rstrip() for row in zip(names, *columns, strict=True)),
        "",
        "Intervals and expected values are for all pixels of new images together,",
        "the range of the next stack is for one new stack on its own.",
        *(f"No range for the next stack: {reason}" for reason in sorted(reasons - {None})),
        *(f"{result.name}: {result.worth_text} of equal weight" for result in results if result.worth_text),
        "",
    ]


def _rows(result):
    """The two rows of a class in the table."""
    trained, confidence = result.trained, result.confidence
    columns = (
        (result.name, f"({result.folder})"),
        (result.x_text(trained.x), interval_text(confidence.x_interval, threshold_text)),
        (result.metric_text(trained.metric), interval_text(confidence.metric_interval)),
        (result.metric_text(confidence.expected_metric), ""),
        ("", interval_text(confidence.next_stack_interval)),
        (number_text(confidence.gain, confidence.gain_interval, signed), "(unclear)" * confidence.gain_unclear),
    )
    return zip(*columns, strict=True)


def _padded(cells):
    """The cells of a column of the table, all of the same width."""
    width = max(map(text_width, cells))
    return [cell + " " * (width - text_width(cell)) for cell in cells]


unsigned, signed = "{:.{}f}".format, "{:+.{}f}".format  # take a number and how many decimals to write, and give a text


def number_text(value, limits, form=unsigned):
    """A value as text, with the decimals that show two digits of the width of its interval; "-" for None.

    `form` is `unsigned`, `signed` or `threshold_text`.
    """
    if value is None:
        return "-"
    width = limits[1] - limits[0] if limits else 0
    return form(value, min(max(1 - math.floor(math.log10(width)), 2), 6) if width else 4)


def interval_text(limits, form=unsigned):
    """An interval as text, likewise."""
    return " to ".join(number_text(limit, limits, form) for limit in limits) if limits else "-"


def threshold_text(threshold, decimals=5):
    """A threshold in (0, 1) as text; near 0 or 1 with more decimals, which show the distance to it."""
    if threshold < 0.001:
        return f"{threshold:.3g}"
    return f"{threshold:.{max(decimals, 1 - math.floor(math.log10(min(threshold, 1 - threshold))))}f}"


def text_width(text):
    """How many columns of a terminal the text takes: Chinese characters take two, combining accents none."""
    return sum((1 + (unicodedata.east_asian_width(c) in "WF")) * (not unicodedata.combining(c)) for c in text)


def shortened(text, room, width_of=text_width):
    """The text without its middle where it is wider than `room`."""
    cut, kept = text, len(text)
    while width_of(cut) > room and kept > 1:
        kept -= 1
        cut = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return cut


def about_split(dataset_directory):
    """A list with a warning for a split on which, by its name, the network was trained; else an empty list."""
    if dataset_directory.rpartition("/")[2].lower() not in ("train", "training"):
        return []
    return [
        f"{dataset_directory}: the network was trained on these images. What it reaches here says nothing about other "
        "images, and the thresholds may not suit them: take validation or test"
    ]


def explanations(result, metric):
    """Sentences that explain the numbers of a class in the table."""
    confidence, guaranteed = result.confidence, result.guaranteed_recall
    sentences = []
    if metric.constraint:
        value, interval = confidence.constraint_value, confidence.constraint_interval
        sentences.append(
            f"{metric.constraint_name} is {number_text(value, interval)} here (95 % interval "
            f"{interval_text(interval)}): {metric.level:g} was asked for"
        )
    if confidence.gain is None:
        sentences.append("0.5 does not reach the level that was asked for, so there is no gain over it")
    if guaranteed and not guaranteed.reason:
        sentences.append(
            f"threshold {threshold_text(guaranteed.threshold)} guarantees recall {guaranteed.level:g} on average over "
            f"new {result.kind} with the class. The price: to be safe with {guaranteed.blocks} {result.kind}, it keeps "
            f"recall {guaranteed.recall:.3f} here, at precision {guaranteed.precision:.3f}"
        )
    return [f"{result.title}: {sentence}" for sentence in sentences]


def doubts(result, metric):
    """Sentences that warn of relying on the numbers of a class in the table."""
    confidence, guaranteed = result.confidence, result.guaranteed_recall
    sentences = []
    if confidence.why_no_interval:
        sentences.append(f"no interval can be given: {confidence.why_no_interval}")
    if confidence.gain_unclear:
        interval = interval_text(confidence.gain_interval, signed)
        sentences.append(f"not shown to be better than 0.5 ({interval} in {label(metric)})")
    if confidence.constraint_interval and confidence.constraint_interval[0] < metric.level:
        sentences.append(
            f"new images may miss the {metric.level:g} of {metric.constraint_name} that was asked for, as they do for "
            "about half of the thresholds chosen so"
        )
    if guaranteed and guaranteed.reason:
        sentences.append(f"no recall can be guaranteed: {guaranteed.reason}")
    return [*result.trained.warnings, *(f"{result.title}: {sentence}" for sentence in sentences)]


def influence(results):
    """A sentence for each class where one stack alone moves threshold or metric by more than half of its interval."""
    sentences = []
    for result in results:
        x, metric, confidence = result.trained.x, result.trained.metric, result.confidence
        if confidence.why_no_interval:
            continue
        of_x, of_metric = (max(high - low, 1e-9) for low, high in (confidence.x_interval, confidence.metric_interval))
        shifts = {
            stack: max(abs(stack.x_without - x) / of_x, abs(stack.metric_without - metric) / of_metric)
            for stack in result.stacks
            if stack.x_without is not None
        }
        stack = max(shifts, key=shifts.get, default=None)
        if stack and shifts[stack] > 0.5:
            sentences.append(
                f"{result.title}: much of this result comes from {stack.stack} alone: without it the threshold is "
                f"{result.x_text(stack.x_without)} instead of {result.x_text(x)}, and the metric "
                f"{result.metric_text(stack.metric_without)} instead of {result.metric_text(metric)}"
            )
    return sentences


# ---------------------------------------------------------------------------------------------------------------
# Tables as data


def curves_csv(results):
    """The curves as CSV: for each class a row per threshold, at some 400 thresholds and the trained one.

    `trained` is 1 in the row of the trained threshold. The limits of the 95 % band of the metric that was optimised are
    empty where there is none. Returns bytes.
    """
    names = ["threshold", "trained", "tp", "fp", "fn", "tn", *models.CLASS_METRICS, "band_low", "band_high"]
    return _csv(names, ((result, row) for result in results for row in zip(*_columns(result), strict=True)))


def _columns(result):
    """The columns of a class in the file of the curves, without its names."""
    trained, confidence = result.trained, result.confidence
    indices = np.union1d(IN_CURVES, trained.index)
    indices = indices[THRESHOLDS[indices] >= min(LOWEST_IN_CURVES, trained.x / 10)]
    here = indices == trained.index
    counts = [count[indices] for count in result.curve.counts]
    metrics = [metric(*counts) for metric in models.CLASS_METRICS.values()]
    band = [np.full(len(indices), "")] * 2
    if confidence.band_low is not None:  # it is known at the thresholds of the blocks only
        limits = zip((confidence.band_low, confidence.band_high), confidence.metric_interval, strict=True)
        band = [np.where(here, end, limit[indices // BLOCK_STEP]) for limit, end in limits]
    arrays = (THRESHOLDS[indices].astype(float), here.astype(int), *counts, *metrics, *band)
    return [array.tolist() for array in arrays]


def stacks_csv(results):
    """What each stack does at the trained threshold, and without it, as CSV: a row for each class and stack; bytes."""
    return _csv(StackResult._fields, ((result, stack) for result in results for stack in result.stacks))


def _csv(names, rows):
    """CSV with these names of columns, after those of class and folder; `rows` gives pairs of ClassResult and row."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["class", "folder", *names])
    writer.writerows([result.name, result.folder, *row] for result, row in rows)
    return file.getvalue().encode()


# ---------------------------------------------------------------------------------------------------------------
# The upload


def upload(bucket, model_id, description, files, folder):
    """Upload the files, then the YAML, under a timestamp that no other result has: now, or the next free second.

    The YAML is uploaded last, so that there is never a YAML without its figures. `description` is that of `describe`;
    its created_datetime is set here. `files` holds bytes by the end of a file's name, as in "_slices.png". Returns the
    name of the YAML in the bucket. If not all can be uploaded, the result is kept in `folder`, and BucketError says so.
    """
    created = datetime.now(UTC)
    while True:
        timestamp = f"{created:%Y%m%dT%H%M%SZ}"
        description["metadata"]["created_datetime"] = timestamp
        document = yaml.dump(description, Dumper=PlainDumper, sort_keys=False, allow_unicode=True)
        files = {**files, ".yaml": document.encode()}
        contents = {f"model_thresholds_{timestamp}{ending}": content for ending, content in files.items()}
        try:
            for name, content in contents.items():
                bucket.create(f"models/{model_id}/{name}", content)
            return f"models/{model_id}/model_thresholds_{timestamp}.yaml"
        except FileExistsError:  # of another run
            created += timedelta(seconds=1)
        except BucketError as error:
            here = _write_here(contents, folder / description["metadata"]["run_id"], bucket.url(f"models/{model_id}/"))
            raise BucketError(f"{error}; {here}") from error


def _write_here(contents, folder, url):
    """Write the files into a new folder; returns words that say so and how to upload them."""
    try:
        folder.mkdir(parents=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        return f"the result cannot be kept in {folder} either ({error.strerror})"
    copy = "gcloud storage cp --no-clobber" if url.startswith("gs://") else "cp -n"
    return f"the result is kept in {folder}, upload it with: {copy} {folder}/* {shlex.quote(url)}"
