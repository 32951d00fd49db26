"""The network is the one that was trained: rebuilt from its configuration, with the weights of every kind of file."""

import inspect
import json
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

import network as room
from errors import ModelError, UsageError, printable

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
    ("Linknet", "seresnet18"),  # 17 layers with automatic names, in pairs of one shape, and Lambda layers
}


pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")


@pytest.fixture(scope="module")
def tf():
    return room.import_tensorflow()


def config(architecture, backbone, **parameters):
    parameters = {"backbone_name": backbone, "encoder_weights": "imagenet", **SMALL[architecture]} | parameters
    return {"segmentation_model": {"model_name": architecture, "model_parameters": parameters}, "loss": "no such loss"}


def trained(tf, architecture, backbone, **parameters):
    """A network as a user's training makes it, with no two weights alike."""
    import segmentation_models

    shape = (*SIZE, 1) if architecture == "PSPNet" else (None, None, 1)
    defaults = {"backbone_name": backbone, "encoder_weights": None, "classes": 2, "input_shape": shape}
    network = getattr(segmentation_models, architecture)(**defaults | SMALL[architecture] | parameters)
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


def write_as_tensorflow_2_4(path):
    """Change a file of today's Keras 2 into what TensorFlow 2.4 with h5py 2.10 writes.

    After tensorflow/python/keras/saving/hdf5_format.py of version 2.4: names as arrays of bytes of one length, no
    top_level_model_weights.
    """
    with h5py.File(path, "r+") as file:
        weights = file.get("model_weights", file)
        weights.pop("top_level_model_weights", None)
        for attributes in (weights.attrs, *(layer.attrs for layer in weights.values())):
            for name in {"layer_names", "weight_names"} & attributes.keys():
                attributes[name] = (
                    np.array([text.encode() for text in attributes[name]], "S") if len(attributes[name]) else []
                )


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
        warnings = []
        rebuilt = build(config(architecture, backbone), path, warn=warnings.append)
        assert not warnings
        assert_same_weights(rebuilt, original)
        np.testing.assert_array_equal(rebuilt(x, training=False), expected)
        path.unlink()


@pytest.fixture(scope="module")
def pspnet(tf):
    """A small network, quickly built."""
    return trained(tf, "PSPNet", "mobilenet")


PSPNET = config(
    *("PSPNet", "mobilenet"),
    **{"input_shape": ["None", None, 1], "psp_dropout": "None", "classes": "None"},  # None as a text is null
    **{"weights": "/nowhere/x.h5", "encoder_weights": "nowhere"},  # all weights come from the bucket
)


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


@pytest.mark.parametrize("name", ["Unet", "FPN"])
def test_where_the_configuration_is_silent_the_architecture_decides(tf, tmp_path, name):
    trained(tf, name, "mobilenet").save_weights(tmp_path / "model.hdf5")
    x = np.random.default_rng(0).random((1, 96, 96, 1), np.float32)
    sums = build(config(name, "mobilenet"), tmp_path / "model.hdf5")(x, training=False).numpy().sum(axis=-1)
    assert np.allclose(sums, 1, atol=1e-5) == (name == "FPN")


def test_a_file_in_the_cache_has_no_ending(path, pspnet):
    assert_same_weights(build(PSPNET, path.rename(path.with_name("0a1b2c"))), pspnet)


def test_compressed_weights_with_checksums(files, tmp_path, pspnet):
    """As h5repack writes them."""
    path, arrays = shutil.copy(files / "weights.hdf5", tmp_path), {}
    with h5py.File(path, "r+") as file:
        file.visititems(lambda name, item: arrays.update({name: item[...]}) if isinstance(item, h5py.Dataset) else None)
        for name, array in arrays.items():
            del file[name]
            file.create_dataset(name, data=array, compression="gzip", shuffle=True, fletcher32=True)
    assert_same_weights(build(PSPNET, path), pspnet)


