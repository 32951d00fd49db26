"""A dataset on disk or in a bucket: pairing images with masks, choosing the subset, decoding."""

import collections
import io
import logging
import math
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from errors import DatasetError

FORMATS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}

FETCH_AHEAD = 512  # samples that may be fetched before they are decoded
MAX_CLASSES = 100  # counts take some 5 MB a class

Image.MAX_IMAGE_PIXELS = None  # the size is compared with target_size before a pixel is decoded
# What is wrong with a file is told in an error that names it.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class Sample(NamedTuple):
    """An image and its masks, as blobs of a bucket."""

    name: str
    image: NamedTuple
    masks: tuple  # one blob a class, in the order of the class folders


def pair_images_and_masks(blobs, split_directory, url):
    """Pair the images of a split with their masks, by name.

    Parameters
    ----------
    blobs : iterable of gcp_utils.Blob
        Everything below `split_directory`.
    split_directory : str
        Holds images/<name> and masks/<class folder>/<name>.
    url : callable
        From a blob's name to its address, for messages.

    Returns
    -------
    class_folders : list of str
        Sorted; their order is the order of the network's output channels.
    samples : list of Sample
        Sorted by name.

    Raises
    ------
    DatasetError
        No images, no masks, an image without its mask, a mask without its image, or a file that is no image by name.
    """
    images, masks = {}, collections.defaultdict(dict)
    for blob in blobs:
        parts = blob.name.removeprefix(f"{split_directory}/").split("/")
        if any(part.startswith(".") for part in parts):  # what desktops leave behind, such as .DS_Store
            continue
        match parts:
            case ["images", name]:
                images[name] = blob
            case ["masks", class_folder, name]:
                masks[class_folder][name] = blob
            case ["images" | "masks", *_]:
                raise DatasetError(
                    f"{url(blob.name)} is out of place: images belong into images/, masks into masks/<class>/"
                )
            case _:
                continue
        if _suffix(name) not in FORMATS:
            raise DatasetError(f"{url(blob.name)} is no image: a PNG or TIFF file is expected; move it elsewhere")
    if not images:
        raise DatasetError(f"{url(split_directory)} has no images: they belong into its folder images/")
    if not masks:
        raise DatasetError(f"{url(split_directory)} has no masks: they belong into masks/class_0/, masks/class_1/, ...")
    if len(masks) > MAX_CLASSES:
        raise DatasetError(
            f"{url(split_directory)} has {len(masks):,} folders in masks/: at most {MAX_CLASSES} classes can be used"
        )
    for class_folder, of_class in sorted(masks.items()):
        for name in sorted(images.keys() ^ of_class.keys()):
            image, mask = f"{split_directory}/images/{name}", f"{split_directory}/masks/{class_folder}/{name}"
            there, missing = (image, mask) if name in images else (mask, image)
            raise DatasetError(f"{url(there)} has no partner: add {url(missing)} or remove it")
    class_folders = sorted(masks)
    return class_folders, [
        Sample(name, images[name], tuple(masks[folder][name] for folder in class_folders)) for name in sorted(images)
    ]


def draw_subset(samples, factor, seed):
    """A random part of the samples, the same whenever samples, factor and seed are.

    Parameters
    ----------
    samples : list
    factor : float in (0, 1]
    seed : int in [0, 2**32)

    Returns
    -------
    list
        ceil(factor * len(samples)) of them, in their order.
    """
    size = math.ceil(round(factor * len(samples), 6))  # 0.1 * 30 is a little more than 3
    chosen = np.random.RandomState(seed).permutation(len(samples))[:size]
    return [samples[i] for i in sorted(chosen)]


def evenly_spread(samples, number):
    """Up to `number` of the samples, at even distances from the first to the last."""
    positions = np.linspace(0, len(samples) - 1, min(number, len(samples)))
    return [samples[round(position)] for position in positions]


