"""Measure what the documentation claims. Each row is a ratio of two things that are measured in turns.

.venv/bin/python tests/benchmark.py [--repeats 3] [--rows whole_job rerun ...]
"""

import argparse
import contextlib
import os
import platform
import resource
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
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a machine compiles a module once, not in every run

import numpy as np  # noqa: E402
import yaml  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import coverage_simulation  # noqa: E402
from benchmark_programs import (  # noqa: E402
    BARE_PREDICT,
    CLASSES,
    FLOOR,
    MANY_CLASSES,
    NETWORK,
    PEAK,
    RE_EVALUATION,
    SIZE,
)
from fake_gcs import fake_gcs_server, free_port, listing_stub  # noqa: E402
from helpers import ROOT, SCRIPT, arguments, blobs_and_masks, tf_config, upload, write_split  # noqa: E402

import inference  # noqa: E402
import models  # noqa: E402
import network  # noqa: E402
from counts import THRESHOLDS, Counts  # noqa: E402
from gcp_utils import open_bucket  # noqa: E402
from image_utils import decode_image  # noqa: E402

MODEL_ID = "segmentation-model-benchmark"
SPLIT = "datasets/dataset-benchmark/validation"


def seconds(*command, cwd):
    start = time.perf_counter()
    process = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return time.perf_counter() - start


