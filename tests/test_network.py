"""The network is the one that was trained: rebuilt from its configuration, with the weights of every kind of file."""

import fcntl
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
QUICK = ("Linknet", "seresnet18")  # 17 layers with automatic names, in pairs of one shape, and Lambda layers


pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
OTHER_SETTINGS = {
    "Unet": {
        **{"input_shape": (96, 96, 1), "classes": 3, "activation": "softmax", "encoder_freeze": True},
        "encoder_features": ("conv_pw_10_relu", "conv_pw_5_relu", "conv_pw_3_relu", "conv_pw_1_relu"),
        **{"decoder_block_type": "transpose", "decoder_filters": (8, 8, 8, 4, 8), "decoder_use_batchnorm": False},
    },
    "FPN": {
        **{"pyramid_block_filters": 16, "pyramid_use_batchnorm": False},
        **{"pyramid_aggregation": "sum", "pyramid_dropout": 0.5},
    },
    "Linknet": {
        "decoder_filters": (None, None, None, None, 8),
        **{"decoder_block_type": "transpose", "decoder_use_batchnorm": False},
    },
    "PSPNet": {
        **{"downsample_factor": 4, "psp_conv_filters": 16, "psp_pooling_type": "max"},
        **{"psp_use_batchnorm": False, "psp_dropout": 0.5},
    },
}
SAME_NETWORK = {"input_shape", "encoder_freeze"}


@pytest.fixture(scope="module")
def tf():
    return room.import_tensorflow()


def config(architecture, backbone, **parameters):
    parameters = {"backbone_name": backbone, "encoder_weights": "imagenet", **SMALL[architecture]} | parameters
    return {"segmentation_model": {"model_name": architecture, "model_parameters": parameters}, "loss": "no such loss"}


def trained(architecture, backbone):
    """A network as a user's training makes it, with no two weights alike."""
    import segmentation_models

    shape = (*SIZE, 1) if architecture == "PSPNet" else (None, None, 1)
    defaults = {"backbone_name": backbone, "encoder_weights": None, "classes": 2, "input_shape": shape}
    network = getattr(segmentation_models, architecture)(**defaults | SMALL[architecture])
    rng = np.random.default_rng(1)
    network.set_weights(
        [
            rng.uniform(0.5, 1.5, weight.shape)  # biases, and the means, variances, ... of normalisation
            if weight.ndim == 1
            else rng.normal(0, 1 / np.sqrt(np.prod(weight.shape[:-1])), weight.shape)  # keeps numbers in bounds
            for weight in network.get_weights()
        ]
    )
    network.compile("adam", "categorical_crossentropy")
    return network


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
                texts = [text.encode() for text in attributes[name]]
                attributes[name] = np.array(texts, "S") if texts else []


# ---------------------------------------------------------------------------------------------------------------
# The networks that users have


@pytest.mark.parametrize(
    ("architecture", "backbone"),
    [
        pytest.param(architecture, backbone, marks=() if (architecture, backbone) == QUICK else pytest.mark.slow)
        for architecture in SMALL
        for backbone in BACKBONES
    ],
)
def test_every_architecture_is_rebuilt_with_its_weights(tf, tmp_path, architecture, backbone):
    original = trained(architecture, backbone)
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
    return trained("PSPNet", "mobilenet")


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


def test_weights_as_other_programs_store_them(files, tmp_path, pspnet):
    """Compressed, with checksums, by h5repack; names in parts, by Keras where HDF5 allows no longer list; no ending."""
    path, arrays = shutil.copy(files / "weights.hdf5", tmp_path / "0a1b2c"), {}
    with h5py.File(path, "r+") as file:
        file.visititems(lambda name, item: arrays.update({name: item[...]}) if isinstance(item, h5py.Dataset) else None)
        for name, array in arrays.items():
            del file[name]
            file.create_dataset(name, data=array, compression="gzip", shuffle=True, fletcher32=True)
        names = file.attrs.pop("layer_names")
        file.attrs["layer_names0"], file.attrs["layer_names1"] = names[:50], names[50:]
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
    environment = {**os.environ, "KERAS_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("HDF5_USE_FILE_LOCKING", None)
    program = UNFRIENDLY.format(config=PSPNET, size=SIZE)
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        subprocess.run([sys.executable, "-c", program, path, tmp_path / "x.npy"], env=environment, check=True)
    result = np.load(tmp_path / "x.npy")
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, pspnet(x, training=False))


# ---------------------------------------------------------------------------------------------------------------
# What the file and the configuration contradict each other in


