"""The images and masks of a dataset: pairing them, drawing a subset, checking and decoding the files."""

import collections
import contextlib
import ctypes
import hashlib
import io
import logging
import math
import os
import struct
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base as Tag

from errors import DatasetError, printable

FORMATS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}
NAMED_PROBLEMS = 10  # in the error; a file lists all
# What desktops, NAS boxes and Hadoop leave behind, in small letters; so are all names that begin with a dot.
LEFTOVERS = ("thumbs.db", "desktop.ini", "__macosx", "@eadir")
LEFTOVER_ENDINGS = ("_$folder$", ":zone.identifier")
FETCH_AHEAD = 512  # samples that may be fetched before they are decoded

IMAGE_MODES = ("L",)  # as Pillow names them
MASK_MODES = ("L", "1", "LA", "P", "RGB", "RGBA")
REFUSED_MODES = {"LA": "has a second channel, such as transparency", "P": "has a palette"}  # others are in colour
THUMBNAIL, TRANSPARENCY = 1, 4  # bits of a TIFF page's NewSubfileType
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CONTENTS = {  # by the first bytes of a file
    PNG_SIGNATURE: "a PNG file",
    **dict.fromkeys(TiffImagePlugin.PREFIXES, "a TIFF file"),
    b"\xff\xd8\xff": "a JPEG file",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself,",
}

MAX_LABEL = 31  # a mask with no value above it, but 255, looks like a label map
# Kinds of remarks: samples whose masks are equal in all classes (blank ones hold one value only), and doubtful masks.
EQUAL, EQUAL_BLANK, NO_ZERO, IGNORE, LABELS, SOFT = "equal", "equal blank", "no zero", "ignore", "labels", "soft"
EXPLANATIONS = {
    NO_ZERO: ("have several grey values but no 0", "write 0 for what is outside"),
    IGNORE: ("hold both 1 and 255", "right if two conventions are mixed, wrong if 255 marks pixels to ignore"),
    LABELS: ("look like label maps", "if the values are classes, write a mask for each class that is 0 outside of it"),
    SOFT: ("have more than two grey values", "soft edges come from resizing or JPEG"),
}

Image.MAX_IMAGE_PIXELS = None  # the size is compared with target_size before a pixel is decoded
# Pillow's warnings, and what the C library libtiff prints, do not name the file; our errors do.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError):  # a Pillow that shows no function of libtiff
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class Sample(NamedTuple):
    """An image and its masks, as blobs of a bucket (gcp_utils.Blob)."""

    name: str  # of the image's file, without folder
    image: NamedTuple
    masks: tuple  # one blob per class, in the order of the class folders


class Decoded(NamedTuple):
    """A sample, as `decode_samples` reads it."""

    sample: Sample
    image: np.ndarray | None  # uint8, shape (height, width), 0 to 255; None if there are problems
    masks: np.ndarray | None  # uint8, shape (height, width, classes), 0 or 1; None if there are problems
    problems: list  # (blob name, sentence) of the files that cannot be used
    remarks: list  # (kind, blob name, detail), for `explain_remarks`
    digest: bytes  # 16 bytes: blake2b over the contents of the image and of the masks, as they were read


def problems_error(problems, path):
    """Make one DatasetError of all files that cannot be used: it names the first ones, and a file lists all.

    Parameters
    ----------
    problems : list of (blob name, sentence)
        At least one. The sentence names the file and says what is wrong and what to do.
    path : Path
        Of the list, which is written if there are several.
    """
    (_, first), *others = problems
    if not others:
        return DatasetError(first)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{printable(what)}\n" for _, what in problems), encoding="utf-8")
        listed = f"{path} says what is wrong with each of them"
    except OSError as error:
        listed = f"The list of all, {path}, cannot be written ({error.strerror})"
    named = [printable(name)[-150:] for name, _ in others[: NAMED_PROBLEMS - 1]]
    more = len(others) - len(named)
    return DatasetError(
        f"{len(problems):,} files cannot be used. The first: {first}. Then {', '.join(named)}"
        f"{f' and {more:,} more' if more else ''}. {listed}"
    )


def is_leftover(name):
    """Whether a "/"-separated name is a file, or in a folder, that a desktop, NAS box or Hadoop made for itself."""
    return any(
        part.startswith(".") or part in LEFTOVERS or part.endswith(LEFTOVER_ENDINGS) for part in name.lower().split("/")
    )


