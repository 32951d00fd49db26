"""Train the prediction thresholds of a segmentation model, one per class, on a validation or test set.

    python3 train_segmentation_model_prediction_thresholds.py --gcp-bucket gs://sandbox \
        --dataset-directory dataset-composite_0123/validation \
        --model-id segmentation-model-composite_0123_20200321T154533Z
"""

import gc
import os

import terminal

if __name__ == "__main__":
    terminal.open_streams()
    terminal.explain_missing_packages()
    last_words = terminal.end_on_signals()
    gc.disable()  # garbage collection during imports costs a fifth of their time and finds nothing
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its idle threads would take cores from the network

import argparse
import contextlib
import hashlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import configuration
import figures
import image_utils
import inference
import models
import network
import results
import workers
from blobs import Blob
from confidence import Blocks, assess, blocks_of, guarantee_recall
from counts import THRESHOLDS, Counts
from errors import BUG, DONE, EXIT_CODES, WORKER_LOST, ExpectedError, ModelError, memory_explained, printable
from gcp_utils import open_bucket, sweep
from terminal import progress, show, warn

TMP = Path("tmp")
CHECKPOINT_SECONDS = 30
DECODED_BYTES = 2**25  # of decoded images and masks that may wait for the network
SHOWN_SLICES = 6
COUNTS_FORMAT = 4  # raise it when the meaning or the form of cached counts changes


def parse_arguments():
    """Parse the command line; raises UsageError."""
    parser = configuration.ArgumentParser(
        description="Find, for each class of a segmentation model, the prediction threshold that makes a class metric\n"
        "best on a validation or test set. The network runs once over the images. The result is written to\n"
        "<gcp-bucket>/models/<model-id>/model_thresholds_<timestamp>.yaml, with figures and curves beside it.",
        epilog="Fetched files and counts are kept in ./tmp: a rerun with another metric needs no inference, and an\n"
        "interrupted run continues when the same command is given again. `rm -r tmp` frees the space.\n\nexit codes:\n"
        + "\n".join(f"  {code:3d}  {meaning}" for code, meaning in EXIT_CODES.items()),
    )
    needed = {"required": True, "default": argparse.SUPPRESS}  # keeps "(default: None)" out of the help
    folders, number = configuration.folders, configuration.number
    metrics = f"the metric to make best for each class: {', '.join(models.METRIC_NAMES)}"
    factor = "the part of the images to use, a random subset, above 0 and up to 1"
    seed = "for np.random.seed, and to draw the subset; without it the subset's seed is in the model's config.yaml"
    parser.add_argument("--gcp-bucket", help="gs://name[/folder], or a directory of the same layout", **needed)
    parser.add_argument("--dataset-directory", type=folders(2), help="<dataset ID>/validation or /test", **needed)
    parser.add_argument("--model-id", type=folders(1), help="name of the model's folder in models/", **needed)
    parser.add_argument("--batch-size", type=number(int, 1, 2**16), default=16, help="images per step and GPU")
    parser.add_argument("--optimizing-class-metric", type=models.class_metric, default="iou_score", help=metrics)
    parser.add_argument(
        "--dataset-downsample-factor", type=number(float, 0, 1, above_low=True), default=1.0, help=factor
    )
    parser.add_argument("--random-module-global-seed", type=int, help="for random.seed")
    parser.add_argument("--numpy-random-global-seed", type=number(int, 0, 2**32 - 1), help=seed)
    parser.add_argument("--tf-random-global-seed", type=int, help="for tf.random.set_seed")
    parser.add_argument("--message", help="a note that is put into the result")
    return parser.parse_args()


@memory_explained()
def run(args, cluster):
    """Do one run, in four steps.

    find_inputs        find what the bucket holds for this run: configurations, weights, images, masks
    count_images       run the network once over the images, or take the counts of an earlier run
    train_thresholds   find the threshold of each class, and how far it can be trusted
    publish            put figures, curves and YAML into the model's folder
    """
    started = time.monotonic()
    models.check_optimisation()
    models.check_metric(args.optimizing_class_metric)
    random.seed(args.random_module_global_seed)
    np.random.seed(args.numpy_random_global_seed)

    job = args.dataset_directory, args.model_id, args.dataset_downsample_factor, args.numpy_random_global_seed
    cluster.agree(f"{job} {args.batch_size}")
    inputs = find_inputs(args.gcp_bucket, *job, cluster)
    counts = count_images(inputs, args.batch_size, args.tf_random_global_seed, cluster)
    if cluster.index > 0:
        show(f"{cluster} is done: its share is counted and summed with the others; the chief continues.")
        return
    trained = train_thresholds(inputs, counts, args.optimizing_class_metric)
    publish(vars(args), inputs, counts, trained, started)


