"""Reading a model's file, HDF5 as Keras 2 writes it. Only names and numbers are read; nothing in it is executed.

Before something is read, its type is checked, and that it needs no more memory than a network can need.
"""

import contextlib
import itertools
import json
import math
import re
import reprlib
from typing import NamedTuple

import h5py

from errors import ModelError, first_line

# Limits for what is read. The largest network of segmentation-models has 7,000 layers.
MAX_NAMES = 2**15
MAX_DESCRIPTION_BYTES = 2**23  # of model_config
MAX_FILE_BYTES = 2**26
MAX_FILE_BYTES_PER_WEIGHT = 32  # an optimiser saves up to three more numbers for each

# ---------------------------------------------------------------------------------------------------------------
# The file

# The first bytes of other kinds of files that are uploaded as model.hdf5 by mistake.
OTHER_FILES = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: upload what `git lfs pull` fetches",
    b"PK\x03\x04": "is a ZIP file, such as Keras 3 saves as .keras: save the model as HDF5 with Keras 2",
    b"\x1f\x8b": "is compressed with gzip: upload it uncompressed",
    b"<": "is a web page, perhaps the login page of the site that has the file: upload the HDF5 file itself",
}


@contextlib.contextmanager
def opened(path, num_weights):
    """Open a model's file for reading.

    Parameters
    ----------
    path : pathlib.Path
    num_weights : int
        Number of weights of the network that the file should contain. A much larger file is refused.

    Yields
    ------
    h5py.File

    Raises
    ------
    ModelError
        The file is of another kind, or damaged. Also raised for damage that h5py finds in the `with` block.
    """
    if path.is_dir():
        raise ModelError("it is a folder, such as TensorFlow's SavedModel: save the model as HDF5")
    size = path.stat().st_size
    if size == 0:
        raise ModelError("it is empty (0 bytes): upload it again")
    if size > MAX_FILE_BYTES + MAX_FILE_BYTES_PER_WEIGHT * num_weights:
        raise ModelError(
            f"it has {size:,} bytes, far more than the {num_weights:,} weights of the network that train_config "
            "describes can take"
        )
    with open(path, "rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    for beginning, what in OTHER_FILES.items():
        if start.startswith(beginning):
            raise ModelError(f"it {what}")
    try:
        with h5py.File(path, "r", locking=False) as file:  # another program may have it open
            yield file
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, OverflowError) as error:  # from h5py
        reason = first_line(error)
        if "truncated file" in reason:
            raise ModelError(f"it is cut short ({size:,} bytes are here): upload it again") from error
        if "already open for write" in reason:
            raise ModelError(f"a program is writing it, or died while writing: save it again ({reason})") from error
        raise ModelError(f"it is no Keras HDF5 file, or damaged: {reason}") from error


def _follow(group, path):
    """What is at `path` below an HDF5 group. Only hard links are followed: others may lead to other files."""
    for name in path.split("/"):
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ModelError(f"{reprlib.repr(name)} in it is missing, or a link to elsewhere")
        group = group[name]
    return group


def _names(item, attribute):
    """Read a list of names. Keras splits a long one into `<attribute>0`, `<attribute>1`, ..."""
    parts = [attribute] if attribute in item.attrs else (f"{attribute}{i}" for i in itertools.count())
    names = []
    for part in itertools.takewhile(item.attrs.__contains__, parts):
        stored = item.attrs.get_id(part)  # to know its size before it is read
        if math.prod(stored.shape) == 0:
            continue
        is_text = h5py.check_string_dtype(stored.dtype) or stored.dtype.kind == "S"
        if not is_text or len(stored.shape) != 1 or len(names) + stored.shape[0] > MAX_NAMES:
            raise ModelError(f"{part} in it is no list of names")
        names += [name.decode() if isinstance(name, bytes) else name for name in item.attrs[part]]
    return names


# ---------------------------------------------------------------------------------------------------------------
# A whole model's description


class DescribedLayer(NamedTuple):
    """The part of a layer's description in model_config that is compared."""

    name: str
    kind: str  # its class
    shape: list  # of an input: batch, height, width, channels; None where any size fits
    filters: int
    activation: str


def described_layers(file):
    """The layers of a whole model, as its model_config lists them, which is JSON.

    Parameters
    ----------
    file : h5py.File

    Returns
    -------
    list of DescribedLayer, or None
        None for a file with only weights. If one of the layers is itself a network, the layers of that network.

    Raises
    ------
    ModelError
        model_config does not describe a network, or the network is one of several parts of another one.
    """
    if "model_config" not in file.attrs:
        return None
    stored = file.attrs.get_id("model_config")
    if stored.shape != () or not h5py.check_string_dtype(stored.dtype):
        raise ModelError("model_config in it is no text")
    text = file.attrs["model_config"]
    if len(text) > MAX_DESCRIPTION_BYTES:
        raise ModelError(f"model_config in it has {len(text):,} characters, more than any network needs")
    try:
        return _layers_of(json.loads(text))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"model_config in it describes no network: {type(error).__name__} {first_line(error)}"
        ) from error


