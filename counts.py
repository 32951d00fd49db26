"""The counts of one pass over the images: of all images, of each block of them, and a few slices to show.

Bin k holds the probabilities in (THRESHOLDS[k - 1], THRESHOLDS[k]]. So the sum over the bins above k is the number of
pixels with `p > THRESHOLDS[k]`: exactly what a Keras metric with `thresholds=THRESHOLDS[k]` counts, but in int64.
"""

import contextlib
import hashlib
import json
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

SHOWN_SLICES = 6  # that the figure of slices shows at most
FORMAT = 5  # raise it when the meaning or the form of kept counts changes


def _thresholds():
    """The list of thresholds: even in the middle, finer where networks crowd: around 0, 1/2 and 1.

    Neighbours differ by 1 / 65536, or less: by at most 1 / 1024 of the distance to the nearest of 0, 1/2 and 1, except
    where that is less than 2**-24, the step of float32 below 1. Below 1 / 64 the thresholds are the float32 numbers
    whose last 13 bits are zero, 1,024 per octave, from 2**-40 on. The distances to 1/2, on both sides, and to 1 are the
    same numbers down to 2**-12, and multiples of 2**-24 below.

    Returns
    -------
    float32 array, strictly increasing, from 2**-40 to 1 - 2**-24; 0.5 is among them
    """
    first, end = np.array([2**-40, 1 / 64], np.float32).view(np.int32)
    low = np.arange(first, end, 2**13, dtype=np.int32).view(np.float32)
    near = np.concatenate([np.arange(1, 4096, dtype=np.float32) / 2**24, low[low >= 2**-12]])
    even = np.arange(1024, 31745, dtype=np.float32) / 65536  # from 1/64 to 31/64
    half = np.float32([0.5])
    return np.concatenate([low, even, half - near[::-1], half, half + near, half + even, 1 - near[::-1]])


THRESHOLDS = _thresholds()
HALF = int(np.searchsorted(THRESHOLDS, 0.5))  # the index of 0.5
BLOCK_STEP = 64  # blocks are counted at every 64th threshold only, to save memory
BLOCK_THRESHOLDS = THRESHOLDS[::BLOCK_STEP]


class ShownSlice(NamedTuple):
    """A slice that the figure may show.

    Attributes
    ----------
    class_index : int
        The class for which it was chosen.
    name : str
    block : int
        The label of its block.
    pixels : int
        How many pixels of that class it has.
    image : uint8 array, shape (height, width), 0 to 255
    truth : bool array, shape (height, width, classes)
        Its masks.
    bins : int32 array, shape (height, width, classes)
        Its probability bins: the prediction at THRESHOLDS[k] is `bins > k`.
    """

    class_index: int
    name: str
    block: int
    pixels: int
    image: np.ndarray
    truth: np.ndarray
    bins: np.ndarray


def slices_to_show(candidates, classes):
    """Choose, for each class in turn, the slices with the most pixels of the class, each of another block.

    The choice from the chosen of several parts is the choice from all, so it does not depend on how a job is divided.

    Parameters
    ----------
    candidates : list of ShownSlice
    classes : int
        Number of classes.

    Returns
    -------
    list of ShownSlice
        At most SHOWN_SLICES, sorted by class, then by number of pixels, most first.
    """
    chosen = []
    for class_index in range(min(classes, SHOWN_SLICES)):
        of_class = [candidate for candidate in candidates if candidate.class_index == class_index]
        best_of_block = {}
        for candidate in sorted(of_class, key=lambda candidate: (-candidate.pixels, candidate.name)):
            best_of_block.setdefault(candidate.block, candidate)
        share = len(range(class_index, SHOWN_SLICES, classes))  # the places are dealt to the classes in turn
        chosen += list(best_of_block.values())[:share]
    return chosen


def without_pixels(shown):
    """The same ShownSlices, for the choice among those of other parts, which then keep only better ones."""
    return [one._replace(image=None, truth=None, bins=None) for one in shown]


