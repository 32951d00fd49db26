"""The counts of one pass over the images: of all images, of each block of them, and a few slices to show.

Bin k holds the probabilities in (THRESHOLDS[k - 1], THRESHOLDS[k]]. So the sum over the bins above k is the number of
pixels with `p > THRESHOLDS[k]`: exactly what a Keras metric with `thresholds=THRESHOLDS[k]` counts, but in int64.
"""

import contextlib
import hashlib
import io
import json
import os
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


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
BLOCK_STEP = 64  # blocks are counted at every 64th threshold only, to save memory
BLOCK_THRESHOLDS = THRESHOLDS[::BLOCK_STEP]


@dataclass
class Counts:
    """The counts of one pass, or of the part of it that is done.

    Attributes
    ----------
    histogram : int64 array, shape (classes, 2, len(THRESHOLDS) + 1)
        Pixels per class, truth (0 outside the mask, 1 inside) and probability bin.
    block_histograms : int64 array, shape (blocks, classes, 2, len(BLOCK_THRESHOLDS) + 1)
        The same for each block of images, in the bins between every 64th threshold.
    images : int
        Number of images counted: the first ones of the pass.
    shown_names : list of str, length shown
        Names of the images that the figure shows.
    shown_images : uint8 array, shape (shown, height, width), 0 to 255
    shown_truth : bool array, shape (shown, height, width, classes)
        Their masks.
    shown_bins : int32 array, shape (shown, height, width, classes)
        Their probability bins: the prediction at THRESHOLDS[k] is `shown_bins > k`.
    counted_with : dict
        What the probabilities depend on besides network and images: batch size, device, libraries. Values that JSON
        can hold.
    """

    histogram: np.ndarray
    block_histograms: np.ndarray
    images: int
    shown_names: list
    shown_images: np.ndarray
    shown_truth: np.ndarray
    shown_bins: np.ndarray
    counted_with: dict

    @classmethod
    def empty(cls, classes, height, width, blocks):
        """Counts of no image: `classes` and `blocks` are numbers, `height` and `width` are pixels."""
        return cls(
            histogram=np.zeros((classes, 2, len(THRESHOLDS) + 1), np.int64),
            block_histograms=np.zeros((blocks, classes, 2, len(BLOCK_THRESHOLDS) + 1), np.int64),
            images=0,
            shown_names=[],
            shown_images=np.zeros((0, height, width), np.uint8),
            shown_truth=np.zeros((0, height, width, classes), bool),
            shown_bins=np.zeros((0, height, width, classes), np.int32),
            counted_with={},
        )

    def add(self, names, block_labels, histogram, coarse, shown=()):
        """Add a batch.

        Parameters
        ----------
        names : sequence of str, length n
        block_labels : sequence of int, length n
            The block of each image.
        histogram : integer array, shape (classes, 2, len(THRESHOLDS) + 1)
        coarse : integer array, shape (n, classes, 2, len(BLOCK_THRESHOLDS) + 1)
            The histogram of each image, in the bins between every 64th threshold.
        shown : iterable of (name, image, truth, bins)
            Images of the batch that the figure shows; shapes as in the attributes, without the first axis.

        Raises
        ------
        RuntimeError
            The histograms of a class do not hold as many pixels as the images have: a bug.
        """
        pixels = int(np.prod(self.shown_images.shape[1:]))
        whole, each = histogram.sum(axis=(1, 2), dtype=np.int64), coarse.sum(axis=(2, 3), dtype=np.int64)
        if len(coarse) != len(names) or (whole != len(names) * pixels).any() or (each != pixels).any():
            raise RuntimeError(f"{len(names)} images of {pixels} pixels were counted as {whole} and {each.tolist()}")
        self.histogram += histogram
        for block, of_image in zip(block_labels, coarse, strict=True):
            self.block_histograms[block] += of_image
        for name, image, truth, bins in shown:
            self.shown_names.append(name)
            self.shown_images = np.concatenate([self.shown_images, image[None]])
            self.shown_truth = np.concatenate([self.shown_truth, truth[None].astype(bool)])
            self.shown_bins = np.concatenate([self.shown_bins, bins[None]])
        self.images += len(names)

    def summed(self, add):
        """The counts of all workers together; the slices to show are only those of this worker.

        Parameters
        ----------
        add : callable
            Takes an int64 array of shape (n,) and returns the sum of these arrays over the workers.

        Returns
        -------
        Counts
        """
        parts = [self.histogram, self.block_histograms, np.array([self.images])]
        total = add(np.concatenate([part.ravel() for part in parts]))
        ends = np.cumsum([part.size for part in parts])[:-1]
        histogram, block_histograms, (images,) = (
            numbers.reshape(part.shape) for numbers, part in zip(np.split(total, ends), parts, strict=True)
        )
        return replace(self, histogram=histogram, block_histograms=block_histograms, images=int(images))

    def save(self, path):
        """Write to `path`, completely or not at all; raises OSError."""
        _write(path, vars(self))

    def save_checkpoint(self, path):
        """Write like `save`, but each slice once, to a file of its own. Other runs may read and write it too."""
        for i, shown in enumerate(self.shown_names):
            if not (file := _slice_file(path, shown)).exists():
                _write(file, {name: getattr(self, name)[i] for name in SLICES})
        _write(path, vars(self) | {name: getattr(self, name)[:0] for name in SLICES})

    @staticmethod
    def remove_checkpoint(path):
        """Delete what `save_checkpoint` wrote; errors do not matter."""
        with contextlib.suppress(OSError):
            for file in (path, *path.parent.glob(path.with_suffix(".*.slice").name)):
                file.unlink(missing_ok=True)

    @classmethod
    def load(cls, path):
        """Read what `save` or `save_checkpoint` wrote; None if there is no such file, or if it is damaged."""
        fields = _read(path)
        if fields is None:
            return None
        files = [_slice_file(path, shown) for shown in fields["shown_names"][len(fields["shown_images"]) :]]
        slices = {file: _read(file) for file in files}
        if damaged := [file for file, content in slices.items() if content is None]:
            with contextlib.suppress(OSError):
                for file in damaged:
                    file.unlink(missing_ok=True)  # the next checkpoint writes it again
            return None
        more = slices.values()
        fields |= {name: np.concatenate([fields[name], *(one[name][None] for one in more)]) for name in SLICES}
        return cls(
            **fields
            | {
                "images": int(fields["images"]),
                "shown_names": fields["shown_names"].tolist(),
                "counted_with": json.loads(str(fields["counted_with"])),
            }
        )


SLICES = ("shown_images", "shown_truth", "shown_bins")


def _slice_file(path, name):
    """The file of one slice of the checkpoint at `path`."""
    return path.with_suffix(f".{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}.slice")


def _write(path, fields):
    """Write attributes of Counts to `path`, completely or not at all, with their SHA-256 at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    plain = {"shown_names": lambda names: np.array(names, dtype=str), "counted_with": json.dumps}
    try:
        with open(partial, "w+b") as file:
            np.savez(file, **{name: plain.get(name, np.asarray)(value) for name, value in fields.items()})
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path):
    """Read what `_write` wrote, as arrays by name; None if there is no such file, or if it is damaged."""
    try:
        content = memoryview(Path(path).read_bytes())
    except OSError:
        return None
    content, digest = content[:-32], content[-32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


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
