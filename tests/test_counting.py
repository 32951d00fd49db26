"""The one pass: its counts are Keras' counts, however a job is divided; batches that do not fit are halved."""

import itertools
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from helpers import MODEL, ROOT, blobs_and_masks, finish, predict, start_program

import chunks
from counts import BLOCK_THRESHOLDS, THRESHOLDS, Checkpoint, Counts, confusion
from errors import ModelError
from image_utils import Decoded, Sample
from inference import Counter
from network import import_tensorflow

NAMES = ["class0 (class_0)", "class1 (class_1)"]
ARRAYS = ("histogram", "block_histograms", "block_labels", "overlap")


@pytest.fixture(scope="module")
def tf():
    return import_tensorflow()


def samples():
    """Eleven samples in three blocks."""
    images, masks = blobs_and_masks(11, 64, 96, 2, seed=3)
    return [(f"slice {i:02d}", image, mask, i % 3) for i, (image, mask) in enumerate(zip(images, masks, strict=True))]


@pytest.fixture(scope="module")
def data():
    return samples()


def count(model, data, batch_size=4, names=NAMES):
    """Counts of the data, and what was said of batches that did not fit."""
    warnings = []
    counter = Counter(model, data[0][1].shape[::-1], names, batch_size, warnings.append)
    counts = Counts.empty(len(names), np.unique([block for *_, block in data]))
    rest, started = iter(data), []
    while samples := list(itertools.islice(rest, counter.images_per_step)):
        started.append(counter.start(samples, counts))
        if len(started) > 1:
            counter.add(started.pop(0))
    counter.add(started[0])
    assert counts.images == len(data)
    return counts, warnings


def assert_equal(ours, others):
    """The same integers, and the same slices to show."""
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(ours, name), getattr(others, name))
    assert ours.images == others.images
    for one, other in zip(ours.shown, others.shown, strict=True):
        assert one[:4] == other[:4]
        for field, expected in zip(one[4:], other[4:], strict=True):
            np.testing.assert_array_equal(field, expected)


def test_the_list_of_thresholds():
    assert THRESHOLDS.dtype == np.float32
    assert THRESHOLDS[0] == 2**-40 and THRESHOLDS[-1] == 1 - 2**-24
    assert 0.5 in THRESHOLDS and 0.5 in BLOCK_THRESHOLDS
    t = THRESHOLDS.astype(np.float64)
    step, distance = np.diff(t), np.minimum(np.minimum(t, 1 - t), np.abs(t - 0.5))
    assert (step > 0).all() and step.max() == 1 / 65536
    # never wider apart than 1 / 1024 of the distance to 0, 1/2 or 1, but for float32's own last step
    assert (step <= np.maximum(np.minimum(distance[1:], distance[:-1]) / 1024, 2**-24 * (t[1:] > 0.25))).all()
    np.testing.assert_array_equal(BLOCK_THRESHOLDS, THRESHOLDS[::64])


def constant_network(tf, probabilities):
    """A network that gives each image these probabilities, shape (height, width, classes), whatever it shows."""
    constant = tf.constant(probabilities, tf.float32)
    return lambda_network(tf, lambda x: tf.where(x[..., :1] < 0, x[..., :1], constant))  # adding 0 would change -0


def lambda_network(tf, function):
    inputs = tf.keras.Input((None, None, 1))
    return tf.keras.Model(inputs, tf.keras.layers.Lambda(function)(inputs))