@dataclass
class Counts:
    """The counts of a pass, or of a part of it.

    Attributes
    ----------
    histogram : integer array, shape (classes, 2, len(THRESHOLDS) + 1)
        Pixels per class, truth (0 outside the mask, 1 inside) and probability bin. int64, as all counts, but the counts
        of a part may be of a smaller type (`smallest`).
    block_histograms : integer array, shape (blocks, classes, 2, len(BLOCK_THRESHOLDS) + 1)
        The same for each block of images, in the bins between every 64th threshold.
    block_labels : int array, shape (blocks,)
        The labels of the blocks, increasing; those of a batch, which may repeat, in the order of its images.
    overlap : integer array, shape (classes, classes)
        [channel, mask folder]: pixels with a probability above 0.5 in the channel and inside the mask.
    images : int
        Number of images counted.
    shown : list of ShownSlice
        As `slices_to_show` chooses them.
    counted_with : list of dict
        For each way in which images were counted: how many `images`, and what the last digits of their probabilities
        depend on besides network and images: batch size, device, libraries. Values that JSON can hold.
    """

    histogram: np.ndarray
    block_histograms: np.ndarray
    block_labels: np.ndarray
    overlap: np.ndarray
    images: int = 0
    shown: list = field(default_factory=list)
    counted_with: list = field(default_factory=list)

    @classmethod
    def empty(cls, classes, block_labels):
        """Counts of no image, for a number of classes and these blocks."""
        return cls(
            histogram=np.zeros((classes, 2, len(THRESHOLDS) + 1), np.int64),
            block_histograms=np.zeros((len(block_labels), classes, 2, len(BLOCK_THRESHOLDS) + 1), np.int64),
            block_labels=np.asarray(block_labels),
            overlap=np.zeros((classes, classes), np.int64),
        )

    def add(self, part):
        """Add the Counts of a part of the pass, whose blocks are among these."""
        self.histogram += part.histogram
        blocks = np.searchsorted(self.block_labels, part.block_labels)
        for block, histogram in zip(blocks, part.block_histograms, strict=True):
            self.block_histograms[block] += histogram
        self.overlap += part.overlap
        self.images += part.images
        self.shown = slices_to_show(self.shown + part.shown, len(self.histogram))
        for way in part.counted_with:
            same = [known for known in self.counted_with if known | {"images": 0} == way | {"images": 0}]
            if same:
                same[0]["images"] += way["images"]
            else:
                self.counted_with.append(dict(way))

    def smallest(self):
        """The same counts in the smallest integer types, to be sent."""
        names = ("histogram", "block_histograms", "overlap")
        arrays = {name: getattr(self, name) for name in names}
        return replace(self, **{name: a.astype(np.min_scalar_type(int(a.max()))) for name, a in arrays.items()})


