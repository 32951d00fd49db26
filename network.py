"""The network: started quietly, rebuilt from `train_config`, given its weights. Nothing in a file is executed.

TensorFlow is imported only by the functions that need it: a rerun from cached counts does without it.
"""

import contextlib
import itertools
import os
import reprlib
import sys

from errors import ModelError, first_line

# What model_parameters may ask for: there is no memory for more.
MAX_FILTERS = 2048
MAX_EDGE = 2**14  # of input_shape


@contextlib.contextmanager
def _native_noise_held_back():
    """Keep what native code writes to stderr off the screen, unless the block fails."""
    sys.stderr.flush()
    screen = os.dup(2)
    with open(os.memfd_create("noise"), "w+b") as held:  # works when the disk is full
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception:
            held.seek(0)
            os.write(screen, held.read())
            raise
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def import_tensorflow():
    """TensorFlow with Keras 2 behind `tf.keras`, quiet; segmentation-models finds both as it needs them."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    os.environ["SM_FRAMEWORK"] = "tf.keras"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.modules.setdefault("pandas", None)  # where it is installed Keras would import it, for nothing that is used here
    with _native_noise_held_back():
        return _start_tensorflow()


def _start_tensorflow():
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU"):
        # Two runs share a GPU only if neither takes all of its memory at once.
        with contextlib.suppress(RuntimeError):  # already in use: this process set it before
            tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.list_logical_devices()
    return tf


def set_seed(seed):
    """The seed of TensorFlow's random numbers."""
    import tensorflow as tf

    tf.random.set_seed(seed)


def build_network(train_config, num_classes, weights_path):
    """Rebuild the network that was trained and give it its weights. Nothing in the weights file is executed.

    Parameters
    ----------
    train_config : dict
        `segmentation_model: {model_name, model_parameters}` is what counts; loss and optimiser do not matter here.
    num_classes : int
        Number of mask folders, which the network's output must have as channels.
    weights_path : path
        Keras HDF5 file, a whole model or weights alone.

    Returns
    -------
    tf.keras.Model
        From (n, height, width, 1) float32 images in [0, 1] to (n, height, width, num_classes) probabilities.

    Raises
    ------
    ModelError
        The configuration does not describe such a network, or the weights do not fit it.
    """
    import tensorflow as tf

    with contextlib.redirect_stdout(None):  # it announces its framework
        import segmentation_models

    config = train_config.get("segmentation_model")
    parameters = config.get("model_parameters") if isinstance(config, dict) else None
    if not isinstance(parameters, dict) or "backbone_name" not in parameters:
        raise ModelError("train_config needs segmentation_model: {model_name, model_parameters: {backbone_name, ...}}")
    architectures = ("Unet", "FPN", "Linknet", "PSPNet")
    if config.get("model_name") not in architectures:
        raise ModelError(f"model_name {reprlib.repr(config.get('model_name'))} is none of {', '.join(architectures)}")
    backbones = segmentation_models.get_available_backbone_names()
    if parameters["backbone_name"] not in backbones:
        raise ModelError(
            f"backbone_name {reprlib.repr(parameters['backbone_name'])} is none of {', '.join(sorted(backbones))}"
        )
    if parameters.get("classes", num_classes) != num_classes:
        raise ModelError(
            f"the network has {reprlib.repr(parameters['classes'])} classes, the dataset has {num_classes} mask folders"
        )
    for name, value in parameters.items():
        values = value if isinstance(value, list) else [value]
        largest = MAX_EDGE if name == "input_shape" else MAX_FILTERS
        if len(values) > 16 or not all(_is_plain(value, largest) for value in values):
            raise ModelError(
                f"model_parameters: {reprlib.repr(name)} must be a text, a number up to {largest}, true, false, null, "
                f"or a list of a few of these, not {reprlib.repr(value)}"
            )

    parameters = {"input_shape": (None, None, 1), "activation": "sigmoid"} | parameters
    parameters = {name: tuple(v) if isinstance(v, list) else v for name, v in parameters.items()}
    # model.hdf5 holds all weights: nothing is to be fetched from elsewhere, nor read from a path in the YAML.
    parameters |= {"classes": num_classes, "encoder_weights": None, "weights": None}
    try:
        with strategy(tf).scope():
            network = getattr(segmentation_models, config["model_name"])(**parameters)
    except Exception as error:  # what segmentation-models and Keras make of parameters that nobody foresaw
        raise ModelError(
            f"segmentation-models cannot build {config['model_name']} from these model_parameters: {first_line(error)}"
        ) from error
    if network.input_shape[-1] != 1:
        raise ModelError(f"the network takes {network.input_shape[-1]} channels, images are greyscale (1 channel)")
    _load_weights(network, weights_path)
    return network


def _is_plain(value, largest):
    # Keras takes a dictionary for an object to make, of any class of any module.
    return value is None or isinstance(value, str | bool) or (isinstance(value, int | float) and abs(value) <= largest)


def _load_weights(network, path):
    import h5py

    try:
        with h5py.File(path, "r") as file:
            nested = "layer_names" not in file.attrs and "model_weights" in file
            group = _follow(file, "model_weights") if nested else file
            arrays, stored, needed, expected = 0, 0, len(network.weights), network.count_params()
            # Before Keras reads them: a file's own word for a shape could otherwise ask for any amount of memory.
            for array in itertools.islice(_named_weights(group), needed + 1):
                filters = array.id.get_create_plist().get_nfilters()
                if array.dtype.kind not in "fiu" or array.external or array.is_virtual or filters:
                    raise ModelError("its weights are not plain numbers stored in the file itself, uncompressed")
                arrays, stored = arrays + 1, stored + array.size
            if (arrays, stored) != (needed, expected):
                more = " and more" if arrays > needed else ""
                raise ModelError(
                    f"it holds {stored:,} weights in {arrays} arrays{more}, the network of train_config has "
                    f"{expected:,} in {needed}: the weights do not fit the network"
                )
        network.load_weights(path)
    except ModelError:
        raise
    except Exception as error:  # h5py and Keras raise anything on a damaged file
        raise ModelError(f"it is no Keras HDF5 file whose weights fit the network: {first_line(error)}") from error


def _follow(group, path):
    """What is at `path` below an HDF5 group, by hard links alone: others may lead in circles or to other files."""
    import h5py

    for name in (path.decode() if isinstance(path, bytes) else path).split("/"):
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ModelError(f"{reprlib.repr(name)} in it is missing, or a link to elsewhere")
        group = group[name]
    return group


def _named_weights(group):
    """The datasets that Keras reads, in its order; one that is named twice comes twice."""

    def names(item, attribute):
        parts = [attribute] if attribute in item.attrs else (f"{attribute}{i}" for i in itertools.count())
        for part in itertools.takewhile(item.attrs.__contains__, parts):
            yield from item.attrs[part]

    top = ["top_level_model_weights"] if "top_level_model_weights" in group else []
    for layer in itertools.chain(names(group, "layer_names"), top):
        weights = _follow(group, layer)
        for weight in names(weights, "weight_names"):
            yield _follow(weights, weight)


def strategy(tf):
    """One replica of the network on every GPU; without a GPU, on every logical CPU, of which there is one."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def device_names():
    """Names of the GPUs that the network runs on, joined by commas; empty for a CPU."""
    import tensorflow as tf

    details = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
    return ", ".join(detail.get("device_name", "GPU") for detail in details)
