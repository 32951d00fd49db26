"""Train the prediction thresholds of a segmentation model, one a class, on a validation or test set.

The story of one run: arguments, bucket, counts (one pass of the network over the images, or from the cache),
thresholds, figures, result into the model's folder in the bucket.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import itertools
import os
import platform
import random
import reprlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for a Ctrl-C during the imports
    gc.disable()  # imports make many objects, which stay: to look for garbage among them takes a fifth of their time
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads spin for a while after use: the network's cores

import numpy as np
import yaml
from tqdm import tqdm

import figures
import models
import network
import workers
from counts import GRID, Counts
from errors import BucketError, DatasetError, ExpectedError, ModelError, PeerError, UsageError, printable
from gcp_utils import Blob, open_bucket, sweep
from image_utils import (
    check_size_in_bytes,
    draw_subset,
    evenly_spread,
    pair_images_and_masks,
    start_decoding,
)

TMP = Path("tmp")
CHECKPOINT_SECONDS = 30
DECODED_BYTES = 2**25  # of decoded images that wait for the network
SHOWN_SLICES = 6
SUBSET_SEED = 1234  # where neither the arguments nor train_config name one
MAX_CONFIG_BYTES = 2**18
MAX_CONFIG_NODES = 20_000
COUNTS_FORMAT = 1  # raise it when the meaning of cached counts changes

ALONE = workers.Cluster()


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def parse_arguments(argv=None):
    parser = ArgumentParser(
        description="Find, for each class of a segmentation model, the prediction threshold that makes a class metric "
        "best on a validation or test set. The network runs once over the images; the result is written to "
        "<gcp-bucket>/models/<model-id>/model_thresholds_<timestamp>.yaml, with two figures beside it.",
        epilog="Fetched files and counts are kept in ./tmp: a rerun with another metric needs no inference, and one "
        "after an interruption goes on where that one stopped. `rm -r tmp` frees the space. Exit codes: 0 done, "
        "2 usage, 3 input, 4 bucket, 5 not converged, 6 another worker is missing, 130 and 143 interrupted.",
    )

    def add(name, kind, text, **options):
        default = options.get("default")
        shown = "" if options.get("required") else f" Default: {'none' if default is None else default}."
        parser.add_argument(name, type=kind, help=text + shown, **options)

    add(
        "--gcp-bucket",
        str,
        "The bucket that holds datasets/ and models/ and receives the result: gs://name, gs://name/folder, or a plain "
        "directory of the same layout.",
        required=True,
    )
    add("--dataset-directory", str, 'The dataset ID + "/validation" or "/test" (or another split).', required=True)
    add("--model-id", str, "The model ID: the name of its folder in models/.", required=True)
    add("--batch-size", int, "Images per inference step and GPU, 1 or more.", default=16)
    add(
        "--optimizing-class-metric",
        str,
        f"The metric to make best for each class: {', '.join(models.CLASS_METRICS)}.",
        default="iou_score",
    )
    add(
        "--dataset-downsample-factor",
        float,
        "The part of the images to use, above 0 and up to 1: a random subset accelerates the run.",
        default=1.0,
    )
    add("--random-module-global-seed", int, "Seed for random.seed.")
    add(
        "--numpy-random-global-seed",
        int,
        "Seed for np.random.seed, 0 to 4294967295; it also draws the subset, which otherwise is drawn with the seed "
        "that the model's config.yaml names for the split.",
    )
    add("--tf-random-global-seed", int, "Seed for tf.random.set_seed.")
    add("--message", str, "A note to keep in the result.")
    args = parser.parse_args(argv)

    if args.batch_size < 1:
        parser.error(f"--batch-size must be 1 or more, not {args.batch_size}")
    if not 0 < args.dataset_downsample_factor <= 1:
        parser.error(f"--dataset-downsample-factor must be above 0 and up to 1, not {args.dataset_downsample_factor}")
    if args.numpy_random_global_seed is not None and not 0 <= args.numpy_random_global_seed < 2**32:
        parser.error(f"--numpy-random-global-seed must be 0 to 4294967295, not {args.numpy_random_global_seed}")
    if args.optimizing_class_metric == "binary_cross_entropy":
        parser.error("--optimizing-class-metric binary_cross_entropy does not depend on a threshold: choose another")
    if args.optimizing_class_metric not in models.CLASS_METRICS:
        parser.error(
            f"--optimizing-class-metric {args.optimizing_class_metric!r} is none of {', '.join(models.CLASS_METRICS)}"
        )
    args.dataset_directory = args.dataset_directory.strip("/")
    args.model_id = args.model_id.strip("/")
    if args.dataset_directory.count("/") != 1:
        parser.error(
            f"--dataset-directory must be <dataset ID>/<split>, such as dataset-1/validation, not "
            f"{args.dataset_directory!r}"
        )
    if not args.model_id or "/" in args.model_id:
        parser.error(f"--model-id must be the name of a folder in models/, not {args.model_id!r}")
    return args


def read_config(bucket, name, section):
    """The dictionary `section` of a YAML file in the bucket."""
    blob = bucket.stat(name)
    if blob.size > MAX_CONFIG_BYTES:
        raise DatasetError(f"{bucket.url(name)} has {blob.size:,} bytes: that is no configuration")
    text = bucket.read(blob)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        # Before any value is made of it: a few aliases, merged or nested, can stand for any number of values.
        if _count_nodes(node, MAX_CONFIG_NODES) <= 0:
            raise DatasetError(f"{bucket.url(name)} is larger than any configuration once its aliases are resolved")
        config = loader.construct_document(node) if node else None
    except DatasetError:
        raise
    except Exception as error:  # the constructors of numbers and dates raise whatever they meet
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DatasetError(f"{bucket.url(name)} is not valid YAML: {reason}") from error
    if not isinstance(config, dict) or not isinstance(config.get(section), dict):
        raise DatasetError(f"{bucket.url(name)} needs a section {section}: with keys and values below it")
    return config[section]


def _count_nodes(node, budget, depth=20):
    """What is left of `budget` after one for every YAML node below; at most 0 if too deep, or for a huge number."""
    if isinstance(node, yaml.CollectionNode) and budget > 0:
        if depth == 0:
            return 0
        for child in itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value:
            budget = _count_nodes(child, budget, depth - 1)
    elif isinstance(node, yaml.ScalarNode) and len(node.value) > 100 and not node.tag.endswith(":str"):
        return 0
    return budget - 1


def read_target_size(dataset_config, url):
    size = dataset_config.get("target_size")
    if not (
        isinstance(size, list) and len(size) == 2 and all(type(edge) is int and 0 < edge <= 2**14 for edge in size)
    ):
        raise DatasetError(f"{url} needs target_size: [width, height], 1 to {2**14} pixels, not {reprlib.repr(size)}")
    return size


def subset_seed(args, train_config):
    """The seed that draws the subset: the argument, else the one of train_config for the split, else a fixed one."""
    split = args.dataset_directory.rpartition("/")[2]
    seed = args.numpy_random_global_seed
    for name in ("validation", "test"):
        if seed is None and name in split:
            seed = train_config.get(f"{name}_data_shuffle_seed")
    if seed is None:
        seed = SUBSET_SEED
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise DatasetError(
            f"the shuffle seed {reprlib.repr(seed)} in the model's config.yaml must be an integer, 0 to 4294967295"
        )
    return seed


class Inference(NamedTuple):
    """A network and the images to run it on: all that the counts depend on."""

    samples: list
    class_folders: list
    target_size: list  # width, height
    train_config: dict
    weights: Blob

    @property
    def class_names(self):
        return [f"class{i} ({folder})" for i, folder in enumerate(self.class_folders)]

    def counts_path(self):
        """Where the counts are cached: named by everything they depend on, and by nothing else."""
        digest = hashlib.sha256()
        for part in (
            COUNTS_FORMAT,
            self.train_config.get("segmentation_model"),
            self.weights.version,
            self.class_folders,
            self.target_size,
            *([sample.name, sample.image.version, *(mask.version for mask in sample.masks)] for sample in self.samples),
        ):
            digest.update(f"{part!r}\n".encode(errors="surrogatepass"))
        return TMP / "counts" / f"{digest.hexdigest()[:32]}.npz"


def count_images(args, bucket, inference, path, cluster):
    """Count the samples, each worker its share, and sum; the chief caches the counts of all at `path`."""
    shown_names = [sample.name for sample in evenly_spread(inference.samples, SHOWN_SLICES)]
    batch_size = min(args.batch_size, len(inference.samples))  # the same for all shares: it may matter to the last bit
    share = inference._replace(samples=inference.samples[cluster.index :: cluster.number])
    own = path if cluster.number == 1 else path.with_suffix(f".{cluster.index}_of_{cluster.number}.npz")
    counts = Counts.load(own) or count_share(args, bucket, share, batch_size, shown_names, own, cluster)
    if cluster.number > 1:
        counts = counts.summed(cluster.sum, shown_names)
        if cluster.index == 0:
            keep(counts, path)
        cluster.sum(np.zeros(1, np.int64))  # the chief has the counts of all: the shares have served
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)
    return counts


def count_share(args, bucket, inference, batch_size, shown_names, path, cluster):
    """Run the network over the samples, from the last checkpoint on, and cache the counts at `path`."""
    samples, class_names, weights = inference.samples, inference.class_names, inference.weights
    width, height = inference.target_size
    checkpoint = path.with_suffix(".partial.npz")
    counts = Counts.load(checkpoint) or Counts.empty(len(class_names), height, width)
    if counts.images:
        tell(f"Going on after {counts.images} of {len(samples)} images: an earlier run had counted them.")
    to_count = samples[counts.images :]
    if not samples:  # fewer images than workers
        return counts
    lookahead = max(2 * batch_size, DECODED_BYTES // (width * height * (1 + len(class_names))))

    for sample in samples:
        for blob in (sample.image, *sample.masks):
            check_size_in_bytes(blob, bucket.url(blob.name), inference.target_size)
    absent = [blob for sample in to_count for blob in (sample.image, *sample.masks) if not bucket.is_here(blob)] + (
        [] if bucket.is_here(weights) else [weights]
    )
    bucket.check_room(absent)

    def fetch():  # the weights first: without them no image is of use
        return bucket.fetch(weights), start_decoding(to_count, bucket, inference.target_size, lookahead)

    with contextlib.ExitStack() as stack:
        if absent:
            download = progress("download", sum(blob.size for blob in absent), unit="B", unit_scale=True)
            bucket.on_bytes = stack.enter_context(download).update
        fetched = ThreadPoolExecutor(1).submit(fetch)
        network.import_tensorflow()
        weights_path, decoded = fetched.result()
        stack.enter_context(contextlib.closing(decoded))
        if args.tf_random_global_seed is not None:
            network.set_seed(args.tf_random_global_seed)
        try:
            built = network.build_network(inference.train_config, len(class_names), weights_path)
        except ModelError as error:
            raise ModelError(f"{bucket.url(weights.name)}, with the config.yaml beside it: {error}") from error
        bucket.fetch(weights)  # it has not changed while it was read
        counts.device = network.device_names()
        tell(f"Counting the probabilities of {len(to_count)} images on {counts.device or 'the CPU'}.")
        with progress("inference", len(samples), initial=counts.images, unit=" images") as bar:
            batches = models.count_probabilities(
                built,
                decoded,
                counts,
                class_names,
                batch_size,
                shown_names=set(shown_names),
                on_smaller_batch=lambda size: say(
                    f"A batch does not fit into memory: going on with --batch-size {size}."
                ),
            )
            saved = time.monotonic()
            try:
                for number, images in enumerate(batches):
                    cluster.check()
                    if number == 0:
                        threading.Thread(target=import_what_follows, daemon=True).start()
                    bar.update(images)
                    if time.monotonic() - saved > CHECKPOINT_SECONDS:
                        keep(counts, checkpoint)
                        saved = time.monotonic()
            except (Interrupted, PeerError):
                on_interruption(signal.SIG_IGN)  # a second must not lose the counts
                if counts.images:
                    keep(counts, checkpoint)
                raise
    keep(counts, path)
    with contextlib.suppress(OSError):
        checkpoint.unlink(missing_ok=True)
    return counts


def keep(counts, path):
    """Cache the counts; if the disk has no room, that costs the next run time, but not this one its result."""
    try:
        counts.save(path)
    except OSError as error:
        say(
            f"warning: the counts of {counts.images} images cannot be kept in {path.parent} "
            f"({error.strerror or error}): make room there, or make it writable, or a later run must count again"
        )


def import_what_follows():
    """Import what only the end of a run needs while the network leaves the interpreter idle, which ends the imports."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import scipy.optimize  # noqa: F401

    gc.freeze()
    gc.enable()


