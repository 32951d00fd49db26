"""The one pass: its counts are Keras' counts, whatever the batch size; networks of every kind are rebuilt."""

import subprocess
import sys
import threading

import h5py
import numpy as np
import pytest
from helpers import ROOT, TRAIN_CONFIG, blobs_and_masks

import models
from counts import COARSE_BIN, COARSE_EDGES, GRID, Counts, bootstrap_weights, confusion

NAMES = ["class0 (class_0)", "class1 (class_1)"]


@pytest.fixture(scope="module")
def tf():
    return network.import_tensorflow()


@pytest.fixture(scope="module")
def data():
    images, masks = blobs_and_masks(11, 64, 96, 2, seed=3)
    return [(f"slice {i}", image, mask) for i, (image, mask) in enumerate(zip(images, masks, strict=True))]


def count(network, data, batch_size=4, shown=()):
    counts = Counts.empty(2, *data[0][1].shape)
    smaller = []
    sizes = list(models.count_probabilities(network, data, counts, NAMES, batch_size, set(shown), smaller.append))
    assert sum(sizes) == counts.images == len(data)
    return counts, smaller


def test_counts_are_those_of_keras_metrics(tf, tiny_network, data):
    counts, _ = count(tiny_network, data, shown=["slice 2", "slice 10"])
    images = np.stack([image for _, image, _ in data])
    truth = np.stack([mask for _, _, mask in data])
    # compiled and in the same batches as in the pass: else a convolution may sum in another order
    probabilities = np.concatenate(
        [
            tiny_network.predict_on_batch((images[i : i + 4] * (1 / 255)).astype(np.float32)[..., None])
            for i in range(0, 11, 4)
        ]
    )
    spread = np.quantile(np.ceil(probabilities * GRID), np.linspace(0, 1, 60)).astype(int)
    positions = np.unique(np.concatenate([spread, spread - 1, [0, 1, GRID // 2, GRID - 1, GRID]]))
    thresholds = [float(k) / GRID for k in positions]
    for c in range(2):
        ours = confusion(counts.histogram[c])
        assert len(np.unique(ours[0][positions])) > 40
        for metric, own in zip(
            ("TruePositives", "FalsePositives", "FalseNegatives", "TrueNegatives"), ours, strict=True
        ):
            keras_metric = getattr(tf.keras.metrics, metric)(thresholds=thresholds)
            keras_metric.update_state(truth[..., c], probabilities[..., c])
            np.testing.assert_array_equal(
                own[positions], keras_metric.result().numpy().astype(np.int64), err_msg=metric
            )

    assert counts.shown_names == ["slice 2", "slice 10"]
    np.testing.assert_array_equal(counts.shown_bins, np.ceil(probabilities[[2, 10]] * GRID))
    np.testing.assert_array_equal(counts.shown_truth, truth[[2, 10]] == 1)

    # the replicates are the same histogram, coarser, each image weighted by its own draws
    expected = np.zeros_like(counts.replicates)
    bins = COARSE_BIN[np.ceil(probabilities * GRID).astype(int)]
    for i, (name, _, mask) in enumerate(data):
        for c in range(2):
            for value in (0, 1):
                own = np.bincount(bins[i, ..., c][mask[..., c] == value], minlength=len(COARSE_EDGES))
                expected[:, c, value] += np.outer(bootstrap_weights(name), own)
    np.testing.assert_array_equal(counts.replicates, expected)


@pytest.mark.parametrize("batch_size", [1, 3, 11, 16])
def test_counts_do_not_depend_on_the_batch_size(tiny_network, data, batch_size):
    counts, _ = count(tiny_network, data, batch_size)
    reference, _ = count(tiny_network, data)
    # Float32 convolutions may differ in the last bit between batch sizes, and some pixels so move to the next bin.
    drift = np.abs(np.cumsum(counts.histogram - reference.histogram, axis=2))
    assert drift.sum() <= 0.02 * reference.histogram.sum()
    np.testing.assert_array_equal(counts.histogram.sum(axis=2), reference.histogram.sum(axis=2))


def test_counts_do_not_depend_on_how_the_images_are_divided(tiny_network, data):
    whole, _ = count(tiny_network, data)
    parts = [count(tiny_network, part)[0] for part in (data[:5], data[5:6], data[6:])]
    np.testing.assert_array_equal(sum(part.histogram for part in parts), whole.histogram)
    np.testing.assert_array_equal(sum(part.replicates for part in parts), whole.replicates)


def test_a_pixel_is_an_exact_table_value(tf, data):
    inputs = tf.keras.Input((None, None, 1))
    outputs = tf.keras.layers.Concatenate()([inputs, 1 - inputs])
    counts, _ = count(tf.keras.Model(inputs, outputs), data)
    values = np.stack([image for _, image, _ in data]).ravel() * (1 / 255)
    expected = np.bincount(np.ceil(values.astype(np.float32) * np.float32(GRID)).astype(int), minlength=GRID + 1)
    np.testing.assert_array_equal(counts.histogram[0].sum(axis=0), expected)


class MemoryHog:
    """Layers that really ask for more memory than there is once a batch is larger than `limit`."""

    def __new__(cls, tf, limit):
        inputs = tf.keras.Input((None, None, 1))

        def hog(x):
            too_much = tf.cast(tf.shape(x)[0] > limit, tf.int64) * 2**50
            return tf.concat([x, x], axis=-1) + tf.reduce_sum(tf.random.uniform([too_much]))

        return tf.keras.Model(inputs, tf.keras.layers.Lambda(hog)(inputs))


def test_a_batch_that_does_not_fit_is_halved(tf, data):
    counts, smaller = count(MemoryHog(tf, limit=3), data, batch_size=8)
    assert smaller == [4, 2]
    reference, none = count(MemoryHog(tf, limit=100), data, batch_size=8)
    assert none == []
    np.testing.assert_array_equal(counts.histogram, reference.histogram)
    np.testing.assert_array_equal(counts.replicates, reference.replicates)


def test_one_image_that_does_not_fit_is_an_error(tf, data):
    with pytest.raises(models.ModelError, match="does not fit into memory"):
        count(MemoryHog(tf, limit=0), data, batch_size=1)


@pytest.mark.parametrize("bad", [float("nan"), 1.5, -0.1])
def test_probabilities_that_are_none_are_an_error(tf, data, bad):
    inputs = tf.keras.Input((None, None, 1))
    second = tf.where(inputs > 0.9, bad, inputs)
    with pytest.raises(models.ModelError, match=r"class1 \(class_1\).*NaN or outside"):
        count(tf.keras.Model(inputs, tf.concat([inputs, second], axis=-1)), data)


def test_images_that_the_network_cannot_take_are_an_error(tiny_network):
    images, masks = blobs_and_masks(1, 50, 70, 2)
    with pytest.raises(models.ModelError, match="70 x 50"):
        count(tiny_network, [("slice", images[0], masks[0])])


def config(architecture, backbone, **parameters):
    return {
        "segmentation_model": {
            "model_name": architecture,
            "model_parameters": {"backbone_name": backbone, "encoder_weights": "imagenet", **parameters},
        },
        "loss": "no such loss",
    }


@pytest.mark.parametrize(
    ("architecture", "backbone", "activation", "whole", "input_shape"),
    [
        ("Unet", "vgg16", "sigmoid", True, None),
        ("Unet", "efficientnetb0", "softmax", False, [None, None, 1]),
        ("FPN", "mobilenetv2", "sigmoid", False, [None, None, 1]),
        ("Linknet", "seresnet18", "softmax", True, [None, None, 1]),
        ("PSPNet", "resnet18", "sigmoid", True, [96, 96, 1]),
        ("Unet", "inceptionv3", "sigmoid", False, None),
        ("FPN", "densenet121", "sigmoid", True, None),
    ],
)
def test_networks_are_rebuilt_with_their_weights(tf, tmp_path, architecture, backbone, activation, whole, input_shape):
    import segmentation_models

    tf.keras.utils.set_random_seed(1)
    shape = tuple(input_shape or (None, None, 1))
    original = getattr(segmentation_models, architecture)(
        backbone, encoder_weights=None, classes=2, activation=activation, input_shape=shape
    )
    original.compile("adam", "categorical_crossentropy")
    path = tmp_path / "model.hdf5"
    original.save(path) if whole else original.save_weights(path)
    parameters = {"activation": activation} | ({"input_shape": input_shape} if input_shape else {})
    rebuilt = models.build_network(config(architecture, backbone, **parameters), 2, path)
    x = np.random.default_rng(0).random((1, 96, 96, 1), np.float32)
    np.testing.assert_array_equal(rebuilt(x, training=False), original(x, training=False))


@pytest.mark.parametrize(
    ("train_config", "words"),
    [
        ({}, "segmentation_model"),
        ({"segmentation_model": ["Unet"]}, "segmentation_model"),
        ({"segmentation_model": {"model_name": "Unet"}}, "model_parameters"),
        (config("Net", "resnet18"), "'Net' is none of Unet"),
        (config("Unet", "resnet17"), "'resnet17' is none of"),
        (config("Unet", "resnet18", classes=3), "3 classes.*2 mask folders"),
        (config("Unet", "resnet18", colour="blue"), "colour"),
        (config("Unet", "resnet18", input_shape=[None, None, 3]), "3 channels"),
        (config("PSPNet", "resnet18"), "PSPNet"),
        (config("Unet", "resnet18"), "weights.*do not fit"),
        (config("Linknet", "resnet18"), "do not fit"),
    ],
)
def test_configurations_that_do_not_fit_are_errors(tiny_bucket, train_config, words):
    with pytest.raises(models.ModelError, match=words):
        models.build_network(train_config, 2, tiny_bucket / "models/segmentation-model-tiny/model.hdf5")


def test_weights_of_another_shape_are_an_error(tiny_network, tmp_path):
    path = tmp_path / "model.hdf5"
    tiny_network.save_weights(path)
    with h5py.File(path, "r+") as file:
        kernel = next(name for name in file if name == "final_conv")
        data = file[kernel][kernel]["kernel:0"][...]
        del file[kernel][kernel]["kernel:0"]
        file[kernel][kernel]["kernel:0"] = data.transpose(3, 0, 1, 2)  # as many numbers, in another shape
    with pytest.raises(models.ModelError, match="fit the network"):
        models.build_network(TRAIN_CONFIG, 2, path)


def test_tensorflow_works_outside_of_the_main_thread(tf, tmp_path, data, monkeypatch):
    """What a signal handler raises comes in the main thread, and crashes TensorFlow now and then."""
    import segmentation_models

    threads = []

    class Noted(tf.keras.layers.Layer):
        def call(self, x):
            threads.append(threading.current_thread())
            return x

    def unet(**_):
        threads.append(threading.current_thread())
        x = image = tf.keras.Input((None, None, 1))
        for layer in (tf.keras.layers.Conv2D(2, 3, padding="same", activation="sigmoid"), Noted()):
            x = layer(x)
        return tf.keras.Model(image, x)

    unet().save_weights(tmp_path / "weights.h5")
    threads.clear()
    monkeypatch.setattr(segmentation_models, "Unet", unet)
    count(models.build_network(TRAIN_CONFIG, 2, tmp_path / "weights.h5"), data)
    assert len(threads) >= 3
    assert threading.main_thread() not in threads


def test_several_devices_give_the_same_counts(tmp_path, tiny_bucket):
    """MirroredStrategy over logical CPUs: 11 images, 2 a replica, so that the last step leaves replicas without any."""
    program = """
import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import numpy as np, models
from helpers import TRAIN_CONFIG, blobs_and_masks
from counts import Counts
import os
os.environ.update(TF_USE_LEGACY_KERAS="1", SM_FRAMEWORK="tf.keras", TF_CPP_MIN_LOG_LEVEL="3")
import tensorflow as tf
if int(sys.argv[2]) > 1:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[2]))
network = models.build_network(TRAIN_CONFIG, 2, sys.argv[3])
assert network.distribute_strategy.num_replicas_in_sync == int(sys.argv[2])
images, masks = blobs_and_masks(11, 64, 96, 2, seed=3)
counts = Counts.empty(2, 64, 96)
data = [(f"slice {i}", *pair) for i, pair in enumerate(zip(images, masks))]
steps = list(models.count_probabilities(network, data, counts, ["a", "b"], 2, {"slice 5"}, print))
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
    for name in ("histogram", "replicates", "shown_names", "shown_bins", "shown_images"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
