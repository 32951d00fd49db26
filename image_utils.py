"""The images and masks of a dataset: pairing them, drawing a subset, checking and decoding the files."""

import collections
import contextlib
import io
import logging
import math
import os
import re
import struct
import unicodedata
import uuid
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from errors import BucketError, DatasetError, printable

FORMATS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}
NAMED_PROBLEMS = 10  # in the error; a file lists all
# Files and folders that desktops, NAS boxes and Hadoop make for themselves; so are all names that begin with a dot.
LEFTOVERS = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("icon\r", "icon\uf00d", "__macosx", "network trash folder", "temporary items"),
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found"),
    *("_success", "_temporary"),
}
LEFTOVER_ENDINGS = ("_$folder$", ":zone.identifier", "@synoeastream", "@synoresource")

FETCH_AHEAD = 512  # samples that may be fetched before they are decoded
MAX_CLASSES = 100  # the counts of each take some 5 MB
MAX_PAGES = 32  # of a TIFF, with its thumbnails

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_COLOURS = {2: "is in colour", 3: "has a palette", 4: "has transparency", 6: "is in colour, with transparency"}
TIFF_COLOURS = {2: "is in colour", 3: "has a palette", 5: "is in colour", 6: "is in colour", 8: "is in colour"}
OTHER_FORMATS = {  # by the first bytes of the file
    PNG_SIGNATURE: "a PNG file",
    **dict.fromkeys(TiffImagePlugin.PREFIXES, "a TIFF file"),
    b"\xff\xd8\xff": "a JPEG file",
    b"GIF8": "a GIF file",
    b"BM": "a BMP file",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself,",
}

Image.MAX_IMAGE_PIXELS = None  # the size is compared with target_size before a pixel is decoded
# Pillow's warnings do not name the file; our errors do.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class Sample(NamedTuple):
    """An image and its masks, as blobs of a bucket (blobs.Blob)."""

    name: str  # of the image's file, without folder
    image: NamedTuple
    masks: tuple  # one blob per class, in the order of the class folders


class Problems:
    """The files of a split that cannot be used, and why: one error names the first ones, a file lists all.

    Parameters
    ----------
    path : Path
        The file with a line for each problem; it is written only if there is more than one.

    Attributes
    ----------
    number : int
        Of problems.
    """

    def __init__(self, path):
        self.number = 0
        self._path, self._file, self._unwritten = Path(path), None, None
        self._partial = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex}.partial")
        self._first, self._names = None, []

    def add(self, name, what):
        """Add a file. `what` is a sentence that names the file and says what is wrong and what to do."""
        self.number += 1
        if self.number == 1:
            self._first = what
        elif self.number <= NAMED_PROBLEMS:
            self._names.append(printable(name)[-150:])
        try:
            if self.number == 2:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._partial, "w", encoding="utf-8")  # noqa: SIM115
                print(printable(self._first), file=self._file)
            if self._file:
                print(printable(what), file=self._file)
        except OSError as error:
            self._file, self._unwritten = None, error

    def error(self):
        """Return one DatasetError for all problems."""
        if self.number == 1:
            return DatasetError(self._first)
        try:
            if self._file:
                self._file.close()
                os.replace(self._partial, self._path)
        except OSError as error:
            self._unwritten = error
        with contextlib.suppress(OSError):
            self._partial.unlink()  # there may be no room for it
        more = self.number - 1 - len(self._names)
        listed = f"{self._path} says what is wrong with each of them"
        if self._unwritten:
            listed = f"The list of all, {self._path}, cannot be written ({self._unwritten.strerror})"
        return DatasetError(
            f"{self.number:,} files cannot be used. The first: {self._first}. Then {', '.join(self._names)}"
            f"{f' and {more:,} more' if more else ''}. {listed}"
        )


def is_leftover(name):
    """Whether a "/"-separated name is a file, or in a folder, that a desktop, NAS box or Hadoop made for itself."""
    return any(
        (part.startswith(".") and part not in (".", ".."))
        or part.lower() in LEFTOVERS
        or part.lower().endswith(LEFTOVER_ENDINGS)
        for part in name.split("/")
    )


