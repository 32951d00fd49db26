"""The network is the one that was trained: rebuilt from its configuration, with the weights of every kind of file."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import ROOT

import model_file
import network as room
from errors import ModelError, printable

SIZE = (96, 96)
SMALL = {
    "Unet": {"decoder_filters": [8, 8, 8, 4, 4]},
    "FPN": {"pyramid_block_filters": 8},
    "Linknet": {},
    "PSPNet": {"psp_conv_filters": 8},
}
BACKBONES = ("vgg16", "resnet18", "seresnet18", "resnext50", "inceptionv3", "mobilenet", "efficientnetb0")
QUICK = {
    ("Unet", "efficientnetb0"),  # layers of its own kinds
    ("FPN", "mobilenet"),
    ("Linknet", "seresnet18"),  # 17 layers with automatic names, in pairs of one shape, and Lambda layers
    ("PSPNet", "resnet18"),
}


@pytest.fixture(scope="module")
def tf():
    return room.import_tensorflow()


def config(architecture, backbone, **parameters):
    parameters = {"backbone_name": backbone, "encoder_weights": "imagenet", **SMALL[architecture]} | parameters
    return {"segmentation_model": {"model_name": architecture, "model_parameters": parameters}, "loss": "no such loss"}


def trained(tf, architecture, backbone, classes=2, **parameters):
    """A network as a user's training makes it, with no two weights alike."""
    import segmentation_models

    parameters = {"input_shape": (*SIZE, 1) if architecture == "PSPNet" else (None, None, 1), **parameters}
    small = {name: tuple(value) if isinstance(value, list) else value for name, value in SMALL[architecture].items()}
    network = getattr(segmentation_models, architecture)(
        backbone, encoder_weights=None, classes=classes, **small, **parameters
    )
    shuffle_weights(network)
    network.compile("adam", "categorical_crossentropy")
    return network


def shuffle_weights(network):
    rng = np.random.default_rng(1)

    def any_weights(shape):
        if len(shape) == 1:  # biases, and the means, variances, ... of normalisation
            return rng.uniform(0.5, 1.5, shape).astype("f4")
        return rng.normal(0, 1 / np.sqrt(np.prod(shape[:-1])), shape).astype("f4")  # keeps numbers in bounds

    network.set_weights([any_weights(weight.shape) for weight in network.get_weights()])


def build(train_config, path, classes=2, size=SIZE, warn=print):
    return room.build_network(train_config, classes, size, path, warn)


