"""Train the prediction thresholds of a segmentation model, one per class, on a validation or test set.

    python3 train_segmentation_model_prediction_thresholds.py --gcp-bucket gs://sandbox \
        --dataset-directory dataset-composite_0123/validation \
        --model-id segmentation-model-composite_0123_20200321T154533Z
"""

import gc
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # `python3 -P` and -I leave it out
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's sums are small: more threads only take cores from others

import terminal

if __name__ == "__main__":
    # The imports make many objects that stay, and the collector looks through them again and again: that is 6 % of a
    # job of 400 small images (tests/benchmark.py --rows whole_job).
    gc.set_threshold(1_000_000)
    terminal.prepare()

import argparse
import difflib
import random
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

import chunks
import configuration
import figures
import image_utils
import models
import results
from chunks import TMP
from confidence import Blocks, assess, blocks_of, guarantee_recall, stack_results
from counts import THRESHOLDS, Checkpoint, checkpoint_path
from errors import BUG, DONE, EXIT_CODES, USAGE, BlobNotFoundError, DatasetError, ExpectedError, UsageError
from gcp_utils import Blob, open_bucket, sweep
from terminal import images_text, progress, show, warn

CHECKPOINT_SECONDS = 30


def parse_arguments():
    """Parse the command line; raises UsageError."""
    parser = configuration.ArgumentParser(
        description="Find, for each class of a segmentation model, the prediction threshold that makes a class metric\n"
        "best on a validation or test set. The network runs once over the images. The result is written to\n"
        "<gcp-bucket>/models/<model-id>/model_thresholds_<timestamp>.yaml, with figures and tables beside it.",
        epilog="Fetched files and counts are kept in ./tmp: a rerun with another metric needs no inference, and an\n"
        "interrupted run continues when the same command is given again. `rm -r tmp` frees the space.\n\nexit codes:\n"
        + "\n".join(f"  {code:3d}  {meaning}" for code, meaning in EXIT_CODES.items()),
    )
    needed = {"required": True, "default": argparse.SUPPRESS}  # keeps "(default: None)" out of the help
    folders, number = configuration.folders, configuration.number
    metrics = f"the metric to make best for each class: {', '.join(models.METRIC_NAMES)}"
    factor = "the part of the images to use, a random subset, above 0 and up to 1"
    seed = "for np.random.seed, and to draw the subset; without it the subset's seed is in the model's config.yaml"
    bucket = "gs://name[/folder], or a directory of the same layout"
    parser.add_argument("--gcp-bucket", type=configuration.text, help=bucket, **needed)
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
    parser.add_argument("--message", type=configuration.text, help="a note that is put into the result")
    return parser.parse_args()


def run(args):
    """Do one run, in four steps.

    find_inputs        find what the bucket holds for this run: configurations, weights, images, masks
    count_images       run the network once over the images, or take the counts of an earlier run
    train_thresholds   find the threshold of each class, and how far it can be trusted
    publish            put YAML, figures and tables into the model's folder
    """
    start = time.monotonic()
    models.optimisation_range()  # an error before the network runs, not after it
    random.seed(args.random_module_global_seed)
    np.random.seed(args.numpy_random_global_seed)
    inputs = find_inputs(args)
    counts = count_images(inputs, args)
    class_results = train_thresholds(inputs, counts, args.optimizing_class_metric)
    publish(vars(args), inputs, counts, class_results, start)


class Inputs(NamedTuple):
    """What a run works on."""

    bucket: object
    dataset_config: dict
    train_config: dict
    weights: Blob
    target_size: list  # width, height
    class_folders: list
    samples: list  # of image_utils.Sample
    blocks: Blocks  # of the samples
    seed: int  # with which the subset was drawn
    problems_path: Path  # lists the files that cannot be used

    @property
    def class_names(self):
        return [f"class{i}" for i in range(len(self.class_folders))]

    @property
    def class_titles(self):
        return [f"{name} ({folder})" for name, folder in zip(self.class_names, self.class_folders, strict=True)]