def pair_images_and_masks(blobs, split_directory, url, problems_path):
    """Pair the images of a split with their masks by name. Names that differ only in their Unicode form are equal.

    Parameters
    ----------
    blobs : iterable of blobs.Blob
        Everything below `split_directory`.
    split_directory : str
        Holds images/<name> and masks/<class folder>/<name>.
    url : callable
        From a blob's name to its address, for messages.
    problems_path : Path
        For `Problems`.

    Returns
    -------
    class_folders : list of str
        Sorted; their order is the order of the network's output channels.
    samples : list of Sample
        Sorted by name.

    Raises
    ------
    DatasetError
        There are no images or no masks, too many classes, an image without a mask of each class, a mask without an
        image, or a file that is out of place or is not an image by its name.
    """
    images, masks = {}, collections.defaultdict(dict)
    problems = Problems(problems_path)

    def complain(blob, what):
        problems.add(blob.name, f"{url(blob.name)} {what}")

    for blob in blobs:
        name = blob.name.removeprefix(f"{split_directory}/")
        if is_leftover(name):
            continue
        match name.split("/"):
            case ["images", name] if _suffix(name) in FORMATS:
                images[name] = blob
            case ["masks", class_folder, name] if _suffix(name) in FORMATS:
                masks[class_folder][name] = blob
            case ["images", _] | ["masks", _, _]:
                complain(blob, "is not a PNG or TIFF file by its name: move it elsewhere")
            case ["images" | "masks", *_]:
                complain(blob, "is out of place: move it; images belong in images/, masks in masks/<class>/")
    if not problems.number:
        if not images:
            raise DatasetError(f"{url(split_directory)} has no images: put them into its folder images/")
        if not masks:
            raise DatasetError(
                f"{url(split_directory)} has no masks: put them into masks/class_0/, masks/class_1/, ..."
            )
        if len(masks) > MAX_CLASSES:
            raise DatasetError(
                f"{url(split_directory)} has {len(masks):,} folders in masks/: at most {MAX_CLASSES} classes can be "
                "used; remove the others"
            )
    for class_folder, of_class in sorted(masks.items()):
        spare = {_composed(name): name for name in of_class.keys() - images.keys()}
        for name in sorted(images.keys() - of_class.keys()):
            if other_form := spare.pop(_composed(name), None):
                of_class[name] = of_class.pop(other_form)
        for name in sorted(images.keys() ^ of_class.keys()):
            missing = f"masks/{class_folder}/{name}" if name in images else f"images/{name}"
            there = images.get(name) or of_class[name]
            complain(there, f"has no partner: add {url(f'{split_directory}/{missing}')} or remove it")
    if problems.number:
        raise problems.error()
    class_folders = sorted(masks)
    return class_folders, [
        Sample(name, images[name], tuple(masks[folder][name] for folder in class_folders)) for name in sorted(images)
    ]


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
    size = max(1, math.ceil(round(factor * len(samples), 6)))  # 0.1 * 30 is a little more than 3
    chosen = np.random.RandomState(seed).permutation(len(samples))[:size]
    return [samples[i] for i in sorted(chosen)]


def evenly_spread(samples, number):
    """Up to `number` of the samples, evenly spaced from the first to the last."""
    positions = np.linspace(0, len(samples) - 1, min(number, len(samples)))
    return [samples[round(position)] for position in positions]


def check_sizes_in_bytes(samples, url, target_size, problems_path):
    """Check, before anything is fetched, that no file is empty or far larger than an 8-bit image can be.

    Parameters
    ----------
    samples : iterable of Sample
    url : callable
        From a blob's name to its address, for messages.
    target_size : (width, height), in pixels
    problems_path : Path
        For `Problems`.

    Raises
    ------
    DatasetError
        A file is empty or too large.
    """
    width, height = target_size
    problems = Problems(problems_path)
    for sample in samples:
        for blob in (sample.image, *sample.masks):
            if blob.size == 0:
                problems.add(blob.name, f"{url(blob.name)} is empty: upload it again")
            elif blob.size > 4 * width * height + 2**20:
                problems.add(
                    blob.name,
                    f"{url(blob.name)} has {blob.size:,} bytes, too many for an 8-bit image of {width} x {height} "
                    "pixels: save it again",
                )
    if problems.number:
        raise problems.error()