def assert_same_weights(rebuilt, original):
    assert len(rebuilt.layers) == len(original.layers)
    for one, other in zip(rebuilt.get_weights(), original.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def error(train_config, path, *words, **others):
    """What the user reads; each of the words must be in it."""
    with pytest.raises(ModelError) as caught:
        build(train_config, path, **others)
    line = printable(caught.value)
    assert len(line) < 2000
    for word in words:
        assert word in line
    return line


def renamed_in(part, rename):
    """Part of a model_config with other layer names: they are values of `name`, and begin lists of [name, 0, 0]."""
    if isinstance(part, dict):
        return {key: rename(value) if key == "name" else renamed_in(value, rename) for key, value in part.items()}
    if isinstance(part, list) and part and isinstance(part[0], str):
        return [rename(part[0]), *part[1:]]
    return [renamed_in(item, rename) for item in part] if isinstance(part, list) else part


def write_as_tensorflow_2_4(path):
    """Change a file of today's Keras 2 into what TensorFlow 2.4 with h5py 2.10 writes.

    After tensorflow/python/keras/saving/hdf5_format.py of version 2.4: names as arrays of bytes of one length, no
    top_level_model_weights; and automatic names with the numbers of a longer session.
    """

    def later(name):
        found = re.fullmatch(r"(conv2d|batch_normalization|activation|lambda|multiply|add)(?:_(\d+))?", name)
        return f"{found[1]}_{int(found[2] or 0) + 95}" if found else name

    with h5py.File(path) as old, h5py.File(f"{path}.new", "w") as new:
        whole = "model_weights" in old
        source, target = (old["model_weights"], new.create_group("model_weights")) if whole else (old, new)
        for file in {new, target} if whole else {target}:
            file.attrs["keras_version"], file.attrs["backend"] = b"2.4.0", b"tensorflow"
        if whole:
            description = renamed_in(json.loads(old.attrs["model_config"]), later)
            new.attrs["model_config"] = json.dumps(description).encode()
        names = list(source.attrs["layer_names"])
        target.attrs["layer_names"] = np.array([later(name).encode() for name in names], "S")
        for name in names:
            group = target.create_group(later(name))
            weights = list(source[name].attrs["weight_names"])
            renamed = ["/".join(map(later, weight.split("/"))) for weight in weights]
            group.attrs["weight_names"] = np.array([weight.encode() for weight in renamed], "S") if weights else []
            for weight, new_weight in zip(weights, renamed, strict=True):
                group[new_weight] = source[name][weight][...]
    os.replace(f"{path}.new", path)


# ---------------------------------------------------------------------------------------------------------------
# The networks that users have


@pytest.mark.parametrize(
    ("architecture", "backbone"),
    [
        pytest.param(architecture, backbone, marks=() if (architecture, backbone) in QUICK else pytest.mark.slow)
        for architecture in SMALL
        for backbone in BACKBONES
    ],
)
def test_every_architecture_is_rebuilt_with_its_weights(tf, tmp_path, architecture, backbone):
    original = trained(tf, architecture, backbone)
    x = np.random.default_rng(0).random((1, 96, 96, 1), np.float32)
    expected = original(x, training=False)
    assert np.isfinite(expected).all()
    for name, save in (("whole", original.save), ("weights", original.save_weights)):
        path = tmp_path / f"{name}.hdf5"
        save(path)
        write_as_tensorflow_2_4(path)
        rebuilt = build(config(architecture, backbone), path)
        assert_same_weights(rebuilt, original)
        np.testing.assert_array_equal(rebuilt(x, training=False), expected)
        path.unlink()


@pytest.mark.parametrize("name", SMALL)
def test_where_the_configuration_is_silent_the_architecture_decides(tf, tmp_path, name):
    original = trained(tf, name, "mobilenet")
    original.save_weights(tmp_path / "model.hdf5")
    x = np.random.default_rng(0).random((1, 96, 96, 1), np.float32)
    sums = build(config(name, "mobilenet"), tmp_path / "model.hdf5")(x, training=False).numpy().sum(axis=-1)
    assert np.allclose(sums, 1, atol=1e-5) == (name in ("FPN", "PSPNet"))


@pytest.fixture(scope="module")
def pspnet(tf):
    """A small network, quickly built."""
    return trained(tf, "PSPNet", "mobilenet")


PSPNET = config("PSPNet", "mobilenet")


@pytest.fixture(scope="module")
def files(pspnet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    pspnet.save(folder / "whole.hdf5")
    pspnet.save_weights(folder / "weights.hdf5")
    return folder


@pytest.fixture(params=["whole.hdf5", "weights.hdf5"])
def path(request, files, tmp_path):
    """A file of the small network, to be changed."""
    return Path(shutil.copy(files / request.param, tmp_path / "model.hdf5"))


def test_none_is_null(files):
    parameters = {
        "encoder_weights": "None",
        "input_shape": ["None", "None", 1],
        "psp_dropout": "None",
        "classes": "None",
    }
    build(config("PSPNet", "mobilenet", **parameters), files / "whole.hdf5")


# ---------------------------------------------------------------------------------------------------------------
# Weights go to their layers


def listed_backwards(path):
    with h5py.File(path, "r+") as file:
        group = file.get("model_weights", file)
        group.attrs["layer_names"] = group.attrs["layer_names"][::-1]


def test_the_order_in_which_a_file_lists_its_layers_does_not_matter(path, pspnet):
    listed_backwards(path)
    assert_same_weights(build(PSPNET, path), pspnet)


def test_nor_does_it_where_names_are_automatic(tf, tmp_path):
    original = trained(tf, "Linknet", "seresnet18")
    original.save_weights(tmp_path / "model.hdf5")
    listed_backwards(tmp_path / "model.hdf5")
    assert_same_weights(build(config("Linknet", "seresnet18"), tmp_path / "model.hdf5"), original)


def rename_layer(path, old, new):
    with h5py.File(path, "r+") as file:
        group = file.get("model_weights", file)
        group.move(old, new)
        group.attrs["layer_names"] = [new if name == old else name for name in group.attrs["layer_names"]]


def test_a_layer_of_another_name_gets_no_weights(files, tmp_path):
    path = shutil.copy(files / "weights.hdf5", tmp_path)
    rename_layer(path, "psp_level2_conv", "psp_level4_conv")
    error(PSPNET, path, "1 layers are only there ('psp_level4_conv')", "1 only here ('psp_level2_conv')")


def test_the_first_layer_that_does_not_fit_is_named(path):
    with h5py.File(path, "r+") as file:
        group = file.get("model_weights", file)
        for layer in ("psp_level3_conv", "aggregation_conv"):
            kernel = group[f"{layer}/{layer}/kernel:0"][...]
            del group[f"{layer}/{layer}/kernel:0"]
            group[f"{layer}/{layer}/kernel:0"] = kernel.swapaxes(2, 3)  # as many numbers, in another shape
    line = error(PSPNET, path, "'psp_level3_conv'", "kernel", "(1, 1, 8, ", " in model.hdf5")
    assert "aggregation" not in line


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_a_network_inside_a_wrapper_is_read(tf, tmp_path, pspnet, whole, frozen):
    inner = trained(tf, "PSPNet", "mobilenet", encoder_freeze=frozen)  # frozen layers come later in the file
    image = tf.keras.Input((*SIZE, 1))
    outer = tf.keras.Model(image, inner(image))
    outer.save(tmp_path / "model.hdf5") if whole else outer.save_weights(tmp_path / "model.hdf5")
    assert_same_weights(build(PSPNET, tmp_path / "model.hdf5"), pspnet)


@pytest.mark.parametrize("whole", [True, False])
def test_a_multi_gpu_model_is_read(tf, tmp_path, pspnet, whole):
    """As tf.keras.utils.multi_gpu_model of TensorFlow 2.3 and before makes it."""
    layers, image = tf.keras.layers, tf.keras.Input((*SIZE, 1))

    def get_slice(data, i, parts):
        return data[i::parts]

    outputs = [pspnet(layers.Lambda(get_slice, arguments={"i": i, "parts": 2})(image)) for i in range(2)]
    parallel = tf.keras.Model(image, layers.concatenate(outputs, axis=0, name="softmax"))
    parallel.save(tmp_path / "model.hdf5") if whole else parallel.save_weights(tmp_path / "model.hdf5")
    assert_same_weights(build(PSPNET, tmp_path / "model.hdf5"), pspnet)


def test_a_wrapper_that_computes_something_is_refused(tf, tmp_path, pspnet):
    layers, image = tf.keras.layers, tf.keras.Input((*SIZE, 1))
    of_three = trained(tf, "PSPNet", "mobilenet", input_shape=(*SIZE, 3))
    wrappers = {
        "three_channels": of_three(layers.Conv2D(3, 1, name="three_channels")(image)),  # as the README of its library
        "scaled": pspnet(layers.Lambda(lambda x: x / 255, name="scaled")(image)),
        "sharper": layers.Activation("sigmoid", name="sharper")(pspnet(image)),
    }
    for name, output in wrappers.items():
        tf.keras.Model(image, output).save(tmp_path / "model.hdf5")
        error(PSPNET, tmp_path / "model.hdf5", "part of another one", name)
    tf.keras.Model(image, wrappers["three_channels"]).save_weights(tmp_path / "model.hdf5")
    error(PSPNET, tmp_path / "model.hdf5", "three_channels")


# ---------------------------------------------------------------------------------------------------------------
# What the file and the configuration contradict each other in


def test_another_last_activation_is_an_error_that_says_both(tf, tmp_path, files):
    error(config("PSPNet", "mobilenet", activation="sigmoid"), files / "whole.hdf5", "'softmax'", "'sigmoid'")
    trained(tf, "FPN", "mobilenet", activation="sigmoid").save(tmp_path / "model.hdf5")
    error(
        config("FPN", "mobilenet"), tmp_path / "model.hdf5", "ends in 'sigmoid'", "train_config describes in 'softmax'"
    )


def test_another_number_of_classes_is_an_error_that_says_both(path):
    line = error(PSPNET, path, "model.hdf5 has 2 classes", "3 mask folders", classes=3)
    assert "background" not in line
    error(config("PSPNet", "mobilenet", classes=5), path, "train_config says 5 classes", "2 mask folders")


def test_a_background_channel_is_called_that(tf, tmp_path, path):
    background = "if one of the channels is the background, it needs a mask folder"
    error(
        config("PSPNet", "mobilenet", activation="sigmoid"),
        path,
        "has 2 classes",
        "1 mask folders",
        background,
        classes=1,
    )
    error(config("PSPNet", "mobilenet", classes=3), path, "says 3 classes", "2 mask folders", background)


def test_other_layers_are_an_error_that_says_both(path):
    error(
        config("PSPNet", "mobilenet", psp_use_batchnorm=False),
        path,
        "5 layers are only there (",
        "psp_level1_bn",
        "0 only here",
    )
    error(config("Unet", "mobilenet"), path, "only there ('", "only here ('", "conv_dw_6")


def test_layers_of_another_kind_or_order_are_an_error(files, tmp_path):
    path = Path(shutil.copy(files / "whole.hdf5", tmp_path))
    error(config("PSPNet", "mobilenet", psp_pooling_type="max"), path, "(AveragePooling2D)", "(MaxPooling2D)")
    with h5py.File(path, "r+") as file:
        description = json.loads(file.attrs["model_config"])
        layers = description["config"]["layers"]
        layers[5], layers[8] = layers[8], layers[5]
        file.attrs["model_config"] = json.dumps(description)
    error(PSPNET, path, "in another order", "number 5 is", layers[5]["config"]["name"], layers[8]["config"]["name"])


def test_a_size_that_the_network_was_not_made_for_is_an_error(files):
    error(PSPNET, files / "whole.hdf5", "96 x 96", "target_size", "144 x 48", size=(144, 48))
    fixed = config("PSPNet", "mobilenet", input_shape=[48, 144, 1])
    error(fixed, files / "whole.hdf5", "input_shape", "144 x 48", "target_size", "96 x 96")
    assert build(fixed, files / "weights.hdf5", size=(144, 48)).input_shape == (None, 48, 144, 1)
    assert build(PSPNET, files / "weights.hdf5", size=(144, 48)).input_shape == (None, 48, 144, 1)


@pytest.mark.parametrize(
    ("name", "parameters", "size", "multiple"),
    [
        ("Unet", {}, (100, 96), 32),
        ("FPN", {}, (96, 112), 32),
        ("Linknet", {}, (48, 32), 32),
        ("PSPNet", {}, (512, 512), 48),
        ("PSPNet", {"downsample_factor": 4}, (36, 48), 24),
        ("PSPNet", {"downsample_factor": 16, "input_shape": ["None", None, 1]}, (96, 48), 96),
    ],
)
def test_target_sizes_that_an_architecture_cannot_take(files, name, parameters, size, multiple):
    line = error(config(name, "mobilenet", **parameters), files / "weights.hdf5", "target_size", size=size)
    assert f"multiples of {multiple};" in line and "{} x {}".format(*size) in line


@pytest.mark.slow
def test_it_is_true_that_other_sizes_do_not_fit(tf):
    """What the multiple of 32 rests on, for each architecture that takes images of any size."""
    for name in ("Unet", "FPN", "Linknet"):
        network = trained(tf, name, "mobilenet")
        for size, fits in ((64, True), (48, False)):
            try:
                assert (network(np.zeros((1, size, 64, 1), "f4")).shape[1] == size) == fits
            except (ValueError, tf.errors.InvalidArgumentError):
                assert not fits


def test_softmax_over_one_class_is_refused(files):
    error(
        config("FPN", "mobilenet"),
        files / "weights.hdf5",
        "softmax, the default of FPN",
        "every probability 1",
        classes=1,
    )
    softmax = config("Unet", "mobilenet", activation="softmax")
    error(softmax, files / "weights.hdf5", "softmax over one class", "every probability 1", classes=1)


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({"preprocessing": "resnet18"}, "'preprocessing': 'resnet18'"),
        ({"data": {"image_function": "sm.get_preprocessing"}}, "sm.get_preprocessing"),
        ({"use_preprocess_input": True}, "use_preprocess_input"),
        ({"preprocessing": None, "preprocess": "None", "preprocess_input": False}, None),
        ({}, None),
    ],
)
def test_another_preprocessing_is_warned_of(files, more, warned):
    warnings = []
    build(PSPNET | more, files / "weights.hdf5", warn=warnings.append)
    assert len(warnings) == (warned is not None)
    assert not warned or (warned in warnings[0] and "divided by 255" in warnings[0])