def test_a_long_list_of_names_in_parts(path, pspnet):
    """As Keras writes it where it is longer than HDF5 allows."""
    with h5py.File(path, "r+") as file:
        attributes = file.get("model_weights", file).attrs
        names = attributes.pop("layer_names")
        attributes["layer_names0"], attributes["layer_names1"] = names[:50], names[50:]
    assert_same_weights(build(PSPNET, path), pspnet)


UNFRIENDLY = """
import sys, numpy as np, network
network.import_tensorflow()
built = network.build_network({config}, 2, {size}, sys.argv[1], print)
np.save(sys.argv[2], built(np.load(sys.argv[2]), training=False))
"""


def test_what_other_programs_do_changes_no_number(files, tmp_path, pspnet):
    """keras.json says something else, and another program has locked the file."""
    path = shutil.copy(files / "whole.hdf5", tmp_path / "model.hdf5")
    x = np.random.default_rng(0).random((1, 96, 96, 1), np.float32)
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "keras.json").write_text('{"floatx": "float16", "image_data_format": "channels_first"}')
    writer = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    environment = {**os.environ, "KERAS_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("HDF5_USE_FILE_LOCKING", None)
    with subprocess.Popen(
        [sys.executable, "-c", writer, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout.readline() == b"open\n"
        program = UNFRIENDLY.format(config=PSPNET, size=SIZE)
        subprocess.run([sys.executable, "-c", program, path, tmp_path / "x.npy"], env=environment, check=True)
        process.stdin.close()
    result = np.load(tmp_path / "x.npy")
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, pspnet(x, training=False))


# ---------------------------------------------------------------------------------------------------------------
# What the file and the configuration contradict each other in


def test_another_order_of_layers_is_an_error(tf, tmp_path):
    path = tmp_path / "model.hdf5"
    trained(tf, "Linknet", "seresnet18").save_weights(path)
    for pattern in ("conv2d", "stage[23]_unit1_conv1"):  # names that Keras gives, and others
        with h5py.File(path, "r+") as file:
            names = list(file.attrs["layer_names"])
            here, there = [number for number, name in enumerate(names) if re.match(pattern, name)][-2:]
            names[here], names[there] = names[there], names[here]
            file.attrs["layer_names"] = names
        error(config("Linknet", "seresnet18"), path, "in the order of the layers", f"{names[here]!r} is there")


def test_the_first_layer_whose_weights_do_not_fit_is_named(path):
    with h5py.File(path, "r+") as file:
        group = file.get("model_weights", file)
        for layer in ("psp_level3_conv", "aggregation_conv"):
            kernel = group[f"{layer}/{layer}/kernel:0"][...]
            del group[f"{layer}/{layer}/kernel:0"]
            group[f"{layer}/{layer}/kernel:0"] = kernel.swapaxes(2, 3)  # as many numbers, in another shape
    line = error(PSPNET, path, "'psp_level3_conv' is [(1, 1, 8, 256)] in model.hdf5, [(1, 1, 256, 8)] in the network")
    assert "aggregation" not in line


@pytest.mark.parametrize("whole", [True, False])
def test_a_network_inside_another_one_is_called_that(tf, tmp_path, pspnet, whole):
    layers, image = tf.keras.layers, tf.keras.Input((*SIZE, 1))
    path = tmp_path / "model.hdf5"
    parts = [pspnet(layers.Lambda(lambda data, i: data[i::2], arguments={"i": i})(image)) for i in range(2)]
    for outer in (
        tf.keras.Model(image, layers.concatenate(parts, axis=0)),  # as multi_gpu_model makes it
        tf.keras.Model(image, pspnet(layers.Conv2D(1, 1)(image))),  # as the README of segmentation-models does
    ):
        outer.save(path) if whole else outer.save_weights(path)
        error(PSPNET, path, "multi_gpu_model", f"model.get_layer('{pspnet.name}').save('model.hdf5')")


def test_another_last_activation_is_an_error_that_says_both(files):
    sigmoid = config("PSPNet", "mobilenet", activation="sigmoid")
    error(sigmoid, files / "whole.hdf5", "activation of layer 'sigmoid' is 'softmax' in", "'sigmoid' in the network")


def test_another_number_of_classes_is_an_error_that_says_both(path):
    background = "if one of the channels is the background, it needs a mask folder"
    assert background not in error(PSPNET, path, "model.hdf5 has 2 classes", "3 mask folders", classes=3)
    sigmoid = config("PSPNet", "mobilenet", activation="sigmoid")
    error(sigmoid, path, "has 2 classes", "1 mask folders", background, classes=1)
    error(config("PSPNet", "mobilenet", classes=3), path, "train_config says 3 classes", "2 mask folders", background)


def test_another_architecture_or_backbone_is_an_error_that_says_where_it_begins(files):
    error(config("Unet", "mobilenet"), files / "weights.hdf5", "is there where", "should be")
    error(config("PSPNet", "resnet18"), files / "whole.hdf5", "'conv1' is there where 'bn_data' should be")


OTHER_SETTINGS = {
    "Unet": {
        "backbone": "resnet18",
        "input_shape": (96, 96, 1),
        "classes": 3,
        "activation": "softmax",
        "encoder_freeze": True,
        "encoder_features": ("conv_pw_10_relu", "conv_pw_5_relu", "conv_pw_3_relu", "conv_pw_1_relu"),
        "decoder_block_type": "transpose",
        "decoder_filters": (8, 8, 8, 4, 8),
        "decoder_use_batchnorm": False,
    },
    "FPN": {
        "pyramid_block_filters": 16,
        "pyramid_use_batchnorm": False,
        "pyramid_aggregation": "sum",
        "pyramid_dropout": 0.5,
    },
    "Linknet": {
        "decoder_block_type": "transpose",
        "decoder_filters": (None, None, None, None, 8),
        "decoder_use_batchnorm": False,
    },
    "PSPNet": {
        "downsample_factor": 4,
        "psp_conv_filters": 16,
        "psp_pooling_type": "max",
        "psp_use_batchnorm": False,
        "psp_dropout": 0.5,
    },
}
SAME_NETWORK = {"input_shape", "encoder_freeze"}


@pytest.mark.parametrize("name", SMALL)
def test_every_setting_that_a_whole_model_does_not_have_is_refused_or_changes_nothing(tf, tmp_path, name):
    import segmentation_models

    original = trained(tf, name, "mobilenet")
    original.save(tmp_path / "model.hdf5")
    of_all = OTHER_SETTINGS["Unet"].keys() | {"backbone_name", "weights", "encoder_weights", "kwargs"}
    settings = inspect.signature(getattr(segmentation_models, name)).parameters.keys()
    assert settings <= OTHER_SETTINGS[name].keys() | of_all
    for setting, value in OTHER_SETTINGS[name].items():
        other = config(name, **{"backbone": "mobilenet", setting: value})
        if setting in SAME_NETWORK:
            assert_same_weights(build(other, tmp_path / "model.hdf5"), original)
        else:
            error(other, tmp_path / "model.hdf5", "train_config")


def described(path, change):
    """Change the layers in the description of a whole model."""
    with h5py.File(path, "r+") as file:
        description = json.loads(file.attrs["model_config"])
        change({layer["config"]["name"]: layer for layer in description["config"]["layers"]})
        file.attrs["model_config"] = json.dumps(description)


@pytest.mark.parametrize(
    ("layer", "setting", "value", "here"),
    [
        ("psp_level1_relu", "activation", "elu", "'relu'"),
        ("final_upsampling", "interpolation", "nearest", "'bilinear'"),
        ("psp_level6_bn", "epsilon", 1.0, "0.001"),
        ("conv_dw_2", "strides", [1, 1], "[2, 2]"),
        ("conv_pw_1", "padding", "valid", "'same'"),
        ("conv1", "dilation_rate", [2, 2], "[1, 1]"),
    ],
)
def test_an_inner_layer_that_computes_something_else_is_named(files, tmp_path, layer, setting, value, here):
    path = shutil.copy(files / "whole.hdf5", tmp_path)
    described(path, lambda layers: layers[layer]["config"].update({setting: value}))
    line = error(PSPNET, path, f"{setting} of layer '{layer}' is {value!r} in model.hdf5, {here} in the network")
    assert "model_parameters" in line


def test_an_inner_layer_of_another_kind_or_after_other_layers_is_named(files, tmp_path):
    path = shutil.copy(files / "whole.hdf5", tmp_path)
    described(path, lambda layers: layers["psp_level1_bn"].update(class_name="LayerNormalization"))
    error(PSPNET, path, "class of layer 'psp_level1_bn' is 'LayerNormalization'", "'BatchNormalization'")
    path = shutil.copy(files / "whole.hdf5", tmp_path)
    described(path, lambda layers: layers["psp_concat"]["inbound_nodes"][0].reverse())
    error(PSPNET, path, "input of layer 'psp_concat'")


def test_what_changes_no_number_or_only_one_version_of_keras_writes_is_no_difference(files, tmp_path, pspnet):
    def change(layers):
        for layer in layers.values():
            layer["config"] |= {"trainable": False, "renorm": False, "kernel_initializer": {"class_name": "Zeros"}}
        layers["psp_level1_bn"]["config"] |= {"momentum": 0.5, "axis": 3}
        layers["psp_level1_relu"]["config"]["activation"] = {"class_name": "function", "config": "relu"}
        layers["psp_level2_bn"]["class_name"] = "BatchNormalizationV1"
        del layers["conv1"]["config"]["dilation_rate"]
        layers["psp_level2_conv"]["config"]["dtype"] = {"class_name": "Policy", "config": {"name": "mixed_float16"}}

    path, warnings = shutil.copy(files / "whole.hdf5", tmp_path), []
    described(path, change)
    assert_same_weights(build(PSPNET, path, warn=warnings.append), pspnet)
    assert len(warnings) == 1 and "mixed_float16" in warnings[0] and "float32" in warnings[0]


def test_a_size_that_the_network_was_not_made_for_is_an_error(files):
    error(PSPNET, files / "whole.hdf5", "96 x 96", "target_size", "144 x 48", size=(144, 48))
    fixed = config("PSPNet", "mobilenet", input_shape=[48, 144, 1])
    error(fixed, files / "whole.hdf5", "input_shape", "144 x 48", "target_size", "96 x 96")
    assert build(PSPNET, files / "weights.hdf5", size=(144, 48)).input_shape == (None, 48, 144, 1)


@pytest.mark.parametrize(
    ("name", "parameters", "size", "multiple"),
    [
        ("Unet", {}, (100, 96), 32),
        ("FPN", {}, (96, 112), 32),
        ("PSPNet", {}, (512, 512), 48),
        ("PSPNet", {"downsample_factor": 16, "input_shape": ["None", None, 1]}, (96, 48), 96),
    ],
)
def test_target_sizes_that_an_architecture_cannot_take(files, name, parameters, size, multiple):
    line = error(config(name, "mobilenet", **parameters), files / "weights.hdf5", "target_size", size=size)
    assert f"multiples of {multiple};" in line and "{} x {}".format(*size) in line


def test_softmax_over_one_class_is_refused(files):
    path, softmax = files / "weights.hdf5", config("Unet", "mobilenet", activation="softmax")
    error(config("FPN", "mobilenet"), path, "softmax, the default of FPN", "every probability 1", classes=1)
    error(softmax, path, "softmax over one class", "every probability 1", classes=1)


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({"preprocessing": "resnet18"}, "preprocessing: resnet18"),
        ({"data": {"function": "sm.get_preprocessing"}}, "sm.get_preprocessing"),
        ({"preprocessing": None, "preprocess": "None", "preprocess_input": False}, None),
    ],
)
def test_another_preprocessing_is_warned_of(files, more, warned):
    warnings = []
    build(PSPNET | more, files / "weights.hdf5", warn=warnings.append)
    assert len(warnings) == (warned is not None)
    assert not warned or (warned in warnings[0] and "divided by 255" in warnings[0])