def pair_images_and_masks(blobs, split_directory, url, problems_path):
    """Pair the images of a split with their masks by name. Names that differ only in their Unicode form are equal.

    Parameters
    ----------
    blobs : iterable of gcp_utils.Blob
        Everything below `split_directory`.
    split_directory : str
        Holds images/<name> and masks/<class folder>/<name>.
    url : callable
        From a blob's name to its address, for messages.
    problems_path : Path
        For `problems_error`.

    Returns
    -------
    class_folders : list of str
        Sorted; their order is the order of the network's output channels.
    samples : list of Sample
        Sorted by name.

    Raises
    ------
    DatasetError
        There are no images or no masks, an image without a mask of each class, a mask without an image, or a file that
        is out of place or is not an image by its name.
    """
    images, masks, problems = _sort_by_place(blobs, split_directory, url)
    split = url(split_directory)
    if not problems and not images:
        raise DatasetError(f"{split} has no images: put them into its folder images/")
    if not problems and not masks:
        raise DatasetError(f"{split} has no masks: put them into masks/class_0/, masks/class_1/, ...")
    for class_folder, of_class in sorted(masks.items()):
        for name in sorted(images.keys() ^ of_class.keys()):
            there = images.get(name) or of_class[name]
            missing = url(f"{split_directory}/{f'masks/{class_folder}' if name in images else 'images'}/{name}")
            problems.append((there.name, f"{url(there.name)} has no partner: add {missing} or remove it"))
    if problems:
        raise problems_error(problems, problems_path)
    class_folders = sorted(masks)
    samples = [
        Sample(image.name.rpartition("/")[2], image, tuple(masks[folder][name] for folder in class_folders))
        for name, image in images.items()
    ]
    return class_folders, sorted(samples)


def _sort_by_place(blobs, split_directory, url):
    """Return the images {name: blob}, the masks {class folder: {name: blob}}, and a problem for each other file.

    The names are in one Unicode form: macOS writes another form than other systems.
    """
    images, masks, problems = {}, collections.defaultdict(dict), []
    for blob in blobs:
        name = blob.name.removeprefix(f"{split_directory}/")
        if is_leftover(name):
            continue
        what, folder = None, None
        match name.split("/"):
            case ["images", file] if _suffix(file) in FORMATS:
                folder = images
            case ["masks", class_folder, file] if _suffix(file) in FORMATS:
                folder = masks[class_folder]
            case _ if "\\" in name and name.startswith(("images/", "images\\", "masks/", "masks\\")):
                what = r"has a backslash (\) in its name, as programs on Windows write it: upload it with / instead"
            case ["images", _] | ["masks", _, _]:
                what = "is not a PNG or TIFF file by its name: move it elsewhere"
            case ["images" | "masks", *_]:
                what = "is out of place: move it; images belong in images/, masks in masks/<class>/"
        if folder is not None and folder.setdefault(unicodedata.normalize("NFC", file), blob) != blob:
            what = "has a name that another file has in another Unicode form: remove or rename one of them"
        if what:
            problems.append((blob.name, f"{url(blob.name)} {what}"))
    return images, masks, problems


def draw_subset(samples, factor, seed):
    """Draw a random subset. The same samples, factor and seed give the same subset.

    Parameters
    ----------
    samples : list
    factor : float, in (0, 1]
    seed : int, in [0, 2**32)

    Returns
    -------
    list
        ceil(factor * len(samples)) of the samples, at least one, in their order.
    """
    size = max(1, math.ceil(round(factor * len(samples), 6)))  # 0.07 * 100 is a little more than 7
    chosen = np.random.RandomState(seed).permutation(len(samples))[:size]
    return [samples[i] for i in sorted(chosen)]


def decode_samples(samples, bucket, target_size, lookahead):
    """Fetch and decode samples in threads, ahead of the consumer. The call itself starts to fetch.

    Parameters
    ----------
    samples : list of Sample
    bucket : as gcp_utils.open_bucket gives
    target_size : (width, height), in pixels
    lookahead : int
        Number of samples that may be decoded before they are asked for; limits the memory.

    Returns
    -------
    generator of Decoded
        In the order of the samples. Close it to stop early.

    Raises
    ------
    BucketError
        From the generator, in place of a sample: a file cannot be fetched.
    """
    decoded = _decode_in_order(samples, bucket, target_size, lookahead)
    next(decoded)
    return decoded


