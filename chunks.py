"""A job is chunks of images, and somebody counts them: this process, or the workers of a Dask cluster.

Either way the same function counts a chunk, and the counts of the chunks add up in any order. So on the same kind of
device the result is the same, to the last integer.
"""

import collections
import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import pickle
import sys
import threading
import time
import uuid
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

import inference
import network
from counts import Counts, add_remarks, slices_to_show, without_pixels
from errors import ClusterError, ModelError, first_line
from gcp_utils import Blob, open_bucket
from image_utils import decode_samples
from terminal import images_text, progress, show, warn

CHUNK_PIXELS = 2**25  # half a second on an A100, 50 s on two cores
DECODED_BYTES = 2**25  # of decoded images and masks that may wait for the network
TMP = Path("tmp")

CHUNKS_PER_WORKER = 3  # at the scheduler: one is counted, one is fetched and decoded, one waits
CONNECT_SECONDS = 30  # for the scheduler's first answer
LOOK_SECONDS = 5  # between two looks at the workers
REMIND_SECONDS = 60  # between two lines that say that there is no worker
GIVE_UP_SECONDS = 30 * 60  # without a worker, or without a counted chunk
IDLE_SECONDS = 10 * 60  # after which a worker gives the memory of its GPU back
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # what glibc's malloc.h calls these settings


class Job(NamedTuple):
    """What all chunks of a run have in common; plain values, which pickle."""

    address: str  # of the bucket
    train_config: dict
    weights: Blob
    target_size: list  # width, height
    class_titles: list
    batch_size: int
    tf_seed: int | None
    environment: dict  # of this process, which a worker's must equal


class Chunk(NamedTuple):
    """Some images that follow each other in the order of their names; plain values, which pickle."""

    number: int
    first: int  # the number of its first image
    samples: list  # of image_utils.Sample
    labels: list  # the block of each


@dataclass
class CountedChunk:
    """What `count_chunks` found out about a chunk."""

    number: int
    first: int  # the number of its first image
    counts: Counts  # of the chunk's own blocks; not of all its images if there are problems
    weights_digest: bytes = b""
    digests: list = field(default_factory=list)  # of the content of each image with its masks
    problems: list = field(default_factory=list)  # (blob name, sentence) of each file that cannot be used
    remarks: dict = field(default_factory=dict)  # kind -> (count, blob name, detail), of doubtful masks
    warnings: list = field(default_factory=list)  # sentences


