"""A dataset on disk or in a bucket: pairing images with masks, choosing the subset, decoding."""

import collections
import contextlib
import io
import logging
import math
import os
import re
import struct
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from errors import BucketError, DatasetError, printable

FORMATS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}
NAMED_PROBLEMS = 10  # in an error; a file lists all
# What desktops, NAS boxes and Hadoop leave behind, apart from names that begin with a dot or end with "_$folder$".
LEFTOVERS = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("icon\r", "icon\uf00d", "__macosx", "network trash folder", "temporary items"),
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found"),
    *("_success", "_temporary"),
}
LEFTOVER_ENDINGS = ("_$folder$", ":zone.identifier", "@synoeastream", "@synoresource")

FETCH_AHEAD = 512  # samples that may be fetched before they are decoded
MAX_CLASSES = 100  # counts take some 5 MB a class
MAX_PAGES = 32  # of a TIFF, thumbnails included

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_COLOURS = {2: "is in colour", 3: "has a palette", 4: "has transparency", 6: "is in colour, with transparency"}
TIFF_COLOURS = {2: "is in colour", 3: "has a palette", 5: "is in colour", 6: "is in colour", 8: "is in colour"}
OTHER_FORMATS = {  # by how a file begins
    PNG_SIGNATURE: "a PNG file",
    **dict.fromkeys(TiffImagePlugin.PREFIXES, "a TIFF file"),
    b"\xff\xd8\xff": "a JPEG file",
    b"GIF8": "a GIF file",
    b"BM": "a BMP file",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself,",
}

Image.MAX_IMAGE_PIXELS = None  # the size is compared with target_size before a pixel is decoded
# What is wrong with a file is told in an error that names it.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class Sample(NamedTuple):
    """An image and its masks, as blobs of a bucket."""

    name: str
    image: NamedTuple
    masks: tuple  # one blob a class, in the order of the class folders


class Problems:
    """What is wrong with the files of a split: counted, a few kept for one message, all listed in a file.

    Parameters
    ----------
    path : Path
        Is written from the second problem on, a line each.
    """

    def __init__(self, path):
        self.number = 0
        self._path, self._file, self._unwritten = Path(path), None, None
        self._first, self._names = None, []

    def add(self, name, what):
        """Add a file: its name, and a text that names it, too, and says what is wrong and what to do."""
        self.number += 1
        if self.number == 1:
            self._first = what
        elif self.number <= NAMED_PROBLEMS:
            self._names.append(printable(name)[-150:])
        try:
            if self.number == 2:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115
                print(printable(self._first), file=self._file)
            if self._file:
                print(printable(what), file=self._file)
        except OSError as error:
            self._file, self._unwritten = None, error

    def error(self):
        """All of them as one DatasetError."""
        if self.number == 1:
            return DatasetError(self._first)
        try:
            if self._file:
                self._file.close()
        except OSError as error:
            self._unwritten = error
        more = self.number - 1 - len(self._names)
        listed = f"{self._path} says what is wrong with each"
        if self._unwritten:
            listed = f"{self._path}, which would list all, cannot be written ({self._unwritten.strerror})"
        return DatasetError(
            f"{self.number:,} files cannot be used. The first: {self._first}. Then {', '.join(self._names)}"
            f"{f' and {more:,} more' if more else ''}. {listed}"
        )


def is_leftover(name):
    """Whether a "/"-separated name has a part that a desktop, a NAS box or Hadoop left behind."""
    return any(
        (part.startswith(".") and part not in (".", ".."))
        or part.lower() in LEFTOVERS
        or part.lower().endswith(LEFTOVER_ENDINGS)
        for part in name.split("/")
    )


