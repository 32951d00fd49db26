"""Build the sandbox: a bucket directory with a real dataset and a network trained on it, in a few minutes.

The images are axial slices of the MNI152 brain, the average of 152 people's T1-weighted MRI scans; the masks
come from its grey- and white-matter maps. The configurations are configs/dataset-sandbox.yaml and
configs/train-sandbox.yaml. If only the train configuration has changed since the last time, only the network is
made again; if this file or the dataset configuration has changed, both are.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import itertools
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import nibabel
import numpy as np
import yaml
from PIL import Image
from scipy.ndimage import binary_dilation

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from network import import_tensorflow  # noqa: E402

DATASET_ID = "dataset-composite_0123"
MODEL_ID = "segmentation-model-composite_0123_20200321T154533Z"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--directory", type=Path, default=ROOT / "sandbox", help="where (default: sandbox)")
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    dataset, model = directory / "datasets" / DATASET_ID, directory / "models" / MODEL_ID
    with only_builder_in(directory):
        made_dataset = build(dataset, ROOT / "configs/dataset-sandbox.yaml", write_dataset, outdates=model)
        made_model = build(model, ROOT / "configs/train-sandbox.yaml", train_model, dataset)
    if not (made_dataset or made_model):
        print(f"{directory} is complete and up to date")


@contextlib.contextmanager
def only_builder_in(directory):
    """Wait until no other process builds in `directory`, then remove what an interrupted one left there."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for leftover in directory.glob(".building-*"):
            shutil.rmtree(leftover)
        yield
    finally:
        os.close(descriptor)


def build(folder, config_path, write, *arguments, outdates=None):
    """Make `folder`, completely or not at all, unless this file has made it from this configuration already.

    `write(new_folder, config, *arguments)` fills it. `outdates` is a folder that was made from the old `folder`, and
    is removed with it. Returns whether `folder` was made.
    """
    builder = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    text = f"# Made by build_sandbox.py ({builder}) from {config_path.name}:\n\n{config_path.read_text()}"
    if (folder / "config.yaml").is_file() and (folder / "config.yaml").read_text() == text:
        return False
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent.parent) as building:
        new = Path(building) / "new"
        new.mkdir()
        write(new, yaml.safe_load(text), *arguments)
        (new / "config.yaml").write_text(text)
        for number, old in enumerate(filter(None, [outdates, folder])):
            if old.exists():
                old.rename(Path(building) / f"old-{number}")
        folder.parent.mkdir(exist_ok=True)
        new.rename(folder)
    return True


def load_volumes():
    """T1-weighted volume, grey- and white-matter maps: uint8, shape (x, y, z), 1 mm voxels, x right, y front, z up."""
    data = Path(importlib.util.find_spec("nilearn").origin).parent / "datasets/data"
    return [
        np.asarray(nibabel.load(data / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz").dataobj)
        for kind in ("t1", "gm", "wm")
    ]


def annotate(grey_map, white_map):
    """uint8 annotation: 50 in grey matter, 200 in white matter; 100 and 150 within two pixels of the other tissue."""
    tissue = grey_map + white_map > 127  # the two fractions of a voxel add up to 255 at most
    grey, white = tissue & (grey_map >= white_map), tissue & (grey_map < white_map)
    near_white, near_grey = binary_dilation(white, iterations=2), binary_dilation(grey, iterations=2)
    regions = [grey & ~near_white, grey, white & near_grey, white]
    return np.select(regions, [50, 100, 150, 200]).astype(np.uint8)


def write_dataset(folder, config):
    config = config["dataset_config"]
    volumes = [volume.transpose(2, 1, 0)[:, ::-1] for volume in load_volumes()]  # axes: z; front to back; left to right
    crops = crop_positions(volumes[0].shape[1:], *config["target_size"], config["image_cropping"]["num_per_image"])
    for split, stacks in config["dataset_split"].items():
        slices = [(stack, z) for stack in stacks for z in slice_numbers(stack)]
        for stack, z in slices:
            image, grey_map, white_map = (volume[z] for volume in volumes)
            annotation = annotate(grey_map, white_map)
            pictures = {"images": image}
            for key, grey_values in config["class_annotation_mapping"].items():
                class_folder = key.removesuffix("_annotation_GVs")
                pictures[f"masks/{class_folder}"] = np.isin(annotation, grey_values).astype(np.uint8)
            for (subfolder, pixels), (number, crop) in itertools.product(pictures.items(), enumerate(crops)):
                path = folder / split / subfolder / f"{stack}-{z:03d}_crop{number}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[crop]).save(path)
        print(f"dataset: {split}, {len(slices) * len(crops)} images from {len(slices)} slices")


def crop_positions(shape, width, height, number):
    """Index expressions of crops side by side in the middle of a slice: two across, number / 2 down."""
    down = number // 2
    top, left = (shape[0] - down * height) // 2, (shape[1] - 2 * width) // 2
    places = itertools.product(range(top, top + down * height, height), (left, left + width))
    return [np.s_[y : y + height, x : x + width] for y, x in places]


def slice_numbers(stack):
    """The numbers of the slices of a stack, such as MNI152_012-016."""
    first, last = re.fullmatch(r"MNI152_(\d+)-(\d+)", stack).groups()
    return range(int(first), int(last) + 1)


def read_split(folder):
    """float32 images, shape (n, height, width, 1), in [0, 1], and masks, shape (n, height, width, classes), 0 or 1."""

    def read_stack(subfolder):
        pictures = [np.asarray(Image.open(path)) for path in sorted(subfolder.iterdir())]
        return np.stack(pictures).astype(np.float32)

    masks = [read_stack(class_folder) for class_folder in sorted((folder / "masks").iterdir())]
    return read_stack(folder / "images")[..., None] / 255, np.stack(masks, axis=-1)


def train_model(folder, config, dataset):
    config = config["train_config"]
    images, masks = read_split(dataset / "train")
    validation = read_split(dataset / "validation")

    tf = import_tensorflow()
    with contextlib.redirect_stdout(None):  # it prints the name of its framework
        import segmentation_models
    tf.keras.utils.set_random_seed(config["training_data_shuffle_seed"])
    architecture = getattr(segmentation_models, config["segmentation_model"]["model_name"])
    parameters = config["segmentation_model"]["model_parameters"]
    network = architecture(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()},
        classes=masks.shape[-1],
    )
    for layer in network.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            # The default, 0.99, averages over more batches than this short training has.
            layer.momentum = 0.9
    network.compile(optimizer=config["optimizer"], loss={"binary_cross_entropy": "binary_crossentropy"}[config["loss"]])

    name = config["segmentation_model"]["model_name"]
    print(f"model: {name} of {network.count_params():,} weights, trained on {len(images)} images", flush=True)
    network.fit(
        images,
        masks,
        batch_size=config["batch_size"],
        epochs=config["epochs"],
        validation_data=validation,
        verbose=2,  # a line for each epoch
    )
    with warnings.catch_warnings(action="ignore"):  # this file format is old: users have it
        network.save(folder / "model.hdf5")


if __name__ == "__main__":
    main()