def images_per_chunk(target_size):
    """The number of images of a chunk: a power of two, so that batches fit in. `target_size` is (width, height)."""
    width, height = target_size
    return 2 ** (max(1, CHUNK_PIXELS // (width * height)).bit_length() - 1)


def most_per_batch(target_size):
    """The largest batch: half a chunk. TensorFlow crashes on GPUs where a layer has more than 2**31 numbers."""
    return max(1, images_per_chunk(target_size) // 2)


def divide(samples, labels, target_size):
    """Cut a job into chunks, always the same for the same images.

    Parameters
    ----------
    samples : list of image_utils.Sample
    labels : sequence of int
        The block of each sample.
    target_size : (width, height), in pixels

    Returns
    -------
    list of Chunk
        Of at most CHUNK_PIXELS pixels, but at least one image.
    """
    size = images_per_chunk(target_size)
    firsts = range(0, len(samples), size)
    labels = [int(label) for label in labels]
    return [
        Chunk(number, first, samples[first : first + size], labels[first : first + size])
        for number, first in enumerate(firsts)
    ]


def count_chunks(chunks, decoded, counter, on_images, shown=(), on_all_started=lambda: None):
    """Count chunks in turn, so that the network need not wait between them; a generator.

    After the first file that cannot be used, the others are only checked.

    Parameters
    ----------
    chunks : iterable of Chunk
    decoded : iterator over image_utils.Decoded
        One for each sample of the chunks.
    counter : inference.Counter or None
        None to check the files only.
    on_images : callable
        Is called with a number of images that were just counted.
    shown : list of counts.ShownSlice
        The best slices of other chunks, without their pixels. A slice of these chunks is kept only if it is better.
    on_all_started : callable
        Is called when the network has got the last batch.

    Yields
    ------
    CountedChunk
        In the order of the chunks.

    Raises
    ------
    ModelError, BucketError
    """
    batch, ending = None, []  # the batch that is not added yet, and the chunks that end with it
    check_only = counter is None
    shown = list(shown)
    for chunk in chunks:
        counts = Counts.empty(len(chunk.samples[0].masks), np.unique(chunk.labels))
        counts.shown = shown
        counted = CountedChunk(chunk.number, chunk.first, counts)
        usable = _usable(chunk, itertools.islice(decoded, len(chunk.samples)), counted)
        while not check_only and (samples := list(itertools.islice(usable, counter.images_per_step))):
            next_batch = counter.start(samples, counts)
            yield from _finish(batch, ending, counter, on_images)
            batch, ending = next_batch, []
        collections.deque(usable, maxlen=0)  # reads what is left of the chunk, to check it
        ending.append(counted)
        shown = without_pixels(counts.shown)
        if check_only := check_only or bool(counted.problems):
            yield from _finish(batch, ending, counter, on_images)
            batch, ending = None, []
    on_all_started()
    yield from _finish(batch, ending, counter, on_images)


def _finish(batch, ending, counter, on_images):
    """Add a batch, and give the chunks that end with it."""
    if batch:
        counter.add(batch)
        on_images(len(batch.samples))
    for counted in ending:
        counted.counts.shown = [one for one in counted.counts.shown if one.image is not None]  # not of other chunks
        yield counted


def _usable(chunk, decoded, counted):
    """The samples as Counter.start takes them, until a file cannot be used; notes what was found in `counted`."""
    for sample, label in zip(decoded, chunk.labels, strict=True):
        counted.digests.append(sample.digest)
        counted.problems += sample.problems
        for kind, name, detail in sample.remarks:
            add_remarks(counted.remarks, {kind: (1, name, detail)})
        if not counted.problems:
            yield sample.sample.name, sample.image, sample.masks, label


def count_job(job, bucket, chunks, on_images):
    """Count chunks of a job, here, or on a Dask cluster if Dask's configuration names a scheduler; a generator.

    Parameters
    ----------
    job : Job
    bucket : as gcp_utils.open_bucket gives
    chunks : list of Chunk, at least one
    on_images : callable
        Is called with a number of images that were just counted.

    Yields
    ------
    CountedChunk
        In any order.

    Raises
    ------
    ExpectedError
        A ClusterError, or what `count_chunks` raises.
    """
    if scheduler := scheduler_address():
        return _count_on_cluster(job, scheduler, chunks, on_images)
    return _count_here(job, bucket, chunks, on_images)


# ---------------------------------------------------------------------------------------------------------------
# In this process


def _count_here(job, bucket, chunks, on_images):
    samples = [sample for chunk in chunks for sample in chunk.samples]
    blobs = [job.weights, *(blob for sample in samples for blob in (sample.image, *sample.masks))]
    with (
        progress("download", bucket.bytes_to_fetch(blobs), unit="B", unit_scale=True, leave=False) as download,
        contextlib.closing(_decode(job, bucket, samples)) as decoded,  # fetches while TensorFlow is imported
    ):
        bucket.on_bytes = download.update
        counter, weights_digest = _make_counter(job, bucket, warn)
        device = network.device_facts()["gpu"] or "the CPU"
        show(f"Counting the probabilities of {images_text(len(samples))} on {device}.")
        for counted in count_chunks(chunks, decoded, counter, on_images):
            counted.weights_digest = weights_digest
            yield counted


def _decode(job, bucket, samples):
    width, height = job.target_size
    ahead = max(2 * job.batch_size, DECODED_BYTES // (width * height * (1 + len(job.class_titles))))
    return decode_samples(samples, bucket, job.target_size, ahead)


def _make_counter(job, bucket, warn):
    """Rebuild the network with its weights; returns an inference.Counter and a digest of the weights."""
    network.import_tensorflow()
    if job.tf_seed is not None:
        network.set_seed(job.tf_seed)
    path = bucket.fetch(job.weights)
    try:
        model = network.build_network(job.train_config, len(job.class_titles), job.target_size, path, warn)
        counter = inference.Counter(model, job.target_size, job.class_titles, job.batch_size, warn)
    except ModelError as error:
        raise ModelError(f"{bucket.url(job.weights.name)}, with the config.yaml beside it: {error}") from error
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    bucket.fetch(job.weights)  # an error if the file changed while it was read
    return counter, digest


# ---------------------------------------------------------------------------------------------------------------
# On a Dask cluster: the side of the command


def scheduler_address():
    """The scheduler that Dask's configuration names, or None. Dask is imported only where there is such a setting."""
    folders = (Path("/etc/dask"), Path(sys.prefix, "etc/dask"), Path.home() / ".config/dask")
    texts = (path.read_text() for folder in folders for path in folder.glob("*.y*ml"))
    if not any(name.startswith("DASK_") for name in os.environ) and not any("scheduler-address" in t for t in texts):
        return None
    import dask.config

    return dask.config.get("scheduler-address", None)


@functools.cache
def environment():
    """What must be the same in all processes of a job, else they may count other integers: text by name."""
    code = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).resolve().parent.glob("*.py")):
        code.update(path.read_bytes())
    return {"the tool's code": code.hexdigest(), "Python": sys.version.split()[0], **network.library_versions()}


def _count_on_cluster(job, address, chunks, on_images):
    with _connected(address) as client:
        show(f"Counting the probabilities of {images_text(sum(len(c.samples) for c in chunks))} on {address}.")
        for counted in _counted_by_workers(client, address, job, chunks):
            on_images(counted.counts.images)
            yield counted


def _counted_by_workers(client, address, job, chunks):
    packed_job, run = pickle.dumps(job), uuid.uuid4().hex
    waiting, running = collections.deque(chunks), {}
    check_only, shown = False, []
    watch = _WorkerWatch(client, address)
    while waiting or running:
        while waiting and len(running) < CHUNKS_PER_WORKER * max(1, watch.workers):
            chunk = waiting.popleft()
            # Compressed, because the scheduler keeps it. With a key of its own, because other runs may count too.
            packed = zlib.compress(pickle.dumps((chunk, shown)))
            key = f"count-{run}-{chunk.number}-{check_only}"
            running[client.submit(count_on_worker, packed_job, packed, check_only, key=key, pure=False)] = chunk
        for future in watch.wait(running):
            counted = _result(future, running.pop(future), address)
            check_only = check_only or bool(counted.problems)
            shown = slices_to_show(shown + without_pixels(counted.counts.shown), len(job.class_titles))
            yield counted


@contextlib.contextmanager
def _connected(address):
    """A distributed.Client; its errors and those of the connection become ClusterErrors."""
    import distributed

    for name in ("distributed", "distributed.client"):  # what they log is in our errors
        logging.getLogger(name).setLevel(logging.CRITICAL)
    where = f"the Dask scheduler {address}"
    try:
        with warnings.catch_warnings(action="ignore"):  # about versions, which the workers check
            client = distributed.Client(address, timeout=CONNECT_SECONDS)
    except TypeError as error:
        raise ClusterError(f"{where}: no certificate to connect with; set distributed.comm.tls ({error})") from error
    except (OSError, ValueError, ImportError) as error:
        raise ClusterError(
            f"{where} cannot be reached ({first_line(error)}): start it, or correct DASK_SCHEDULER_ADDRESS"
        ) from error
    try:
        yield client
    except (OSError, distributed.CancelledError) as error:
        raise ClusterError(f"{where} was lost: run the same command again to continue, when it is back") from error
    finally:
        client.close(timeout=2)


class _WorkerWatch:
    """Waits for chunks, and says so, and gives up in the end, where no worker comes or none counts anything."""

    def __init__(self, client, address):
        self._client, self._address = client, address
        self._last_chunk = self._last_worker = self._said = time.monotonic()
        self.workers = len(client.nthreads())

    def wait(self, futures):
        """The futures that are done; perhaps none yet."""
        import distributed

        try:
            done = distributed.wait(list(futures), timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED").done
            self._last_chunk = time.monotonic()
        except distributed.TimeoutError:
            done = ()
        self.workers = len(self._client.nthreads())
        self._remind_or_give_up(time.monotonic())
        return done

    def _remind_or_give_up(self, now):
        if self.workers:
            self._last_worker = self._said = now
            if now - self._last_chunk > GIVE_UP_SECONDS:
                busy = [worker for worker, keys in self._client.processing().items() if keys]
                raise ClusterError(
                    f"no chunk was counted for {GIVE_UP_SECONDS // 60} minutes by {', '.join(busy) or 'any worker'}: "
                    "see its log, restart it, then run the same command again to continue"
                )
            return
        minutes = int(now - self._last_worker) // 60
        if now - self._last_worker > GIVE_UP_SECONDS:
            raise ClusterError(
                f"{self._address} has had no worker for {minutes} minutes: start workers, then run the same command "
                "again to continue"
            )
        if now - self._said > REMIND_SECONDS:
            self._said = now
            warn(f"{self._address} has no worker (for {minutes} min): start one, the job goes on when it comes")


def _result(future, chunk, address):
    """The CountedChunk of a future that is done."""
    import distributed

    try:
        return future.result()
    except distributed.KilledWorker as error:
        first, last = chunk.samples[0].name, chunk.samples[-1].name
        raise ClusterError(
            f"each worker that took the images {first} to {last} died, {error.allowed_failures + 1} times: most likely "
            "its memory is too small; see its log, or use a smaller --batch-size"
        ) from error
    except (ImportError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "deserialization" not in str(error):
            raise
        raise ClusterError(
            f"{address}: the scheduler or a worker has not the same code ({first_line(error.__cause__ or error)}): "
            "start each with this code's folder in PYTHONPATH, and the packages of requirements.txt"
        ) from error


# ---------------------------------------------------------------------------------------------------------------
# On a Dask cluster: the side of a worker

_network_lock = threading.Lock()
_last_use = [time.monotonic()]


class _NoLongerWanted(Exception):
    """The command that asked for a chunk has ended, or another worker counts it."""


def count_on_worker(packed_job, packed_chunk, check_only):
    """The task that Dask runs: count one chunk. While the network counts one, the next one is fetched and decoded.

    Parameters
    ----------
    packed_job, packed_chunk : bytes
        A pickled Job; a Chunk with the `shown` of `count_chunks`, pickled and compressed.
    check_only : bool
        Whether the files are only checked.

    Returns
    -------
    CountedChunk
        In small integers.
    """
    import distributed

    worker = distributed.get_worker()
    key = worker.get_current_task()

    def check_wanted(_=None):
        _last_use[0] = time.monotonic()
        task = worker.state.tasks.get(key)
        if task is None or task.state not in ("executing", "long-running"):
            raise _NoLongerWanted(key)

    job, (chunk, shown) = pickle.loads(packed_job), pickle.loads(zlib.decompress(packed_chunk))
    _check_environment(job, worker.address)
    bucket = _opened(job.address)
    with contextlib.closing(_decode(job, bucket, chunk.samples)) as decoded, contextlib.ExitStack() as holding:
        first = next(decoded)  # while the network counts another chunk, this one is decoded
        holding.enter_context(_network_lock)
        check_wanted()
        _prepare(worker)
        distributed.secede()  # the worker takes the next chunk
        counter, weights_digest, sentences = (None, b"", []) if check_only else _kept_counter(packed_job)
        samples = itertools.chain([first], decoded)
        # The next chunk gets the network when it has the last batch of this one, before that is added.
        [counted] = count_chunks([chunk], samples, counter, check_wanted, shown, on_all_started=holding.close)
    counted.weights_digest, counted.warnings = weights_digest, sentences
    counted.counts = counted.counts.smallest()
    return counted


def _check_environment(job, address):
    here = environment()
    for name, text in job.environment.items():
        if text != here.get(name):
            raise ClusterError(
                f"worker {address} has another version of {name} ({here.get(name)}) than the command ({text}), so it "
                "may count other numbers: install the same there, and restart it"
            )


@functools.lru_cache(maxsize=2)
def _opened(address):
    return open_bucket(address, TMP / "objects")


@functools.lru_cache(maxsize=2)  # a user often goes back and forth between two models
def _kept_counter(packed_job):
    """A Counter for a job, the digest of its weights, and the list of sentences that it has warned of."""
    job, sentences = pickle.loads(packed_job), []
    return *_make_counter(job, _opened(job.address), sentences.append), sentences


@functools.cache
def _prepare(worker):
    """Once in the life of a worker: keep freed memory, and end when no job has used the GPU for long."""
    # Dask's nanny makes malloc give back at once what is freed, so that the pages of each array are mapped anew: 5 % of
    # the time on two cores, and more on many.
    libc = ctypes.CDLL(None)
    for setting, size in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_THRESHOLD, 2**25)):
        libc.mallopt(setting, size)
    threading.Thread(target=_end_when_idle, args=(worker,), daemon=True).start()


def _end_when_idle(worker):
    """Let a worker's process end when its GPU is not used; its nanny or its service starts a new one."""
    while (left := _last_use[0] + IDLE_SECONDS - time.monotonic()) > 0 or _network_lock.locked():
        time.sleep(max(left, 1))
    worker.loop.add_callback(worker.close_gracefully, restart=True, reason="idle: the GPU's memory is given back")