def train_thresholds(counts, class_names, metric_name):
    """Train class after class, showing every evaluation; returns a TrainedThreshold and ClassCurves a class."""
    models.check_trainable(counts, class_names)
    trained = []
    for i, class_name in enumerate(class_names):
        tell(f"Training the threshold of {class_name}.")
        trained.append(
            models.train_prediction_threshold(
                counts,
                i,
                class_name,
                metric_name,
                on_evaluation=lambda n, x, metric: tell(f"  {n:3d}  threshold {x:.5f}  {metric_name} {metric:.6f}"),
            )
        )
        for warning in trained[-1][0].warnings:
            say(f"warning: {warning}")
    return trained


def draw_figures(args, counts, inference, trained):
    """The two figures as PNG bytes: curves, and slices with hits, misses and false alarms."""
    curves = [
        figures.ClassCurve(
            name=f"class{i}",
            folder=folder,
            **vars(class_curves),
            x=result.x,
            x_interval=result.x_interval,
            metric_at_x=result.metric,
            metric_interval=result.metric_interval,
            metric_at_half=result.metric_at_half,
        )
        for i, (folder, (result, class_curves)) in enumerate(zip(inference.class_folders, trained, strict=True))
    ]
    positions = np.array([round(result.x * GRID) for result, _ in trained])
    shown = zip(counts.shown_names, counts.shown_images, counts.shown_truth, counts.shown_bins, strict=True)
    slices = [figures.Slice(name, image, truth, bins > positions) for name, image, truth, bins in shown]
    title = f"{args.model_id} on {args.dataset_directory} ({counts.images} images)"
    return (
        figures.draw_curves(curves, args.optimizing_class_metric, title),
        figures.draw_slices(slices, inference.class_names, title),
    )