class Inputs(NamedTuple):
    """What the bucket holds for a run."""

    bucket: object
    dataset_config: dict
    train_config: dict
    weights: Blob
    target_size: list  # width, height
    class_folders: list
    samples: list  # of image_utils.Sample; a worker's share of them while it counts
    blocks: Blocks  # of the samples
    seed: int  # with which the subset was drawn
    problems_path: Path  # lists the files that cannot be used

    @property
    def class_names(self):
        return [f"class{i}" for i in range(len(self.class_folders))]

    @property
    def class_titles(self):
        return [f"{name} ({folder})" for name, folder in zip(self.class_names, self.class_folders, strict=True)]

    def share(self, index, number):
        """The part that worker `index` of `number` counts."""
        if number == 1:
            return self
        return self._replace(
            samples=self.samples[index::number],
            blocks=replace(self.blocks, labels=self.blocks.labels[index::number]),
            problems_path=self.problems_path.with_suffix(f".{index}_of_{number}.txt"),
        )

    def counts_path(self):
        """The file of the cached counts: its name is a hash of all that they depend on, and of nothing else."""
        digest = hashlib.sha256(THRESHOLDS.tobytes())  # counts over another list of thresholds are of no use
        for part in (
            COUNTS_FORMAT,
            self.train_config.get("segmentation_model"),
            self.weights.version,
            self.class_folders,
            self.target_size,
            self.blocks.labels.tolist(),
            *([sample.name, sample.image.version, *(mask.version for mask in sample.masks)] for sample in self.samples),
        ):
            digest.update(f"{part!r}\n".encode(errors="surrogatepass"))
        return TMP / "counts" / f"{digest.hexdigest()[:32]}.npz"


def find_inputs(gcp_bucket, dataset_directory, model_id, downsample_factor, seed, cluster):
    """List and check what a run needs, and draw its subset of the images. Only the chief lists the images."""
    dataset_id, split = dataset_directory.split("/")
    dataset_yaml, split_directory = f"datasets/{dataset_id}/config.yaml", f"datasets/{dataset_directory}"
    sweep(TMP)
    bucket = open_bucket(gcp_bucket, TMP / "objects")
    dataset_config, train_config, weights, blobs = in_parallel(
        lambda: configuration.read_config(bucket, dataset_yaml, "dataset_config"),
        lambda: configuration.read_config(bucket, f"models/{model_id}/config.yaml", "train_config"),
        lambda: bucket.stat(f"models/{model_id}/model.hdf5"),
        lambda: cluster.from_chief(lambda: bucket.list(split_directory, skip=image_utils.is_leftover), Blob),
    )
    target_size = configuration.target_size(dataset_config, bucket.url(dataset_yaml))
    problems_path = TMP / f"problems_{dataset_id}_{split}.txt"
    class_folders, all_samples = image_utils.pair_images_and_masks(blobs, split_directory, bucket.url, problems_path)
    seed = configuration.subset_seed(train_config, split, seed)
    samples = image_utils.draw_subset(all_samples, downsample_factor, seed)
    blocks = blocks_of([sample.name for sample in samples], configuration.stacks(dataset_config, split))

    show(f"{bucket.url(split_directory)}: {len(all_samples)} images, {len(class_folders)} classes.")
    if len(samples) < len(all_samples):
        show(f"Using {len(samples)} of them, drawn with seed {seed}.")
    show(results.what_intervals_rest_on(blocks))
    configs = dataset_config, train_config
    return Inputs(bucket, *configs, weights, target_size, class_folders, samples, blocks, seed, problems_path)


def in_parallel(*calls):
    """Make the calls in threads and return their results: on a slow network each waits for several answers."""
    pool = ThreadPoolExecutor(len(calls))
    try:
        return [future.result() for future in [pool.submit(call) for call in calls]]
    finally:
        pool.shutdown(wait=False)  # an error is shown without waiting for the other calls


