"""The one pass: its counts are Keras' counts, whatever the batch size; batches that do not fit are halved."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, blobs_and_masks
from PIL import Image

import counts as counts_module
import inference
from counts import BLOCK_THRESHOLDS, THRESHOLDS, Counts, confusion
from errors import ModelError
from network import import_tensorflow

NAMES = ["class0 (class_0)", "class1 (class_1)"]


@pytest.fixture(scope="module")
def tf():
    return import_tensorflow()


@pytest.fixture(scope="module")
def data():
    images, masks = blobs_and_masks(11, 64, 96, 2, seed=3)
    return [(f"slice {i}", image, mask) for i, (image, mask) in enumerate(zip(images, masks, strict=True))]


def count(network, data, batch_size=4, shown=(), blocks=None, names=NAMES, **more):
    """Counts of the data, in 3 blocks unless said otherwise, and what was said of batches that did not fit."""
    blocks = np.arange(len(data)) % 3 if blocks is None else blocks
    counts = Counts.empty(len(names), *data[0][1].shape, max(blocks) + 1)
    smaller = []
    sizes = list(
        inference.count_probabilities(
            network, data, blocks, counts, names, batch_size, set(shown), lambda *sizes: smaller.append(sizes), **more
        )
    )
    assert sum(sizes) == counts.images == len(data)
    return counts, smaller


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
    inputs = tf.keras.Input((None, None, 1))
    constant = tf.constant(probabilities, tf.float32)
    same = tf.keras.layers.Lambda(lambda x: tf.where(x[..., :1] < 0, x[..., :1], constant))  # adding 0 would change -0
    return tf.keras.Model(inputs, same(inputs))


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
    counts, _ = count(constant_network(tf, p), [("image", masks[..., 0], masks)], 1, ["image"], names=names)
    np.testing.assert_array_equal(counts.shown_bins[0], np.searchsorted(THRESHOLDS, p, side="left"))
    for i in range(p.shape[2]):
        for truth in (0, 1):
            own = p[..., i][masks[..., i] == truth]
            for thresholds, histogram in (
                (THRESHOLDS, counts.histogram),
                (BLOCK_THRESHOLDS, counts.block_histograms[0]),
            ):
                expected = np.bincount(np.searchsorted(thresholds, own, side="left"), minlength=len(thresholds) + 1)
                np.testing.assert_array_equal(histogram[i, truth], expected)


def predictions(network, data, batch_size=4):
    """Of tf-keras, compiled and in the same batches as in the pass: else a convolution may sum in another order."""
    images = np.stack([image for _, image, _ in data])
    padded = np.concatenate([images, *[images[-1:]] * (-len(images) % batch_size)])
    batches = (padded * (1 / 255)).astype(np.float32)[..., None].reshape(-1, batch_size, *images.shape[1:], 1)
    return np.concatenate([network.predict_on_batch(batch) for batch in batches])[: len(images)]


def test_counts_are_those_of_keras_metrics(tf, tiny_network, data):
    counts, _ = count(tiny_network, data, shown=["slice 2", "slice 10"])
    truth = np.stack([mask for _, _, mask in data])
    probabilities = predictions(tiny_network, data)
    bins = np.searchsorted(THRESHOLDS, probabilities)
    spread = np.quantile(bins, np.linspace(0, 1, 60)).astype(int)
    positions = np.unique(np.concatenate([spread, spread - 1, [0, 1, len(THRESHOLDS) - 1]]))
    for c in range(2):
        ours = confusion(counts.histogram[c])
        assert len(np.unique(ours[0][positions])) > 40
        for metric, own in zip(
            ("TruePositives", "FalsePositives", "FalseNegatives", "TrueNegatives"), ours, strict=True
        ):
            keras_metric = getattr(tf.keras.metrics, metric)(thresholds=THRESHOLDS[positions].tolist())
            keras_metric.update_state(truth[..., c], probabilities[..., c])
            np.testing.assert_array_equal(
                own[positions], keras_metric.result().numpy().astype(np.int64), err_msg=metric
            )

    assert counts.shown_names == ["slice 2", "slice 10"]
    np.testing.assert_array_equal(counts.shown_bins, bins[[2, 10]])
    np.testing.assert_array_equal(counts.shown_truth, truth[[2, 10]] == 1)

    # the blocks are the same counts, at every 64th threshold
    for ours, whole in zip(confusion(counts.block_histograms), confusion(counts.histogram), strict=True):
        np.testing.assert_array_equal(ours.sum(axis=0), whole[..., ::64])
    for block in range(3):
        above = probabilities[block::3, ..., None] > BLOCK_THRESHOLDS[::100]
        tp = (above & (truth[block::3, ..., None] == 1)).sum(axis=(0, 1, 2))
        np.testing.assert_array_equal(confusion(counts.block_histograms[block])[0][:, ::100], tp)


@pytest.mark.parametrize("batch_size", [1, 3, 11, 16])
def test_counts_do_not_depend_on_the_batch_size(tiny_network, data, batch_size):
    counts, _ = count(tiny_network, data, batch_size)
    reference, _ = count(tiny_network, data)
    # Float32 convolutions may differ in the last bit between batch sizes, and some pixels so move to the next bin.
    drift = np.abs(np.cumsum(counts.histogram - reference.histogram, axis=2))
    assert drift.sum() <= 0.02 * reference.histogram.sum()
    np.testing.assert_array_equal(counts.histogram.sum(axis=2), reference.histogram.sum(axis=2))
    np.testing.assert_array_equal(counts.block_histograms.sum(axis=3), reference.block_histograms.sum(axis=3))


def test_counts_do_not_depend_on_how_the_images_are_divided(tiny_network, data):
    whole, _ = count(tiny_network, data)
    parts = Counts.empty(2, 64, 96, 3)
    for own in (slice(0, 5), slice(5, 6), slice(6, 11)):
        blocks = (np.arange(11) % 3)[own]
        list(inference.count_probabilities(tiny_network, data[own], blocks, parts, NAMES, 4, set(), print))
    np.testing.assert_array_equal(parts.histogram, whole.histogram)
    np.testing.assert_array_equal(parts.block_histograms, whole.block_histograms)


def test_a_pixel_is_an_exact_table_value(tf, data):
    inputs = tf.keras.Input((None, None, 1))
    outputs = tf.keras.layers.Concatenate()([inputs, 1 - inputs])
    counts, _ = count(tf.keras.Model(inputs, outputs), data)
    values = (np.stack([image for _, image, _ in data]).ravel() * (1 / 255)).astype(np.float32)
    expected = np.bincount(np.searchsorted(THRESHOLDS, values), minlength=len(THRESHOLDS) + 1)
    np.testing.assert_array_equal(counts.histogram[0].sum(axis=0), expected)


def test_32_classes_in_a_batch_of_1024(tf):
    """Indices of all classes and images together would not fit into 32 bits."""
    rng = np.random.default_rng(0)
    p = rng.random((32, 32, 32), np.float32)
    masks = (rng.random((8, 32, 32, 32)) < 0.5 * p).astype(np.uint8)
    data = [(f"slice {i}", masks[0, ..., 0], masks[i % 8]) for i in range(1500)]
    names = [f"class{i}" for i in range(32)]
    counts, _ = count(constant_network(tf, p), data, 1024, blocks=[i // 750 for i in range(1500)], names=names)
    truth = np.stack([mask for _, _, mask in data]).astype(bool)
    for k in (0, 30_000, 75_776, 100_000):
        above = p > THRESHOLDS[k]
        tp, fp, fn, tn = (count[:, k] for count in confusion(counts.histogram))
        np.testing.assert_array_equal(tp, (truth & above).sum(axis=(0, 1, 2)))
        np.testing.assert_array_equal(fp, (~truth & above).sum(axis=(0, 1, 2)))
        np.testing.assert_array_equal(tp + fp + fn + tn, 1500 * 32 * 32)
    tp = confusion(counts.block_histograms)[0]
    np.testing.assert_array_equal(tp[1, :, 1184], (truth[750:] & (p > 0.5)).sum(axis=(0, 1, 2)))


@pytest.mark.parametrize("lost", ["histogram", "coarse"])
def test_counts_that_lose_a_pixel_are_a_bug(lost):
    counts = Counts.empty(1, 2, 2, 1)
    batch = {
        "histogram": np.zeros((1, 2, len(THRESHOLDS) + 1), np.int64),
        "coarse": np.zeros((2, 1, 2, len(BLOCK_THRESHOLDS) + 1), np.int64),
    }
    batch["histogram"][0, 1, 5], batch["coarse"][:, 0, 1, 1] = 8, 4
    batch[lost][..., 1, 1 if lost == "coarse" else 5] -= 1
    with pytest.raises(RuntimeError, match="2 images of 4 pixels"):
        counts.add(["a", "b"], [0, 0], **batch)
    assert counts.images == 0 and not counts.histogram.any()


def best_iou(truth, probabilities):
    """Exact optimum over all distinct probabilities: positives are those above a threshold."""
    order = np.argsort(-probabilities, kind="stable")
    tp, above = np.cumsum(truth[order], dtype=np.int64), np.arange(1, len(order) + 1)
    last_of_value = np.append(np.diff(probabilities[order]) != 0, True)
    return (tp / (above + truth.sum(dtype=np.int64) - tp))[last_of_value].max()


@pytest.fixture(scope="module")
def trained(tf, sandbox):
    """The end of the sandbox's network from its last weights on, what goes in there for the validation split, masks."""
    network = tf.keras.models.load_model(next((sandbox / "models").iterdir()) / "model.hdf5", compile=False)
    split = next((sandbox / "datasets").iterdir()) / "validation"
    folders, paths = sorted((split / "masks").iterdir()), sorted((split / "images").iterdir())
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    masks = [np.stack([np.asarray(Image.open(folder / path.name)) for folder in folders], axis=-1) for path in paths]
    last = max(i for i, layer in enumerate(network.layers) if layer.weights)
    until = tf.keras.Model(network.input, network.layers[last].input)
    end = tf.keras.Sequential(network.layers[last:])
    given = until.predict((images * (1 / 255)).astype(np.float32)[..., None], batch_size=8, verbose=0)
    end.build(given.shape)
    return end, given, np.stack(masks) > 0, end.get_weights()