def describe_result(args, counts, inference, dataset_config, trained, seed, started):
    """The content of the YAML, but for its timestamp: plain Python values only."""
    names = [f"class{i}" for i in range(len(inference.class_folders))]
    results = [result for result, _ in trained]
    return {
        "final_trained_prediction_thresholds": {name: result.x for name, result in zip(names, results, strict=True)},
        "metadata": {
            "message": args.message,
            "gcp_bucket": args.gcp_bucket,
            "created_datetime": None,
            "run_id": uuid.uuid4().hex,
            "num_classes": len(inference.class_folders),
            "target_size": inference.target_size,
            "git_hash": git_hash(),
            "elapsed_minutes": round((time.monotonic() - started) / 60, 2),
            "dataset_directory": args.dataset_directory,
            "model_id": args.model_id,
            "batch_size": args.batch_size,
            "dataset_config": dataset_config,
            "train_config": inference.train_config,
            "num_images": counts.images,
            "num_pixels": int(counts.histogram[0].sum()),
            "subset_seed": seed,
            "class_folders": dict(zip(names, inference.class_folders, strict=True)),
            "thresholds_training_configuration": {
                "opt_bounds": models.OPT_BOUNDS,
                "opt_method": models.OPT_METHOD,
                "opt_tol": models.OPT_TOL,
                "opt_options": models.OPT_OPTIONS,
                "opt_class_metric": args.optimizing_class_metric,
                "opt_dataset_generator": args.dataset_directory,
                "opt_dataset_downsample_factor": args.dataset_downsample_factor,
            },
            "thresholds_training_output": {
                name: {
                    "x": result.x,
                    "success": result.success,
                    "status": result.status,
                    "message": result.message,
                    "nfev": result.nfev,
                    "fun": 1 - result.metric,
                    "metric": result.metric,
                    "metric_at_half": result.metric_at_half,
                    "x_confidence_interval": list(result.x_interval),
                    "metric_confidence_interval": list(result.metric_interval),
                    "exact_best": {"metric": result.metric, "equally_good_thresholds": list(result.best_stretch)},
                    "plain_minimize_scalar": dict(zip(("x", "metric"), result.plain, strict=True)),
                    "warnings": result.warnings,
                }
                for name, result in zip(names, results, strict=True)
            },
            "thresholds_training_history": {
                name: {f"{n}_threshold_metric": list(point) for n, point in enumerate(result.history)}
                for name, result in zip(names, results, strict=True)
            },
            "bootstrap": {
                "replicates": len(counts.replicates),
                "confidence": models.CONFIDENCE,
            },
            "random-module-global-seed": args.random_module_global_seed,
            "numpy_random_global_seed": args.numpy_random_global_seed,
            "tf_random_global_seed": args.tf_random_global_seed,
        },
        "metadata_system": {
            "System_info": {
                "platform": platform.platform(),
                "machine": platform.machine(),
                "cpu_count": os.cpu_count(),
                "python": platform.python_version(),
                "gpu": counts.device or None,
            },
            "Lib_versions_info": {
                name: importlib.metadata.version(name)
                for name in (
                    "tensorflow",
                    "tf-keras",
                    "segmentation-models",
                    "numpy",
                    "scipy",
                    "pillow",
                    "google-cloud-storage",
                )
            },
        },
    }


