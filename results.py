"""What goes back: the YAML's content, the curves as data, the table, and publishing without overwriting."""

import csv
import importlib.metadata
import io
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
CURVE_STEP = 2  # every second of BLOCK_THRESHOLDS, 0.5 among them, has a row in the curves' file


class ClassResult(NamedTuple):
    """What a run finds out about one class."""

    name: str  # class0, class1, ...
    folder: str
    trained: models.TrainedThreshold
    curve: models.ClassCurve
    confidence: Confidence
    guaranteed_recall: GuaranteedRecall | None  # where the metric asks for a recall


def what_intervals_rest_on(blocks):
    """A sentence on the blocks of a run."""
    if blocks.number < FEWEST_BLOCKS:
        return f"No intervals: they would rest on {blocks.number} {blocks.kind} only, and {FEWEST_BLOCKS} are needed."
    return f"Intervals rest on {blocks.number} {blocks.kind} and speak of {blocks.speaks_of}."


def describe(arguments, inputs, counts, results, started):
    """The content of the YAML, but for its timestamp: plain Python values only.

    Parameters
    ----------
    arguments : dict
        Of the command line.
    inputs : Inputs
    counts : counts.Counts
    results : list of ClassResult
    started : float
        `time.monotonic()` at the beginning of the run.
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
                "gpu": counts.counted_with["gpu"],
            },
            "Lib_versions_info": versions(),
        },
    }


def git_hash():
    """Commit of the checkout that this file lies in, or of the copy that was sent to a VM; None elsewhere.

    `-dirty` follows it where a tracked file was edited.
    """
    here = Path(__file__).resolve().parent

    def git(*command):
        return subprocess.run(["git", "-C", here, *command], text=True, capture_output=True, check=True).stdout.strip()

    try:
        if (here / ".git").exists():
            edited = git("status", "--porcelain", "--untracked-files=no")
            return git("rev-parse", "HEAD") + "-dirty" * bool(edited)
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
    """What a reader of the table should know of a class beside its numbers: sentences."""
    sentences, guaranteed = [], result.guaranteed_recall
    if not result.trained.allowed_at_half:
        sentences.append(
            f"{_title(result)}: 0.5 does not reach the level that was asked for, so there is no gain over it"
        )
    if guaranteed and guaranteed.threshold is not None:
        sentences.append(
            f"{_title(result)}: threshold {threshold_text(guaranteed.threshold)} guarantees recall "
            f"{guaranteed.level:g} on average over further blocks that hold the class: precision "
            f"{guaranteed.precision:.4f} here, from {guaranteed.blocks} blocks"
        )
    return sentences


def warnings(result, metric_name):
    """What a reader of the table must know of a class: sentences."""
    confidence, guaranteed = result.confidence, result.guaranteed_recall
    sentences = list(result.trained.warnings)
    if confidence.reason:
        sentences.append(f"{_title(result)}: no interval can be given: {confidence.reason}")
    if confidence.no_gain:
        low, high = confidence.gain_interval
        sentences.append(
            f"{_title(result)}: 0.5 does as well on this evidence: the gain in {metric_name} lies between {low:+.4f} "
            f"and {high:+.4f}"
        )
    if guaranteed and guaranteed.threshold is None:
        sentences.append(f"{_title(result)}: no recall can be guaranteed: {guaranteed.reason}")
    return sentences


def _title(result):
    return f"{result.name} ({result.folder})"


def versions():
    """The versions of the libraries that numbers depend on; None for one that is not installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a rerun needs no TensorFlow
            found[name] = None
    return found