@pytest.mark.parametrize(
    ("shift", "scale"), [(-20, 1), (-14, 1), (-8, 1), (0, 1), (8, 1), (14, 1), (0, 0.1), (0, 0.02), (0, 0.005)]
)
def test_the_best_threshold_is_on_the_list(trained, shift, scale):
    """Networks whose probabilities crowd at one end, or around 1/2: the best IoU is near the exact optimum's."""
    end, given, truth, (kernel, bias) = trained
    end.set_weights([kernel * np.float32(scale), bias * np.float32(scale) + shift])
    probabilities = end.predict(given, batch_size=30, verbose=0)
    for c in range(truth.shape[-1]):
        bins = np.searchsorted(THRESHOLDS, probabilities[..., c])
        histogram = [np.bincount(bins[truth[..., c] == side], minlength=len(THRESHOLDS) + 1) for side in (0, 1)]
        tp, fp, fn, _ = confusion(np.stack(histogram))
        exact = best_iou(truth[..., c].ravel(), probabilities[..., c].ravel())
        assert exact > 0.5  # the network finds the class
        assert abs((tp / (tp + fp + fn)).max() - exact) <= 2e-5


def lambda_network(tf, function):
    inputs = tf.keras.Input((None, None, 1))
    return tf.keras.Model(inputs, tf.keras.layers.Lambda(function)(inputs))


