"""The trained network: TensorFlow is started, the network is rebuilt from `train_config`, and its weights are read.

Nothing in a model's file is executed. The network comes from segmentation-models, as the configuration says; only names
and numbers are read from the file, and each is checked before. TensorFlow is imported only by the functions that need
it, because a rerun from cached counts works without it.
"""

import contextlib
import importlib.metadata
import inspect
import itertools
import math
import os
import re
import reprlib
import resource
import subprocess
import sys
import warnings
from pathlib import Path

from errors import ModelError, UsageError, first_line

ARCHITECTURES = ("Unet", "FPN", "Linknet", "PSPNet")

# Limits for model_parameters: no memory is large enough for more.
MAX_FILTERS = 2048
MAX_EDGE = 2**14  # of input_shape

# Bytes. TensorFlow crashes when it comes to the limit of `ulimit -v`, so the end of a run must fit below it too.
import re as _re

LIBRARIES = ("tensorflow", "tf-keras", "segmentation-models", "numpy", "scipy", "pillow", "google-cloud-storage")


def versions():
    return {n: _wheel_version(n) for n in LIBRARIES}


def is_out_of_memory(error):
    return isinstance(error, MemoryError) or bool(_re.search("memory|exhausted|OOM", str(error), _re.I))


ADDRESS_SPACE_OF_TENSORFLOW = 2_500_000_000
ADDRESS_SPACE_OF_THE_END = 500_000_000

# Lines that TensorFlow logs before it reads TF_CPP_MIN_LOG_LEVEL: information, warnings, and errors after which it
# continues.
LOG_LINES = r"^([IWE][0-9]{4} |WARNING: All log messages before absl::InitializeLog)"


# ---------------------------------------------------------------------------------------------------------------
# TensorFlow