def process_seconds(*command, cwd):
    """Processor time of a process and its children in seconds, with the time in the kernel."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds(*command, cwd=cwd)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def peak_megabytes(*command, cwd, **environment):
    """Peak resident memory of a process, in MiB."""
    words = [sys.executable, "-c", PEAK, sys.executable, *map(str, command)]
    process = subprocess.run(words, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return float(process.stdout)


def make_bucket(bucket, images, size=SIZE):
    """Make a bucket with a network of random weights and `images` images."""
    dataset, model = bucket / "datasets/dataset-benchmark", bucket / "models" / MODEL_ID
    write_split(bucket / SPLIT, *blobs_and_masks(images, size, size, CLASSES))
    (dataset / "config.yaml").write_text(yaml.safe_dump({"dataset_config": {"target_size": [size, size]}}))
    model.mkdir(parents=True)
    (model / "config.yaml").write_text(yaml.safe_dump({"train_config": {"segmentation_model": NETWORK}}))
    make = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import network as room
tf = room.import_tensorflow()
import segmentation_models
tf.keras.utils.set_random_seed(1)
network = segmentation_models.Unet("resnet18", encoder_weights=None, input_shape=(None, None, 1), classes={CLASSES})
network.compile("adam", "binary_crossentropy")
network.save({str(model / "model.hdf5")!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", make], check=True, stdout=subprocess.DEVNULL)


def bucket_of(folder, images, size=SIZE):
    """The name of a bucket in `folder` with `images` images; it is made if it is not there yet."""
    name = f"{images} of {size}"
    if not (folder / name).exists():
        if images <= 400:
            make_bucket(folder / name, images, size)
        else:
            multiply(folder / name, folder / bucket_of(folder, 100, size), images // 100)
    return name


def first_run(folder, images, size=SIZE, measure=seconds):
    """Measure a run with an empty cache."""
    bucket = bucket_of(folder, images, size)
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    return measure(*tool(bucket), cwd=folder)


def tool(bucket, **others):
    return [SCRIPT, *arguments(bucket, "dataset-benchmark/validation", MODEL_ID, **others)]


def multiply(bucket, source, times, split=SPLIT):
    """Make a bucket that has each image of `source` `times` times, as links to the same files."""
    shutil.copytree(source, bucket, copy_function=os.link)
    for path in list((bucket / split).rglob("*.png")):
        for i in range(1, times):
            os.link(path, path.with_name(f"copy_{i:04d}_{path.name}"))
    return bucket


def ratio_of_medians(first, second, repeats):
    """The medians of first() and second(), which are called in turns, and the ratio of the medians."""
    pairs = [(first(), second()) for _ in range(repeats)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return ours, theirs, ours / theirs


def two_workers(folder, bucket):
    """Seconds that two workers take, each on half of the cores."""
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
                stderr=subprocess.DEVNULL,
                preexec_fn=lambda index=index: os.sched_setaffinity(0, cores[index::2]),
            )
        )
    assert [process.wait() for process in processes] == [0, 0]
    return time.perf_counter() - start


def unet(backbone, size=None):
    """A network of random weights."""
    with contextlib.redirect_stdout(None):  # it prints the name of its framework
        import segmentation_models
    return segmentation_models.Unet(backbone, encoder_weights=None, input_shape=(size, size, 1), classes=CLASSES)


def pass_ratio(backbone, images, repeats):
    """Images per second of `count_probabilities` and of only the network on the same batches; the ratio of times."""
    tf = network.import_tensorflow()
    net = unet(backbone)
    pictures, masks = blobs_and_masks(16, 512, 512, CLASSES)
    samples = [(f"slice {i}", pictures[i % 16], masks[i % 16]) for i in range(images)]
    forward = tf.function(lambda x: net(x, training=False))
    batch = tf.constant((pictures * (1 / 255)).astype(np.float32)[..., None])

    def with_counts():
        counts = Counts.empty(CLASSES, 512, 512, 20)
        blocks = np.arange(images) * 20 // images
        names = ["class"] * CLASSES
        batches = inference.count_probabilities(net, samples, blocks, counts, names, 16, set(), print)
        next(batches), next(batches)  # now all is compiled and warm, and three batches have been started
        return timed(lambda: list(batches)) / (images - 48)

    def alone():
        forward(batch), forward(batch).numpy()
        return timed(lambda: [forward(batch) for _ in range(images // 16 - 3)][-1].numpy()) / (images - 48)

    ours, theirs, ratio = ratio_of_medians(with_counts, alone, repeats)
    return 1 / ours, 1 / theirs, ratio


def network_ratio(repeats):
    """Seconds per image of Unet/vgg16 and of the original U-Net, whose speed on GPUs is published; their ratio."""
    tf = network.import_tensorflow()
    images, seconds_an_image = 2, []
    for name, net, size in (
        ("Unet/vgg16", unet("vgg16", 512), 512),
        ("the original U-Net", original_unet(tf.keras), 572),
    ):
        print(f"{name}: {multiply_adds(tf.keras, net) / 1e9:.1f} billion multiply-adds an image")
        forward = tf.function(lambda x, net=net: net(x, training=False))
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


def multiply_adds(keras, net):
    """Multiply-adds per image in the convolutions; those of other layers are negligible."""
    total = 0
    for layer in net.layers:
        if isinstance(layer, keras.layers.Conv2D):
            # each weight is used once per pixel of the output; in a transposed convolution, of the input
            grid = layer.input if isinstance(layer, keras.layers.Conv2DTranspose) else layer.output
            total += layer.kernel.shape.num_elements() * grid.shape[1] * grid.shape[2]
    return total


def listing_ratio(repeats):
    """Seconds to list a split of four folders as the tool does, and in one chain of pages; their ratio."""
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


def rates(folder, repeats):
    """Print the rates that docs/large_jobs.md computes with: the work of the host for a large dataset."""
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
    import scipy.optimize  # noqa: F401  its import is not measured

    truth, p = pixels()
    bins, metric = np.searchsorted(THRESHOLDS, p), models.class_metric("f1_score")
    histogram = np.stack([np.bincount(bins[truth == side], minlength=len(THRESHOLDS) + 1) for side in (0, 1)])
    return ratio_of_medians(
        lambda: timed(models.train_prediction_threshold, histogram, "class0", metric, lambda *_: None),
        lambda: timed(other, truth, p),
        repeats,
    )


def row(what, measured, unit="s"):
    ours, theirs, ratio = measured
    shown = f"{ratio:.2f}" if ratio > 0.1 else f"{ratio:.2g}"
    print(f"| {what} | {ours:,.3g} {unit} | {theirs:,.3g} {unit} | {shown} |", flush=True)


def whole_job(folder, repeats):
    bucket = folder / bucket_of(folder, 400)
    weights = bucket / "models" / MODEL_ID / "model.hdf5"
    others = {
        "its floor: TensorFlow, the network, the forward passes": ("-c", FLOOR, weights, 400),
        "bare `model.predict`, once": ("-c", BARE_PREDICT, bucket / SPLIT, weights),
    }
    for name, other in others.items():
        row(
            f"whole job, 400 images of {SIZE} x {SIZE}, Unet/resnet18 / {name}",
            ratio_of_medians(lambda: first_run(folder, 400), lambda o=other: seconds(*o, cwd=folder), repeats),
        )


def rerun(folder, repeats):
    again = tool(bucket_of(folder, 400), optimizing_class_metric="f1_score")
    first_run(folder, 400)
    for name, measure in (("", seconds), (", processor time", process_seconds)):
        row(
            f"rerun with another metric / first run, 400 images{name}",
            ratio_of_medians(
                lambda m=measure: m(*again, cwd=folder), lambda m=measure: first_run(folder, 400, measure=m), repeats
            ),
        )


def running_the_network_for_every_threshold(folder, repeats):
    first_run(folder, 100)
    bucket = folder / bucket_of(folder, 100)
    result = max((bucket / "models" / MODEL_ID).glob("model_thresholds_*.yaml"))
    history = yaml.safe_load(result.read_text())["metadata"]["thresholds_training_history"]
    # nine per class, as many as minimize_scalar needs with a tolerance of 0.01
    candidates = [[point[0] for point in list(of_class.values())[:9]] for of_class in history.values()]
    other = ["-c", RE_EVALUATION, bucket / SPLIT, bucket / "models" / MODEL_ID / "model.hdf5", candidates]
    row(
        "whole job, 100 images / the network again for each of 9 thresholds a class",
        ratio_of_medians(lambda: first_run(folder, 100), lambda: seconds(*other, cwd=folder), min(repeats, 3)),
    )


def optimum(folder, repeats):
    for name, other in (
        ("`sklearn.metrics.precision_recall_curve`", sorted_curve),
        ("200 binned thresholds, numpy", binned_curve),
    ):
        row(f"one class, 4 million pixels: optimum from counts / {name}", curve_ratio(other, repeats))


def memory(folder, repeats):
    row(
        "peak memory, 2,000 images / 100 images",
        ratio_of_medians(
            *(lambda n=n: first_run(folder, n, measure=peak_megabytes) for n in (2000, 100)), min(repeats, 3)
        ),
        unit="MiB",
    )
    threads = [{f"TF_NUM_{kind}_THREADS": str(n) for kind in ("INTRAOP", "INTEROP")} for n in (32, 2)]
    row(
        "peak memory of a pass with 100 classes, 512 x 512, batch 2: 32 threads / 2 threads",
        ratio_of_medians(
            *(lambda t=t: peak_megabytes("-c", MANY_CLASSES, cwd=folder, **t) for t in threads), min(repeats, 3)
        ),
        unit="MiB",
    )


def workers(folder, repeats):
    for images, times in ((100, repeats), (10_000, 1)):  # 10,000 images take minutes
        bucket = bucket_of(folder, images)
        row(
            f"{images:,} images in two processes of half the cores each / in one of all cores",
            ratio_of_medians(lambda b=bucket: two_workers(folder, b), lambda i=images: first_run(folder, i), times),
        )


def many_images(folder, repeats):
    def each_further_image(fewer, more):
        return (first_run(folder, more, 32) - first_run(folder, fewer, 32)) / (more - fewer) * 1000

    row(
        "each image from the 5,000th to the 10,000th / from the 100th to the 5,000th, 32 x 32",
        ratio_of_medians(
            lambda: each_further_image(5000, 10_000), lambda: each_further_image(100, 5000), min(repeats, 3)
        ),
        unit="ms",
    )


def counting(folder, repeats):
    gpu = bool(network.import_tensorflow().config.list_physical_devices("GPU"))
    backbone, images = ("vgg16", 1024) if gpu else ("resnet18", 128)
    row(
        f"forward pass with counting and blocks / alone, Unet/{backbone}, 512 x 512, batch 16",
        pass_ratio(backbone, images, repeats),
        unit="images/s",
    )


def published_network(folder, repeats):
    row(
        "an image of 512 x 512 through Unet/vgg16 / of 572 x 572 through the original U-Net",
        network_ratio(repeats),
    )


def listing(folder, repeats):
    row("listing 40,000 objects in 4 folders, 50 ms an answer / in one chain of pages", listing_ratio(repeats))


def coverage(folder, repeats):
    """Print how often the intervals cover the truth; this row is not a time."""
    pictures = coverage_simulation.population(ROOT / "sandbox")
    coverage_simulation.print_table(pictures, models.class_metric("iou_score"), worlds=1000)


ROWS = {
    function.__name__: function
    for function in (
        whole_job,
        rerun,
        running_the_network_for_every_threshold,
        optimum,
        memory,
        workers,
        many_images,
        counting,
        published_network,
        listing,
        rates,
        coverage,
    )
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="number of repeats; medians are shown (default: 3)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="which rows (default: all)")
    options = parser.parse_args()
    print("| what | ours | the other | ratio |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.rows:
            ROWS[name](Path(folder), options.repeats)
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.platform()}")


if __name__ == "__main__":
    main()
