"""The trained network: TensorFlow is started, the network is rebuilt from `train_config`, and its weights are loaded.

Nothing in a model's file is executed. The network comes from segmentation-models, as the configuration says; the file
gives the weights, and names and settings of layers to compare with. TensorFlow is imported only by the functions that
need it, because a rerun from cached counts works without it.
"""

import contextlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import re
import reprlib
import warnings

import yaml

from errors import ModelError, UsageError, first_line

ARCHITECTURES = ("Unet", "FPN", "Linknet", "PSPNet")
LIBRARIES = ("tensorflow", "tf-keras", "segmentation-models", "numpy", "scipy", "pillow", "google-cloud-storage")

OTHER_FILES = {  # by their first bytes
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: upload what `git lfs pull` fetches",
    b"PK\x03\x04": "is a ZIP file, such as Keras 3 saves as .keras: save the model as HDF5 with Keras 2",
}

# Settings of layers that change no probability, or that versions of Keras and Python write in different ways: the code
# of a Lambda layer, and its output's shape, which depends on the input's.
HARMLESS = re.compile(
    "name|dtype|trainable|momentum|rate|noise_shape|seed|batch_input_shape|function.*|module|output_shape.*"
    "|.*_(initializer|regularizer|constraint)"
)

# ---------------------------------------------------------------------------------------------------------------
# TensorFlow


def import_tensorflow():
    """Import TensorFlow with Keras 2 as `tf.keras`, which segmentation-models needs, and return it.

    To see more of its log lines, set TF_CPP_MIN_LOG_LEVEL to 0, 1 or 2. Raises UsageError if TensorFlow is not
    installed, or not completely, and ModelError if a GPU has too little free memory for TensorFlow to start.
    """
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    os.environ["SM_FRAMEWORK"] = "tf.keras"
    os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"  # another program may have locked the model's file
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # On a GPU, each process would else time cuDNN's algorithms and take the fastest: other last digits in each process.
    os.environ.setdefault("TF_CUDNN_USE_AUTOTUNE", "0")
    try:
        import tensorflow as tf

        # The user's keras.json, which Keras reads now, may say otherwise.
        tf.keras.backend.set_floatx("float32")
        tf.keras.backend.set_image_data_format("channels_last")
    except ImportError as error:
        raise UsageError(f"TensorFlow cannot be imported: {first_line(error)}; install requirements.txt") from error
    for gpu in tf.config.list_physical_devices("GPU"):
        # Otherwise TensorFlow takes all memory of the GPU at once, and a second run cannot share it.
        with contextlib.suppress(RuntimeError):  # the GPU is in use, so this process has set it before
            tf.config.experimental.set_memory_growth(gpu, True)
    try:
        tf.config.list_logical_devices()
    except Exception as error:
        raise _model_error(tf, error, "TensorFlow cannot use the GPU") from error
    return tf


def is_out_of_memory(error):
    """Whether an error, of whatever type, says that there is no memory, in the words of TensorFlow, oneDNN or CUDA."""
    words = (
        r"out.of.memory|\bOOM\b|MemoryError|alloc_failed|failed to alloc|resource.exhausted|no algorithm worked"
        "|could not create a primitive|Dst tensor is not initialized"  # the last: of a copy to a GPU that is full
    )
    return isinstance(error, MemoryError) or bool(re.search(words, str(error), re.IGNORECASE))


def _model_error(tf, error, what):
    """Make a ModelError of an error of TensorFlow's: it says `what` failed, or that there is no memory."""
    if is_out_of_memory(error):
        what = "the machine has no memory for the network"
        if tf.config.list_physical_devices("GPU"):
            what = "the GPU has no memory for the network: another process fills it (nvidia-smi shows which)"
    return ModelError(f"{what}: {first_line(error)}")


def set_seed(seed):
    import tensorflow as tf

    tf.random.set_seed(seed)