def table(results, metric_name):
    """The lines of the table on the screen, with a blank one before and after."""
    rows = [
        ("class", "folder", "threshold", "95 % interval", metric_name, "95 % interval", "expected", "at 0.5", "gain")
    ]
    for name, folder, trained, _, confidence, _ in results:
        gain = "-" if confidence.gain is None else f"{confidence.gain:+.4f}"
        rows.append(
            (
                name,
                folder,
                threshold_text(trained.x),
                _interval(confidence.x_interval, threshold_text),
                f"{trained.metric:.4f}",
                _interval(confidence.metric_interval, "{:.4f}".format),
                "unknown" if confidence.expected_metric is None else f"{confidence.expected_metric:.4f}",
                f"{trained.metric_at_half:.4f}",
                gain + " (none)" * confidence.no_gain,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return ["", *lines, ""]


def _interval(limits, text):
    return " to ".join(map(text, limits)) if limits else "unknown"


def threshold_text(threshold):
    """A threshold for readers, with three digits of its distance from 0 or 1 where that is small."""
    if threshold < 0.001:
        return f"{threshold:.3g}"
    return f"{threshold:.{max(5, 2 - math.floor(math.log10(1 - threshold)))}f}"


def curves_csv(results):
    """The curves as data: a row per class and threshold, for some 1,000 thresholds and the trained one.

    Returns
    -------
    bytes
        CSV with a header: class, threshold, the four counts, every metric of models.CLASS_METRICS, and the limits of
        the 95 % band of the trained metric (empty where there is none).
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["class", "threshold", "tp", "fp", "fn", "tn", *models.CLASS_METRICS, "band_low", "band_high"])
    for result in results:
        limits = _band_limits(result.confidence)
        limits[result.trained.index] = result.confidence.metric_interval or (None, None)
        indices = sorted(limits)
        counts = [count[indices] for count in (result.curve.tp, result.curve.fp, result.curve.fn, result.curve.tn)]
        metrics = [metric(*counts) for metric in models.CLASS_METRICS.values()]
        columns = (column.tolist() for column in (*counts, *metrics))  # Python's numbers are written twice as fast
        for index, *values in zip(indices, *columns, strict=True):
            row = [float(THRESHOLDS[index]), *values, *limits[index]]
            writer.writerow([result.name, *("" if value is None else f"{value:.12g}" for value in row)])
    return file.getvalue().encode()


def _band_limits(confidence):
    """The band's limits by the threshold's index."""
    places = range(0, len(BLOCK_THRESHOLDS), CURVE_STEP)
    if confidence.band_low is None:
        return {place * BLOCK_STEP: (None, None) for place in places}
    return {place * BLOCK_STEP: (confidence.band_low[place], confidence.band_high[place]) for place in places}


class PlainDumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
    """Writes a value that occurs twice twice: anchors and aliases are hard on human readers."""

    def ignore_aliases(self, data):
        return True


def publish(bucket, model_id, description, files, folder):
    """Upload the files, then the YAML, under a timestamp that no other result has.

    Everything is on disk before the first upload, if there is room, and stays there should one fail. The YAML is the
    result: it comes last, so that there is none without its figures.

    Parameters
    ----------
    bucket : as gcp_utils.open_bucket gives
    model_id : str
    description : dict
        From `describe`; its created_datetime is set here.
    files : dict of bytes
        What else belongs to the result, by the ending of its name: "_slices.png".
    folder : Path
        Where the result waits until it is uploaded.

    Returns
    -------
    str
        Name of the YAML in the bucket.

    Raises
    ------
    BucketError
        Nothing was uploaded, or not all; the message says where the result is kept.
    """
    created = datetime.now(UTC).replace(microsecond=0)
    while True:
        while datetime.now(UTC) < created:
            time.sleep(0.05)
        timestamp = created.strftime("%Y%m%dT%H%M%SZ")
        description["metadata"]["created_datetime"] = timestamp
        text = yaml.dump(description, Dumper=PlainDumper, sort_keys=False, allow_unicode=True)
        contents = {
            f"model_thresholds_{timestamp}{ending}": content
            for ending, content in {**files, ".yaml": text.encode()}.items()
        }
        staged = _stage(contents, timestamp, folder)
        published = False
        try:
            for name, content in contents.items():
                bucket.create(f"models/{model_id}/{name}", content)
            published = True
        except FileExistsError:  # another run had the same second
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
    """Write files into a folder of their own in `folder` and return it; None, with a warning, where that fails."""
    staged = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f"{timestamp}_", dir=folder))
        for name, content in contents.items():
            (staged / name).write_bytes(content)
    except OSError as error:
        terminal.warn(
            f"no copy of the result can be kept in {folder} ({error.strerror or error}): make room there, or make it "
            "writable; it is uploaded all the same"
        )
        if staged:
            shutil.rmtree(staged, ignore_errors=True)
        return None
    return staged
