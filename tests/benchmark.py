"""Measure what the README claims: each figure a ratio, both sides measured side by side in this run.

.venv/bin/python tests/benchmark.py [--repeats 5]
"""

import argparse
import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as in the tool

import numpy as np  # noqa: E402
import yaml  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import coverage_simulation  # noqa: E402
from fake_gcs import fake_gcs_server, free_port, listing_stub  # noqa: E402
from helpers import ROOT, SCRIPT, arguments, blobs_and_masks, tf_config, upload, write_split  # noqa: E402

import models  # noqa: E402
from counts import GRID, Counts  # noqa: E402
from gcp_utils import open_bucket  # noqa: E402
from image_utils import decode_image  # noqa: E402

MODEL_ID = "segmentation-model-benchmark"
SPLIT = "datasets/dataset-benchmark/validation"
NETWORK = {"model_name": "Unet", "model_parameters": {"backbone_name": "resnet18", "activation": "sigmoid"}}
SIZE, CLASSES = 128, 3

# What people think of as the floor: load the model, read the images, predict once.
BARE_PREDICT = """
import os, sys
os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3")
sys.modules["pandas"] = None  # which the tests alone bring along: Keras would import it
from pathlib import Path
import numpy as np
from PIL import Image
import tensorflow as tf
network = tf.keras.models.load_model(sys.argv[2], compile=False)
paths = sorted(Path(sys.argv[1], "images").iterdir())
images = np.stack([np.asarray(Image.open(path)) for path in paths])
network.predict((images * (1 / 255)).astype("float32")[..., None], batch_size=16, verbose=0)
"""

# The way that runs the network for every candidate threshold, as fast as that way can be: one model, compiled once,
# the threshold a variable of one compiled metric a class, all images in memory. It gets the candidates for free.
RE_EVALUATION = """
import os, sys, time
os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3")
sys.modules["pandas"] = None  # which the tests alone bring along: Keras would import it
from pathlib import Path
import numpy as np
from PIL import Image
import tensorflow as tf
network = tf.keras.models.load_model(sys.argv[2], compile=False)
split, thresholds = Path(sys.argv[1]), eval(sys.argv[3])
names = sorted(path.name for path in (split / "images").iterdir())
images = np.stack([np.asarray(Image.open(split / "images" / name)) for name in names])
images = (images * (1 / 255)).astype("float32")[..., None]
folders = sorted((split / "masks").iterdir())
masks = np.stack([np.stack([np.asarray(Image.open(folder / name)) for folder in folders], -1) for name in names])
threshold = tf.Variable(0.5)
class IoU(tf.keras.metrics.Metric):
    def __init__(self, i):
        super().__init__(name=f"class{i}_iou_score")
        self.i = i
        self.both, self.either = self.add_weight("both", dtype="int64"), self.add_weight("either", dtype="int64")
    def update_state(self, truth, probability, sample_weight=None):
        truth, predicted = truth[..., self.i] > 0, probability[..., self.i] > threshold
        self.both.assign_add(tf.math.count_nonzero(truth & predicted))
        self.either.assign_add(tf.math.count_nonzero(truth | predicted))
    def result(self):
        return self.both / self.either
for i, candidates in enumerate(thresholds):
    network.compile(metrics=[IoU(i)])
    for candidate in candidates:
        threshold.assign(candidate)
        network.evaluate(images, masks, batch_size=16, verbose=0)
"""


def seconds(*command, cwd):
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


# A process begins with its parent's peak, so a small one stands between: this one may be large.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def peak_megabytes(*command, cwd):
    """Peak resident memory of a process, in MiB."""
    words = [sys.executable, "-c", PEAK, sys.executable, *map(str, command)]
    return float(subprocess.run(words, cwd=cwd, check=True, stdout=subprocess.PIPE).stdout)


def make_bucket(bucket, images, size=SIZE):
    """A bucket with a network of random weights and so many images."""
    dataset, model = bucket / "datasets/dataset-benchmark", bucket / "models" / MODEL_ID
    write_split(bucket / SPLIT, *blobs_and_masks(images, size, size, CLASSES))
    (dataset / "config.yaml").write_text(yaml.safe_dump({"dataset_config": {"target_size": [size, size]}}))
    model.mkdir(parents=True)
    (model / "config.yaml").write_text(yaml.safe_dump({"train_config": {"segmentation_model": NETWORK}}))
    make = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import models