def _decode_in_order(samples, bucket, target_size, lookahead):
    """The generator of `decode_samples`; it gives None once, when fetching has started."""
    fetchers = ThreadPoolExecutor(bucket.threads)
    decoders = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2))  # more would wait for each other's Python
    fetching, decoding = collections.deque(), collections.deque()
    try:
        for sample in samples[:FETCH_AHEAD]:
            fetching.append(fetchers.submit(_fetch, sample, bucket))
        yield None  # decoding now would slow down the import of TensorFlow
        for number, sample in enumerate(samples):
            # Fetched files wait on the disk, where there is room for many; decoded ones wait in memory.
            if number + FETCH_AHEAD < len(samples):
                fetching.append(fetchers.submit(_fetch, samples[number + FETCH_AHEAD], bucket))
            decoding.append(decoders.submit(_decode, sample, fetching.popleft(), bucket, target_size))
            if len(decoding) == lookahead:
                yield decoding.popleft().result()
        while decoding:
            yield decoding.popleft().result()
    finally:
        for pool in (fetchers, decoders):
            pool.shutdown(wait=False, cancel_futures=True)


def _fetch(sample, bucket):
    for blob in (sample.image, *sample.masks):
        bucket.fetch(blob)


def _decode(sample, fetched, bucket, target_size):
    """Decode a sample once it is fetched."""
    fetched.result()
    digest, pixels, problems = hashlib.blake2b(digest_size=16), [], []
    for blob, modes in [(sample.image, IMAGE_MODES), *((mask, MASK_MODES) for mask in sample.masks)]:
        data = bucket.read(blob)
        digest.update(data)
        try:
            pixels.append(decode_image(data, bucket.url(blob.name), target_size, modes))
        except DatasetError as error:
            problems.append((blob.name, str(error)))
    if problems:
        return Decoded(sample, None, None, problems, [], digest.digest())
    image, *masks = pixels
    insides = np.stack([mask != 0 for mask in masks], axis=-1).view(np.uint8)
    return Decoded(sample, image, insides, [], _remarks(sample, masks), digest.digest())


def _remarks(sample, masks):
    """Return what is doubtful about a sample's masks, which are arrays of grey values: [(kind, name, detail)]."""
    remarks = []
    for blob, mask in zip(sample.masks, masks, strict=True):
        if ((mask != 0) & (mask != mask.max())).any():
            values = np.unique(mask).tolist()
            listed = f" ({', '.join(map(str, values))})" if len(values) <= 8 else ""
            remarks.append((_kind_of_mask(values), blob.name, f"{len(values)} grey values{listed}"))
    if len(masks) > 1 and all(np.array_equal(mask, masks[0]) for mask in masks[1:]):
        kind = EQUAL_BLANK if (masks[0] == masks[0][0, 0]).all() else EQUAL
        remarks.append((kind, sample.masks[0].name, ""))
    return remarks


def _kind_of_mask(values):
    """The kind of a mask with these grey values, sorted, of which at least two are not 0."""
    labels = all(value <= MAX_LABEL or value == 255 for value in values)
    if values[0] > 0 and (labels or len(values) == 2):
        return NO_ZERO
    if values == [0, 1, 255]:
        return IGNORE
    return LABELS if labels else SOFT


def explain_remarks(remarks, number_of_samples, url):
    """Say once, for a whole run, what is doubtful about its masks.

    Parameters
    ----------
    remarks : dict, kind -> (count, blob name, detail)
        The remarks of all samples, added up: how many there are of a kind, and the one with the smallest name.
    number_of_samples : int
    url : callable
        From a blob's name to its address.

    Returns
    -------
    list of str

    Raises
    ------
    DatasetError
        In every sample the masks of all classes are equal.
    """
    if EQUAL in remarks and remarks[EQUAL][0] + remarks.get(EQUAL_BLANK, (0,))[0] == number_of_samples:
        raise DatasetError(
            f"all class folders hold the same masks, such as {url(remarks[EQUAL][1])}: write a mask for each class "
            "that is 0 outside of it, also if they are label maps"
        )
    return [
        f"masks that {look}: {remarks[kind][0]:,}, such as {url(remarks[kind][1])} with {remarks[kind][2]}. "
        f"Every pixel that is not 0 counts as inside: {meaning}"
        for kind, (look, meaning) in EXPLANATIONS.items()
        if kind in remarks
    ]


