"""The result: the content of the YAML, the curves as data, the table, and publishing without overwriting."""

import importlib.metadata
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import yaml

import models
import terminal
from confidence import FEWEST_BLOCKS, LEVEL, REPLICATES, Confidence, GuaranteedRecall
from counts import BLOCK_STEP, BLOCK_THRESHOLDS, THRESHOLDS
from errors import BucketError

LIBRARIES = ("tensorflow", "tf-keras", "segmentation-models", "numpy", "scipy", "pillow", "google-cloud-storage")
CURVE_STEP = 2  # the file of the curves has a row for every second of BLOCK_THRESHOLDS; 0.5 is one of them


class ClassResult(NamedTuple):
    """The result for one class."""

    name: str  # class0, class1, ...
    folder: str  # of its masks
    trained: models.TrainedThreshold
    curve: models.ClassCurve
    confidence: Confidence
    guaranteed_recall: GuaranteedRecall | None  # None unless the metric asks for a recall
    stacks: list

    @property
    def title(self):
        return f"{self.name} ({self.folder})"


def what_intervals_rest_on(blocks):
    """A sentence that says which blocks the intervals of a run rest on; `blocks` is a confidence.Blocks."""
    if blocks.number < FEWEST_BLOCKS:
        return f"No intervals: they would rest on {blocks.number} {blocks.kind} only, and {FEWEST_BLOCKS} are needed."
    return f"Intervals rest on {blocks.number} {blocks.kind} and speak of {blocks.speaks_of}."


def influence(r):
    return []


def stacks_csv(r):
    return b"x\n"


def describe(arguments, inputs, counts, results, started, warnings):
    """The content of the YAML, in plain Python values; `publish` sets its created_datetime.

    Parameters
    ----------
    arguments : dict
        The command line's, by name.
    inputs : Inputs
        Of the entry script.
    counts : counts.Counts
    results : list of ClassResult
    started : float
        `time.monotonic()` at the beginning of the run, in seconds.

    Returns
    -------
    dict
    """
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
            "thresholds_training_configuration": {
                "opt_bounds": models.OPT_BOUNDS,
                "opt_method": models.OPT_METHOD,
                "opt_tol": models.OPT_TOL,
                "opt_options": models.OPT_OPTIONS,
                "opt_class_metric": arguments["optimizing_class_metric"].name,
                "opt_dataset_generator": arguments["dataset_directory"],
                "opt_dataset_downsample_factor": arguments["dataset_downsample_factor"],
            },
            "thresholds_training_output": {result.name: _describe_class(result) for result in results},
            "thresholds_training_history": {
                result.name: {f"{n}_threshold_metric": list(point) for n, point in enumerate(result.trained.history)}
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
                "gpu": None,
            },
            "Lib_versions_info": versions(),
        },
    }


def git_hash():
    """The commit of this file's checkout, or of the copy that was sent to a VM; None elsewhere.

    It ends with `-dirty` if a tracked file was edited.
    """
    here = Path(__file__).resolve().parent

    try:
        if (here / ".git").exists():
            describe = ["git", "-C", here, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
            return subprocess.run(describe, text=True, capture_output=True, check=True).stdout.strip()
        return (here / ".git_hash").read_text().strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _describe_class(result):
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
        "expected_metric": confidence.expected_metric,
        "x_confidence_interval": _plain(confidence.x_interval),
        "metric_confidence_interval": _plain(confidence.metric_interval),
        "gain_confidence_interval": _plain(confidence.gain_interval),
        "blocks": confidence.blocks,
        "why_no_interval": confidence.reason,
        "guaranteed_recall": None if guaranteed is None else vars(guaranteed),
        "equally_good_thresholds": list(trained.best_stretch),
        "warnings": trained.warnings,
    }


def _plain(limits):
    return None if limits is None else list(limits)


def remarks(result):
    """Sentences that explain the numbers of a class in the table."""
    sentences, guaranteed = [], result.guaranteed_recall
    if not result.trained.allowed_at_half:
        sentences.append(
            f"{result.title}: 0.5 does not reach the level that was asked for, so there is no gain over it"
        )
    if guaranteed and guaranteed.threshold is not None:
        sentences.append(
            f"{result.title}: threshold {threshold_text(guaranteed.threshold)} guarantees recall "
            f"{guaranteed.level:g} on average over new blocks that contain the class: precision "
            f"{guaranteed.precision:.4f} here, from {guaranteed.blocks} blocks"
        )
    return sentences


def warnings(result, metric_name):
    """Sentences that warn of relying on the numbers of a class in the table."""
    confidence, guaranteed = result.confidence, result.guaranteed_recall
    sentences = list(result.trained.warnings)
    if confidence.reason:
        sentences.append(f"{result.title}: no interval can be given: {confidence.reason}")
    if confidence.gain_unclear:
        low, high = confidence.gain_interval
        sentences.append(
            f"{result.title}: 0.5 does as well on this evidence: the gain in {metric_name} lies between {low:+.4f} "
            f"and {high:+.4f}"
        )
    if guaranteed and guaranteed.threshold is None:
        sentences.append(f"{result.title}: no recall can be guaranteed: {guaranteed.reason}")
    return sentences