def memory_hog(tf, limit):
    """A network that really asks for more memory than there is once a batch is larger than `limit`."""

    def hog(x):
        too_much = tf.cast(tf.shape(x)[0] > limit, tf.int64) * 2**50
        return tf.concat([x, x], axis=-1) + tf.reduce_sum(tf.random.uniform([too_much]))

    return lambda_network(tf, hog)


def test_a_batch_that_does_not_fit_is_halved(tf, data):
    counts, smaller = count(memory_hog(tf, limit=3), data, batch_size=8)
    assert smaller == [(8, 4), (4, 2)]
    reference, none = count(memory_hog(tf, limit=100), data, batch_size=8)
    assert none == []
    np.testing.assert_array_equal(counts.histogram, reference.histogram)
    np.testing.assert_array_equal(counts.block_histograms, reference.block_histograms)


def test_a_lack_of_memory_that_shows_where_results_are_read(tf, tiny_network, data, monkeypatch):
    """As where a step only hands the batch over: none of the images of the two batches on their way is lost."""
    tensor = next(kind for kind in type(tf.constant(0)).__mro__ if "numpy" in vars(kind))
    read = tensor.numpy

    def numpy(self):
        if self.shape.rank == 3 and self.dtype == tf.int64 and self.shape[1] > 3:  # histograms of so many images
            raise tf.errors.InternalError(None, None, "CUDA_ERROR_OUT_OF_MEMORY: out of memory")
        return read(self)

    reference, _ = count(tiny_network, data, batch_size=2)
    monkeypatch.setattr(tensor, "numpy", numpy)
    counts, smaller = count(tiny_network, data, batch_size=4)
    assert smaller == [(4, 2)]
    np.testing.assert_array_equal(counts.histogram, reference.histogram)
    np.testing.assert_array_equal(counts.block_histograms, reference.block_histograms)