@pytest.mark.parametrize(
    "raised",
    [
        lambda errors: errors.ResourceExhaustedError(None, None, "failed to allocate memory"),
        lambda errors: errors.InternalError(None, None, "Dst tensor is not initialized."),
        lambda errors: RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"),
        lambda errors: MemoryError(),
    ],
)
def test_lack_of_memory_is_called_that(tf, files, monkeypatch, raised):
    """What TensorFlow raises; to be really out of memory takes it 10 s of trying."""
    import segmentation_models

    def no_memory(activation="softmax", **_):
        raise raised(tf.errors)

    monkeypatch.setattr(segmentation_models, "PSPNet", no_memory)
    line = error(PSPNET, files / "weights.hdf5", "has no memory for the network")
    assert "model_parameters" not in line
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU 0"])
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["GPU 0"])
    error(PSPNET, files / "weights.hdf5", "the GPU has no memory", "another process fills it")


MEMINFO = {"proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable:    8000000 kB\n"}
VERSION_2 = {
    "proc/self/cgroup": "0::/job/step\n",
    "sys/fs/cgroup/job/step/memory.max": "max\n",
    "sys/fs/cgroup/job/memory.max": "3000000000\n",
    "sys/fs/cgroup/job/memory.current": "1000000000\n",
    "sys/fs/cgroup/job/memory.stat": "anon 900000000\ninactive_file 50000000\n",
}
VERSION_1 = {  # in a container, which has its own group as the root
    "proc/self/cgroup": "9:cpu:/docker/1\n4:memory:/docker/1\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000000\n",
    "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50000000\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, math.inf),
        (MEMINFO, 8_192_000_000),
        (MEMINFO | VERSION_2, 2_050_000_000),
        (MEMINFO | VERSION_1, 2_050_000_000),
        (MEMINFO | VERSION_2 | {"sys/fs/cgroup/job/memory.max": "900000000"}, 0),
        (MEMINFO | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max"}, 8_192_000_000),
    ],
)
def test_free_memory_is_the_least_of_what_machine_and_control_groups_leave(tf, tmp_path, files, free):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert room.free_memory(tmp_path) == free