def start_decoding(samples, bucket, target_size, lookahead):
    """Fetch samples from now on, and decode them from the first one asked for on, in threads ahead of the consumer.

    Parameters
    ----------
    samples : iterable of Sample
    bucket : as gcp_utils.open_bucket gives
    target_size : (width, height)
    lookahead : int
        Samples that may be decoded before they are asked for: what bounds the memory.

    Returns
    -------
    generator of (name, image, masks)
        In the order of the samples: str; uint8 array, shape (height, width), 0 to 255; uint8 array, shape
        (height, width, classes), 0 or 1. It raises DatasetError and gcp_utils.BucketError. Close it to stop early.
    """

    def fetch(sample):
        for blob in (sample.image, *sample.masks):
            if not bucket.is_here(blob):  # else reading it checks it, and once is enough
                bucket.fetch(blob)

    def decode(sample, fetched):
        fetched.result()
        image = decode_image(bucket.read(sample.image), bucket.url(sample.image.name), target_size, modes=("L",))
        masks = [
            decode_image(bucket.read(mask), bucket.url(mask.name), target_size, modes=("L", "1"))
            for mask in sample.masks
        ]
        return sample.name, image, np.stack([mask != 0 for mask in masks], axis=-1).view(np.uint8)

    fetchers, decoders = ThreadPoolExecutor(bucket.threads), ThreadPoolExecutor(os.cpu_count())
    to_fetch = iter(samples)
    # Files wait on disk, where there is room for many, arrays in memory.
    fetching, decoding = collections.deque(), collections.deque()

    def advance(decode_ahead):
        while len(fetching) < FETCH_AHEAD and (sample := next(to_fetch, None)):
            fetching.append((sample, fetchers.submit(fetch, sample)))
        while decode_ahead and fetching and len(decoding) < lookahead:
            decoding.append(decoders.submit(decode, *fetching.popleft()))

    def results():
        try:
            advance(decode_ahead=True)
            while decoding:
                sample = decoding.popleft().result()
                advance(decode_ahead=True)
                yield sample
        finally:
            for pool in (fetchers, decoders):
                pool.shutdown(wait=False, cancel_futures=True)

    advance(decode_ahead=False)  # decoding would only slow down the interpreter that is importing TensorFlow now
    return results()


def check_size_in_bytes(blob, url, target_size):
    """Raise DatasetError for a file far larger than an 8-bit image of target_size can be, before it is fetched."""
    if blob.size == 0:
        raise DatasetError(f"{url} is empty")
    if blob.size > 4 * math.prod(target_size) + 2**20:
        width, height = target_size
        raise DatasetError(f"{url} has {blob.size:,} bytes, too many for an 8-bit image of {width} x {height} pixels")


def decode_image(data, url, target_size, modes):
    """Decode an 8-bit greyscale PNG or TIFF.

    Parameters
    ----------
    data : bytes
    url : str
        For messages; its ending tells the format.
    target_size : (width, height)
    modes : tuple of str
        Pillow modes to accept: "L" is 8-bit greyscale, "1" is one bit a pixel.

    Returns
    -------
    uint8 array, shape (height, width), 0 to 255

    Raises
    ------
    DatasetError
    """
    expected = FORMATS[_suffix(url)]
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "TIFF")) as image:
            if image.format != expected:
                raise DatasetError(f"{url} is a {image.format} file by its content: rename or convert it")
            if image.size != tuple(target_size):
                raise DatasetError(
                    f"{url} is {image.size[0]} x {image.size[1]} pixels, target_size in the dataset's config.yaml is "
                    f"{target_size[0]} x {target_size[1]}"
                )
            if image.mode not in modes:
                raise DatasetError(f"{url} is not 8-bit greyscale (its mode is {image.mode}): convert it")
            if getattr(image, "n_frames", 1) != 1:
                raise DatasetError(f"{url} holds {image.n_frames} pages, one is expected")
            if expected == "PNG":
                image.verify()  # its checksums, which decoding ignores
            elif image.tag_v2.get(322, 0) * image.tag_v2.get(323, 0) > 2**20 + 4 * math.prod(target_size):
                raise DatasetError(f"{url} has tiles far larger than itself: save it without tiles")
        with Image.open(io.BytesIO(data), formats=[expected]) as image:
            pixels = np.asarray(image, dtype=np.uint8)
        if pixels.shape != tuple(target_size)[::-1]:  # a TIFF tag may turn the image
            raise DatasetError(f"{url} is turned by its orientation tag: save it without one")
        return pixels
    except DatasetError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        reason = re.sub(r"<_io.BytesIO.*?>", "it", str(error))[:300] or type(error).__name__
        raise DatasetError(f"{url} cannot be decoded as {expected}: {reason}") from error


def _suffix(name):
    return "." + name.rpartition(".")[2].lower()