def count_images(inputs, batch_size, tf_seed, cluster):
    """Return the counts of all samples: from the cache, or each worker counts its share and the shares are summed."""
    path = inputs.counts_path()
    cached = Counts.load(path) if cluster.index == 0 else None
    if cluster.agree(path.name, cached is not None):
        where = path if cluster.index == 0 else "the chief's cache"
        show(f"Counts of these images by this model are in {where}: no inference needed.")
        return cached
    batch_size = min(batch_size, len(inputs.samples))  # the same for all shares: a probability's last bit depends on it
    share_path = path if cluster.number == 1 else path.with_suffix(f".{cluster.index}_of_{cluster.number}.npz")
    share = inputs.share(cluster.index, cluster.number)
    counts = Counts.load(share_path) or count_share(share, batch_size, tf_seed, share_path, cluster)
    if cluster.number > 1:
        counts = counts.summed(cluster.sum)
        if cluster.index == 0:
            keep(counts, path, counts.save)
        cluster.sum(np.zeros(1, np.int64))  # returns when the chief has saved the sum: the share is no longer needed
        with contextlib.suppress(OSError):
            share_path.unlink(missing_ok=True)
    return counts


def count_share(share, batch_size, tf_seed, path, cluster):
    """Count a share from its last checkpoint on, and cache the counts at `path`."""
    width, height = share.target_size
    checkpoint = path.with_suffix(".partial.npz")
    counts = Counts.load(checkpoint) or Counts.empty(len(share.class_folders), height, width, share.blocks.number)
    if not share.samples:  # fewer images than workers
        return counts
    if counts.images:
        show(f"Continuing after {counts.images} of {len(share.samples)} images, which an earlier run counted.")
    with fetching(share, counts.images, batch_size) as (weights_path, decoded):
        built = load_network(share, weights_path, tf_seed)
        counts.counted_with = {"batch_size": batch_size, **network.device_facts(), "libraries": results.versions()}
        device = counts.counted_with["gpu"] or "the CPU"
        show(f"Counting the probabilities of {len(share.samples) - counts.images} images on {device}.")
        run_pass(built, decoded, counts, share, batch_size, checkpoint, cluster)
    keep(counts, path, counts.save)
    Counts.remove_checkpoint(checkpoint)
    return counts