def pair_images_and_masks(blobs, split_directory, url, problems_path):
    """Pair the images of a split with their masks, by name, in whatever Unicode form each of them is written.

    Parameters
    ----------
    blobs : iterable of gcp_utils.Blob
        Everything below `split_directory`.
    split_directory : str
        Holds images/<name> and masks/<class folder>/<name>.
    url : callable
        From a blob's name to its address, for messages.
    problems_path : Path
        Lists all that is wrong, where that is more than one file.

    Returns
    -------
    class_folders : list of str
        Sorted; their order is the order of the network's output channels.
    samples : list of Sample
        Sorted by name, which is the image's.

    Raises
    ------
    DatasetError
        No images, no masks, images without a mask, masks without an image, or files that are no images by name.
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
                complain(blob, "is no image: a PNG or TIFF file is expected; move it elsewhere")
            case ["images" | "masks", *_]:
                complain(blob, "is out of place: images belong into images/, masks into masks/<class>/")
    if not problems.number:
        if not images:
            raise DatasetError(f"{url(split_directory)} has no images: they belong into its folder images/")
        if not masks:
            raise DatasetError(
                f"{url(split_directory)} has no masks: they belong into masks/class_0/, masks/class_1/, ..."
            )
        if len(masks) > MAX_CLASSES:
            raise DatasetError(
                f"{url(split_directory)} has {len(masks):,} folders in masks/: at most {MAX_CLASSES} classes can be "
                "used"
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
    """A random part of the samples, the same whenever samples, factor and seed are.

    Parameters
    ----------
    samples : list
    factor : float in (0, 1]
    seed : int in [0, 2**32)

    Returns
    -------
    list
        ceil(factor * len(samples)) of them, but at least one, in their order.
    """
    size = max(1, math.ceil(round(factor * len(samples), 6)))  # 0.1 * 30 is a little more than 3
    chosen = np.random.RandomState(seed).permutation(len(samples))[:size]
    return [samples[i] for i in sorted(chosen)]


def evenly_spread(samples, number):
    """Up to `number` of the samples, at even distances from the first to the last."""
    positions = np.linspace(0, len(samples) - 1, min(number, len(samples)))
    return [samples[round(position)] for position in positions]


def check_sizes_in_bytes(samples, url, target_size, problems_path):
    """Check, before anything is fetched, that no file is empty or far larger than an 8-bit image can be.

    Parameters
    ----------
    samples : iterable of Sample
    url : callable
        From a blob's name to its address, for messages.
    target_size : (width, height)
    problems_path : Path
        Lists all that is wrong, where that is more than one file.

    Raises
    ------
    DatasetError
    """
    width, height = target_size
    problems = Problems(problems_path)
    for sample in samples:
        for blob in (sample.image, *sample.masks):
            if blob.size == 0:
                problems.add(blob.name, f"{url(blob.name)} is empty")
            elif blob.size > 4 * width * height + 2**20:
                problems.add(
                    blob.name,
                    f"{url(blob.name)} has {blob.size:,} bytes, too many for an 8-bit image of {width} x {height} "
                    "pixels",
                )
    if problems.number:
        raise problems.error()


def start_decoding(samples, bucket, target_size, lookahead, problems_path, on_warning):
    """Fetch samples from now on, and decode them from the first one asked for on, in threads ahead of the consumer.

    Parameters
    ----------
    samples : iterable of Sample
    bucket : as gcp_utils.open_bucket gives
    target_size : (width, height)
    lookahead : int
        Samples that may be decoded before they are asked for: what bounds the memory.
    problems_path : Path
        Lists all that is wrong, where that is more than one file.
    on_warning : callable
        Gets a sentence: at the end, about masks with more than two grey values; and when a file is wrong while there
        are others to look at.

    Returns
    -------
    generator of (name, image, masks)
        In the order of the samples: str; uint8 array, shape (height, width), 0 to 255; uint8 array, shape
        (height, width, classes), 0 or 1. After a sample with a file that cannot be used there is no other: the rest is
        fetched and decoded to find all such files, then it raises DatasetError. It raises gcp_utils.BucketError at
        once. Close it to stop early.
    """

    def fetch(sample):
        for blob in (sample.image, *sample.masks):
            if not bucket.is_here(blob):  # else reading it checks it, and once is enough
                bucket.fetch(blob)

    def decode(sample, fetched):
        """The sample decoded; (name, what is wrong) of its files; (name, number of grey values) of its soft masks."""
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
        problems, soft_masks, first_soft = Problems(problems_path), 0, None
        try:
            advance(decode_ahead=True)
            while decoding:
                try:
                    sample, wrong, soft = decoding.popleft().result()
                except BucketError as error:
                    if not problems.number:
                        raise
                    raise DatasetError(f"{problems.error()}; the rest was not looked at: {error}") from error
                advance(decode_ahead=True)
                if wrong and not problems.number and fetching:
                    on_warning(
                        f"{wrong[0][1]}; the other files are looked at now, without inference, to name all at once"
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
                    f"masks with more than two grey values, counting 0: {soft_masks:,}, such as {bucket.url(name)} "
                    f"with {values}. Whatever is not 0 counts as inside. Soft edges come from resizing or JPEG, 1 and "
                    "255 in one mask from two conventions"
                )
        finally:
            for pool in (fetchers, decoders):
                pool.shutdown(wait=False, cancel_futures=True)

    advance(decode_ahead=False)  # decoding would only slow down the interpreter that is importing TensorFlow now
    return results()


def decode_image(data, url, target_size, modes):
    """Decode an 8-bit greyscale PNG or TIFF, whose grey values must be stored as they are meant.

    Metadata is no obstacle. What Pillow would turn, invert, scale or drop on its way to 8-bit grey is refused.

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
        raise DatasetError(f"{url} cannot be decoded as {expected}: {reason}") from error


