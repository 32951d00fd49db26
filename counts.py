"""What one pass over the images leaves behind: exact counts, bootstrap replicates, and a few slices to show.

A probability p in [0, 1] falls into bin ceil(p * GRID). GRID is a power of two, so product and ceil are exact in
float32, and `p > k / GRID` holds exactly for the pixels in bins above k: a suffix sum of the histogram is the very
count that a Keras metric with `thresholds=k / GRID` accumulates, but in int64.
"""

import hashlib
import math
import os
import uuid
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GRID = 65536  # thresholds are k / GRID, k = 0 .. GRID

REPLICATES = 500  # bootstrap replicates
BOOTSTRAP_SEED = 20200321

# The replicates are counted on a coarser grid, to keep them small: 512 steps, finest near 0 and 1, where networks
# put most of their probabilities (Chebyshev spacing, at most 0.0031 wide). Coarse bin j holds the bins up to
# COARSE_EDGES[j] that no earlier one holds.
COARSE_EDGES = np.unique(np.rint(GRID * np.sin(np.linspace(0, np.pi / 2, 513)) ** 2).astype(np.int64))
COARSE_BIN = np.searchsorted(COARSE_EDGES, np.arange(GRID + 1)).astype(np.int32)

_POISSON_CDF = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(13)])


@dataclass
class Counts:
    """Counts of one pass, or of the part of it that is done.

    Attributes
    ----------
    histogram : int64 array, shape (classes, 2, GRID + 1)
        Pixels per class, truth (0 outside the mask, 1 inside) and probability bin.
    replicates : float64 array, shape (REPLICATES, classes, 2, len(COARSE_EDGES))
        The histogram on the coarse grid, each image weighted by its Poisson(1) draws; whole numbers.
    images : int
        Number of images counted: the first so many of the pass. None while a batch is being added: an interruption
        there leaves counts that must not be kept.
    shown_names : list of str, length shown
        The images kept for display.
    shown_images : uint8 array, shape (shown, height, width)
    shown_truth : bool array, shape (shown, height, width, classes)
    shown_bins : int32 array, shape (shown, height, width, classes)
        Probability bins: the prediction at threshold k / GRID is `shown_bins > k`.
    device : str
        What the network ran on; empty for a CPU.
    """

    histogram: np.ndarray
    replicates: np.ndarray
    images: int
    shown_names: list
    shown_images: np.ndarray
    shown_truth: np.ndarray
    shown_bins: np.ndarray
    device: str = ""

    @classmethod
    def empty(cls, classes, height, width, device=""):
        return cls(
            histogram=np.zeros((classes, 2, GRID + 1), np.int64),
            replicates=np.zeros((REPLICATES, classes, 2, len(COARSE_EDGES))),
            images=0,
            shown_names=[],
            shown_images=np.zeros((0, height, width), np.uint8),
            shown_truth=np.zeros((0, height, width, classes), bool),
            shown_bins=np.zeros((0, height, width, classes), np.int32),
            device=device,
        )

    def add(self, names, histogram, coarse, shown=()):
        """Add a batch.

        Parameters
        ----------
        names : sequence of str, length n
            Image names: an image's weights in the bootstrap depend on its name alone.
        histogram : integer array, shape (classes, 2, GRID + 1)
        coarse : integer array, shape (n, classes, 2, len(COARSE_EDGES))
            The histogram of each image on the coarse grid.
        shown : iterable of (name, image, truth, bins)
            Images of the batch to keep for display; shapes as in the attributes, without the first axis.
        """
        images, self.images = self.images, None
        self.histogram += histogram
        weights = np.stack([bootstrap_weights(name) for name in names])
        # float64 holds whole numbers up to 2**53 exactly, so the sums do not depend on order or batch size.
        self.replicates += np.tensordot(weights, coarse.astype(np.float64), axes=(0, 0))
        for name, image, truth, bins in shown:
            self.shown_names.append(name)
            self.shown_images = np.concatenate([self.shown_images, image[None]])
            self.shown_truth = np.concatenate([self.shown_truth, truth[None].astype(bool)])
            self.shown_bins = np.concatenate([self.shown_bins, bins[None]])
        self.images = images + len(names)

    def summed(self, add, shown_names):
        """Counts of all workers together.

        Parameters
        ----------
        add : callable
            Takes an int64 array of shape (n,) and returns its sum over the workers.
        shown_names : list of str
            The images that the workers keep for display, in the order in which the result has them.
        """
        places = [shown_names.index(name) for name in self.shown_names]
        parts = [self.histogram, self.replicates, np.array([self.images])]
        for own in (self.shown_images, self.shown_truth, self.shown_bins):
            parts.append(np.zeros((len(shown_names), *own.shape[1:]), np.int64))
            parts[-1][places] = own
        total = add(np.concatenate([part.ravel().astype(np.int64) for part in parts]))  # all are whole numbers
        ends = np.cumsum([part.size for part in parts])[:-1]
        histogram, replicates, (images,), shown_images, shown_truth, shown_bins = (
            numbers.reshape(part.shape) for numbers, part in zip(np.split(total, ends), parts, strict=True)
        )
        return Counts(
            histogram=histogram,
            replicates=replicates.astype(np.float64),
            images=int(images),
            shown_names=shown_names,
            shown_images=shown_images.astype(np.uint8),
            shown_truth=shown_truth.astype(bool),
            shown_bins=shown_bins.astype(np.int32),
            device=self.device,
        )

    def save(self, path):
        """Write to `path`, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with open(partial, "wb") as file:
                np.savez(file, **{**vars(self), "shown_names": np.array(self.shown_names, dtype=str)})
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path):
        """Read what `save` wrote; None where there is none or it is damaged (the file carries CRC-32 sums)."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                fields = {name: arrays[name] for name in cls.__dataclass_fields__}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError):
            return None
        return cls(
            **fields
            | {
                "images": int(fields["images"]),
                "shown_names": fields["shown_names"].tolist(),
                "device": str(fields["device"]),
            }
        )


def bootstrap_weights(name):
    """Poisson(1) weights of one image in all bootstrap replicates.

    The Poisson bootstrap draws how often an image occurs in a replicate on its own, image by image, so that it fits
    into one pass (Chamandy et al., "Estimating uncertainty for massive data streams", 2012). The draws are read off
    a hash of seed and name: the same in any order, batch, process or version of a library.

    Parameters
    ----------
    name : str

    Returns
    -------
    float64 array, shape (REPLICATES,)
        Whole numbers, 0 and up.
    """
    text = f"{BOOTSTRAP_SEED}/{name}".encode(errors="surrogateescape")
    draws = np.frombuffer(hashlib.shake_256(text).digest(4 * REPLICATES), "<u4")
    return np.searchsorted(_POISSON_CDF, draws / 2**32, side="right").astype(np.float64)


def confusion(histogram):
    """Confusion counts at every threshold of the histogram's grid.

    Parameters
    ----------
    histogram : array, shape (..., 2, bins)
        Pixels per truth (0 outside, 1 inside) and bin.

    Returns
    -------
    tp, fp, fn, tn : arrays, shape (..., bins)
        Entry k counts `bin > k` as positive.
    """
    at_or_below = np.cumsum(histogram, axis=-1)
    above = at_or_below[..., -1:] - at_or_below
    return above[..., 1, :], above[..., 0, :], at_or_below[..., 1, :], at_or_below[..., 0, :]