def decode_image(data, url, target_size, modes):
    """Decode an 8-bit greyscale PNG or TIFF, with the grey values exactly as they are stored.

    A file is refused if Pillow would rotate, invert, scale or drop something. Other metadata does not matter.

    Parameters
    ----------
    data : bytes
    url : str
        For messages; its ending gives the format.
    target_size : (width, height), in pixels
    modes : tuple of str
        IMAGE_MODES: 8-bit greyscale only. MASK_MODES: also fewer bits, and colours if all of them are grey and opaque.

    Returns
    -------
    uint8 array, shape (height, width), 0 to 255; 0 or 1 in masks of one bit

    Raises
    ------
    DatasetError
        The file is damaged, or is not such an image of target_size.
    """
    expected = FORMATS[_suffix(url)]
    found = next((what for beginning, what in CONTENTS.items() if data.startswith(beginning)), "no PNG or TIFF file")
    if found != f"a {expected} file":
        raise DatasetError(f"{url} is {found} by its content: rename or convert it, or upload it again")
    try:
        image, bits = {"PNG": _open_png, "TIFF": _open_tiff}[expected](data, url)
        if image.size != tuple(target_size):
            raise DatasetError(
                f"{url} has {image.width} x {image.height} pixels, but target_size in the dataset's config.yaml is "
                f"{target_size[0]} x {target_size[1]}: correct one of them"
            )
        if bits > 8 or (bits < 8 and modes == IMAGE_MODES):
            raise _not_grey(url, f"has {bits}-bit pixels")
        if image.mode not in modes:
            raise _not_grey(url, REFUSED_MODES.get(image.mode, "is in colour"))
        return _grey_values(image, url)
    except DatasetError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        reason = str(error)[:300] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it is damaged, or of a kind that Pillow does not read"
        raise DatasetError(f"{url} cannot be decoded as {expected} ({reason}): save it again") from error


def _open_png(data, url):
    """Open a PNG without its metadata, some of which Pillow refuses; returns it and the bits of a channel."""
    kept, position, kind = [PNG_SIGNATURE], len(PNG_SIGNATURE), None
    while kind != b"IEND" and position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind[:1].isupper() or kind == b"tRNS":
            kept.append(data[position : position + 12 + length])
        position += 12 + length
    file = io.BytesIO(b"".join(kept))
    Image.open(file, formats=["PNG"]).verify()
    return Image.open(file, formats=["PNG"]), data[24]


def _open_tiff(data, url):
    """Open the one page of a TIFF that is no thumbnail or transparency mask; returns it and the bits of a channel."""
    image = Image.open(io.BytesIO(data), formats=["TIFF"])
    pages = []
    for page in range(image.n_frames):
        image.seek(page)
        if not image.tag_v2.get(Tag.NewSubfileType, 0) & (THUMBNAIL | TRANSPARENCY):
            pages.append(page)
    if len(pages) > 1:
        raise DatasetError(f"{url} has {len(pages)} pages or slices: save each as a file with one page")
    image.seek(pages[0] if pages else 0)
    tags = image.tag_v2
    if tags.get(Tag.PhotometricInterpretation, 0) == 0:  # Pillow takes a missing one for 0
        raise DatasetError(
            f"{url} stores white as 0 (its photometric interpretation is 0, as with ImageJ's inverting LUT), so that "
            "programs disagree about its values: in ImageJ, choose Image > Lookup Tables > Invert LUT, check the "
            "values, and save it again; in Python, save an array of the type uint8, not bool"
        )
    if (orientation := image.getexif().get(Tag.Orientation, 1)) != 1:  # Pillow applies the one in the XMP, too
        raise DatasetError(
            f"{url} is rotated or mirrored by its orientation tag ({orientation}), which some programs ignore: rotate "
            "the pixels themselves and save it without the tag"
        )
    if 2 in tags.get(Tag.SampleFormat, ()):
        raise _not_grey(url, "has signed numbers: its sample format is 2")
    if 0 in tags.get(Tag.ExtraSamples, ()):
        raise _not_grey(url, "has a channel of unknown meaning")
    return image, max(tags.get(Tag.BitsPerSample, (1,)))


def _grey_values(image, url):
    """The pixels of an image as uint8, shape (height, width); the colours of all must be grey and opaque."""
    if image.mode in ("1", "L"):
        return np.array(image, dtype=np.uint8)
    red, green, blue, alpha = np.moveaxis(np.asarray(image.convert("RGBA")), -1, 0)
    if (alpha != 255).any():
        raise _not_grey(url, "is transparent in places")
    if (red != green).any() or (red != blue).any():
        raise _not_grey(url, "is in colour")
    if image.mode == "P" and ((np.asarray(image) == 0) != (red == 0)).any():
        raise _not_grey(url, "has a palette that swaps black with another grey, so that programs disagree about it")
    return red.copy()


def _not_grey(url, what):
    return DatasetError(f"{url} is not 8-bit greyscale (it {what}): convert it")


def _suffix(name):
    return os.path.splitext(name)[1].lower()