def find_inputs(args):
    """List and check what a run needs, and draw its subset of the images; returns Inputs."""
    dataset_id, split = args.dataset_directory.split("/")
    dataset_yaml, split_directory = f"datasets/{dataset_id}/config.yaml", f"datasets/{args.dataset_directory}"
    model_directory = f"models/{args.model_id}"
    sweep(TMP)
    bucket = open_bucket(args.gcp_bucket, TMP / "objects")
    pool = ThreadPoolExecutor(4)  # on a slow network each waits for several answers
    asked = [
        pool.submit(configuration.read_config, bucket, dataset_yaml, "dataset_config", warn),
        pool.submit(configuration.read_config, bucket, f"{model_directory}/config.yaml", "train_config", warn),
        pool.submit(bucket.stat, f"{model_directory}/model.hdf5"),
        pool.submit(bucket.list, split_directory, image_utils.is_leftover),
    ]
    try:
        dataset_config, train_config, weights, blobs = (future.result() for future in asked)
    except BlobNotFoundError as error:
        raise with_names_that_are_there(error, bucket, args) from error
    finally:
        pool.shutdown(wait=False)  # an error is shown without waiting for a long list
    if not blobs:
        error = DatasetError(f"{bucket.url(split_directory)}: there are no files")
        raise with_names_that_are_there(error, bucket, args)
    target_size = configuration.target_size(dataset_config, bucket.url(dataset_yaml))
    problems_path = TMP / f"problems_{dataset_id}_{split}.txt"
    class_folders, all_samples = image_utils.pair_images_and_masks(blobs, split_directory, bucket.url, problems_path)
    seed = configuration.subset_seed(train_config, split, args.numpy_random_global_seed)
    samples = image_utils.draw_subset(all_samples, args.dataset_downsample_factor, seed)
    stacks = configuration.stacks(dataset_config, split, warn)
    blocks = blocks_of([sample.name for sample in samples], stacks, [sample.name for sample in all_samples])

    show(f"{bucket.url(split_directory)}: {images_text(len(all_samples))}, {len(class_folders)} classes.")
    if len(samples) < len(all_samples):
        show(f"Using {len(samples)} of them, drawn with seed {seed}.")
    for sentence in blocks.warnings:
        warn(sentence)
    show(results.what_intervals_rest_on(blocks))
    configs = dataset_config, train_config
    return Inputs(bucket, *configs, weights, target_size, class_folders, samples, blocks, seed, problems_path)


def with_names_that_are_there(error, bucket, args):
    """The error to raise instead, which lists the names that --dataset-directory or --model-id can be meant to be."""
    dataset_id, split = args.dataset_directory.split("/")
    for flag, folder, name in (
        ("--model-id", "models", args.model_id),
        ("--dataset-directory", "datasets", dataset_id),
        ("--dataset-directory", f"datasets/{dataset_id}", split),
    ):
        names = bucket.folders(folder)
        if name not in names:
            close = difflib.get_close_matches(name, names, 5, 0)
            there = f"it has {', '.join(close)}{' ...' if len(names) > 5 else ''}" if names else "it holds no folders"
            return type(error)(f"{flag} names {name!r}, which is not in {bucket.url(folder)}: {there}")
    return error


def count_images(inputs, args):
    """Return the counts of all samples: those that an earlier run kept, or else this run counts, or continues."""
    job = chunks.Job(
        address=inputs.bucket.address,
        train_config=inputs.train_config,
        weights=inputs.weights,
        target_size=inputs.target_size,
        class_titles=inputs.class_titles,
        batch_size=min(args.batch_size, len(inputs.samples), chunks.most_per_batch(inputs.target_size)),
        tf_seed=args.tf_random_global_seed,
        environment=chunks.environment(),
    )
    parts = chunks.divide(inputs.samples, inputs.blocks.labels, inputs.target_size)
    path = checkpoint_path(
        TMP / "counts",
        (inputs.bucket.address, args.dataset_directory, args.model_id, inputs.train_config.get("segmentation_model")),
        (inputs.class_folders, inputs.target_size, len(parts[0].samples), inputs.blocks.labels.tolist()),
        [sample.name for sample in inputs.samples],
    )
    files = [(inputs.weights,), *((sample.image, *sample.masks) for sample in inputs.samples)]
    checkpoint = Checkpoint.load_if_it_holds(path, files, inputs.bucket) or Checkpoint.empty(
        len(inputs.class_folders), inputs.blocks.number, files, len(parts)
    )
    if checkpoint.done.all():
        show(f"Counts of these images by this model are in {path}: no inference needed.")
    else:
        if checkpoint.done.any():
            terminal.kept = counted_text(checkpoint)
            show(f"Continuing after {terminal.kept}, which an earlier run counted.")
        missing = [part for part in parts if not checkpoint.done[part.number]]
        count_what_is_missing(job, inputs, missing, checkpoint, path)
    for sentence in image_utils.explain_remarks(checkpoint.remarks, len(inputs.samples), inputs.bucket.url):
        warn(sentence)
    return checkpoint.counts