def strategy(tf):
    """The distribution strategy: one replica of the network per GPU; without a GPU, one per logical CPU."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def device_facts():
    """What the last bits of the probabilities depend on.

    Returns
    -------
    dict
        gpu: names of the GPUs, joined by commas. tf32: whether convolutions round their inputs to TF32, which they do
        on GPUs of compute capability 8.0 (Ampere) and later, unless NVIDIA_TF32_OVERRIDE is 0. cuda_version,
        cudnn_version: of the installed wheels, else those that TensorFlow was built for. All of these are None on a
        CPU. libraries: as `library_versions` returns them.
    """
    import tensorflow as tf

    facts = dict.fromkeys(("gpu", "tf32", "cuda_version", "cudnn_version"))
    if gpus := tf.config.list_physical_devices("GPU"):
        details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
        ampere = any(detail.get("compute_capability", (0, 0)) >= (8, 0) for detail in details)
        built_for = tf.sysconfig.get_build_info()
        facts = {
            "gpu": ", ".join(detail.get("device_name", "GPU") for detail in details),
            "tf32": ampere and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0",
            "cuda_version": _version("nvidia-cuda-runtime-cu12") or built_for.get("cuda_version"),
            "cudnn_version": _version("nvidia-cudnn-cu12") or built_for.get("cudnn_version"),
        }
    return facts | {"libraries": library_versions()}


def library_versions():
    """Version by name of the libraries that a result depends on; None for one that is not installed."""
    return {name: _version(name) for name in LIBRARIES}


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------------------------
# From the configuration to the network


def build_network(train_config, num_classes, target_size, weights_path, warn=warnings.warn):
    """Rebuild the network that was trained and give it its weights. Nothing in the weights file is executed.

    Parameters
    ----------
    train_config : dict
        The network is built from `segmentation_model: {model_name, model_parameters}`. Parameters that are not given
        have the architecture's defaults: FPN and PSPNet end in softmax, Unet and Linknet in sigmoid. Only input_shape
        has another: (None, None, 1), or for PSPNet, which needs a fixed size, that of the images.
    num_classes : int
        Number of mask folders, which the network's output must have as channels.
    target_size : (int, int)
        Width and height of the images in pixels.
    weights_path : path
        Keras HDF5 file, a whole model or weights only.
    warn : callable
        Is called with a sentence if train_config mentions a preprocessing, and if the network in the file computes in
        another precision than float32.

    Returns
    -------
    tf.keras.Model
        From (n, height, width, 1) float32 images in [0, 1] to (n, height, width, num_classes) probabilities.

    Raises
    ------
    ModelError
        The configuration does not describe such a network, the weights do not fit it, a whole model in the file is
        another network than the configuration describes, or there is no memory for it.
    """
    import tensorflow as tf

    with contextlib.redirect_stdout(None):  # it prints the name of its framework
        import segmentation_models

    name, parameters = _arguments(segmentation_models, train_config, num_classes, target_size)
    _warn_of_preprocessing(train_config, warn)
    try:
        with strategy(tf).scope():
            network = getattr(segmentation_models, name)(**parameters)
    except Exception as error:  # of many types, for unexpected parameters
        what = f"segmentation-models cannot build {name} from these model_parameters"
        raise _model_error(tf, error, what) from error
    if network.input_shape[-1] != 1:
        raise ModelError(f"the network takes {network.input_shape[-1]} channels, images are greyscale (1 channel)")
    _load_weights(network, weights_path, num_classes, target_size, warn)
    return network


def _warn_of_preprocessing(train_config, warn):
    lines = yaml.safe_dump(train_config, width=math.inf).splitlines()
    off = (": null", ": None", ": false", ": ''", ": {}", ": []")  # the ends of lines that switch it off
    found = [line.strip()[:80] for line in lines if "preprocess" in line.lower() and not line.endswith(off)]
    if found:
        warn(
            f"train_config has {', '.join(found[:3])}: here the grey values of an image are divided "
            "by 255, and nothing else is done; the results are wrong for a network that was trained with another "
            "preprocessing"
        )


def _arguments(segmentation_models, train_config, num_classes, target_size):
    """The architecture's name and all arguments that it is called with."""
    config = train_config.get("segmentation_model")
    given = config.get("model_parameters") if isinstance(config, dict) else None
    if not isinstance(given, dict):
        raise ModelError("train_config needs segmentation_model: {model_name, model_parameters: {backbone_name, ...}}")
    name = config.get("model_name")
    if name not in ARCHITECTURES:
        raise ModelError(f"model_name {reprlib.repr(name)} is none of {', '.join(ARCHITECTURES)}")
    given = {key: _null_for_none(value) for key, value in given.items()}
    for key, value in given.items():
        values = value if isinstance(value, tuple) else [value]
        # No dictionaries: Keras would make an object from one, of any class of any module.
        if not all(value is None or isinstance(value, str | int | float) for value in values):
            raise ModelError(
                f"model_parameters: {reprlib.repr(key)} must be a text, a number, true, false, null, or a list of "
                f"these, not {reprlib.repr(value)}"
            )
    if given.get("classes") not in (None, num_classes):
        raise ModelError(_wrong_number_of_classes("train_config says", given["classes"], num_classes))

    signature = inspect.signature(getattr(segmentation_models, name)).parameters
    defaults = {key: signature[key].default for key in signature if key != "kwargs"}
    parameters = defaults | {"input_shape": (None, None, 1)} | given
    # model.hdf5 has all weights: none are downloaded, and none are read from a path in the YAML.
    parameters |= {"classes": num_classes, "encoder_weights": None, "weights": None}
    if parameters["activation"] == "softmax" and num_classes == 1:
        default = "" if "activation" in given else f", the default of {name},"
        raise ModelError(
            f"activation softmax{default} over one class makes every probability 1: write the activation "
            "that the network was trained with into model_parameters"
        )
    return name, parameters | {"input_shape": _input_shape(name, parameters, target_size)}