@contextlib.contextmanager
def fetching(share, done, batch_size):
    """Fetch the weights and all samples but the first `done` while TensorFlow is imported.

    Yields the path of the weights, and a generator of decoded samples.
    """
    bucket, weights, samples = share.bucket, share.weights, share.samples[done:]
    width, height = share.target_size
    image_utils.check_sizes_in_bytes(share.samples, bucket.url, share.target_size, share.problems_path)
    blobs = [weights, *(blob for sample in samples for blob in (sample.image, *sample.masks))]
    absent = [blob for blob in blobs if not bucket.is_here(blob)]
    bucket.check_room(absent)
    lookahead = max(2 * batch_size, DECODED_BYTES // (width * height * (1 + len(share.class_folders))))

    def fetch():  # the weights first: nothing can be counted without them
        return bucket.fetch(weights), image_utils.start_decoding(
            samples, bucket, share.target_size, lookahead, share.problems_path, warn
        )

    with contextlib.ExitStack() as stack:
        if absent:
            download = progress("download", sum(blob.size for blob in absent), unit="B", unit_scale=True)
            bucket.on_bytes = stack.enter_context(download).update
        fetched = ThreadPoolExecutor(1).submit(fetch)
        network.import_tensorflow()
        weights_path, decoded = fetched.result()
        yield weights_path, stack.enter_context(contextlib.closing(decoded))


def load_network(share, weights_path, tf_seed):
    """Rebuild the network, with its weights."""
    if tf_seed is not None:
        network.set_seed(tf_seed)
    try:
        built = network.build_network(
            share.train_config, len(share.class_folders), share.target_size, weights_path, warn
        )
    except ModelError as error:
        raise ModelError(f"{share.bucket.url(share.weights.name)}, with the config.yaml beside it: {error}") from error
    share.bucket.fetch(share.weights)  # an error if the file changed while it was read
    return built


def run_pass(built, decoded, counts, share, batch_size, checkpoint, cluster):
    """Run the network over the decoded samples and count, with a checkpoint every CHECKPOINT_SECONDS."""
    batches = inference.count_probabilities(
        built,
        decoded,
        share.blocks.labels[counts.images :],
        counts,
        share.class_titles,
        batch_size,
        shown_names={sample.name for sample in image_utils.evenly_spread(share.samples, SHOWN_SLICES)},
        on_smaller_batch=lambda size, half: warn(
            f"a batch of {size} images does not fit into memory: continuing with {half}; next time use "
            f"--batch-size {half}"
        ),
        free_memory=network.free_memory(),
    )
    saved = time.monotonic()
    with progress("inference", len(share.samples), initial=counts.images, unit=" images") as bar:
        for batch, images in enumerate(batches):
            if batch == 0:
                threading.Thread(target=import_what_follows, daemon=True).start()
            bar.update(images)
            cluster.progress(counts.images, len(share.samples))
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                keep(counts, checkpoint, counts.save_checkpoint)
                saved = time.monotonic()


def import_what_follows():
    """Import what the end of a run needs, while the interpreter waits for the network; then collect garbage again."""
    with contextlib.suppress(ImportError, MemoryError):  # the end of the run imports again, and shows the error
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
        import scipy.optimize  # noqa: F401
    gc.freeze()
    gc.enable()


def keep(counts, path, save):
    """Cache the counts. A full disk is only a warning: this run does not need the cache."""
    try:
        save(path)
    except OSError as error:
        warn(
            f"the counts of {counts.images} images cannot be kept in {path.parent} ({error.strerror or error}): make "
            "room there, or make it writable, else a later run must count again"
        )


def train_thresholds(inputs, counts, metric):
    """Train the threshold of each class, showing every evaluation; returns a list of results.ClassResult."""
    models.check_trainable(counts, inputs.class_titles)
    low, high = models.check_optimisation()
    trained = []
    for i, title in enumerate(inputs.class_titles):
        show(f"Training the threshold of {title}.")
        threshold, curve = models.train_prediction_threshold(
            counts.histogram[i],
            title,
            metric,
            on_evaluation=lambda n, x, value: show(f"  {n:3d}  threshold {x:.5f}  {metric.name} {value:.6f}"),
        )
        of_class = THRESHOLDS, counts.histogram[i], counts.block_histograms[:, i]
        confidence = assess(*of_class, metric, threshold.index, low, high)
        guaranteed = None
        if metric.constraint_name == "recall":
            guaranteed = guarantee_recall(*of_class, float(metric.level), low, high)
        name, folder = inputs.class_names[i], inputs.class_folders[i]
        trained.append(results.ClassResult(name, folder, threshold, curve, confidence, guaranteed))
    return trained


def publish(arguments, inputs, counts, trained, started):
    """Show the table, draw the figures, and put all into the model's folder; `arguments` is a dictionary."""
    metric, model_id = arguments["optimizing_class_metric"].name, arguments["model_id"]
    for line in results.table(trained, metric):
        show(line)
    for result in trained:
        for line in results.remarks(result):
            show(line)
        for line in results.warnings(result, metric):
            warn(line)
    title = f"{model_id} on {arguments['dataset_directory']} ({counts.images} images)"
    slices = figures.slices(counts, [result.trained.index for result in trained])
    files = {
        ".png": figures.draw_curves(trained, metric, title, results.what_intervals_rest_on(inputs.blocks)),
        "_slices.png": figures.draw_slices(slices, inputs.class_titles, title),
        "_curves.csv": results.curves_csv(trained),
    }
    description = results.describe(arguments, inputs, counts, trained, started)
    name = results.publish(inputs.bucket, model_id, description, files, TMP / "results")
    show(f"Result: {inputs.bucket.url(name)}")
    show(f"To test or infer with it: --trained-thresholds-id {name.rpartition('/')[2]}")


def main():
    cluster = workers.Cluster()
    try:
        args = parse_arguments()
        cluster = workers.Cluster(*workers.read_tf_config(os.environ.get("TF_CONFIG")), show, terminal.end_with)
        last_words.append(lambda: cluster.leave((WORKER_LOST, f"{cluster} was interrupted; {workers.CONTINUE}")))
        cluster.join()
        run(args, cluster)
    except ExpectedError as error:
        terminal.fail(error)
        cluster.leave((error.exit_code, f"{cluster}: {printable(error)}"))
        return error.exit_code
    except Exception:
        terminal.report_bug(TMP)
        cluster.leave((BUG, f"{cluster} ended by a bug in this program"))
        return BUG
    terminal.begin_to_end()
    cluster.leave()
    return DONE


if __name__ == "__main__":
    os._exit(main())  # without waiting for threads that still wait for a slow bucket
