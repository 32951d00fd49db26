"""Measure what the documentation claims. Each row is a ratio of two things that are measured in turns, or a limit.

.venv/bin/python tests/benchmark.py [--repeats 3] [--rows whole_job rerun ...]
"""

import argparse
import collections
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a machine compiles a module once, not in every run

import dask.config
import distributed
import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fake_gcs import fake_gcs_server, free_port  # noqa: E402
from helpers import ROOT, SCRIPT, arguments, blobs_and_masks, finish, start_program, upload, write_split  # noqa: E402

import chunks  # noqa: E402
import inference  # noqa: E402
import network  # noqa: E402
from counts import Counts  # noqa: E402
from gcp_utils import open_bucket  # noqa: E402
from image_utils import decode_image, decode_samples, pair_images_and_masks  # noqa: E402

MODEL_ID = "segmentation-model-benchmark"
MODEL = f"models/{MODEL_ID}"
SPLIT = "datasets/dataset-benchmark/validation"
GPU = bool(shutil.which("nvidia-smi"))
BACKBONE = "vgg16" if GPU else "resnet18"  # of the rows whose images are 512 x 512
LARGE = 2000 if GPU else 500  # images of them
SIZE, CLASSES = 128, 3  # of the other rows, and of all


def network_of(backbone):
    return {"model_name": "Unet", "model_parameters": {"backbone_name": backbone, "activation": "sigmoid"}}


# Programs, each in a process of its own. Makes a model of random weights; its arguments are the backbone and the file.
MAKE_MODEL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import network
tf = network.import_tensorflow()
import segmentation_models
tf.keras.utils.set_random_seed(1)
model = segmentation_models.Unet(sys.argv[1], encoder_weights=None, input_shape=(None, None, 1), classes={CLASSES})
model.compile("adam", "binary_crossentropy")
model.save(sys.argv[2])
"""

# What a job cannot do without: TensorFlow, the network with its weights, and the forward passes.
FLOOR = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import network as room
tf = room.import_tensorflow()
config = {{"segmentation_model": {network_of("resnet18")}}}
network = room.build_network(config, {CLASSES}, ({SIZE}, {SIZE}), sys.argv[1], lambda line: None)
forward = tf.function(lambda x: network(x, training=False))
batch = np.random.default_rng(0).random((16, {SIZE}, {SIZE}, 1), np.float32)
for _ in range(int(sys.argv[2]) // 16):
    last = forward(batch)
last.numpy()
os._exit(0)
"""

# A process begins with its parent's peak, so a small one stands between: this one may be large.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def seconds(*command, cwd, **environment):
    start = time.perf_counter()
    process = finish(start_program(sys.executable, *command, cwd=cwd, environment=environment), 3600)
    assert process.returncode == 0, process.stderr
    return time.perf_counter() - start


def peak_megabytes(*command, cwd, **environment):
    """Peak resident memory of a process, in MiB."""
    words = (sys.executable, "-c", PEAK, sys.executable, *command)
    return float(finish(start_program(*words, cwd=cwd, environment=environment), 3600).stdout)