def _layers_of(description):
    layers = description["config"]["layers"]
    networks = [layer for layer in layers if "layers" in layer["config"]]
    others = [layer for layer in layers if "layers" not in layer["config"] and not _passes_images_on(layer)]
    if len(networks) == 1 and not others:
        return _layers_of(networks[0])
    if networks:
        raise ModelError(_part_of_another(_described(layer).name for layer in others or networks))
    return [_described(layer) for layer in layers]


def _part_of_another(others):
    """The message for a network that is a layer of another one, beside other layers with these names."""
    names = ", ".join(others)[:200]
    return f"the network in model.hdf5 is part of another one, which train_config does not describe: {names}"


def _described(layer):
    config = layer["config"]
    activation = config.get("activation")
    return DescribedLayer(
        name=str(config["name"]),
        kind=re.sub(r"^.*>|V[12]$", "", layer["class_name"]),  # without the package, and the V1 or V2 of TensorFlow 1
        shape=[
            int(edge) if edge else None for edge in config.get("batch_input_shape") or config.get("batch_shape") or []
        ],
        filters=config.get("filters"),
        activation=activation["config"] if isinstance(activation, dict) else activation,
    )


def _passes_images_on(layer):
    """Whether a layer beside the network changes no numbers: an input, or one that multi_gpu_model adds."""
    kind, config = layer["class_name"], layer["config"]
    return (
        kind == "InputLayer"
        or (kind == "Lambda" and set(config.get("arguments") or ()) == {"i", "parts"})
        or (kind == "Concatenate" and config.get("axis") == 0)
    )


# ---------------------------------------------------------------------------------------------------------------
# Weights


class StoredLayer(NamedTuple):
    """The weights of a layer in the file."""

    name: str
    arrays: dict  # h5py.Dataset by kind: kernel, bias, gamma, ...


def stored_layers(file):
    """The layers of the file that have weights, each once, in the file's order.

    Parameters
    ----------
    file : h5py.File

    Returns
    -------
    list of StoredLayer
        If one layer is itself a network, the layers of that network, according to the names of its weights. The arrays
        have not been read, but all their numbers are in the file.

    Raises
    ------
    ModelError
        The file has no such weights, or they are not plain numbers in the file.
    """
    if "layer_names" not in file.attrs and "layer_names0" not in file.attrs:
        if "model_weights" in file:
            return stored_layers(_follow(file, "model_weights"))
        if "layers" in file or "_layer_checkpoint_dependencies" in file:
            raise ModelError(
                "its weights are in the layout of Keras 3 (.weights.h5): save the model as HDF5 with Keras 2"
            )
        raise ModelError("it is an HDF5 file without Keras weights: it has no layer_names")
    stored, count = {}, 0
    top = ["top_level_model_weights"] if "top_level_model_weights" in file else []
    for name in dict.fromkeys(_names(file, "layer_names") + top):
        group = _follow(file, name)
        weights = _names(group, "weight_names")
        count += len(weights)
        if count > MAX_NAMES:
            raise ModelError(f"it names more than {MAX_NAMES} weights")
        if weights:
            stored[name] = [(weight, _plain_array(_follow(group, weight), weight)) for weight in weights]
    networks = [name for name, weights in stored.items() if len({_layer_of(weight) for weight, _ in weights}) > 1]
    if networks and len(stored) > 1:
        raise ModelError(_part_of_another(name for name in stored if name not in networks[:1]))
    if networks:
        (weights,) = stored.values()
        stored = {}
        for weight, array in weights:
            stored.setdefault(_layer_of(weight), []).append((weight, array))
    return [StoredLayer(name, _by_kind(name, weights)) for name, weights in stored.items()]


def _layer_of(weight):
    """The name of the layer in the name of a weight, which ends in <layer>/<kernel>:0."""
    return weight.rpartition("/")[0].rpartition("/")[2]


def _by_kind(layer_name, weights):
    arrays = {weight.rpartition("/")[2].partition(":")[0]: array for weight, array in weights}
    if len(arrays) != len(weights):
        raise ModelError(f"layer {reprlib.repr(layer_name)} in it has several weights of one name")
    return arrays


def _plain_array(array, name):
    """Return the dataset; raise ModelError unless all its numbers are in the file itself, uncompressed."""
    if not (
        isinstance(array, h5py.Dataset)
        and array.dtype.kind == "f"
        and not array.external
        and not array.is_virtual
        and array.id.get_create_plist().get_nfilters() == 0
        and array.id.get_storage_size() >= array.size * array.dtype.itemsize
    ):
        raise ModelError(f"{reprlib.repr(name)} in it is not plain numbers that lie in the file itself, uncompressed")
    return array