def test_one_image_that_does_not_fit_is_an_error(tf, data):
    with pytest.raises(ModelError, match="4, 2, 1 images of 96 x 64 .*memory.*OOM"):
        count(memory_hog(tf, limit=0), data, batch_size=4)


def test_a_batch_that_would_not_fit_is_not_tried(tf, tiny_network, data):
    counts, smaller = count(tiny_network, data, batch_size=8, free_memory=5_000_000)
    assert smaller == [(8, 2)]
    reference, none = count(tiny_network, data, batch_size=2, free_memory=10**9)
    assert none == []
    np.testing.assert_array_equal(counts.histogram, reference.histogram)
    with pytest.raises(ModelError, match="no batch of 8 images of 96 x 64 .*one image needs some 1 MB, 0 MB are free"):
        count(tiny_network, data, batch_size=8, free_memory=1000)


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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("AbortedError", "Operation received an exception: could not create a primitive"),
        ("NotFoundError", "No algorithm worked!  Error messages:"),
        ("InternalError", "Blas GEMM launch failed"),
        ("UnknownError", "CUDNN_STATUS_ALLOC_FAILED"),
        ("ResourceExhaustedError", "OOM when allocating tensor"),
        (None, "Unable to allocate 7.00 GiB"),
    ],
)
def test_no_memory_has_many_names(tf, data, name, text):
    error = getattr(tf.errors, name)(None, None, text) if name else MemoryError(text)
    counts, smaller = count(failing_network(tf, error, 3), data, batch_size=8)
    assert smaller == [(8, 4), (4, 2)]
    with pytest.raises(ModelError, match=f"2, 1 images of 96 x 64 .*memory.*{text[:20]}"):
        count(failing_network(tf, error, 0), data, batch_size=2)


@pytest.mark.parametrize("after", [1, 2])
def test_memory_that_fills_during_the_pass_loses_no_image(tf, data, after):
    counts, smaller = count(failing_network(tf, MemoryError("out of memory"), 2, after), data, batch_size=3)
    assert smaller == [(3, 1)]
    reference, _ = count(failing_network(tf, MemoryError(), 9), data, batch_size=3)
    assert counts.images == len(data)
    np.testing.assert_array_equal(counts.histogram, reference.histogram)
    np.testing.assert_array_equal(counts.block_histograms, reference.block_histograms)


def test_another_error_is_no_lack_of_memory(tf, data):
    error = tf.errors.InternalError(None, None, "a shape that cannot be")
    with pytest.raises(tf.errors.OpError, match="a shape that cannot be"):
        count(failing_network(tf, error, 0), data, batch_size=2)


@pytest.mark.parametrize("bad", [float("nan"), 1.5, float(np.nextafter(np.float32(1), 2)), -0.1, -1e-30, float("inf")])
def test_probabilities_that_are_none_are_an_error(tf, data, bad):
    inputs = tf.keras.Input((None, None, 1))
    second = tf.where(inputs > 0.9, bad, inputs)
    with pytest.raises(ModelError, match=r"class1 \(class_1\).*NaN or outside"):
        count(tf.keras.Model(inputs, tf.concat([inputs, second], axis=-1)), data)


def test_images_that_the_network_cannot_take_are_an_error(tiny_network):
    images, masks = blobs_and_masks(1, 50, 70, 2)
    with pytest.raises(ModelError, match="70 x 50"):
        count(tiny_network, [("slice", images[0], masks[0])])