def test_this_machine_has_free_memory(tf, monkeypatch):
    assert 10**8 < room.free_memory() < math.inf
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU 0"])
    assert room.free_memory() == math.inf


# ---------------------------------------------------------------------------------------------------------------
# Files that are something else


def saved_by_keras_3(path):
    import keras

    image = keras.Input((8, 8, 1))
    network = keras.Model(image, keras.layers.Conv2D(2, 1, activation="sigmoid", name="final_conv")(image))
    network.save(path) if path.suffix == ".keras" else network.save_weights(path)
    return path


def refusal(path):
    """Why a file is refused: before the network is looked at, or because it does not fit."""
    try:
        with model_file.opened(path, num_weights=150_000) as file:
            model_file.described_layers(file)
            model_file.stored_layers(file)
    except ModelError as found:
        line = printable(found)
    else:
        line = error(PSPNET, path)
    assert line and len(line) < 2000
    return line


OTHER_FILES = {
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "a pointer of Git LFS": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
        "Git LFS",
    ),
    "a web page": (lambda path: path.write_text("\n<!DOCTYPE html><html><title>Sign in</title></html>"), "web page"),
    "compressed": (lambda path: path.write_bytes(__import__("gzip").compress(path.read_bytes(), 1)), "gzip"),
    "half of it": (lambda path: os.truncate(path, path.stat().st_size // 2), "cut short"),
    "all but the last byte": (lambda path: os.truncate(path, path.stat().st_size - 1), "cut short"),
    "the head only": (lambda path: os.truncate(path, 500), "cut short"),
    "the signature only": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "damaged"),
    "text": (lambda path: path.write_text("weights"), "no Keras HDF5 file"),
    "a pickle": (lambda path: path.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR."), "no Keras HDF5 file"),
    "HDF5 of something else": (lambda path: h5py.File(path, "w").create_dataset("x", (3,)).file.close(), "layer_names"),
    "Keras 3's own format": (lambda path: os.replace(saved_by_keras_3(path.with_suffix(".keras")), path), "Keras 3"),
    "Keras 3's weights": (lambda path: os.replace(saved_by_keras_3(path.with_suffix(".weights.h5")), path), "Keras 3"),
    "a sparse file of 1 TB": (lambda path: os.truncate(path, 2**40), "far more than"),
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_files_that_are_something_else_are_called_that(what, files, tmp_path):
    path = Path(shutil.copy(files / "whole.hdf5", tmp_path / "model.hdf5"))
    change, words = OTHER_FILES[what]
    change(path)
    assert words in refusal(path)


def test_a_saved_model_is_called_that(tf, tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "model.hdf5"))
    error(PSPNET, tmp_path / "model.hdf5", "SavedModel")


def test_a_file_that_another_program_has_open_for_writing_is_read(path, pspnet):
    program = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline() == b"open\n"
        assert_same_weights(build(PSPNET, path), pspnet)
        writer.stdin.close()


# ---------------------------------------------------------------------------------------------------------------
# Hostile configurations and files: nothing is executed, and memory stays bounded


HOSTILE_NETWORKS = {
    "no section": {},
    "a text": {"segmentation_model": "Unet"},
    "a list": {"segmentation_model": ["Unet"]},
    "no parameters": {"segmentation_model": {"model_name": "Unet"}},
    "parameters that are a text": {"segmentation_model": {"model_name": "Unet", "model_parameters": "x"}},
    **{
        f"model_name {str(name)[:20]!r}": {"segmentation_model": {"model_name": name, "model_parameters": {}}}
        for name in (None, 1, ["Unet"], {"Unet": 1}, "__class__", "set_framework", "\x1b[2J", "U" * 9000)
    },
    **{
        f"{name}: {str(value)[:40]!r}": config("Unet", "mobilenet", **{name: value})
        for name, value in [
            ("classes", 10**9),
            ("classes", "2"),
            ("classes", [2]),
            ("classes", "\x1b[2J" * 999),
            ("decoder_filters", [10**9] * 5),
            ("decoder_filters", [64] * 9000),
            ("decoder_filters", [-1] * 5),
            ("decoder_filters", [float("nan")] * 5),
            ("decoder_filters", 10**9),
            ("decoder_filters", "many"),
            ("decoder_filters", [[64], [64]]),
            ("input_shape", [10**9, 10**9, 1]),
            ("input_shape", [96, 96, 3]),
            ("input_shape", "none"),
            ("input_shape", []),
            ("input_shape", [33, 33, 1]),
            ("activation", {"class_name": "Lambda", "config": {"function": "os.system"}}),
            ("activation", {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}),
            ("activation", "os.system"),
            ("activation", "deserialize"),
            ("activation", 3),
            ("decoder_block_type", "\x1b[2J"),
            ("encoder_features", [10**6]),
            ("encoder_features", ["no such layer"] * 4),
            ("no_such_parameter\x1b[2J", 1),
        ]
    },
    **{
        f"backbone_name: {str(value)[:40]!r}": config("Unet", value)
        for value in (None, "../../etc/passwd", ["resnet18"], "\x1b]0;owned\x07")
    },
    "a number for a name": {"segmentation_model": {"model_name": "Unet", "model_parameters": {3: 4}}},
    "no factor": config("PSPNet", "mobilenet", downsample_factor=0),
    "a factor that is a list": config("PSPNet", "mobilenet", downsample_factor=[8]),
    "one edge": config("PSPNet", "mobilenet", input_shape=[96]),
}


@pytest.mark.parametrize("what", HOSTILE_NETWORKS)
def test_hostile_network_configurations(what, files):
    error(HOSTILE_NETWORKS[what], files / "weights.hdf5")


@pytest.mark.parametrize(
    "parameters", [{"weights": "/nowhere/x.h5"}, {"encoder_weights": "https://example.com/x.h5"}, {"layers": "os"}]
)
def test_weights_come_from_the_bucket_only(parameters, files, monkeypatch):
    def no(*_, **__):
        raise AssertionError("a connection that nobody asked for")

    monkeypatch.setattr("socket.socket.connect", no)
    monkeypatch.setenv("HOME", "/nowhere")
    build(config("PSPNet", "mobilenet", **parameters), files / "weights.hdf5")


KERNEL = "final_conv/final_conv/kernel:0"


def replaced(make):
    """Put something else in the place of the last kernel."""

    def change(group, path):
        shape = group[KERNEL].shape
        del group[KERNEL]
        make(group, shape, path)

    return change


def virtual(group, shape, path):
    layout = h5py.VirtualLayout(shape, "f4")
    layout[...] = h5py.VirtualSource("/etc/passwd", "x", shape)
    group.create_virtual_dataset(KERNEL, layout)


def link_to_another_file(group, shape, path):
    with h5py.File(path.with_name("other.h5"), "w") as other:
        other["kernel"] = np.zeros(shape, "f4")
    group[KERNEL] = h5py.ExternalLink("other.h5", "/kernel")


def link_to_another_place(group, shape, path):
    group["kernel"] = np.zeros(shape, "f4")
    group[KERNEL] = h5py.SoftLink("/kernel")


def weight_names(names):
    return lambda group, path: group["final_conv"].attrs.__setitem__("weight_names", names)


def soft_loop(group, path):
    del group["final_conv"]
    group["final_conv"] = h5py.SoftLink("/final_conv")


def repeat_weights(group, path):
    names = group["final_conv"].attrs["weight_names"]
    del group["final_conv"].attrs["weight_names"]
    for number in range(200):
        group["final_conv"].attrs[f"weight_names{number}"] = np.repeat(np.array(names[:1], "S"), 500)


HOSTILE_WEIGHTS = {
    "an external link": replaced(lambda g, shape, path: g.__setitem__(KERNEL, h5py.ExternalLink("/x.h5", "/x"))),
    "an external link to itself": replaced(
        lambda g, shape, path: g.__setitem__(KERNEL, h5py.ExternalLink(path.name, KERNEL))
    ),
    "a link to another file": replaced(link_to_another_file),
    "a link to another place": replaced(link_to_another_place),
    "a soft link to itself": replaced(lambda g, shape, path: g.__setitem__(KERNEL, h5py.SoftLink(f"/{KERNEL}"))),
    "a layer that is a link to itself": soft_loop,
    "external storage": replaced(
        lambda g, shape, path: g.create_dataset(KERNEL, shape, "f4", external=[("/etc/passwd", 0, 2**20)])
    ),
    "a virtual dataset": replaced(virtual),
    "a huge shape": replaced(lambda g, shape, path: g.create_dataset(KERNEL, (2**40,), "f4", chunks=(1024,))),
    "a shape without numbers": replaced(lambda g, shape, path: g.create_dataset(KERNEL, shape, "f4", chunks=shape)),
    "a compression bomb": replaced(
        lambda g, shape, path: g.create_dataset(KERNEL, data=np.zeros(2**24, "f4"), compression="gzip")
    ),
    "compressed": replaced(
        lambda g, shape, path: g.create_dataset(
            KERNEL,
            data=np.frombuffer(np.random.default_rng(0).bytes(4 * np.prod(shape)), "f4").reshape(shape),
            compression="gzip",
        )
    ),
    "texts": replaced(lambda g, shape, path: g.create_dataset(KERNEL, shape, h5py.string_dtype())),
    "references": replaced(lambda g, shape, path: g.create_dataset(KERNEL, shape, h5py.ref_dtype)),
    "a group": replaced(lambda g, shape, path: g.create_group(KERNEL)),
    "complex": replaced(lambda g, shape, path: g.create_dataset(KERNEL, data=np.zeros(shape, "c8"))),
    "missing": replaced(lambda g, shape, path: None),
    "one layer's weights named 100,000 times": repeat_weights,
    "one weight twice": weight_names(["final_conv/kernel:0", "final_conv/kernel:0", "final_conv/bias:0"]),
    "a name that climbs out": weight_names(np.array(["../../../x"], "S")),
    "an absolute name": weight_names(np.array(["/etc/passwd"], "S")),
    "an empty name": weight_names(np.array([""], "S1")),
    "an escape sequence as a name": weight_names(np.array(["\x1b]0;owned\x07"], "S")),
    "a name that is not UTF-8": weight_names(np.array([b"\xff\xfe"])),
    "no layer_names": lambda group, path: group.attrs.__delitem__("layer_names"),
    "layer_names that is a number": lambda group, path: group.attrs.__setitem__("layer_names", 3),
    "layer_names of numbers": lambda group, path: group.attrs.__setitem__("layer_names", np.arange(9)),
    "a layer named 500 times": lambda group, path: group.attrs.__setitem__("layer_names", ["final_conv"] * 500),
    "no weight_names": lambda group, path: group["final_conv"].attrs.__delitem__("weight_names"),
}


@pytest.mark.parametrize("what", HOSTILE_WEIGHTS)
def test_hostile_weights(what, files, tmp_path):
    path = Path(shutil.copy(files / "weights.hdf5", tmp_path))
    with h5py.File(path, "r+") as file:
        HOSTILE_WEIGHTS[what](file, path)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use now
    before = memory("VmRSS")
    line = refusal(path)
    assert memory("VmHWM") - before < 150
    assert "root:" not in line


def memory(kind):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


LAMBDA = {"class_name": "Lambda", "config": {"name": "owned", "function": ["touch owned", None, None]}}
HOSTILE_DESCRIPTIONS = {
    "no text": np.arange(9),
    "no JSON": "{",
    "a number": "3",
    "nested without end": "[" * 100_000,
    "no layers": '{"config": {}}',
    "no layer": '{"config": {"layers": []}}',
    "layers that are numbers": '{"config": {"layers": [1, 2]}}',
    "layers without names": '{"config": {"layers": [{"class_name": "Conv2D", "config": {}}]}}',
    "networks in networks": '{"config": {"layers": [{"config": ' * 20_000 + "{}" + "}]}}" * 20_000,
    "20 MB": json.dumps({"config": {"layers": [{}] * 5_000_000}}),
    "code": json.dumps({"class_name": "Functional", "config": {"layers": [LAMBDA]}}),
    "a shape of texts": json.dumps(
        {"config": {"layers": [{"class_name": "X", "config": {"name": "a", "batch_input_shape": ["x"] * 4}}]}}
    ),
}


@pytest.mark.parametrize("what", HOSTILE_DESCRIPTIONS)
def test_hostile_descriptions(what, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copy(files / "whole.hdf5", tmp_path))
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = HOSTILE_DESCRIPTIONS[what]
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    refusal(path)
    assert memory("VmHWM") - before < 200
    assert os.listdir(tmp_path) == ["whole.hdf5"]


def test_deeply_nested_groups_are_not_walked(path, pspnet):
    with h5py.File(path, "r+") as file:
        group = file
        for _ in range(5000):
            group = group.create_group("g")
        file["circle"] = file
    assert_same_weights(build(PSPNET, path), pspnet)


# ---------------------------------------------------------------------------------------------------------------
# TensorFlow's start


START = """
import os, network, terminal
terminal.open_streams()
network.import_tensorflow()
os.write(2, b"after\\n")
"""


def start(tmp_path, body, **environment):
    """Start TensorFlow as the tool does, with a stand-in that does what `body` says."""
    (tmp_path / "tensorflow.py").write_text(f"import os, sys\n{body}\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", **environment}
    if environment.get("TF_CPP_MIN_LOG_LEVEL") == "3":  # this process has set it
        del environment["TF_CPP_MIN_LOG_LEVEL"]
    return subprocess.run(
        [sys.executable, "-c", START],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


NOISE = (
    "os.write(2, b'WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n'"
    "b'I0000 00:00:1795625113.483012    9100 port.cc:153] oneDNN custom operations are on.\\n'"
    "b'E0000 00:00:1795625119.543205    9100 cuda_platform.cc:52] failed call to cuInit\\n')\n"
)
DEVICES = """
class config:
    list_physical_devices = list_logical_devices = lambda kind=None: []
class errors:
    pass
"""


def test_log_lines_are_kept_off_the_screen(tmp_path):
    process = start(tmp_path, NOISE + DEVICES)
    assert (process.returncode, process.stderr) == (0, "after\n")


def test_a_fatal_message_is_seen_though_the_process_is_aborted(tmp_path):
    process = start(tmp_path, NOISE + "os.write(2, b'F0000 00:00:1 cpu_feature_guard.cc:38] needs AVX\\n'); os.abort()")
    assert process.returncode == -6
    assert process.stderr == "F0000 00:00:1 cpu_feature_guard.cc:38] needs AVX\n"


def test_an_exception_is_seen(tmp_path):
    process = start(tmp_path, NOISE + "raise ImportError('libfoo.so is missing')")
    assert process.returncode == 1
    assert "libfoo.so is missing" in process.stderr and "cuInit" not in process.stderr


def test_what_the_tool_itself_writes_meanwhile_is_seen_at_once(tmp_path):
    process = start(tmp_path, NOISE + DEVICES + "sys.stderr.write('I0000  50 %'); sys.stderr.flush(); os._exit(3)")
    assert (process.returncode, process.stderr) == (3, "I0000  50 %")


@pytest.mark.parametrize("environment", [{"PATH": "/nowhere"}, {"TF_CPP_MIN_LOG_LEVEL": "0"}])
def test_without_grep_or_if_asked_for_all_is_shown(tmp_path, environment):
    process = start(tmp_path, NOISE + DEVICES, **environment)
    assert process.returncode == 0
    assert "oneDNN" in process.stderr and process.stderr.endswith("after\n")


# ---------------------------------------------------------------------------------------------------------------
# Devices


@pytest.mark.parametrize(("capability", "tf32"), [((7, 0), False), ((8, 0), True), ((9, 0), True)])
def test_what_the_probabilities_depend_on_is_told(tf, monkeypatch, capability, tf32):
    """On a stand-in for a GPU, as machines without one run this test."""
    details = {"device_name": "Some GPU", "compute_capability": capability}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["one", "two"])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details)
    facts = room.device_facts()
    assert (facts["gpu"], facts["tf32"]) == ("Some GPU, Some GPU", tf32)
    assert re.match(r"\d+", facts["cuda_version"]) and re.match(r"\d+", facts["cudnn_version"])
    monkeypatch.setattr(tf.config.experimental, "tensor_float_32_execution_enabled", lambda: False)
    assert room.device_facts()["tf32"] is False


def test_a_cpu_has_no_such_facts(tf):
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("this machine has a GPU")
    assert room.device_facts() == {"gpu": None, "tf32": None, "cuda_version": None, "cudnn_version": None}