def test_the_bin_of_every_probability_is_exact(tf):
    rng = np.random.default_rng(0)
    tiny = np.float32([0, -0.0, 1, 1e-45, 1e-40, 2**-126, 2**-41])
    each = [np.nextafter(THRESHOLDS, np.float32(0)), THRESHOLDS, np.nextafter(THRESHOLDS, np.float32(1)), tiny]
    each += [10 ** rng.uniform(-46, 0, 10**6), 1 - 10 ** rng.uniform(-8, 0, 10**6)]
    each += [0.5 + rng.choice([-1, 1], 10**6) * 10 ** rng.uniform(-8, -0.31, 10**6), rng.random(10**6)]
    p = np.concatenate(each).astype(np.float32)
    p = np.resize(p, (-(-len(p) // 2**18), 2**18)).T.reshape(512, 512, -1)
    masks = (rng.random(p.shape) < 0.3).astype(np.uint8)
    names = [f"class{i}" for i in range(p.shape[2])]
    counts, _ = count(constant_network(tf, p), [("image", masks[..., 0], masks, 0)], 1, names)
    assert counts.shown[0].pixels == masks[..., 0].sum() > 2**16
    np.testing.assert_array_equal(counts.shown[0].bins, np.searchsorted(THRESHOLDS, p, side="left"))
    np.testing.assert_array_equal(counts.overlap, np.einsum("hwi,hwj->ij", p > 0.5, masks.astype(int)))
    lists = ((THRESHOLDS, counts.histogram), (BLOCK_THRESHOLDS, counts.block_histograms[0]))
    for i, truth in np.ndindex(p.shape[2], 2):
        own = p[..., i][masks[..., i] == truth]
        for thresholds, histogram in lists:
            expected = np.bincount(np.searchsorted(thresholds, own, side="left"), minlength=len(thresholds) + 1)
            np.testing.assert_array_equal(histogram[i, truth], expected)


def test_counts_are_those_of_keras_metrics(tf, tiny_network, data):
    counts, _ = count(tiny_network, data)
    truth = np.stack([masks for _, _, masks, _ in data])
    probabilities = predict(tiny_network, np.stack([image for _, image, *_ in data]), 4)
    bins = np.searchsorted(THRESHOLDS, probabilities)
    spread = np.quantile(bins, np.linspace(0, 1, 60)).astype(int)
    positions = np.unique(np.concatenate([spread, spread - 1, [0, 1, len(THRESHOLDS) - 1]]))
    metrics = ("TruePositives", "FalsePositives", "FalseNegatives", "TrueNegatives")
    for c in range(2):
        ours = confusion(counts.histogram[c])
        assert len(np.unique(ours[0][positions])) > 40
        for metric, own in zip(metrics, ours, strict=True):
            keras_metric = getattr(tf.keras.metrics, metric)(thresholds=THRESHOLDS[positions].tolist())
            keras_metric.update_state(truth[..., c], probabilities[..., c])
            np.testing.assert_array_equal(own[positions], keras_metric.result().numpy(), err_msg=metric)


def in_chunks(data):
    """Chunks of four samples, and the samples as they are decoded: the digest of each is its number."""
    samples, labels = [Sample(name, None, (None, None)) for name, *_ in data], [block for *_, block in data]
    decoded = (Decoded(samples[i], *data[i][1:3], [], [], bytes([i]) * 16) for i in range(len(data)))
    return [chunks.Chunk(i // 4, i, samples[i : i + 4], labels[i : i + 4]) for i in range(0, len(data), 4)], decoded


def test_chunks_add_up_in_any_order_to_the_counts_of_the_pass(tiny_network, data):
    whole, _ = count(tiny_network, data)
    counter = Counter(tiny_network, (96, 64), NAMES, 4, print)
    parts = list(chunks.count_chunks(*in_chunks(data), counter, lambda images: None))
    for order in ((0, 1, 2), (2, 0, 1)):
        total = Checkpoint.empty(2, 3, [()] * 12, 3)
        for i in order:
            total.add(replace(parts[i], counts=parts[i].counts.smallest(), weights_digest=bytes(16)))
        assert_equal(total.counts, whole)
        assert total.counts.counted_with == whole.counted_with and whole.counted_with[0]["images"] == 11
        assert total.digests[1:, 0].tolist() == list(range(11))


@pytest.mark.parametrize(
    ("pixels", "size", "batch"), [(96 * 64, 1, 1), (10 * 96 * 64, 8, 4), (1, 1, 1), (10**9, 11, 2**16)]
)
def test_a_chunk_is_a_power_of_two_of_images_in_order(monkeypatch, pixels, size, batch):
    monkeypatch.setattr(chunks, "CHUNK_PIXELS", pixels)
    divided = chunks.divide(list("abcdefghijk"), np.arange(11) // 3, (96, 64))
    assert [sample for chunk in divided for sample in chunk.samples] == list("abcdefghijk")
    assert [label for chunk in divided for label in chunk.labels] == [i // 3 for i in range(11)]
    assert [(chunk.number, chunk.first) for chunk in divided] == [(i, i * size) for i in range(len(divided))]
    assert {len(chunk.samples) for chunk in divided[:-1]} <= {size}
    assert chunks.most_per_batch((96, 64)) == batch


def test_the_network_has_the_next_batch_before_the_last_is_added_also_where_a_chunk_ends(data):
    events, counter = [], mock.Mock(images_per_step=2)
    counter.start.side_effect = lambda batch, counts: events.append(f"start {batch[0][0]}") or mock.Mock(samples=batch)
    counter.add.side_effect = lambda batch: events.append(f"add {batch.samples[0][0]}")
    names = [(name, *sample[1:]) for name, sample in zip("abcdefg", data, strict=False)]
    told = (lambda images: None), (), (lambda: events.append("all started"))
    for counted in chunks.count_chunks(*in_chunks(names), counter, *told):
        events.append(f"chunk {counted.number}")
    order = "start a, start c, add a, start e, add c, chunk 0, start g, add e, all started, add g, chunk 1"
    assert events == order.split(", ")

    parts, decoded = in_chunks(data)
    spoiled = (one._replace(problems=[("a", "b")] * (i == 0)) for i, one in enumerate(decoded))
    assert len(list(chunks.count_chunks(parts, spoiled, counter, *told))) == 3 and events[-1] == "all started"


# ---------------------------------------------------------------------------------------------------------------
# What does not fit, and what is no probability


def failing_network(tf, error, limit, after=0):
    """A network that fails as a device does whose memory is full once a batch is larger than `limit`.

    The first `after` batches fit all the same.
    """
    batches = []

    def fail(x):
        batches.append(len(x))
        if len(x) > limit and len(batches) > after:
            raise error
        return np.concatenate([x, x], axis=-1)

    return lambda_network(tf, lambda x: tf.ensure_shape(tf.numpy_function(fail, [x], tf.float32), (*x.shape[:3], 2)))


def test_a_batch_that_does_not_fit_is_halved(tf, data):
    error = tf.errors.UnknownError(None, None, "CUDNN_STATUS_ALLOC_FAILED")
    counts, warnings = count(failing_network(tf, error, 3), data, batch_size=8)
    assert len(warnings) == 2
    assert "8 images" in warnings[0] and "--batch-size 4" in warnings[0] and "--batch-size 2" in warnings[1]
    assert [way["batch_size"] for way in counts.counted_with] == [2]
    reference, none = count(failing_network(tf, error, 9), data, batch_size=8)
    assert none == []
    assert_equal(counts, reference)
    with pytest.raises(ModelError, match="one image does not fit into memory"):
        count(failing_network(tf, error, 0), data, batch_size=2)


def test_memory_that_fills_during_the_pass_loses_no_image(tf, data):
    counts, warnings = count(failing_network(tf, MemoryError("out of memory"), 2, after=2), data, batch_size=3)
    assert len(warnings) == 1
    assert sum(way["images"] for way in counts.counted_with) == counts.images == 11
    assert {way["batch_size"] for way in counts.counted_with} == {3, 1}
    assert_equal(counts, count(failing_network(tf, MemoryError(), 9), data, batch_size=3)[0])


def test_another_error_is_no_lack_of_memory(tf, data):
    error = tf.errors.InternalError(None, None, "libdevice not found at ./libdevice.10.bc")
    with pytest.raises(tf.errors.OpError, match="libdevice"):
        count(failing_network(tf, error, 0), data, batch_size=2)


@pytest.mark.parametrize("bad", [float("nan"), float(np.nextafter(np.float32(1), 2)), -1e-30, float("inf")])
def test_probabilities_that_are_none_are_an_error(tf, data, bad):
    network = lambda_network(tf, lambda x: tf.concat([x, tf.where(x > 0.9, bad, x)], axis=-1))
    with pytest.raises(ModelError, match=r"class1 \(class_1\).*NaN or outside"):
        count(network, data)


def test_images_that_the_network_cannot_take_are_an_error(tiny_network):
    images, masks = blobs_and_masks(1, 50, 70, 2)
    with pytest.raises(ModelError, match="70 x 50"):
        count(tiny_network, [("slice", images[0], masks[0], 0)])


# ---------------------------------------------------------------------------------------------------------------
# Kept counts, and several devices


def kept(counts, path):
    """Keep counts, as if they were all of one chunk."""
    files = [()] * (1 + counts.images)
    checkpoint = Checkpoint.empty(2, 3, files, 1)
    digests = [bytes([i]) * 16 for i in range(counts.images)]
    checkpoint.add(chunks.CountedChunk(0, 0, counts, b"w" * 16, digests, remarks={"grey": (2, "a", "b")}))
    checkpoint.save(path)
    return checkpoint


def test_kept_counts_are_read_as_they_were_and_damaged_ones_are_not(tiny_network, data, tmp_path):
    path = tmp_path / "counts.npz"
    written, read = kept(count(tiny_network, data)[0], path), Checkpoint.load(path)
    assert_equal(read.counts, written.counts)
    assert read.counts.counted_with == written.counts.counted_with
    for name in ("done", "versions", "digests"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert {kind: tuple(remark) for kind, remark in read.remarks.items()} == written.remarks
    content = path.read_bytes()
    for position in range(0, len(content), len(content) // 60):
        path.write_bytes(content[:position])
        assert Checkpoint.load(path) is None
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        if found := Checkpoint.load(path):  # the damage is in a part of the file that says nothing
            assert_equal(found.counts, written.counts)
    assert Checkpoint.load(tmp_path / "none.npz") is None


def test_several_devices_give_the_same_counts(tmp_path, tiny_bucket_template, tiny_network, data):
    """MirroredStrategy over logical CPUs: 11 images, 2 a replica, so that the last step leaves replicas without any."""
    program = """
import os, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
os.environ.update(TF_USE_LEGACY_KERAS="1", SM_FRAMEWORK="tf.keras", TF_CPP_MIN_LOG_LEVEL="3")
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 3)
import network, test_counting
from helpers import TRAIN_CONFIG
model = network.build_network(TRAIN_CONFIG, 2, (96, 64), sys.argv[2], print)
assert model.distribute_strategy.num_replicas_in_sync == 3
counts, _ = test_counting.count(model, test_counting.samples(), 2)
test_counting.kept(counts, Path("counts.npz"))
"""
    words = (ROOT, tiny_bucket_template / MODEL / "model.hdf5")
    process = finish(start_program(sys.executable, "-c", program, *words, cwd=tmp_path))
    assert process.returncode == 0, process.stderr
    assert_equal(Checkpoint.load(tmp_path / "counts.npz").counts, count(tiny_network, data, 2)[0])