def _null_for_none(value):
    """Replace the text "None", which is often written instead of YAML's null, and make tuples of lists."""
    if isinstance(value, list):
        return tuple(map(_null_for_none, value))
    return None if value == "None" else value


def _input_shape(name, parameters, target_size):
    """The input's shape, after a check that the architecture can take images of `target_size`."""
    width, height = target_size
    shape, factor = parameters["input_shape"], parameters.get("downsample_factor")
    multiple = 6 * factor if name == "PSPNet" and factor in (4, 8, 16) else 32
    if width % multiple or height % multiple:
        what = f"{name} with downsample_factor {factor}" if name == "PSPNet" else name
        raise ModelError(
            f"{what} takes images whose width and height are multiples of {multiple}; target_size in the dataset's "
            f"config.yaml is {width} x {height}"
        )
    if name == "PSPNet" and isinstance(shape, tuple):  # its pooling needs a fixed size
        shape = tuple(edge or size for edge, size in zip(shape, (height, width, 1), strict=False))
    return shape


def _wrong_number_of_classes(where, classes, num_classes):
    text = f"{where} {reprlib.repr(classes)} classes, the dataset has {num_classes} mask folders"
    if classes == num_classes + 1:
        text += ": if one of the channels is the background, it needs a mask folder too, at the same place in the order"
    return text


# ---------------------------------------------------------------------------------------------------------------
# From the file to the weights


def _load_weights(network, path, num_classes, target_size, warn):
    """Check that the file has this network, as far as the file tells, and load its weights."""
    import h5py  # only after HDF5_USE_FILE_LOCKING is set

    with open(path, "rb") as file:
        start = file.read(64)
    for beginning, what in OTHER_FILES.items():
        if start.startswith(beginning):
            raise ModelError(f"it {what}")
    try:
        with h5py.File(path, "r") as file:
            _check_layers(file, network, num_classes)
            if "model_config" in file.attrs:
                _check_description(file.attrs["model_config"], network, target_size, warn)
        network.load_weights(path)
    except OSError as error:
        reason = first_line(error)
        raise ModelError(f"it is no HDF5 file, cut short or damaged: save or upload it again ({reason})") from error
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"it is not as Keras 2 writes it, or damaged: save it again ({first_line(error)})") from error