def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def ratio_of_medians(first, second, repeats):
    """The medians of first() and second(), which are called in turns, and the ratio of the medians."""
    pairs = [(first(), second()) for _ in range(repeats)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return ours, theirs, ours / theirs


def row(what, measured, unit="s"):
    ours, theirs, ratio = measured
    shown = f"{ratio:.2f}" if ratio > 0.1 else f"{ratio:.2g}"
    print(f"| {what} | {ours:,.3g} {unit} | {theirs:,.3g} {unit} | {shown} |", flush=True)


def bucket_of(folder, images, size=SIZE, backbone="resnet18"):
    """The name of a bucket in `folder`; where there are more than 100 images, they are links to the same files."""
    name = f"{images} of {size}, {backbone}"
    bucket = folder / name
    if bucket.exists():
        return name
    write_split(bucket / SPLIT, *blobs_and_masks(min(images, 100), size, size, CLASSES))
    for path in list((bucket / SPLIT).rglob("*.png")):
        for i in range(1, images // 100):
            os.link(path, path.with_name(f"copy_{i:04d}_{path.name}"))
    dataset_config = {"dataset_config": {"target_size": [size, size]}}
    (bucket / SPLIT).with_name("config.yaml").write_text(yaml.safe_dump(dataset_config))
    (bucket / MODEL).mkdir(parents=True)
    train_config = {"train_config": {"segmentation_model": network_of(backbone)}}
    (bucket / MODEL / "config.yaml").write_text(yaml.safe_dump(train_config))
    seconds("-W", "ignore", "-c", MAKE_MODEL, backbone, bucket / MODEL / "model.hdf5", cwd=folder)
    return name


def tool(bucket, **others):
    return [SCRIPT, *arguments(bucket, "dataset-benchmark/validation", MODEL_ID, **others)]


def first_run(folder, bucket, measure=seconds, **environment):
    """Measure a run that has nothing in its cache."""
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    return measure(*tool(bucket), cwd=folder, **environment)


def whole_job(folder, repeats):
    bucket = bucket_of(folder, 400)
    floor = ("-c", FLOOR, folder / bucket / MODEL / "model.hdf5", 400)
    row(
        f"whole job, 400 images of {SIZE} x {SIZE}, Unet/resnet18 / its floor: TensorFlow, network, forward passes",
        ratio_of_medians(lambda: first_run(folder, bucket), lambda: seconds(*floor, cwd=folder), repeats),
    )


def rerun(folder, repeats):
    bucket = bucket_of(folder, 400)
    again = tool(bucket, optimizing_class_metric="f1_score")
    first_run(folder, bucket)
    row(
        "rerun with another metric / first run, 400 images",
        ratio_of_medians(lambda: seconds(*again, cwd=folder), lambda: first_run(folder, bucket), repeats),
    )


def memory(folder, repeats):
    buckets = [bucket_of(folder, images) for images in (2000, 100)]
    row(
        "peak memory, 2,000 images / 100 images",
        ratio_of_medians(*(lambda b=b: first_run(folder, b, peak_megabytes) for b in buckets), repeats),
        unit="MiB",
    )


def counting(folder, repeats):
    """Images per second of the pass and of only the network on the same batches."""
    tf = network.import_tensorflow()
    bucket = folder / bucket_of(folder, 100, 512, BACKBONE)
    images = 1024 if GPU else 128
    config = {"segmentation_model": network_of(BACKBONE)}
    net = network.build_network(config, CLASSES, (512, 512), bucket / MODEL / "model.hdf5", print)
    pictures, masks = blobs_and_masks(16, 512, 512, CLASSES)
    samples = [(f"slice {i}", pictures[i % 16], masks[i % 16], i * 20 // images) for i in range(images)]
    counter = inference.Counter(net, (512, 512), ["class"] * CLASSES, 16, print)
    forward = tf.function(lambda x: net(x, training=False))
    batch = tf.constant((pictures * (1 / 255)).astype(np.float32)[..., None])

    def with_counts():
        counts = Counts.empty(CLASSES, np.arange(20))
        counter.add(counter.start(samples[:16], counts))  # now all is warm
        batches = [samples[i : i + 16] for i in range(16, images, 16)]
        return timed(count, batches, counts) / (images - 16)

    def count(batches, counts):
        started = counter.start(batches[0], counts)
        for batch in batches[1:]:
            following = counter.start(batch, counts)
            counter.add(started)
            started = following
        counter.add(started)

    def alone():
        forward(batch), forward(batch).numpy()
        return timed(lambda: [forward(batch) for _ in range(images // 16 - 1)][-1].numpy()) / (images - 16)

    ours, theirs, ratio = ratio_of_medians(with_counts, alone, repeats)
    row(
        f"forward pass with counting / alone, Unet/{BACKBONE}, 512 x 512, batch 16",
        (1 / ours, 1 / theirs, ratio),
        "images/s",
    )


def fetching(folder, repeats):
    """The rates of the host that docs/large_jobs.md computes with."""
    bucket = folder / bucket_of(folder, 500, 512, BACKBONE)
    files = [(path.name, path.read_bytes()) for path in sorted((bucket / SPLIT).rglob("*.png"))]
    decode = timed(lambda: [decode_image(data, name, (512, 512), ("L",)) for name, data in files]) / 500
    with fake_gcs_server() as server:
        os.environ["STORAGE_EMULATOR_HOST"] = server
        upload(server, bucket, "fetching")
        opened = open_bucket("gs://fetching", folder / "fetched")
        blobs = opened.list(SPLIT)
        listing = timed(opened.list, SPLIT) / len(blobs)
        with ThreadPoolExecutor(opened.threads) as pool:
            fetching = timed(lambda: list(pool.map(opened.fetch, blobs))) / len(blobs)
    print(
        f"| an image of 512 x 512 with {CLASSES} masks is decoded; objects are fetched from a fake-gcs-server on the "
        f"same cores, and listed | {decode * 1000:.2g} ms | {1 / fetching:,.0f}/s, {1 / listing:,.0f}/s | |",
        flush=True,
    )


# Rows: a Dask cluster on this machine


@contextlib.contextmanager
def dask_cluster(folder, workers):
    """A scheduler and workers, each on its part of the cores; yields the environment for the tool."""
    address = f"tcp://127.0.0.1:{free_port()}"
    path = {"PYTHONPATH": ROOT}
    dask = [sys.executable, "-m", "dask"]
    port = address.rpartition(":")[2]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, "environment": path}
    processes = [start_program(*dask, "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard", **quiet)]
    cores = sorted(os.sched_getaffinity(0))
    options = ["--nthreads", "1", "--memory-limit", "0", "--no-dashboard", "--local-directory", "tmp/dask"]
    for i in range(workers):
        own = ",".join(map(str, cores[i::workers]))
        processes.append(start_program("taskset", "-c", own, *dask, "worker", address, *options, **quiet))
    try:
        with distributed.Client(address, timeout=60) as client:
            client.wait_for_workers(workers, timeout=60)
        yield {"DASK_SCHEDULER_ADDRESS": address}
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def cluster(folder, repeats):
    """The same job by two workers and by one process, and what Dask costs."""
    bucket = bucket_of(folder, LARGE, 512, BACKBONE)
    alone = statistics.median(first_run(folder, bucket) for _ in range(repeats))
    what = f"{LARGE} images of 512 x 512, Unet/{BACKBONE}: two Dask workers on half the cores each"
    for name, runs in (("cold", range(1)), ("warm", range(repeats))):
        with dask_cluster(folder, 2) as environment:
            if name == "warm":
                first_run(folder, bucket, **environment)
            together = statistics.median(first_run(folder, bucket, **environment) for _ in runs)
        row(f"{what}, {name} / one process (at most 1.0)", (together, alone, together / alone))
    with dask_cluster(folder, 1) as environment:
        address = environment["DASK_SCHEDULER_ADDRESS"]
        connect = f"import distributed; distributed.Client({address!r}).close()"
        both = [("-c", program) for program in (connect, "pass")]
        ours, nothing, _ = ratio_of_medians(*(lambda b=b: seconds(*b, cwd=folder) for b in both), repeats)
        print(f"| import and connect (at most 1.5 s) | {ours - nothing:.2f} s | | |", flush=True)
        with distributed.Client(address) as client:
            packed = [os.urandom(8000) for _ in range(2000)]
            took = timed(lambda: client.gather([client.submit(len, one, pure=False) for one in packed]))
        print(f"| a chunk of 8 kB through scheduler and worker | {took / len(packed) * 1000:.2g} ms | | |", flush=True)


def gap(folder, repeats):
    """What it costs that a pass is cut into chunks; and the rate of a whole Dask worker."""
    bucket = open_bucket(str(folder / bucket_of(folder, LARGE, 512, BACKBONE)), folder / "tmp/objects")
    _, samples = pair_images_and_masks(bucket.list(SPLIT), SPLIT, bucket.url, folder / "problems.txt")
    samples = samples[: LARGE // 128 * 128]
    what = f"{len(samples)} images of 512 x 512, Unet/{BACKBONE}, in one piece /"
    labels = np.arange(len(samples)) * 20 // len(samples)
    job = chunks.Job(
        address=bucket.address,
        train_config={"segmentation_model": network_of(BACKBONE)},
        weights=bucket.stat(f"{MODEL}/model.hdf5"),
        target_size=[512, 512],
        class_titles=["class"] * CLASSES,
        batch_size=16,
        tf_seed=None,
        environment=chunks.environment(),
    )
    network.import_tensorflow()
    net = network.build_network(job.train_config, CLASSES, (512, 512), bucket.fetch(job.weights), print)
    counter, ends = inference.Counter(net, (512, 512), job.class_titles, 16, print), []

    def note(images):
        ends.append((time.perf_counter(), images))

    def images_per_second(counted):
        """From the end of the first 128 images on; there a chunk may end, so that all passes start and stop alike."""
        ends.clear()
        collections.deque(counted, maxlen=0)
        done = np.cumsum([images for _, images in ends])
        first = int(np.searchsorted(done, 128))
        return (done[-1] - done[first]) / (ends[-1][0] - ends[first][0])

    def of_pass(pixels):
        with mock.patch("chunks.CHUNK_PIXELS", pixels):
            parts = chunks.divide(samples, labels, (512, 512))
        with contextlib.closing(decode_samples(samples, bucket, (512, 512), 32)) as decoded:
            return images_per_second(chunks.count_chunks(parts, decoded, counter, note))

    def of_worker():
        with contextlib.redirect_stdout(io.StringIO()):
            parts = chunks.divide(samples, labels, (512, 512))
            return images_per_second(chunks.count_job(job, bucket, parts, note))

    pair = ratio_of_medians(lambda: of_pass(2**40), lambda: of_pass(chunks.CHUNK_PIXELS), repeats)
    row(f"{what} in chunks (at most 1.02)", pair, "images/s")
    with (
        dask_cluster(folder, 1) as environment,
        dask.config.set({"scheduler-address": environment["DASK_SCHEDULER_ADDRESS"]}),
        mock.patch.dict(os.environ, environment),
    ):
        of_worker()
        rate = statistics.median(of_worker() for _ in range(repeats))
    row(f"{what} by one Dask worker", (pair[0], rate, pair[0] / rate), "images/s")


ROWS = {row.__name__: row for row in (whole_job, rerun, memory, counting, fetching, cluster, gap)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="number of repeats; medians are shown (default: 3)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="which rows (default: all)")
    options = parser.parse_args()
    print("| what | ours | the other | ratio |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.rows:
            ROWS[name](Path(folder), options.repeats)


if __name__ == "__main__":
    main()