@pytest.mark.parametrize("words", ["OOM when allocating", "Dst tensor is not initialized.", "CUDA_ERROR_OUT_OF_MEMORY"])
def test_lack_of_memory_is_called_that(tf, files, monkeypatch, words):
    """What TensorFlow raises; to be really out of memory takes it 10 s of trying."""
    import segmentation_models

    def no_memory(activation="softmax", downsample_factor=8, **kwargs):
        raise tf.errors.InternalError(None, None, words)

    monkeypatch.setattr(segmentation_models, "PSPNet", no_memory)
    line = error(PSPNET, files / "weights.hdf5", "the machine has no memory for the network", words)
    assert "model_parameters" not in line
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU 0"])
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["GPU 0"])
    error(PSPNET, files / "weights.hdf5", "the GPU has no memory", "another process fills it")


# ---------------------------------------------------------------------------------------------------------------
# Files that are something else, and configurations that cannot be used


OTHER_FILES = {
    "Git LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4\n"), "lfs pull"),
    "a web page": (lambda path: path.write_text("\n<!DOCTYPE html><html><title>Sign in</title></html>"), "web page"),
    "Keras 3's .keras, which is a ZIP file": (lambda path: path.write_bytes(b"PK\x03\x04 and more"), "Keras 3"),
    "Keras 3's weights": (lambda path: h5py.File(path, "w").create_group("layers/conv2d/vars").file.close(), "Keras 3"),
    "empty": (lambda path: path.write_bytes(b""), "upload it again"),
    "half of it": (lambda path: os.truncate(path, path.stat().st_size // 2), "truncated file"),
    "HDF5 of something else": (lambda path: h5py.File(path, "w").create_dataset("x", (3,)).file.close(), "layer_names"),
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_files_that_are_something_else_are_called_that(what, files, tmp_path):
    path = Path(shutil.copy(files / "weights.hdf5", tmp_path / "model.hdf5"))
    change, words = OTHER_FILES[what]
    change(path)
    error(PSPNET, path, words)


UNUSABLE = {
    "no section": {},
    "no parameters": {"segmentation_model": {"model_name": "Unet"}},
    "another architecture": {"segmentation_model": {"model_name": "set_framework", "model_parameters": {}}},
    "another backbone": config("Unet", "../../etc/passwd"),
    "three channels": config("Unet", "mobilenet", input_shape=[96, 96, 3]),
    "negative filters": config("Unet", "mobilenet", decoder_filters=[-1] * 5),
    "a mistyped parameter": config("PSPNet", "mobilenet", psp_pool="max"),
    "no factor": config("PSPNet", "mobilenet", downsample_factor=0),
    "an object": config("Unet", "mobilenet", activation={"module": "os", "class_name": "function", "config": "system"}),
    "another activation": config("Unet", "mobilenet", activation="os.system"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_configurations_that_describe_no_network(what, files):
    error(UNUSABLE[what], files / "weights.hdf5")


def test_code_in_a_file_is_not_executed(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = shutil.copy(files / "whole.hdf5", "model.hdf5")
    code = {"class_name": "Lambda", "config": {"name": "conv1", "function": ["__import__('os').mkdir('owned')"]}}
    described(path, lambda layers: layers["conv1"].update(code))
    error(PSPNET, path, "class of layer 'conv1' is 'Lambda'")
    assert os.listdir() == ["model.hdf5"]


# ---------------------------------------------------------------------------------------------------------------
# TensorFlow and devices


def test_an_incomplete_installation_is_called_that(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UsageError, match="TensorFlow cannot be imported.*install requirements.txt"):
        room.import_tensorflow()


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
    facts = room.device_facts()
    versions = facts.pop("libraries")
    assert facts == {"gpu": None, "tf32": None, "cuda_version": None, "cudnn_version": None}
    assert versions == room.versions()
    assert (versions["tensorflow"], versions["numpy"]) == (tf.__version__, np.__version__)
    assert None not in versions.values()