def test_another_order_of_layers_is_an_error(tf, tmp_path):
    path = tmp_path / "model.hdf5"
    trained("Linknet", "seresnet18").save_weights(path)
    for pattern in ("conv2d", "stage[23]_unit1_conv1"):  # names that Keras gives, and others
        with h5py.File(path, "r+") as file:
            names = list(file.attrs["layer_names"])
            here, there = [number for number, name in enumerate(names) if re.match(pattern, name)][-2:]
            names[here], names[there] = names[there], names[here]
            file.attrs["layer_names"] = names
        error(config("Linknet", "seresnet18"), path, "in the order of the layers", f"{names[here]!r} is there")


@pytest.mark.parametrize("whole", [True, False])
def test_a_network_inside_another_one_is_called_that(tf, tmp_path, pspnet, whole):
    """As the README of segmentation-models does it, and as multi_gpu_model did."""
    image, path = tf.keras.Input((*SIZE, 1)), tmp_path / "model.hdf5"
    outer = tf.keras.Model(image, pspnet(tf.keras.layers.Conv2D(1, 1)(image)))
    outer.save(path) if whole else outer.save_weights(path)
    error(PSPNET, path, "multi_gpu_model", f"model.get_layer('{pspnet.name}').save('model.hdf5')")


def psp(**parameters):
    return config("PSPNet", "mobilenet", **parameters)


UNET, FPN = config("Unet", "mobilenet"), config("FPN", "mobilenet")
BACKGROUND = "if one of the channels is the background, it needs a mask folder too"
TARGET = "target_size in the dataset's config.yaml is"
CALL = {"module": "os", "class_name": "function", "config": "system"}
ERRORS = {  # what the error says, the configuration, and what else is not as usual
    "layer 'sigmoid' is 'softmax' in model.hdf5, 'sigmoid' in": (psp(activation="sigmoid"), {}),
    "weights of layer 'psp_level1_conv' is [(1, 1, 256, 8)]": (psp(psp_conv_filters=16), {}),
    f"has 2 classes, the dataset has 1 mask folders: {BACKGROUND}": (psp(activation="sigmoid"), {"classes": 1}),
    f"train_config says 3 classes, the dataset has 2 mask folders: {BACKGROUND}": (psp(classes=3), {}),
    "is there where": (UNET, {}),
    "'conv1' is there where 'bn_data' should be": (psp(backbone_name="resnet18"), {}),
    f"for images of 96 x 96 pixels, {TARGET} 144 x 48": (psp(), {"size": (144, 48)}),
    f"width and height are multiples of 32; {TARGET} 100 x 96": (UNET, {"size": (100, 96)}),
    "downsample_factor 8 takes images whose width and height are multiples of 48": (psp(), {"size": (512, 512)}),
    f"multiples of 96; {TARGET} 96 x 48": (psp(downsample_factor=16), {"size": (96, 48)}),
    "softmax, the default of FPN, over one class makes every probability 1": (FPN, {"classes": 1}),
    "needs segmentation_model: {": ({}, {}),
    "'x' is none of Unet": ({"segmentation_model": {"model_name": "x", "model_parameters": {}}}, {}),
    "the network takes 3 channels": (psp(input_shape=[96, 96, 3]), {}),
    "segmentation-models cannot build PSPNet from these model_parameters": (psp(psp_pool="max"), {}),
    "No such model `../../etc/passwd`": (psp(backbone_name="../../etc/passwd"), {}),
    "Unknown activation function 'os.system'": (psp(activation="os.system"), {}),
    "'activation' must be a text": (psp(activation=CALL), {}),
}


@pytest.mark.parametrize("words", ERRORS)
def test_a_configuration_that_the_file_or_the_dataset_contradicts_is_an_error(files, words):
    train_config, others = ERRORS[words]
    error(train_config, files / "whole.hdf5", words, **others)


def described(path, change):
    """Change the layers in the description of a whole model."""
    with h5py.File(path, "r+") as file:
        description = json.loads(file.attrs["model_config"])
        change({layer["config"]["name"]: layer for layer in description["config"]["layers"]})
        file.attrs["model_config"] = json.dumps(description)