@contextlib.contextmanager
def _without_log_lines():
    """Hide TensorFlow's log lines. All other lines are shown, even if the process is aborted immediately afterwards."""
    sys.stderr.flush()
    screen = os.dup(2)
    try:
        command = ["grep", "--line-buffered", "--text", "--invert-match", "--extended-regexp", LOG_LINES]
        filtered = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=screen, stderr=subprocess.DEVNULL)
    except OSError:  # there is no grep, or no process can be started
        yield
    else:
        os.dup2(filtered.stdin.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(screen, 2)
            filtered.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                filtered.wait(1)
    finally:
        os.close(screen)


def import_tensorflow():
    """Import TensorFlow without its log lines, with Keras 2 as `tf.keras`, which segmentation-models needs.

    To see TensorFlow's log lines, set TF_CPP_MIN_LOG_LEVEL to 0, 1 or 2.

    Returns
    -------
    module
        tensorflow

    Raises
    ------
    UsageError
        TensorFlow is not installed, or not completely, or `ulimit -v` is too low for it.
    ModelError
        A GPU has too little free memory for TensorFlow to start.
    """
    if (limit := _address_space()) and limit < ADDRESS_SPACE_OF_TENSORFLOW:
        raise UsageError(
            f"this process may use {limit / 1e9:.1f} GB of address space (ulimit -v), and TensorFlow crashes with less "
            f"than {ADDRESS_SPACE_OF_TENSORFLOW / 1e9:.1f} GB: raise the limit"
        )
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    os.environ["SM_FRAMEWORK"] = "tf.keras"
    sys.modules.setdefault("pandas", None)  # Keras would import it if it is installed; nothing here uses it
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _without_log_lines() if level == "3" else contextlib.nullcontext():
        return _start_tensorflow()


def _start_tensorflow():
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UsageError(f"TensorFlow cannot be imported: {first_line(error)}; install requirements.txt") from error
    for gpu in tf.config.list_physical_devices("GPU"):
        # Otherwise TensorFlow takes all memory of the GPU at once, and a second run cannot share it.
        with contextlib.suppress(RuntimeError):  # the GPU is in use, so this process has set it before
            tf.config.experimental.set_memory_growth(gpu, True)
    with _explaining_lack_of_memory(tf):
        tf.config.list_logical_devices()
    return tf


def _is_lack_of_memory(tf, error):
    exhausted = isinstance(error, tf.errors.ResourceExhaustedError | MemoryError)
    # The last two appear when a weight is copied to a GPU whose memory is full.
    words = r"out.of.memory|\bOOM\b|ALLOC_FAILED|Dst tensor is not initialized"
    return exhausted or bool(re.search(words, str(error), re.IGNORECASE))


@contextlib.contextmanager
def _explaining_lack_of_memory(tf):
    try:
        yield
    except Exception as error:
        if isinstance(error, ModelError) or not _is_lack_of_memory(tf, error):
            raise
        if tf.config.list_physical_devices("GPU"):
            text = "the GPU has no memory for the network: another process fills it (nvidia-smi shows which)"
        else:
            text = "the machine has no memory for the network"
        raise ModelError(f"{text}: {first_line(error)}") from error


def set_seed(seed):
    """Set the seed of TensorFlow's random numbers."""
    import tensorflow as tf

    tf.random.set_seed(seed)


def strategy(tf):
    """The distribution strategy: one replica of the network per GPU; without a GPU, one per logical CPU."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def _address_space():
    """The limit of this process's address space in bytes, which `ulimit -v` sets; None without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def free_memory(root="/"):
    """Bytes of the host's memory that a step may take; infinite if there is a GPU, which reports a lack of memory.

    On a CPU, Linux kills a process that takes more than the machine or its control group (of a container or a batch
    system) has, and TensorFlow crashes when it comes to the limit of `ulimit -v`.

    Parameters
    ----------
    root : path
        Where Linux's proc and sys/fs/cgroup are mounted.

    Returns
    -------
    float
    """
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        return math.inf
    root = Path(root)

    def number(path, form="([0-9]+)"):  # NaN where there is no such file, or no number in it
        try:
            return int(re.search(form, (root / path).read_text())[1])
        except (OSError, TypeError, ValueError):
            return math.nan

    free = [1024 * number("proc/meminfo", "MemAvailable: *([0-9]+)")]
    for group in _control_groups(root):
        for limit, usage, cache in (  # of versions 2 and 1 of control groups
            ("memory.max", "memory.current", "inactive_file ([0-9]+)"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ([0-9]+)"),
        ):
            free.append(number(group / limit) - number(group / usage) + number(group / "memory.stat", cache))
    if limit := _address_space():  # half of it, because TensorFlow takes memory in ever larger pieces
        used = 1024 * number("proc/self/status", "VmSize:[ \t]*([0-9]+)")
        free.append((limit - used - ADDRESS_SPACE_OF_THE_END) / 2)
    return max(0, min((size for size in free if not math.isnan(size)), default=math.inf))


def _control_groups(root):
    """The folders of the control groups with a limit for the memory that this process is in, and of their parents."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        mounted = {"": "sys/fs/cgroup", "memory": "sys/fs/cgroup/memory"}.get(controllers)
        if mounted:
            group = Path(mounted, path.lstrip("/"))
            yield from itertools.takewhile(lambda folder: folder != Path("sys/fs"), (group, *group.parents))


def device_facts():
    """What the result says about the device, on which the last bits of the probabilities depend.

    Returns
    -------
    dict
        gpu: names of the GPUs, joined by commas. tf32: whether convolutions round their inputs to TF32, which
        TensorFlow does by default on GPUs of compute capability 8.0 (Ampere) and later. cuda_version, cudnn_version:
        of the installed wheels, else those that TensorFlow was built for. All None on a CPU.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return dict.fromkeys(("gpu", "tf32", "cuda_version", "cudnn_version")) | {"libraries": versions()}
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    ampere = any(detail.get("compute_capability", (0, 0)) >= (8, 0) for detail in details)
    built_for = tf.sysconfig.get_build_info()
    return {
        "gpu": ", ".join(detail.get("device_name", "GPU") for detail in details),
        "tf32": ampere and tf.config.experimental.tensor_float_32_execution_enabled(),
        "cuda_version": _wheel_version("nvidia-cuda-runtime-cu12") or built_for.get("cuda_version"),
        "cudnn_version": _wheel_version("nvidia-cudnn-cu12") or built_for.get("cudnn_version"),
    }


def _wheel_version(name):
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
        have the architecture's defaults: FPN and PSPNet end in softmax, Unet and Linknet in sigmoid. The exception is
        input_shape: its default is (None, None, 1), and PSPNet, which needs a fixed size, gets that of the images.
    num_classes : int
        Number of mask folders, which the network's output must have as channels.
    target_size : (int, int)
        Width and height of the images in pixels.
    weights_path : path
        Keras HDF5 file, a whole model or weights only. The network may be wrapped in another one by multi_gpu_model.
    warn : callable
        Is called with a sentence if train_config mentions a preprocessing.

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
    import model_file

    name, parameters = _settings(segmentation_models, train_config, num_classes, target_size)
    if preprocessing := _mentions_of("preprocess", train_config):
        warn(
            f"train_config has {', '.join(preprocessing)}: here the grey values of an image are divided by 255, and "
            "nothing else is done; the results are wrong for a network that was trained with another preprocessing"
        )
    with _explaining_lack_of_memory(tf):
        try:
            with strategy(tf).scope():
                network = getattr(segmentation_models, name)(**parameters)
        except Exception as error:  # of many types, for unexpected parameters
            if _is_lack_of_memory(tf, error):
                raise
            raise ModelError(
                f"segmentation-models cannot build {name} from these model_parameters: {first_line(error)}"
            ) from error
        if network.input_shape[-1] != 1:
            raise ModelError(f"the network takes {network.input_shape[-1]} channels, images are greyscale (1 channel)")
        with model_file.opened(Path(weights_path), network.count_params()) as file:
            described = model_file.described_layers(file)
            if described is not None:
                _compare(described, network, num_classes, target_size)
            _load_weights(file, network, num_classes)
    return network


def _settings(segmentation_models, train_config, num_classes, target_size):
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
        largest = MAX_EDGE if key == "input_shape" else MAX_FILTERS
        if len(values) > 16 or not all(_is_plain(value, largest) for value in values):
            raise ModelError(
                f"model_parameters: {reprlib.repr(key)} must be a text, a number up to {largest}, true, false, null, "
                f"or a list of a few of these, not {reprlib.repr(value)}"
            )
    classes = given.get("classes")
    if classes is not None and classes != num_classes:
        raise ModelError(_other_classes("train_config says", classes, num_classes))

    signature = inspect.signature(getattr(segmentation_models, name)).parameters.values()
    defaults = {
        parameter.name: parameter.default for parameter in signature if parameter.default is not parameter.empty
    }
    parameters = defaults | {"input_shape": (None, None, 1)} | given
    # model.hdf5 has all weights: none are downloaded, and none are read from a path in the YAML.
    parameters |= {"classes": num_classes, "encoder_weights": None, "weights": None}
    backbones = segmentation_models.get_available_backbone_names()
    if parameters["backbone_name"] not in backbones:
        raise ModelError(
            f"backbone_name {reprlib.repr(parameters['backbone_name'])} is none of {', '.join(sorted(backbones))}"
        )
    if parameters["activation"] == "softmax" and num_classes == 1:
        default = "" if "activation" in given else f", the default of {name},"
        raise ModelError(
            f"activation softmax{default} over one class makes every probability 1: write the activation "
            "that the network was trained with into model_parameters"
        )
    parameters["input_shape"] = _input_shape(name, parameters, target_size)
    return name, parameters


def _null_for_none(value):
    """Replace the text "None", which is often written instead of YAML's null, by None; make tuples of lists."""
    if isinstance(value, list):
        return tuple(map(_null_for_none, value))
    return None if value == "None" else value


def _is_plain(value, largest):
    # No dictionaries: Keras would make an object from one, of any class of any module.
    return value is None or isinstance(value, str | bool) or (isinstance(value, int | float) and abs(value) <= largest)


def _input_shape(name, parameters, target_size):
    """The input's shape, after a check that the architecture can take images of `target_size`."""
    width, height = target_size
    shape, factor = parameters["input_shape"], parameters.get("downsample_factor")
    if isinstance(shape, tuple) and len(shape) == 3:
        edges = shape[:2]
        if name == "PSPNet":  # its pooling needs a fixed size
            edges = tuple(edge or size for edge, size in zip(edges, (height, width), strict=True))
        _check_size("input_shape in train_config", edges, target_size)
        shape = (*edges, shape[2])
    multiple = 6 * factor if name == "PSPNet" and factor in (4, 8, 16) else 32
    if width % multiple or height % multiple:
        what = f"{name} with downsample_factor {factor}" if name == "PSPNet" else name
        raise ModelError(
            f"{what} takes images whose width and height are multiples of {multiple}; target_size in the dataset's "
            f"config.yaml is {width} x {height}"
        )
    return shape


def _check_size(where, edges, target_size):
    """Raise ModelError unless `edges` are those of target_size: height and width, None where any size fits."""
    width, height = target_size
    if any(edge not in (None, size) for edge, size in zip(edges, (height, width), strict=True)):
        raise ModelError(
            f"{where} is for images of {edges[1]} x {edges[0]} pixels, target_size in the dataset's config.yaml is "
            f"{width} x {height}"
        )


def _other_classes(where, classes, num_classes):
    text = f"{where} {reprlib.repr(classes)} classes, the dataset has {num_classes} mask folders"
    if classes == num_classes + 1:
        text += ": if one of the channels is the background, it needs a mask folder too, at the same place in the order"
    return text


def _mentions_of(word, config, depth=20):
    """Up to 3 entries of nested dictionaries, as texts, with the word in key or value, unless the value is null."""
    found = []
    for key, value in config.items() if depth else ():
        if isinstance(value, dict):
            found += _mentions_of(word, value, depth - 1)
        switched_off = value in (None, False, "None", "")
        if word in f"{key} {value if isinstance(value, str) else ''}".lower() and not switched_off:
            found.append(f"{reprlib.repr(key)}: {reprlib.repr(value)}")
    return found[:3]


# ---------------------------------------------------------------------------------------------------------------
# Comparing the network in the file with the rebuilt one


def _compare(described, network, num_classes, target_size):
    """Raise ModelError unless the layers that a file describes are those of the network.

    Only what the parameters of segmentation-models determine is compared: number of classes, the names, kinds and order
    of the layers, activation, and size. Versions of Keras describe the rest in different ways.
    """
    classes = next((layer.filters for layer in reversed(described) if layer.filters is not None), None)
    if classes != num_classes:
        raise ModelError(_other_classes("the network in model.hdf5 has", classes, num_classes))
    automatic = _automatic_names(network)
    saved = [f"{name} ({layer.kind})" for name, layer in zip(_identities(described, automatic), described, strict=True)]
    rebuilt = [
        f"{name} ({type(layer).__name__})"
        for name, layer in zip(_identities(network.layers, automatic), network.layers, strict=True)
    ]
    _check_same_layers(saved[:-1], rebuilt[:-1])  # the last layer's name is that of its activation
    for number, (there, here) in enumerate(zip(saved[:-1], rebuilt[:-1], strict=True)):
        if there != here:
            raise ModelError(
                f"the layers in model.hdf5 come in another order than those that train_config describes: number "
                f"{number} is {there[:80]!r} there, {here!r} here"
            )
    there, here = described[-1].activation, network.layers[-1].activation.__name__
    if there != here:
        raise ModelError(
            f"the network in model.hdf5 ends in {reprlib.repr(there)}, the one that train_config describes in "
            f"{here!r}: write the activation that it was trained with into model_parameters"
        )
    shape = next((layer.shape for layer in described if layer.shape), [None] * 4)
    _check_size("the network in model.hdf5", shape[1:3], target_size)


def _check_same_layers(saved, rebuilt):
    """Raise ModelError with the first names that only one side has."""
    only_saved, only_rebuilt = (
        [name for name in names if name not in others]
        for names, others in ((saved, set(rebuilt)), (rebuilt, set(saved)))
    )
    if only_saved or only_rebuilt or len(saved) != len(rebuilt):
        there, here = (
            ", ".join(repr(name[:80]) for name in names[:3]) or "none" for names in (only_saved, only_rebuilt)
        )
        raise ModelError(
            f"the network in model.hdf5 does not fit the one that train_config describes: {len(only_saved)} layers are "
            f"only there ({there}), {len(only_rebuilt)} only here ({here})"
        )


def _automatic_names(network):
    """The names that Keras gives to layers without a name, without the number: conv2d, batch_normalization, ..."""
    bases = {(layer.name.rstrip("0123456789").rstrip("_"), type(layer).__name__) for layer in network.layers}
    return {base for base, kind in bases if base.replace("_", "") == kind.lower()} | {"input"}


def _identities(layers, automatic):
    """Names of the layers that are the same in every session; `layers` are objects with a `name`.

    An automatic name ends in a number, and Keras continues to count when a session builds another network. So the
    number is replaced by its rank, which is the order in which the layers were made.
    """
    numbers = {}
    for layer in layers:
        base, _, number = layer.name.rpartition("_")
        if layer.name in automatic:
            numbers.setdefault(layer.name, {})[layer.name] = 0
        elif base in automatic and number.isdecimal():
            numbers.setdefault(base, {})[layer.name] = int(number[:18])
    identities = {
        name: f"{base} number {rank}"
        for base, of_base in numbers.items()
        for rank, name in enumerate(sorted(of_base, key=of_base.get))
    }
    return [identities.get(layer.name, layer.name) for layer in layers]


# ---------------------------------------------------------------------------------------------------------------
# The weights


def _load_weights(file, network, num_classes):
    """Check that all weights in the file fit the network, then load them into it."""
    import model_file

    layers = [layer for layer in network.layers if layer.weights]
    stored = model_file.stored_layers(file)
    automatic = _automatic_names(network)
    in_file = dict(zip(_identities(stored, automatic), stored, strict=True))
    identities = _identities(layers, automatic)
    _check_same_layers(list(in_file), identities)
    matched = [(layer, _arrays_for(layer, in_file[name])) for layer, name in zip(layers, identities, strict=True)]
    last = layers[-1]
    for layer, arrays in matched:
        for weight, array in zip(layer.weights, arrays, strict=True):
            if layer is last and array.shape[-1:] != (num_classes,):
                raise ModelError(_other_classes("the network in model.hdf5 has", array.shape[-1], num_classes))
            if array.shape != tuple(weight.shape):
                raise ModelError(
                    f"the weights of layer {layer.name!r} do not fit the network: {weight.name} is {array.shape} in "
                    f"model.hdf5, {tuple(weight.shape)} in the network of train_config"
                )
    for layer, arrays in matched:
        layer.set_weights([array[...] for array in arrays])


def _arrays_for(layer, stored):
    """The file's arrays for layer.weights, in the same order."""
    kinds = [weight.name.rpartition("/")[2].partition(":")[0] for weight in layer.weights]
    if set(kinds) != set(stored.arrays):
        raise ModelError(
            f"the weights of layer {layer.name!r} do not fit the network: {', '.join(sorted(stored.arrays))[:200]} in "
            f"model.hdf5, {', '.join(sorted(kinds))} in the network of train_config"
        )
    return [stored.arrays[kind] for kind in kinds]