def _open_png(data, url, target_size, depths):
    """Open what counts of a PNG: its critical chunks. Their checksums are checked here, since decoding ignores them."""
    if not data.startswith(PNG_SIGNATURE):
        raise _of_another_format(data, url)
    kept, position, kind = [PNG_SIGNATURE], len(PNG_SIGNATURE), None
    while kind != b"IEND":
        start = position
        length, kind = struct.unpack_from(">I4s", data, start) if len(data) >= start + 8 else (0, b"")
        position += 12 + length
        if len(data) < position:
            raise ValueError("it is cut off")
        if kind == b"fdAT":
            raise DatasetError(f"{url} is an animation: save the one image that is meant")
        if kind == b"eXIf":
            exif = Image.Exif()
            with contextlib.suppress(Exception):  # broken metadata is as good as none
                exif.load(data[start + 8 : position - 4])
            _check_orientation(exif, url)
        if kind[:1].islower():  # an ancillary chunk, which may be broken without harm to the pixels
            continue
        if zlib.crc32(memoryview(data)[start + 4 : position - 4]) != int.from_bytes(data[position - 4 : position]):
            raise ValueError("it is damaged (a checksum is wrong)")
        if kind == b"IHDR" and len(kept) == 1:
            width, height, depth, colour = struct.unpack_from(">IIBB", data, start + 8)
            _check_size(width, height, url, target_size)
            if colour != 0:
                raise _not_grey(url, PNG_COLOURS.get(colour, f"has colour type {colour}"))
            _check_depth(depth, url, depths)
        elif kind not in (b"PLTE", b"IDAT", b"IEND") or len(kept) == 1:
            raise DatasetError(f"{url} is no standard PNG (it has a chunk {kind.decode()}): save it again as PNG")
        if kind != b"PLTE":
            kept.append(data[start:position])
    return Image.open(io.BytesIO(b"".join(kept)), formats=["PNG"])


def _open_tiff(data, url, target_size, depths):
    """Open the page of a TIFF that is neither thumbnail nor transparency mask, if its tags let it pass."""
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
        raise DatasetError(f"{url} holds {images if images > 1 else 'several'} pages or slices, one is expected")

    width, height, photometric = get(256), get(257), get(262)
    if photometric == 0:
        raise DatasetError(
            f"{url} stores white as 0 (its photometric interpretation is 0, as with ImageJ's inverting LUT), so that "
            "programs disagree about its values: in ImageJ, choose Image > Lookup Tables > Invert LUT, see that the "
            "values are as meant, and save it again; in Python, save numbers of the type uint8, not bool"
        )
    for refused, what in (
        (photometric is None, "does not say whether 0 is black: it has no photometric interpretation"),
        (photometric != 1, TIFF_COLOURS.get(photometric, f"has the photometric interpretation {photometric}")),
        (get(277, 1) != 1 or 338 in tags, "has several channels"),
        (get(339, 1) == 2, "holds signed numbers: its sample format is 2"),
        (get(339, 1) == 3, "holds floating-point numbers: its sample format is 3"),
        (get(339, 1) != 1, f"has the sample format {get(339)}"),
        (get(266, 1) != 1, f"has its bits in another order: its fill order is {get(266)}"),
    ):
        if refused:
            raise _not_grey(url, what)
    _check_depth(get(258, 1), url, depths)
    _check_size(width, height, url, target_size)
    if get(322, 0) * get(323, 0) > 2**20 + 4 * width * height:
        raise DatasetError(f"{url} has tiles far larger than itself: save it without tiles")
    if get(259, 1) not in TiffImagePlugin.COMPRESSION_INFO:
        raise DatasetError(f"{url} is compressed in an unknown way (number {get(259)}): save it with LZW or without")
    if len(tags.get(273, ())) > math.ceil(height / min(get(278, height), height)):
        raise DatasetError(f"{url} has more strips than its {height} rows need: save it again")
    image = Image.open(io.BytesIO(data), formats=["TIFF"])
    image.seek(number)
    _check_orientation(image.getexif(), url)  # from its tag 274 or its XMP: Pillow obeys both
    return image


def _pages(data, url):
    """The tags of each page of a TIFF, read by Pillow, since they are what Pillow goes by."""
    file, tags = io.BytesIO(data), TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2:3] == b"+" else 8])
    pages, offsets = [], set()
    while tags.next and tags.next not in offsets:
        if len(pages) == MAX_PAGES:
            raise DatasetError(f"{url} holds more than {MAX_PAGES} pages, one is expected")
        offsets.add(tags.next)
        file.seek(tags.next)
        tags.load(file)
        pages.append(dict(tags))
    return pages


def _check_size(width, height, url, target_size):
    if (width, height) != target_size:
        raise DatasetError(
            f"{url} is {width} x {height} pixels, target_size in the dataset's config.yaml is "
            f"{target_size[0]} x {target_size[1]}"
        )


def _check_depth(depth, url, depths):
    if depth not in depths:
        raise _not_grey(url, f"has {depth}-bit pixels")


def _check_orientation(exif, url):
    if (orientation := exif.get(ExifTags.Base.Orientation, 1)) != 1:
        raise DatasetError(
            f"{url} is turned or mirrored by its orientation tag ({orientation}), which not every program obeys: turn "
            "the pixels themselves and save it without the tag"
        )


def _not_grey(url, what):
    return DatasetError(f"{url} is not 8-bit greyscale (it {what}): convert it")


def _of_another_format(data, url):
    for beginning, what in OTHER_FORMATS.items():
        if data.startswith(beginning):
            return DatasetError(f"{url} is {what} by its content: rename or convert it")
    return ValueError("it does not begin like one")


def _suffix(name):
    return "." + name.rpartition(".")[2].lower()


def _composed(name):
    """The same for all Unicode forms of a name: Macs write other ones than the rest."""
    return unicodedata.normalize("NFC", name)