def versions():
    """Version by name of the libraries that the result depends on; None for one that is not installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # as may be TensorFlow, which a rerun does not need
            found[name] = None
    return found


def table(results, metric_name):
    """The lines of the table that is shown, with an empty line before and after."""
    rows = [
        ("class", "folder", "threshold", "95 % interval", metric_name, "95 % interval", "expected", "at 0.5", "gain")
    ]
    for result in results:
        trained, confidence = result.trained, result.confidence
        gain = "-" if confidence.gain is None else f"{confidence.gain:+.4f}"
        rows.append(
            (
                result.name,
                result.folder,
                threshold_text(trained.x),
                _interval(confidence.x_interval, threshold_text),
                f"{trained.metric:.4f}",
                _interval(confidence.metric_interval, "{:.4f}".format),
                "unknown" if confidence.expected_metric is None else f"{confidence.expected_metric:.4f}",
                f"{trained.metric_at_half:.4f}",
                gain + " (none)" * confidence.gain_unclear,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return ["", *lines, ""]


def _interval(limits, text):
    return " to ".join(map(text, limits)) if limits else "unknown"


def threshold_text(threshold):
    """A threshold as text: five decimals, and near 0 or 1 as many as show three digits of the distance to it."""
    if threshold < 0.001:
        return f"{threshold:.3g}"
    return f"{threshold:.{max(5, 2 - math.floor(math.log10(1 - threshold)))}f}"


def curves_csv(results):
    """The curves as data: for each class a row per threshold, at some 1,000 thresholds and the trained one.

    Parameters
    ----------
    results : list of ClassResult

    Returns
    -------
    bytes
        CSV with a header: class, threshold, the four counts, every metric of models.CLASS_METRICS, and the limits of
        the 95 % band of the metric that was optimised (empty where there is none).
    """
    lines = [",".join(["class", "threshold", "tp", "fp", "fn", "tn", *models.CLASS_METRICS, "band_low", "band_high"])]
    for result in results:
        limits = _band_limits(result.confidence)
        limits[result.trained.index] = result.confidence.metric_interval
        indices = sorted(limits)
        counts = [count[indices] for count in (result.curve.tp, result.curve.fp, result.curve.fn, result.curve.tn)]
        metrics = [metric(*counts) for metric in models.CLASS_METRICS.values()]
        # One format for a whole row takes less than half of the time that csv takes.
        row = f"{result.name},%.12g,%d,%d,%d,%d{',%.12g' * len(metrics)},"
        columns = [column.tolist() for column in (THRESHOLDS[indices], *counts, *metrics)]
        if result.confidence.metric_interval is None:
            row += ","
        else:
            row += "%.12g,%.12g"
            columns += zip(*(limits[index] for index in indices), strict=True)
        lines += [row % values for values in zip(*columns, strict=True)]
    return ("\n".join(lines) + "\n").encode()


def _band_limits(confidence):
    """(low, high) of the 95 % band by index into THRESHOLDS; None where there is no band."""
    coarse = range(0, len(BLOCK_THRESHOLDS), CURVE_STEP)
    if confidence.band_low is None:
        return dict.fromkeys(j * BLOCK_STEP for j in coarse)
    return {j * BLOCK_STEP: (confidence.band_low[j], confidence.band_high[j]) for j in coarse}


class PlainDumper(yaml.SafeDumper):
    """Writes equal values in full each time: people find anchors and aliases hard to read."""

    def ignore_aliases(self, data):
        return True


class FastDumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
    """The same with libyaml, where PyYAML was built with it."""

    ignore_aliases = PlainDumper.ignore_aliases


def to_yaml(content):
    """YAML of plain Python values: with escapes for characters that UTF-8 does not have or that steer a terminal."""
    options = {"sort_keys": False, "allow_unicode": True}
    try:
        return yaml.dump(content, Dumper=FastDumper, **options)
    except UnicodeEncodeError:  # libyaml refuses half of a surrogate pair, as from a message that is not UTF-8
        return yaml.dump(content, Dumper=PlainDumper, **options)


def publish(bucket, model_id, description, files, folder):
    """Upload the files, then the YAML, under a timestamp that no other result has.

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
    created = datetime.now(UTC).replace(microsecond=0)
    while True:
        while datetime.now(UTC) < created:
            time.sleep(0.05)
        timestamp = created.strftime("%Y%m%dT%H%M%SZ")
        description["metadata"]["created_datetime"] = timestamp
        contents = {
            f"model_thresholds_{timestamp}{ending}": content
            for ending, content in {**files, ".yaml": to_yaml(description).encode()}.items()
        }
        staged = _stage(contents, timestamp, folder)
        published = False
        try:
            for name, content in contents.items():
                bucket.create(f"models/{model_id}/{name}", content)
            published = True
        except FileExistsError:  # another run took this second
            created += timedelta(seconds=1)
        except BucketError as error:
            raise BucketError(_kept(error, staged, bucket, model_id)) from error
        if staged:
            shutil.rmtree(staged, ignore_errors=True)
        if published:
            return f"models/{model_id}/model_thresholds_{timestamp}.yaml"


def _kept(error, staged, bucket, model_id):
    if not staged:
        return str(error)
    copy = "gcloud storage cp --no-clobber" if bucket.url("").startswith("gs://") else "cp -n"
    target = shlex.quote(bucket.url(f"models/{model_id}/"))
    return f"{error}; the result is kept in {staged}, upload it with: {copy} {staged}/* {target}"


def _stage(contents, timestamp, folder):
    """Write the files into a new folder in `folder` and return it; where that fails, warn and return None."""
    staged = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f"{timestamp}_", dir=folder))
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