tf = network.import_tensorflow()
import segmentation_models
tf.keras.utils.set_random_seed(1)
network = segmentation_models.Unet("resnet18", encoder_weights=None, input_shape=(None, None, 1), classes={CLASSES})
network.compile("adam", "binary_crossentropy")
network.save({str(model / "model.hdf5")!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", make], check=True, stdout=subprocess.DEVNULL)
    return bucket / SPLIT, model / "model.hdf5"


def tool(bucket, **others):
    return [SCRIPT, *arguments(bucket, "dataset-benchmark/validation", MODEL_ID, **others)]


def multiply(bucket, source, times, split=SPLIT):
    """A bucket with each image of `source` so many times, as links to the same files."""
    shutil.copytree(source, bucket, copy_function=os.link)
    for path in list((bucket / split).rglob("*.png")):
        for i in range(1, times):
            os.link(path, path.with_name(f"copy_{i:04d}_{path.name}"))
    return bucket


def ratio_of_medians(first, second, repeats):
    """Median of first() over median of second(), the two taking turns."""
    pairs = [(first(), second()) for _ in range(repeats)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return ours, theirs, ours / theirs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement; medians are shown")
    repeats = parser.parse_args().repeats
    rows = []

    def row(what, ours, theirs, ratio, unit="s"):
        shown = f"{ratio:.2f}" if ratio > 0.1 else f"{ratio:.2g}"
        rows.append((what, f"{ours:,.3g} {unit}", f"{theirs:,.3g} {unit}", shown))
        print("| " + " | ".join(rows[-1]) + " |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        split, weights = make_bucket(folder / "400", 400)
        make_bucket(folder / "100", 100)
        print("| what | ours | the other | ratio |\n| --- | --- | --- | --- |")

        def first_run(bucket="400"):
            shutil.rmtree(folder / "tmp", ignore_errors=True)
            return seconds(*tool(bucket), cwd=folder)

        row(
            "whole job, 400 images / bare `model.predict`, once",
            *ratio_of_medians(first_run, lambda: seconds("-c", BARE_PREDICT, split, weights, cwd=folder), repeats),
        )
        row(
            "rerun with another metric / first run, 400 images",
            *ratio_of_medians(
                lambda: seconds(*tool("400", optimizing_class_metric="f1_score"), cwd=folder), first_run, repeats
            ),
        )

        first_run("100")
        result = max((folder / "100/models" / MODEL_ID).glob("model_thresholds_*.yaml"))
        history = yaml.safe_load(result.read_text())["metadata"]["thresholds_training_history"]
        # nine a class, as many as a tolerance of 0.01 takes
        candidates = [[point[0] for point in list(of_class.values())[:9]] for of_class in history.values()]
        row(
            "whole job, 100 images / the network again for each of 9 thresholds a class",
            *ratio_of_medians(
                lambda: first_run("100"),
                lambda: seconds(
                    "-c",
                    RE_EVALUATION,
                    folder / "100" / SPLIT,
                    folder / "100/models" / MODEL_ID / "model.hdf5",
                    candidates,
                    cwd=folder,
                ),  # fmt: skip
                min(repeats, 3),
            ),
        )
        for name, other in (
            ("`sklearn.metrics.precision_recall_curve`", sorted_curve),
            ("200 binned thresholds, numpy", binned_curve),
        ):
            row(f"one class, 4 million pixels: optimum from counts / {name}", *curve_ratio(other, repeats))

        multiply(folder / "2000", folder / "100", 20)

        def peak(bucket):
            shutil.rmtree(folder / "tmp", ignore_errors=True)
            return peak_megabytes(*tool(bucket), cwd=folder)

        row(
            "peak memory, 2,000 images / 100 images",
            *ratio_of_medians(lambda: peak("2000"), lambda: peak("100"), min(repeats, 3)),
            unit="MiB",
        )
        multiply(folder / "10000", folder / "100", 100)
        row(
            "10,000 images in two processes of half the cores each / in one of all cores (once)",
            *ratio_of_medians(lambda: two_workers(folder, "10000"), lambda: first_run("10000"), 1),  # minutes each
        )

        make_bucket(folder / "small 100", 100, size=32)
        for number in (5000, 10_000):
            multiply(folder / f"small {number}", folder / "small 100", number // 100)

        def each_further_image(fewer, more):
            return (first_run(f"small {more}") - first_run(f"small {fewer}")) / (more - fewer) * 1000

        row(
            "each image from the 5,000th to the 10,000th / from the 100th to the 5,000th, 32 x 32",
            *ratio_of_medians(
                lambda: each_further_image(5000, 10_000), lambda: each_further_image(100, 5000), min(repeats, 3)
            ),
            unit="ms",
        )
        gpu = bool(network.import_tensorflow().config.list_physical_devices("GPU"))
        backbone, images = ("vgg16", 1024) if gpu else ("resnet18", 128)
        row(
            f"forward pass with counting and bootstrap / alone, Unet/{backbone}, 512 x 512, batch 16",
            *pass_ratio(backbone, images, repeats),
            unit="images/s",
        )
        row(
            "an image of 512 x 512 through Unet/vgg16 / of 572 x 572 through the original U-Net",
            *network_ratio(repeats),
        )
        row("listing 40,000 objects in 4 folders, 50 ms an answer / in one chain of pages", *listing_ratio(repeats))
        print_rates(folder)
    pictures = coverage_simulation.population(ROOT / "sandbox")
    coverage_simulation.print_table(pictures, models.class_metric("iou_score"), worlds=1000)
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}")


def two_workers(folder, bucket):
    """Seconds that two workers take, each held to its half of the cores."""
    cores = sorted(os.sched_getaffinity(0))
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    start = time.perf_counter()
    processes = []
    for index in (0, 1):
        (folder / f"worker {index}").mkdir(exist_ok=True)
        shutil.rmtree(folder / f"worker {index}/tmp", ignore_errors=True)
        processes.append(
            subprocess.Popen(
                [sys.executable, *tool(folder / bucket)],
                cwd=folder / f"worker {index}",
                env={**os.environ, "TF_CONFIG": tf_config(("worker", index), worker=addresses)},
                stdout=subprocess.DEVNULL,
                preexec_fn=lambda index=index: os.sched_setaffinity(0, cores[index::2]),
            )
        )
    assert [process.wait() for process in processes] == [0, 0]
    return time.perf_counter() - start


def unet(backbone, size=None):
    """A network of random weights."""
    with contextlib.redirect_stdout(None):  # it announces its framework
        import segmentation_models
    return segmentation_models.Unet(backbone, encoder_weights=None, input_shape=(size, size, 1), classes=CLASSES)


def pass_ratio(backbone, images, repeats):
    """Images per second of `count_probabilities` and of the network alone on the same batches; the ratio of times."""
    tf = network.import_tensorflow()
    network = unet(backbone)
    pictures, masks = blobs_and_masks(16, 512, 512, CLASSES)
    samples = [(f"slice {i}", pictures[i % 16], masks[i % 16]) for i in range(images)]
    forward = tf.function(lambda x: network(x, training=False))
    batch = tf.constant((pictures * (1 / 255)).astype(np.float32)[..., None])

    def with_counts():
        counts = Counts.empty(CLASSES, 512, 512)
        batches = models.count_probabilities(network, samples, counts, ["class"] * CLASSES, 16, set(), print)
        next(batches), next(batches)  # compiled and warm; three batches are on their way
        return timed(lambda: list(batches)) / (images - 48)

    def alone():
        forward(batch), forward(batch).numpy()
        return timed(lambda: [forward(batch) for _ in range(images // 16 - 3)][-1].numpy()) / (images - 48)

    ours, theirs, ratio = ratio_of_medians(with_counts, alone, repeats)
    return 1 / ours, 1 / theirs, ratio


def network_ratio(repeats):
    """Seconds an image of Unet/vgg16 and of the original U-Net, whose speed on GPUs is published; their ratio."""
    tf = network.import_tensorflow()
    images, seconds_an_image = 2, []
    for name, network, size in (
        ("Unet/vgg16", unet("vgg16", 512), 512),
        ("the original U-Net", original_unet(tf.keras), 572),
    ):
        print(f"{name}: {multiply_adds(tf.keras, network) / 1e9:.1f} billion multiply-adds an image")
        forward = tf.function(lambda x, network=network: network(x, training=False))
        batch = tf.zeros((images, size, size, 1))
        forward(batch)
        seconds_an_image.append(lambda forward=forward, batch=batch: timed(lambda: forward(batch).numpy()) / images)
    return ratio_of_medians(*seconds_an_image, repeats)


def original_unet(keras):
    """Ronneberger et al. 2015 (arXiv 1505.04597), with the 3 x 3 up-convolutions of the published measurements."""
    layers = keras.layers
    first = x = layers.Input((572, 572, 1))
    skipped = []
    for filters in (64, 128, 256, 512, 1024):
        if skipped:
            x = layers.MaxPool2D()(x)
        for _ in range(2):
            x = layers.Conv2D(filters, 3, activation="relu")(x)
        skipped.append(x)
    skipped.pop()
    for filters in (512, 256, 128, 64):
        x = layers.Conv2DTranspose(filters, 3, strides=2, padding="same", activation="relu")(x)
        across = skipped.pop()
        x = layers.Concatenate()([layers.Cropping2D((across.shape[1] - x.shape[1]) // 2)(across), x])
        for _ in range(2):
            x = layers.Conv2D(filters, 3, activation="relu")(x)
    return keras.Model(first, layers.Conv2D(2, 1)(x))


def multiply_adds(keras, network):
    """Of the convolutions, an image: next to them, nothing else counts."""
    total = 0
    for layer in network.layers:
        if isinstance(layer, keras.layers.Conv2D):
            # each weight is used once a pixel of the output, or of the input where that is the smaller
            grid = layer.input if isinstance(layer, keras.layers.Conv2DTranspose) else layer.output
            total += layer.kernel.shape.num_elements() * grid.shape[1] * grid.shape[2]
    return total


def listing_ratio(repeats):
    """Seconds to list a split of four folders, and to list it page after page; their ratio."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    folders = ["images", "masks/class_0", "masks/class_1", "masks/class_2"]
    names = [f"{SPLIT}/{folder}/slice_{i:05d}.png" for folder in folders for i in range(10_000)]
    with listing_stub(names, latency=0.05) as (url, _):
        os.environ["STORAGE_EMULATOR_HOST"] = url
        bucket = open_bucket("gs://listing", Path("unused"))
        client = storage.Client(project=None, credentials=AnonymousCredentials())

        def in_one_chain():
            assert sum(1 for _ in client.list_blobs("listing", prefix=SPLIT)) == len(names)

        return ratio_of_medians(lambda: timed(bucket.list, SPLIT), lambda: timed(in_one_chain), repeats)


def print_rates(folder):
    """What the README's section on scale computes with: the work of the host for a large dataset."""
    bucket = folder / "rates"
    write_split(bucket / SPLIT, *blobs_and_masks(500, 512, 512, CLASSES))
    files = [(path.relative_to(bucket).as_posix(), path.read_bytes()) for path in sorted(bucket.rglob("*.png"))]
    decode = timed(lambda: [decode_image(data, name, (512, 512), ("L",)) for name, data in files]) / 500
    with fake_gcs_server() as server:
        os.environ["STORAGE_EMULATOR_HOST"] = server
        upload(server, bucket, "rates")
        opened = open_bucket("gs://rates", folder / "rates cache")
        blobs = opened.list(SPLIT)
        listing = timed(lambda: opened.list(SPLIT)) / len(blobs)
        with ThreadPoolExecutor(opened.threads) as pool:
            fetching = timed(lambda: list(pool.map(opened.fetch, blobs))) / len(blobs)
    print(
        f"\nAn image of 512 x 512 with {CLASSES} masks is decoded in {decode * 1000:.2g} ms of one core. From a "
        f"fake-gcs-server on the same cores, {1 / fetching:,.0f} objects/s are fetched and {1 / listing:,.0f} listed."
    )


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def pixels(number=4_000_000):
    rng = np.random.default_rng(0)
    truth = rng.random(number) < 0.1
    return truth, np.where(truth, rng.beta(3, 2, number), rng.beta(1, 6, number)).astype(np.float32)


def sorted_curve(truth, p):
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(truth, p)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return thresholds[f1[:-1].argmax()]


def binned_curve(truth, p):
    thresholds = np.linspace(0, 1, 200, dtype=np.float32)
    bins = np.searchsorted(thresholds, p)
    tp, fp = (np.bincount(bins[truth == side], minlength=201)[::-1].cumsum()[::-1][1:] for side in (True, False))
    return thresholds[(2 * tp / (tp + fp + truth.sum())).argmax()]


def curve_ratio(other, repeats):
    truth, p = pixels()
    counts = Counts.empty(1, 1, 1)
    for side in (0, 1):
        counts.histogram[0, side] = np.bincount(np.ceil(p[truth == side] * GRID).astype(int), minlength=GRID + 1)
    counts.images = 1
    return ratio_of_medians(
        lambda: timed(models.train_prediction_threshold, counts, 0, "class0", "f1_score", lambda *_: None),
        lambda: timed(other, truth, p),
        repeats,
    )


if __name__ == "__main__":
    main()