def git_hash():
    """Commit of the checkout that this script lies in, or of the copy that was sent to a VM; None elsewhere."""
    here = Path(__file__).resolve().parent
    if (here / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.check_output(
                ["git", "-C", here, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL
            ).strip()
    with contextlib.suppress(OSError):
        return (here / ".git_hash").read_text().strip()
    return None


class PlainDumper(yaml.SafeDumper):
    """Writes a value that occurs twice twice: anchors and aliases are hard on human readers."""

    def ignore_aliases(self, data):
        return True


def publish(bucket, model_id, result, curves, slices):
    """Upload the figures, then the YAML, under a timestamp that no other result has; returns the YAML's name.

    Everything is on disk before the first upload, if there is room, and stays there should one fail. The YAML is the
    result: it comes last, so that there is none without its figures.
    """
    created = datetime.now(UTC).replace(microsecond=0)
    while True:
        while datetime.now(UTC) < created:
            time.sleep(0.05)
        timestamp = created.strftime("%Y%m%dT%H%M%SZ")
        result["metadata"]["created_datetime"] = timestamp
        stem = f"model_thresholds_{timestamp}"
        files = {
            f"{stem}.png": curves,
            f"{stem}_slices.png": slices,
            f"{stem}.yaml": yaml.dump(result, Dumper=PlainDumper, sort_keys=False, allow_unicode=True).encode(),
        }
        staged = stage(files, timestamp)
        published = False
        try:
            for name, content in files.items():
                bucket.create(f"models/{model_id}/{name}", content)
            published = True
        except FileExistsError:  # another run had the same second
            created += timedelta(seconds=1)
        except BucketError as error:
            if not staged:
                raise
            copy = "gcloud storage cp --no-clobber" if bucket.url("").startswith("gs://") else "cp -n"
            folder = shlex.quote(bucket.url(f"models/{model_id}/"))
            raise BucketError(
                f"{error}; the result is kept in {staged}, upload it with: {copy} {staged}/* {folder}"
            ) from error
        if staged:
            shutil.rmtree(staged, ignore_errors=True)
        if published:
            return f"models/{model_id}/{stem}.yaml"


def stage(files, timestamp):
    """Write files into a folder of their own in tmp/results and return it; None, with a warning, where that fails."""
    folder = None
    try:
        (TMP / "results").mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{timestamp}_", dir=TMP / "results"))
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        say(
            f"warning: no copy of the result can be kept in {TMP / 'results'} ({error.strerror or error}): make room "
            "there, or make it writable; it is uploaded all the same"
        )
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        return None
    return folder


def print_table(class_folders, trained, metric_name):
    rows = [("class", "folder", "threshold", "95 % interval", metric_name, "95 % interval", "at 0.5", "gain")]
    for i, (folder, (result, _)) in enumerate(zip(class_folders, trained, strict=True)):
        rows.append(
            (
                f"class{i}",
                folder,
                f"{result.x:.5f}",
                "{:.3f} to {:.3f}".format(*result.x_interval),
                f"{result.metric:.4f}",
                "{:.4f} to {:.4f}".format(*result.metric_interval),
                f"{result.metric_at_half:.4f}",
                f"{result.metric - result.metric_at_half:+.4f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    tell()
    for row in rows:
        tell("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    tell()


def progress(title, total, **options):
    """A progress bar with rates, where somebody watches."""
    return tqdm(desc=title, total=total, disable=None, dynamic_ncols=True, mininterval=0.25, **options)


def tell(line=""):
    """Print a line to stdout. That nobody reads it any more (`| head`) is no reason to lose a result."""
    with contextlib.suppress(OSError):
        print(printable(line), flush=True)


def say(line):
    """Print a line to stderr without disturbing progress bars."""
    with contextlib.suppress(OSError):
        tqdm.write(printable(line), file=sys.stderr)


def at_once(*calls):
    """What the calls return, made in threads: on a slow network each of them waits for several answers."""
    pool = ThreadPoolExecutor(len(calls))
    try:
        return [future.result() for future in [pool.submit(call) for call in calls]]
    finally:
        pool.shutdown(wait=False)  # an interruption does not wait for a bucket that does not answer


class Interrupted(BaseException):
    """SIGINT or SIGTERM; the argument is the exit code."""


def interrupt(signal_number, _):
    raise Interrupted(128 + signal_number)


def interrupt_again(unraisable):
    """Python drops what a signal handler raises amid a destructor. A moment later there is none in its way."""
    if unraisable.exc_type is Interrupted:
        threading.Timer(0.01, os.kill, (os.getpid(), unraisable.exc_value.args[0] - 128)).start()
    else:
        sys.__unraisablehook__(unraisable)


def on_interruption(action):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, action)


def read_cluster():
    try:
        return workers.read_tf_config(os.environ.get("TF_CONFIG"))
    except ValueError as error:
        raise UsageError(f"TF_CONFIG {error}") from error


def run(args, cluster=ALONE):
    started = time.monotonic()
    random.seed(args.random_module_global_seed)
    np.random.seed(args.numpy_random_global_seed)

    dataset_id = args.dataset_directory.partition("/")[0]
    split_directory = f"datasets/{args.dataset_directory}"
    sweep(TMP)
    bucket = open_bucket(args.gcp_bucket, TMP / "objects")
    dataset_config, train_config, weights, blobs = at_once(
        lambda: read_config(bucket, f"datasets/{dataset_id}/config.yaml", "dataset_config"),
        lambda: read_config(bucket, f"models/{args.model_id}/config.yaml", "train_config"),
        lambda: bucket.stat(f"models/{args.model_id}/model.hdf5"),
        lambda: bucket.list(split_directory),
    )
    target_size = read_target_size(dataset_config, bucket.url(f"datasets/{dataset_id}/config.yaml"))
    class_folders, samples = pair_images_and_masks(blobs, split_directory, bucket.url)
    seed = subset_seed(args, train_config)
    total, samples = len(samples), draw_subset(samples, args.dataset_downsample_factor, seed)
    tell(f"{bucket.url(split_directory)}: {total} images, {len(class_folders)} classes.")
    if len(samples) < total:
        tell(f"Using {len(samples)} of them, drawn with seed {seed}.")

    inference = Inference(samples, class_folders, target_size, train_config, weights)
    path = inference.counts_path()
    counts = Counts.load(path) if cluster.index == 0 else None
    try:
        no_inference = cluster.agree(f"{path.name} {args.batch_size}", bool(counts))
    except ValueError as error:
        raise UsageError(error) from error
    if no_inference:
        where = path if cluster.index == 0 else "the chief's cache"
        tell(f"Counts of these images by this model are in {where}: no inference needed.")
    else:
        counts = count_images(args, bucket, inference, path, cluster)
    if cluster.index > 0:
        tell(f"{cluster} is done: its share is counted and summed with the others; the chief goes on.")
        return

    trained = train_thresholds(counts, inference.class_names, args.optimizing_class_metric)
    print_table(class_folders, trained, args.optimizing_class_metric)
    pictures = draw_figures(args, counts, inference, trained)
    result = describe_result(args, counts, inference, dataset_config, trained, seed, started)
    tell(f"Result: {bucket.url(publish(bucket, args.model_id, result, *pictures))}")


def main():
    sys.stdout.reconfigure(errors="backslashreplace")
    on_interruption(interrupt)
    sys.unraisablehook = interrupt_again
    cluster = ALONE

    def end(code, message, for_others=None):
        on_interruption(signal.SIG_IGN)  # one is enough: a second must not lose the line, nor what the others hear
        fail(code, message)
        cluster.leave(for_others or (code, printable(message)))
        return code

    try:
        args = parse_arguments()
        cluster = workers.Cluster(*read_cluster())
        if cluster.number > 1:
            tell(f"This is {cluster} of {cluster.number}; waiting for all to come.")
            cluster.join()
        run(args, cluster)
    except ExpectedError as error:
        return end(error.exit_code, f"{error}; see --help" if isinstance(error, UsageError) else error)
    except Interrupted as interruption:
        kept = "what was fetched and counted is kept in tmp"
        return end(
            interruption.args[0],
            f"interrupted; {kept}: run the same command again to go on",
            for_others=(6, f"{cluster} was interrupted; {kept}: start all workers again to go on"),
        )
    on_interruption(signal.SIG_IGN)
    cluster.leave()
    return 0


def fail(code, message):
    with contextlib.suppress(OSError):
        print(f"error: {printable(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    os._exit(main())  # no thread that still waits for a slow bucket is waited for