def _read_names(item, attribute):
    """Read a list of names. Keras splits a long one into `<attribute>0`, `<attribute>1`, ..."""
    parts = [attribute] if attribute in item.attrs else [f"{attribute}{i}" for i in range(len(item.attrs))]
    names = [name for part in parts if part in item.attrs for name in item.attrs[part]]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _check_layers(file, network, num_classes):
    """Raise ModelError unless the layers with weights are the network's, in its order. Keras only counts them."""
    group = file.get("model_weights", file)
    weights = {layer: _read_names(group[layer], "weight_names") for layer in _read_names(group, "layer_names")}
    weights = {layer: names for layer, names in weights.items() if names}
    if not weights:
        raise ModelError(
            "it has no weights as Keras 2 saves them in HDF5 (layer_names), but perhaps as Keras 3 does (.weights.h5): "
            "save the model as HDF5 with Keras 2"
        )
    for layer, names in weights.items():
        if len({name.rpartition("/")[0] for name in names}) > 1:
            raise ModelError(
                "its network is a layer of another one, as multi_gpu_model makes it: save that layer alone, with "
                f"model.get_layer({layer!r}).save('model.hdf5')"
            )
    layers = [layer for layer in network.layers if layer.weights]
    _check_same_names(list(weights), [layer.name for layer in layers])
    shapes = [[group[layer][name].shape for name in names] for layer, names in weights.items()]
    if shapes[-1][-1][-1:] != (num_classes,):
        raise ModelError(_wrong_number_of_classes("the network in model.hdf5 has", shapes[-1][-1][-1], num_classes))
    for layer, there in zip(layers, shapes, strict=True):
        here = [tuple(weight.shape) for weight in layer.weights]
        _check_same(f"the shape of the weights of layer {layer.name!r}", there, here)


def _check_description(model_config, network, target_size, warn):
    """Raise ModelError unless the description in a whole model's file, in JSON, is that of the network."""
    saved = json.loads(model_config)["config"]["layers"]
    rebuilt = json.loads(network.to_json())["config"]["layers"]
    names_there, names_here = ([layer["config"]["name"] for layer in layers] for layers in (saved, rebuilt))
    _check_same_names(names_there[:-1], names_here[:-1])  # the last layer is named after its activation
    _, height, width, _ = saved[0]["config"].get("batch_input_shape") or [None] * 4
    if (width or target_size[0], height or target_size[1]) != tuple(target_size):
        raise ModelError(
            f"the network in model.hdf5 is for images of {width} x {height} pixels, target_size in the dataset's "
            f"config.yaml is {target_size[0]} x {target_size[1]}"
        )
    for name, there, here in zip(names_here, _settings(saved), _settings(rebuilt), strict=True):
        for setting in sorted(there.keys() & here.keys()):  # what only one has comes from another version of Keras
            _check_same(f"{setting} of layer {name!r}", there[setting], here[setting])
    if other := re.search(r'"((mixed_)?b?float(16|64))"', str(model_config)):
        warn(f"the network in model.hdf5 computes in {other[1]}; here all is float32, so probabilities differ a little")


def _check_same(what, there, here):
    if there != here:
        raise ModelError(
            f"{what} is {reprlib.repr(there)} in model.hdf5, {reprlib.repr(here)} in the network that train_config "
            "describes: correct its model_parameters, or name the model that they belong to"
        )


def _settings(layers):
    """For each layer of a model_config what decides on its numbers: class, settings, and the layers before it."""
    place = {layer["config"]["name"]: number for number, layer in enumerate(layers)}
    return [
        {name: _comparable(value) for name, value in layer["config"].items() if not HARMLESS.fullmatch(name)}
        | {
            "class": re.sub("^.*>|V[12]$", "", layer["class_name"]),  # V1 or V2 in TensorFlow 1
            "input": [place[source[0]] for node in layer["inbound_nodes"] for source in node],
        }
        for layer in layers
    ]


def _comparable(value):
    """A setting's value in one form: Keras also writes a function as {..., config: its name}, and 3 as [3]."""
    if isinstance(value, dict):
        value = value.get("config", value)
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _check_same_names(saved, rebuilt):
    """Raise ModelError unless the names of layers in model.hdf5 and in the network are the same, in the same order."""
    pairs = itertools.zip_longest(saved, rebuilt, _identities(saved), _identities(rebuilt))
    for there, here, identity_there, identity_here in pairs:
        if identity_there != identity_here:
            raise ModelError(
                "the network in model.hdf5 is another one than train_config describes: in the order of the layers, "
                f"{reprlib.repr(there)} is there where {here!r} should be"
            )


def _identities(names):
    """What is the same in every session: the name's beginning, and the rank of the number at its end.

    Keras numbers the layers that were given no name, and continues to count when a session builds another network.
    """
    parts = [re.fullmatch(r"(.*?)(?:_(\d+))?", name, re.DOTALL).groups(default="0") for name in names]
    ranks = {}
    for beginning, number in sorted(parts, key=lambda part: int(part[1])):
        ranks.setdefault(beginning, {}).setdefault(number, len(ranks[beginning]))
    return [(beginning, ranks[beginning][number]) for beginning, number in parts]