def start_decoding(samples, bucket, target_size, lookahead, problems_path, on_warning):
    """Start to fetch samples, and decode them in threads, ahead of the consumer, as soon as the first one is asked for.

    Parameters
    ----------
    samples : iterable of Sample
    bucket : as gcp_utils.open_bucket gives
    target_size : (width, height), in pixels
    lookahead : int
        Number of samples that may be decoded before they are asked for; limits the memory.
    problems_path : Path
        For `Problems`.
    on_warning : callable
        Is called with a sentence about masks with more than two grey values, at the end, and with one about the first
        file that cannot be used, if the other files are checked after it.

    Returns
    -------
    generator of (name, image, masks)
        In the order of the samples. name: str; image: uint8 array, shape (height, width), 0 to 255; masks: uint8 array,
        shape (height, width, classes), 0 or 1. Close it to stop early.

    Raises
    ------
    DatasetError
        From the generator: a file cannot be used. No further sample is given, but the others are fetched and decoded
        first, so that the error can name all such files.
    BucketError
        From the generator, immediately: a file cannot be fetched.
    """

    def fetch(sample):
        for blob in (sample.image, *sample.masks):
            if not bucket.is_here(blob):  # `decode` reads it, which checks a file that is here
                bucket.fetch(blob)

    def decode(sample, fetched):
        """(name, image, masks); [(name, what is wrong)] of its files; [(name, number of grey values)] of soft masks."""
        fetched.result()
        pixels, wrong = [], []
        for blob, modes in [(sample.image, ("L",)), *((mask, ("L", "1")) for mask in sample.masks)]:
            try:
                pixels.append(decode_image(bucket.read(blob), bucket.url(blob.name), target_size, modes))
            except DatasetError as error:
                wrong.append((blob.name, str(error)))
        if wrong:
            return None, wrong, []
        image, *masks = pixels
        insides = [mask != 0 for mask in masks]
        soft = [
            (blob.name, 1 + len(np.unique(mask[inside])))
            for blob, mask, inside in zip(sample.masks, masks, insides, strict=True)
            if (inside & (mask != mask.max())).any()
        ]
        return (sample.name, image, np.stack(insides, axis=-1).view(np.uint8)), [], soft

    fetchers = ThreadPoolExecutor(bucket.threads)
    cores = len(os.sched_getaffinity(0))
    decoders = ThreadPoolExecutor(max(1, cores // 2))  # more threads would wait for each other's Python code
    to_fetch = iter(samples)
    # Fetched files wait on the disk, where there is room for many; decoded ones wait in memory.
    fetching, decoding = collections.deque(), collections.deque()

    def advance(decode_ahead):
        while len(fetching) < FETCH_AHEAD and (sample := next(to_fetch, None)):
            fetching.append((sample, fetchers.submit(fetch, sample)))
        while decode_ahead and fetching and len(decoding) < lookahead:
            decoding.append(decoders.submit(decode, *fetching.popleft()))

    def results():
        problems, soft_masks, first_soft = Problems(problems_path), 0, None
        try:
            advance(decode_ahead=True)
            while decoding:
                try:
                    sample, wrong, soft = decoding.popleft().result()
                except BucketError as error:
                    if not problems.number:
                        raise
                    raise DatasetError(f"{problems.error()}; the other files were not checked: {error}") from error
                advance(decode_ahead=True)
                if wrong and not problems.number and fetching:
                    on_warning(
                        f"{wrong[0][1]}; now the other files are checked, without inference, to name all in one error"
                    )
                for name, what in wrong:
                    problems.add(name, what)
                if soft:
                    soft_masks, first_soft = soft_masks + len(soft), first_soft or soft[0]
                if not problems.number:
                    yield sample
            if problems.number:
                raise problems.error()
            if soft_masks:
                name, values = first_soft
                on_warning(
                    f"masks with more than two grey values (0 is one of them): {soft_masks:,}, such as "
                    f"{bucket.url(name)} with {values}. Every pixel that is not 0 counts as inside the mask. Soft "
                    "edges come from resizing or JPEG, 1 and 255 in one mask from two conventions"
                )
        finally:
            for pool in (fetchers, decoders):
                pool.shutdown(wait=False, cancel_futures=True)

    advance(decode_ahead=False)  # decoding now would slow down the import of TensorFlow
    return results()


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
        Pillow modes to accept: "L" is 8-bit greyscale, "1" is one bit per pixel.

    Returns
    -------
    uint8 array, shape (height, width), 0 to 255; 0 or 1 in mode "1"

    Raises
    ------
    DatasetError
        The file is damaged, or is not such an image of target_size.
    """
    expected = FORMATS[_suffix(url)]
    depths = [{"L": 8, "1": 1}[mode] for mode in modes]
    try:
        open_image = {"PNG": _open_png, "TIFF": _open_tiff}[expected]
        with open_image(data, url, tuple(target_size), depths) as image:
            pixels = np.asarray(image, dtype=np.uint8)
        if pixels.shape != tuple(target_size)[::-1]:
            raise ValueError(f"its pixels have the shape {pixels.shape}")
        return pixels
    except DatasetError:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        reason = re.sub(r"<_io.BytesIO.*?>", "it", str(error))[:300] or type(error).__name__
        raise DatasetError(f"{url} cannot be decoded as {expected} ({reason}): save it again") from error


def _open_png(data, url, target_size, depths):
    """Open the critical chunks of a PNG, and check their checksums, which Pillow ignores when it decodes."""
    if not data.startswith(PNG_SIGNATURE):
        raise _of_another_format(data, url)
    critical, position, kind = [PNG_SIGNATURE], len(PNG_SIGNATURE), None
    while kind != b"IEND":
        start = position
        length, kind = struct.unpack_from(">I4s", data, start) if len(data) >= start + 8 else (0, b"")
        position += 12 + length
        if len(data) < position:
            raise ValueError("it is cut off")
        if kind == b"fdAT":
            raise DatasetError(f"{url} is an animation: save only the image that is meant")
        if kind == b"eXIf":
            exif = Image.Exif()
            with contextlib.suppress(Exception):  # programs ignore metadata that is broken
                exif.load(data[start + 8 : position - 4])
            _check_orientation(exif, url)
        if kind[:1].islower():  # an ancillary chunk: damage in it does not change the pixels
            continue
        if zlib.crc32(memoryview(data)[start + 4 : position - 4]) != int.from_bytes(data[position - 4 : position]):
            raise ValueError("it is damaged (a checksum is wrong)")
        if kind == b"IHDR" and len(critical) == 1:
            width, height, depth, colour = struct.unpack_from(">IIBB", data, start + 8)
            _check_size(width, height, url, target_size)
            if colour != 0:
                raise _not_grey(url, PNG_COLOURS.get(colour, f"has colour type {colour}"))
            _check_depth(depth, url, depths)
        elif kind not in (b"PLTE", b"IDAT", b"IEND") or len(critical) == 1:
            raise DatasetError(f"{url} is not a standard PNG (it has a chunk {kind.decode()}): save it again as PNG")
        if kind != b"PLTE":
            critical.append(data[start:position])
    return Image.open(io.BytesIO(b"".join(critical)), formats=["PNG"])


def _open_tiff(data, url, target_size, depths):
    """Check the tags of a TIFF and open its one page that is neither thumbnail nor transparency mask."""
    if not data.startswith(tuple(TiffImagePlugin.PREFIXES)):
        raise _of_another_format(data, url)
    if data.startswith(b"MM\0+"):  # Pillow takes it for a plain TIFF
        raise DatasetError(f"{url} is a big-endian BigTIFF: save it as plain TIFF")
    pages = _pages(data, url)
    if not all({256, 257} <= tags.keys() for tags in pages) or not pages:
        raise ValueError("it is damaged or cut off: its size is missing")
    whole = [i for i, tags in enumerate(pages) if not tags.get(254, 0) & 5 and tags.get(255) != 2]
    number = whole[0] if whole else 0
    tags = pages[number]

    def get(tag, default=None):
        values = tags.get(tag, default)
        return values[0] if isinstance(values, tuple) and len(set(values)) == 1 else values

    about = str(get(270))
    stack = re.match(r"ImageJ=.*^images=(\d+)", about, re.DOTALL | re.MULTILINE)
    images = max(len(whole), int(stack[1]) if stack else 1, get(32997, 1))
    if images > 1 or (about.startswith('{"shape":') and '"truncated": true' in about):
        raise DatasetError(
            f"{url} has {images if images > 1 else 'several'} pages or slices: save each as a file with one page"
        )

    width, height, photometric = get(256), get(257), get(262)
    if photometric == 0:
        raise DatasetError(
            f"{url} stores white as 0 (its photometric interpretation is 0, as with ImageJ's inverting LUT), so that "
            "programs disagree about its values: in ImageJ, choose Image > Lookup Tables > Invert LUT, check the "
            "values, and save it again; in Python, save an array of the type uint8, not bool"
        )
    for refused, what in (
        (photometric is None, "does not say whether 0 is black: it has no photometric interpretation"),
        (photometric != 1, TIFF_COLOURS.get(photometric, f"has the photometric interpretation {photometric}")),
        (get(277, 1) != 1 or 338 in tags, "has several channels"),
        (get(339, 1) == 2, "has signed numbers: its sample format is 2"),
        (get(339, 1) == 3, "has floating-point numbers: its sample format is 3"),
        (get(339, 1) != 1, f"has the sample format {get(339)}"),
        (get(266, 1) != 1, f"has its bits in another order: its fill order is {get(266)}"),
    ):
        if refused:
            raise _not_grey(url, what)
    _check_depth(get(258, 1), url, depths)
    _check_size(width, height, url, target_size)
    if get(322, 0) * get(323, 0) > 2**20 + 4 * width * height:
        raise DatasetError(f"{url} has tiles far larger than the image: save it without tiles")
    if get(259, 1) not in TiffImagePlugin.COMPRESSION_INFO:
        raise DatasetError(f"{url} is compressed in an unknown way (number {get(259)}): save it with LZW")
    if len(tags.get(273, ())) > math.ceil(height / min(get(278, height), height)):
        raise DatasetError(f"{url} has more strips than its {height} rows need: save it again")
    image = Image.open(io.BytesIO(data), formats=["TIFF"])
    image.seek(number)
    _check_orientation(image.getexif(), url)  # in its tag 274 or its XMP: Pillow applies either
    return image


def _pages(data, url):
    """The tags of each page of a TIFF, read by Pillow, so that they are the ones that Pillow will use."""
    file, tags = io.BytesIO(data), TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2:3] == b"+" else 8])
    pages, offsets = [], set()
    while tags.next and tags.next not in offsets:
        if len(pages) == MAX_PAGES:
            raise DatasetError(f"{url} has more than {MAX_PAGES} pages: save each as a file with one page")
        offsets.add(tags.next)
        file.seek(tags.next)
        tags.load(file)
        pages.append(dict(tags))
    return pages


def _check_size(width, height, url, target_size):
    if (width, height) != target_size:
        raise DatasetError(
            f"{url} has {width} x {height} pixels, but target_size in the dataset's config.yaml is "
            f"{target_size[0]} x {target_size[1]}: correct one of them"
        )


def _check_depth(depth, url, depths):
    if depth not in depths:
        raise _not_grey(url, f"has {depth}-bit pixels")


def _check_orientation(exif, url):
    if (orientation := exif.get(ExifTags.Base.Orientation, 1)) != 1:
        raise DatasetError(
            f"{url} is rotated or mirrored by its orientation tag ({orientation}), which some programs ignore: rotate "
            "the pixels themselves and save it without the tag"
        )


def _not_grey(url, what):
    return DatasetError(f"{url} is not 8-bit greyscale (it {what}): convert it")


def _of_another_format(data, url):
    for beginning, what in OTHER_FORMATS.items():
        if data.startswith(beginning):
            return DatasetError(f"{url} is {what} by its content: rename or convert it")
    return ValueError("it does not begin like such a file")


def _suffix(name):
    return "." + name.rpartition(".")[2].lower()


def _composed(name):
    """The name in one Unicode form: macOS writes another form than other systems."""
    return unicodedata.normalize("NFC", name)