@dataclass
class Checkpoint:
    """What is kept of a pass: the counts so far, and of what they are the counts.

    Attributes
    ----------
    counts : Counts
    done : bool array, shape (chunks,)
        The chunks of the pass that the counts contain.
    versions : uint8 array, shape (1 + images, 16)
        A hash of what the bucket said of the weights, and of the files of each image, when they were counted.
    digests : uint8 array, shape (1 + images, 16)
        A hash of their content as it was counted; zeros for images that are not counted yet.
    remarks : dict
        Kind -> (count, name, detail): what `image_utils.explain_remarks` takes, of the masks counted so far.
    """

    counts: Counts
    done: np.ndarray
    versions: np.ndarray
    digests: np.ndarray
    remarks: dict

    @classmethod
    def empty(cls, classes, blocks, files, chunks):
        """Nothing is counted yet.

        Parameters
        ----------
        classes, blocks, chunks : int
            Their numbers.
        files : list of tuples of gcp_utils.Blob
            The weights, then for each image itself and its masks.
        """
        counts = Counts.empty(classes, np.arange(blocks))
        digests = np.zeros((len(files), 16), np.uint8)
        return cls(counts, np.zeros(chunks, bool), _versions(files), digests, {})

    def add(self, counted):
        """Add a chunks.CountedChunk."""
        self.counts.add(counted.counts)
        self.done[counted.number] = True
        self.digests[0] = np.frombuffer(counted.weights_digest, np.uint8)
        first = 1 + counted.first
        self.digests[first : first + len(counted.digests)] = [np.frombuffer(d, np.uint8) for d in counted.digests]
        add_remarks(self.remarks, counted.remarks)

    def still_holds(self, files, bucket):
        """Whether what was counted still has the same content. Only a file that may have changed is read again."""
        doubtful = np.flatnonzero(self.digests.any(axis=1) & (self.versions != _versions(files)).any(axis=1))
        with ThreadPoolExecutor(bucket.threads) as pool:
            digests = pool.map(lambda i: _digest(files[i], bucket), doubtful)
            return all(self.digests[i].tobytes() == digest for i, digest in zip(doubtful, digests, strict=True))

    def save(self, path):
        """Write to `path`, completely or not at all; raises OSError."""
        counts, shown = self.counts, self.counts.shown
        about = {
            "images": counts.images,
            "counted_with": counts.counted_with,
            "remarks": self.remarks,
            "shown": [(one.class_index, one.name, one.block, one.pixels) for one in shown],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with open(partial, "wb") as file:
                np.savez(
                    file,
                    about=json.dumps(about),
                    **{name: getattr(counts, name) for name in COUNT_ARRAYS},
                    **{name: getattr(self, name) for name in ("done", "versions", "digests")},
                    **{name: np.array([getattr(one, name) for one in shown]) for name in SLICE_ARRAYS},
                )
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load_if_it_holds(cls, path, files, bucket):
        """Read what `save` wrote; None where that is missing, damaged, or of files with other content.

        `files` is as for `empty`, from the `bucket` (as gcp_utils.open_bucket gives).
        """
        kept = cls.load(path)
        if kept is None or not kept.still_holds(files, bucket):
            return None
        if (kept.versions != (versions := _versions(files))).any():
            kept.versions = versions
            with contextlib.suppress(OSError):  # without this, the next run reads the files again
                kept.save(path)
        return kept

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; None if there is no such file, or if it is damaged, which zip's checksums tell."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        except Exception:  # of many types: the damage may be anywhere
            return None
        about = json.loads(str(arrays["about"]))
        slices = zip(about["shown"], *(arrays[name] for name in SLICE_ARRAYS), strict=True)
        counts = Counts(
            **{name: arrays[name] for name in COUNT_ARRAYS},
            images=about["images"],
            shown=[ShownSlice(*chosen, *pixels) for chosen, *pixels in slices],
            counted_with=about["counted_with"],
        )
        return cls(counts, *(arrays[name] for name in ("done", "versions", "digests")), about["remarks"])


def add_remarks(total, more):
    """Add remarks on masks, kind -> (count, name, detail), to others. The example is the one of the smallest name."""
    for kind, (count, *example) in more.items():
        so_far, *other = total.get(kind, (0, *example))
        total[kind] = (so_far + count, *min(example, other))


COUNT_ARRAYS = ("histogram", "block_histograms", "block_labels", "overlap")
SLICE_ARRAYS = ("image", "truth", "bins")


def _versions(files):
    """A hash of what the bucket says of the files, for each entry of `Checkpoint.empty`'s `files`: uint8, (n, 16)."""
    texts = ("\n".join(blob.version for blob in blobs).encode() for blobs in files)
    hashes = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    return np.frombuffer(hashes, np.uint8).reshape(-1, 16)


def _digest(blobs, bucket):
    content = hashlib.blake2b(digest_size=16)
    for blob in blobs:
        content.update(bucket.read(blob))
    return content.digest()


def checkpoint_path(folder, *parts):
    """The file in which the counts of a pass are kept: its name is a hash of what they depend on.

    Parameters
    ----------
    folder : Path
    parts : values with a `repr`
        Which images are counted, by which network, and how they are divided. Not what the files contain: a Checkpoint
        knows that.
    """
    digest = hashlib.sha256(THRESHOLDS.tobytes())  # counts over another list of thresholds are of no use
    for part in (FORMAT, *parts):
        digest.update(f"{part!r}\n".encode(errors="surrogatepass"))
    return folder / f"{digest.hexdigest()[:32]}.npz"


def confusion(histogram):
    """True and false positives and negatives at every threshold between the histogram's bins.

    Parameters
    ----------
    histogram : array, shape (..., 2, thresholds + 1)
        Pixels per truth (0 outside the mask, 1 inside) and bin.

    Returns
    -------
    tp, fp, fn, tn : arrays, shape (..., thresholds)
        Entry k takes the pixels in the bins above k, those with `p > threshold k`, for positive.
    """
    at_or_below = np.cumsum(histogram, axis=-1)
    at_or_below, total = at_or_below[..., :-1], at_or_below[..., -1:]
    above = total - at_or_below
    return above[..., 1, :], above[..., 0, :], at_or_below[..., 1, :], at_or_below[..., 0, :]