def count_what_is_missing(job, inputs, parts, checkpoint, path):
    """Count chunks, and add them to the Checkpoint, which is saved now and then and at the end."""
    problems, saved = [], time.monotonic()
    with progress("inference", len(inputs.samples), initial=checkpoint.counts.images, unit=" images") as bar:
        for counted in chunks.count_job(job, inputs.bucket, parts, bar.update):
            for sentence in counted.warnings:
                warn(sentence)
            if counted.problems and not problems:
                warn(f"{counted.problems[0][1]}; the others are checked, without inference, to name all in one error")
            problems += counted.problems
            if problems:
                continue
            checkpoint.add(counted)
            if time.monotonic() - saved > CHECKPOINT_SECONDS or checkpoint.done.all():
                save(checkpoint, path)
                saved = time.monotonic()
    if problems:
        raise image_utils.problems_error(sorted(problems), inputs.problems_path)


def save(checkpoint, path):
    """Save the Checkpoint. A full disk is only a warning: this run does not need it."""
    try:
        checkpoint.save(path)
        terminal.kept = counted_text(checkpoint)
    except OSError as error:
        warn(
            f"counts cannot be kept in {path.parent} ({error.strerror or error}): make room there, or make it "
            "writable, else a later run must count again"
        )


def counted_text(checkpoint):
    """How many images the Checkpoint contains the counts of, as in "8 of 11 images"."""
    return f"{checkpoint.counts.images:,} of {images_text(len(checkpoint.digests) - 1)}"


def train_thresholds(inputs, counts, metric):
    """Train the threshold of each class, showing every evaluation; returns a list of results.ClassResult."""
    models.check_trainable(counts, inputs.class_titles)
    for sentence in models.swapped_classes(counts, inputs.class_titles, inputs.class_folders):
        warn(sentence)
    low, high = models.optimisation_range()
    class_results = []
    for i, title in enumerate(inputs.class_titles):
        show(f"Training the threshold of {title}.")
        with terminal.updating_line() as update:
            trained, curve = models.train_prediction_threshold(
                counts.histogram[i],
                title,
                metric,
                on_evaluation=lambda n, x, value, update=update: update(
                    f"  {n:3d}  threshold {results.threshold_text(x)}  {metric.name} {value:.6f}"
                ),
            )
        of_class = THRESHOLDS, counts.histogram[i], counts.block_histograms[:, i]
        guaranteed = None
        if metric.constraint_name == "recall":
            guaranteed = guarantee_recall(*of_class, metric.level, low, high, inputs.blocks.names)
        class_results.append(
            results.ClassResult(
                name=inputs.class_names[i],
                folder=inputs.class_folders[i],
                trained=trained,
                curve=curve,
                confidence=assess(*of_class, metric, trained.index, low, high, inputs.blocks.kind),
                guaranteed_recall=guaranteed,
                stacks=stack_results(*of_class, inputs.blocks, metric, trained.index, low, high),
                kind=inputs.blocks.kind,
            )
        )
    return class_results


def publish(arguments, inputs, counts, class_results, start):
    """Show the table, draw the figures, and put all into the model's folder; `arguments` is a dictionary."""
    metric, model_id = arguments["optimizing_class_metric"], arguments["model_id"]
    for line in results.table(class_results, metric):
        show(line)
    for line in results.about_split(arguments["dataset_directory"]):
        warn(line)
    for result in class_results:
        for line in results.explanations(result, metric):
            show(line)
        for line in results.doubts(result, metric):
            warn(line)
    for line in results.influence(class_results):
        show(line)
    title = f"{model_id} on {arguments['dataset_directory']} ({images_text(counts.images)})"
    files, problems = figures.draw(class_results, counts, metric, title, results.what_intervals_rest_on(inputs.blocks))
    for line in problems:
        warn(line)
    files |= {"_curves.csv": results.curves_csv(class_results), "_stacks.csv": results.stacks_csv(class_results)}
    description = results.describe(arguments, inputs, counts, class_results, start, terminal.warned)
    name = results.upload(inputs.bucket, model_id, description, files, TMP / "results")
    show(f"Result: {inputs.bucket.url(name)}")
    show(f"Your testing and inference tools take it as --trained-thresholds-id {name.rpartition('/')[2]}")


def main():
    terminal.warned.clear()
    try:
        if "cluster" in os.environ.get("TF_CONFIG", ""):
            raise UsageError("TF_CONFIG is not read any more: several machines share a job as docs/large_jobs.md says")
        run(parse_arguments())
    except ExpectedError as error:
        terminal.fail(error)
        return error.exit_code
    except ModuleNotFoundError as error:
        terminal.fail(terminal.missing_package(error))
        return USAGE
    except Exception:
        terminal.fail("this is a bug in this program, not your mistake; please report it, with the lines below")
        traceback.print_exc()
        return BUG
    return DONE


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # without waiting for threads that still wait for a slow bucket