def test_damaged_counts_are_not_read(tiny_network, data, tmp_path):
    counts, _ = count(tiny_network, data, shown=["slice 2"])
    path = tmp_path / "counts.npz"
    counts.save(path)
    content = path.read_bytes()
    read = Counts.load(path)
    for name, value in vars(counts).items():
        np.testing.assert_array_equal(getattr(read, name), value)
    positions = range(0, len(content), len(content) // 60)
    around = [i for start in (0, len(content) - 2048) for i in range(start, start + 2048, 41)]
    for position in {*positions, *around}:
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        assert Counts.load(path) is None, position
    for length in (0, 1, 31, 32, 33, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert Counts.load(path) is None, length
    assert Counts.load(tmp_path / "none.npz") is None


def test_several_devices_give_the_same_counts(tmp_path, tiny_bucket):
    """MirroredStrategy over logical CPUs: 11 images, 2 a replica, so that the last step leaves replicas without any."""
    program = """
import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import numpy as np, inference, network as networks
from helpers import TRAIN_CONFIG, blobs_and_masks
from counts import Counts
import os
os.environ.update(TF_USE_LEGACY_KERAS="1", SM_FRAMEWORK="tf.keras", TF_CPP_MIN_LOG_LEVEL="3")
import tensorflow as tf
if int(sys.argv[2]) > 1:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[2]))
network = networks.build_network(TRAIN_CONFIG, 2, (96, 64), sys.argv[3], print)
assert network.distribute_strategy.num_replicas_in_sync == int(sys.argv[2])
images, masks = blobs_and_masks(11, 64, 96, 2, seed=3)
counts = Counts.empty(2, 64, 96, 4)
data = [(f"slice {i}", *pair) for i, pair in enumerate(zip(images, masks))]
steps = list(inference.count_probabilities(network, data, np.arange(11) % 4, counts, ["a", "b"], 2, {"slice 5"}, print))
print(steps)
counts.save(sys.argv[4])
"""
    weights = tiny_bucket / "models/segmentation-model-tiny/model.hdf5"
    found = []
    for replicas in (1, 3):
        path = tmp_path / f"{replicas}.npz"
        subprocess.run(
            [sys.executable, "-c", program, str(ROOT), str(replicas), str(weights), str(path)], check=True, timeout=120
        )
        found.append(Counts.load(path))
    for name in ("histogram", "block_histograms", "shown_names", "shown_bins", "shown_images"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))


def test_a_checkpoint_writes_a_slice_once(tiny_network, data, tmp_path):
    path = tmp_path / "of these counts.partial.npz"
    counts, files = Counts.empty(2, 64, 96, 3), set()
    steps = inference.count_probabilities(tiny_network, data, [0] * 11, counts, NAMES, 2, {"slice 1", "slice 6"}, print)
    for _ in steps:
        counts.save_checkpoint(path)
        files |= {(file.name, file.stat().st_ino) for file in set(tmp_path.iterdir()) - {path}}
        found = Counts.load(path)
        for name, value in vars(counts).items():
            np.testing.assert_array_equal(getattr(found, name), value)
    assert len(files) == 2
    for name, _ in files:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    assert Counts.load(path) is None
    counts.save_checkpoint(path)
    assert Counts.load(path).images == 11
    others = path.with_suffix(".0123456789abcdef.slice.1.partial")  # another run is about to write this one
    others.touch()
    Counts.remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == [others]


@pytest.mark.parametrize("other_is_ahead", [True, False])
def test_runs_that_share_a_checkpoint_leave_it_whole(tiny_network, data, tmp_path, monkeypatch, other_is_ahead):
    """One has counted both slices to show, the other only the first; the other saves before each write of the one."""
    path = tmp_path / "of these counts.partial.npz"
    runs = [count(tiny_network, data[:n], shown={"slice 1", "slice 6"})[0] for n in (11, 5)]
    one, other = reversed(runs) if other_is_ahead else runs
    assert [len(run.shown_names) for run in runs] == [2, 1]
    write, written = counts_module._write, []

    def write_after_the_other(*given):
        with monkeypatch.context() as patch:
            patch.setattr(counts_module, "_write", write)
            other.save_checkpoint(path)
        write(*given)
        written.append(Counts.load(path).images)

    monkeypatch.setattr(counts_module, "_write", write_after_the_other)
    one.save_checkpoint(path)
    assert written[-1] == one.images and set(written[:-1]) <= {other.images}