OTHER_LAYERS = {  # what the error says, the layer, and its settings in the file
    "activation of layer 'psp_level1_relu' is 'elu' in model.hdf5, 'relu' in": (
        "psp_level1_relu",
        {"activation": "elu"},
    ),
    "interpolation of layer 'final_upsampling' is 'nearest'": ("final_upsampling", {"interpolation": "nearest"}),
    "epsilon of layer 'psp_level6_bn' is 1.0 in model.hdf5, 0.001 in": ("psp_level6_bn", {"epsilon": 1.0}),
    "strides of layer 'conv_dw_2' is [1, 1]": ("conv_dw_2", {"strides": [1, 1]}),
    "padding of layer 'conv_pw_1' is 'valid'": ("conv_pw_1", {"padding": "valid"}),
    "dilation_rate of layer 'conv1' is [2, 2]": ("conv1", {"dilation_rate": [2, 2]}),
}


@pytest.mark.parametrize("words", OTHER_LAYERS)
def test_an_inner_layer_that_computes_something_else_is_named(files, tmp_path, words):
    path, (name, settings) = shutil.copy(files / "whole.hdf5", tmp_path), OTHER_LAYERS[words]
    described(path, lambda layers: layers[name]["config"].update(settings))
    error(PSPNET, path, words, "correct its model_parameters")


def test_an_inner_layer_of_another_kind_or_order_is_named_and_its_code_is_not_executed(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = {"class_name": "Lambda", "config": {"name": "conv1", "function": ["__import__('os').mkdir('owned')"]}}
    for words, change in (
        ("class of layer 'conv1' is 'Lambda'", lambda layers: layers["conv1"].update(code)),
        ("of 144 x 48", lambda layers: [*layers.values()][0]["config"].update(batch_input_shape=[None, 48, 144, 1])),
        ("input of layer 'psp_concat'", lambda layers: layers["psp_concat"]["inbound_nodes"][0].reverse()),
    ):
        shutil.copy(files / "whole.hdf5", "model.hdf5")
        described("model.hdf5", change)
        error(PSPNET, "model.hdf5", words)
    assert os.listdir() == ["model.hdf5"]


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


def test_weights_alone_fit_another_size(files):
    assert build(PSPNET, files / "weights.hdf5", size=(144, 48)).input_shape == (None, 48, 144, 1)


def test_another_preprocessing_is_warned_of(files):
    for more, warned in (
        ({"preprocessing": "resnet18"}, "preprocessing: resnet18"),
        ({"data": {"Preprocessing": "sm"}}, "Preprocessing: sm"),
        ({"preprocessing": None, "preprocess": "None", "preprocess_input": False}, None),
    ):
        warnings = []
        build(PSPNET | more, files / "weights.hdf5", warn=warnings.append)
        assert len(warnings) == (warned is not None)
        assert not warned or (warned in warnings[0] and "divided by 255" in warnings[0])


# ---------------------------------------------------------------------------------------------------------------
# Files that are something else, and configurations that cannot be used


OTHER_FILES = {
    "Git LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4\n"), "lfs pull"),
    "Keras 3's .keras, which is a ZIP file": (lambda path: path.write_bytes(b"PK\x03\x04 and more"), "Keras 3"),
    "Keras 3's weights": (lambda path: h5py.File(path, "w").create_group("layers/conv2d/vars").file.close(), "Keras 3"),
    "empty": (lambda path: path.write_bytes(b""), "upload it again"),
    "half of it": (lambda path: os.truncate(path, path.stat().st_size // 2), "truncated file"),
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_files_that_are_something_else_are_called_that(what, files, tmp_path):
    path = Path(shutil.copy(files / "weights.hdf5", tmp_path / "model.hdf5"))
    change, words = OTHER_FILES[what]
    change(path)
    error(PSPNET, path, words)


# ---------------------------------------------------------------------------------------------------------------
# TensorFlow and devices


def test_an_incomplete_installation_is_called_that(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UsageError, match="TensorFlow cannot be imported.*install requirements.txt"):
        room.import_tensorflow()


def test_what_the_probabilities_depend_on_is_told(tf, monkeypatch):
    """On a stand-in for a GPU, as machines without one run this test."""
    details = {"device_name": "Some GPU", "compute_capability": (8, 0)}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["one", "two"])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details)
    facts = room.device_facts()
    assert (facts["gpu"], facts["tf32"]) == ("Some GPU, Some GPU", True)
    assert re.match(r"\d+", facts["cuda_version"]) and re.match(r"\d+", facts["cudnn_version"])
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert room.device_facts()["tf32"] is False
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    details["compute_capability"] = (7, 0)  # before Ampere there is no TF32
    assert room.device_facts()["tf32"] is False


@pytest.mark.parametrize(
    "name", [name if name in ("Linknet", "PSPNet") else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_every_setting_that_a_whole_model_does_not_have_is_refused_or_changes_nothing(tf, tmp_path, name):
    import segmentation_models

    original = trained(name, "mobilenet")
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
