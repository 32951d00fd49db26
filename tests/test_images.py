"""Images and masks: names, pairing, decoding, and one error that names all files that cannot be used."""

import contextlib
import hashlib
import io
import struct
import time
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers import ROOT, SPLIT, write_split
from PIL import Image

from errors import BucketError, DatasetError
from gcp_utils import Blob, open_bucket
from image_utils import (
    IMAGE_MODES,
    MASK_MODES,
    decode_image,
    decode_samples,
    draw_subset,
    explain_remarks,
    pair_images_and_masks,
)

CASES = ROOT / "tests/cases"
TRUTH = np.load(CASES / "truth.npz")
JPEG = decode_image((CASES / "mask_jpeg.tif").read_bytes(), "mask_jpeg.tif", (96, 64), MASK_MODES)

# ---------------------------------------------------------------------------------------------------------------
# Names


def url(name):
    return f"gs://bucket/{name}"


def paired(names, path=Path("/dev/null/problems.txt")):
    return pair_images_and_masks([Blob(f"{SPLIT}/{name}", 5) for name in names], SPLIT, url, path)


MISPLACED = {
    "images/x.png.exe": "is not a PNG or TIFF file by its name",
    "masks/x.png": "is out of place",
    "images/more/x.png": "is out of place",
    "images\\x.tif": r"has a backslash (\) in its name",
    "masks/class_0\\x.tif": r"has a backslash (\) in its name",
    "images/A.png": f"has no partner: add gs://bucket/{SPLIT}/masks/class_0/A.png",
    "masks/class_0/b.png": f"has no partner: add gs://bucket/{SPLIT}/images/b.png",
}


def test_names_that_fit_nowhere_are_errors():
    cases = [(["images/a.png", "masks/class_0/a.png", name], words) for name, words in MISPLACED.items()]
    cases += [(["notes.txt", "image/a.png"], "has no images: put them"), (["images/a.png"], "has no masks")]
    for names, words in cases:
        with pytest.raises(DatasetError) as caught:
            paired(names)
        assert words in str(caught.value) and str(caught.value).startswith("gs://bucket/")


def test_odd_names_are_accepted_and_not_confused():
    odd = ["A.png", "a.PNG", "\u0430.png", "a..png", "$(touch owned).png", "%2e%2e%2fx.png", "x\\..\\x.png", "-rf.tiff"]
    names = [f"{part}/{name}" for part in ("images", "masks/class_0") for name in ["a.png", *odd]]
    assert [sample.name for sample in paired(names)[1]] == sorted(["a.png", *odd])


LEFT_BEHIND = ["Thumbs.db", "__MACOSX/a.png", "._a.png", "a.png:Zone.Identifier", "@eaDir/a.png/x.png", "a_$folder$"]


@pytest.mark.parametrize("folder", ["", "images/", "masks/", "masks/class_0/"])
def test_what_desktops_and_nas_boxes_leave_behind_is_skipped(folder):
    """Also in places where it would be a class or an image."""
    class_folders, samples = paired(["images/a.png", "masks/class_0/a.png", *(folder + name for name in LEFT_BEHIND)])
    assert class_folders == ["class_0"] and [sample.name for sample in samples] == ["a.png"]


COMPOSED, DECOMPOSED = "sch\u00e4dling.png", "scha\u0308dling.png"


@pytest.mark.parametrize("image, mask", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_that_differ_only_in_unicode_form_are_paired(image, mask):
    _, (sample,) = paired([f"images/{image}", f"masks/class_0/{mask}"])
    assert (sample.name, sample.image.name) == (image, f"{SPLIT}/images/{image}")
    assert [blob.name for blob in sample.masks] == [f"{SPLIT}/masks/class_0/{mask}"]
    with pytest.raises(DatasetError, match="another file has in another Unicode form"):
        paired([f"images/{image}", f"images/{mask}", f"masks/class_0/{mask}"])


def test_all_wrong_names_are_counted_and_ten_are_named(tmp_path):
    fine = [f"{folder}/{number:02}.png" for folder in ("images", "masks/a", "masks/b") for number in range(20)]
    more = ["images/x.jpg", "masks/04.png", *(f"masks/b/{n}.png" for n in range(20, 30))]
    path = tmp_path / "tmp/problems.txt"
    with pytest.raises(DatasetError) as caught:
        paired([name for name in fine if name != "images/03.png"] + more, path)
    words = "14 files", " and 4 more. ", str(path)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    named = [line.split()[0].removeprefix(url(f"{SPLIT}/")) for line in path.read_text().splitlines()]
    assert [name in str(caught.value) for name in named] == 10 * [True] + 4 * [False]
    assert set(named) == {*more, "masks/a/03.png", "masks/b/03.png"}


@pytest.mark.parametrize("factor, number", [(1e-300, 1), (0.01, 1), (0.07, 7), (0.034, 4), (1.0, 100)])
def test_a_subset_is_drawn_in_order_and_again_the_same(factor, number):
    subset = draw_subset(list(range(100)), factor, 1)
    assert len(subset) == number and subset == sorted(subset) == draw_subset(list(range(100)), factor, 1)
    assert number == 100 or subset != draw_subset(list(range(100)), factor, 2)


# ---------------------------------------------------------------------------------------------------------------
# Images

WIDTH, HEIGHT = SIZE = (48, 32)
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), np.uint8)
INSIDE = PIXELS > 99


def encoded(pixels=PIXELS, kind="PNG", mode=None, palette=None, **options):
    file, image = io.BytesIO(), Image.fromarray(pixels).convert(mode)
    if palette:
        image.putpalette(palette)
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth=8, data=None, before=b""):
    raw = b"".join(b"\0" + row.tobytes() for row in PIXELS) if data is None else data
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def several_pages(*pages):
    """A TIFF of pages, each as its pixels and its NewSubfileType."""
    file = io.BytesIO()
    first, *others = [Image.fromarray(pixels) for pixels, _ in pages]
    for image, (_, flag) in zip(others, pages[1:], strict=True):
        image.encoderinfo = {"tiffinfo": {254: flag}}
    first.save(file, "TIFF", save_all=True, append_images=others, tiffinfo={254: pages[0][1]})
    return file.getvalue()


def with_tag(data, before, after):
    """A TIFF with another tag in place of one; each is (number, type, count, value)."""
    before, after = (struct.pack("<HHII", *tag) for tag in (before, after))
    assert data.count(before) == 1
    return data.replace(before, after)


SMALL = np.ascontiguousarray(PIXELS[::8, ::8])
PNG, TIFF = encoded(), encoded(kind="TIFF")
LZW, DEFLATE = (encoded(kind="TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate"))
DAMAGED = {
    **{f"cut after {percent} %.png": PNG[: len(PNG) * percent // 100] for percent in (5, 50, 99)},
    **{f"cut after {percent} %.tif": TIFF[: len(TIFF) * percent // 100] for percent in (0, 1, 50, 99)},
    **{f"deflate, cut at {percent} %.tif": DEFLATE[: len(DEFLATE) * percent // 100] for percent in (50, 99)},
    "deflate, changed in the middle.tif": DEFLATE.replace(DEFLATE[600:604], b"!!!!"),
    "LZW, changed in the middle.tif": LZW.replace(LZW[20:24], b"\xff" * 4),
    "JPEG, two beginnings.tif": encoded(kind="TIFF", compression="jpeg").replace(b"\xff\xda", b"\xff\xd8"),
    "too few pixels.png": png(data=b"\0" * 99),
    "an unknown compression.tif": with_tag(TIFF, (259, 3, 1, 1), (259, 3, 1, 4711)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_errors_and_no_library_writes_a_line_of_its_own(name, capfd):
    with pytest.raises(DatasetError) as caught:
        decode_image(DAMAGED[name], url(name), SIZE, MASK_MODES)
    assert str(caught.value).startswith(url(name)) and "BytesIO" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_no_flipped_bit_of_a_png_changes_a_pixel():
    for position in range(len(PNG)):
        with contextlib.suppress(DatasetError):
            data = PNG[:position] + bytes([PNG[position] ^ 0x40]) + PNG[position + 1 :]
            np.testing.assert_array_equal(decode_image(data, "a.png", SIZE, IMAGE_MODES), PIXELS)


ZERO_ONE, BLACK_WHITE = INSIDE * np.uint8(1), INSIDE * np.uint8(255)
REFUSED = {  # Pillow would silently rotate, invert, scale, drop or misread something, or the file is another one
    **{f"{n}.tif": (encoded(kind="TIFF", tiffinfo={274: n}), f"tag ({n})") for n in (0, *range(2, 10))},
    "XMP.tif": (encoded(kind="TIFF", tiffinfo={700: b'<x tiff:Orientation="3"/>'}), "orientation tag (3)"),
    "white is zero in one bit.tif": (encoded(kind="TIFF", mode="1", tiffinfo={262: 0}), "uint8, not bool"),
    "nothing about white.tif": (with_tag(TIFF, (262, 3, 1, 1), (263, 3, 1, 1)), "stores white as 0"),
    "float.tif": (encoded(PIXELS.astype("f4"), "TIFF"), "32-bit"),
    "16 bits.tif": (encoded(PIXELS.astype(np.uint16), "TIFF"), "16-bit"),
    "16 bits.png": (encoded(PIXELS.astype(np.uint16)), "16-bit"),
    "two channels.tif": (
        with_tag(encoded(kind="TIFF", mode="LA"), (338, 3, 1, 2), (338, 3, 1, 0)),
        "a channel of unknown meaning",
    ),
    "colour.tif": (encoded(np.dstack([PIXELS, PIXELS, PIXELS.T.reshape(SIZE[::-1])]), "TIFF"), "is in colour"),
    "two pages.tif": (several_pages((PIXELS, 0), (255 - PIXELS, 0)), "2 pages"),
    "another size.png": (encoded(PIXELS[:-1]), "48 x 31 pixels, but target_size in the dataset's config.yaml is 48"),
    "a TIFF.png": (TIFF, "a TIFF file by its content"),
    "a JPEG.png": (encoded(kind="JPEG"), "a JPEG file by its content"),
    "Git's.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "text.tif": (b"<html>", "no PNG or TIFF file by its content"),
    "swapped palette.png": (encoded(ZERO_ONE, palette=[255, 255, 255, 0, 0, 0]), "programs disagree"),
    "alpha.png": (encoded(np.dstack([*3 * [0 * BLACK_WHITE], BLACK_WHITE])), "is transparent in places"),
    "alpha in a palette.png": (encoded(ZERO_ONE, palette=[0, 0, 0, 9, 9, 9], transparency=0), "is transparent"),
    "green.png": (encoded(np.dstack([0 * BLACK_WHITE, BLACK_WHITE, 0 * BLACK_WHITE])), "is in colour"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_pillow_would_reinterpret_is_refused_with_a_reason(name):
    data, words = REFUSED[name]
    with pytest.raises(DatasetError) as caught:
        decode_image(data, url(name), SIZE, MASK_MODES)
    assert words in str(caught.value)


FINE = {
    "in capitals.PNG": PNG,
    "metadata cut short.png": png(before=b"".join(chunk(k, b"") for k in (b"gAMA", b"pHYs", b"iTXt", b"eXIf"))),
    "a damaged comment.png": png(before=chunk(b"tEXt", b"a\0b")[:-1] + b"!"),
    "a transparent grey value.png": encoded(transparency=9),
    "deflate.tiff": DEFLATE,
    "thumbnails before the image.tif": several_pages((SMALL, 1), (SMALL, 1), (PIXELS, 0)),
    "a transparency mask.tif": several_pages((PIXELS, 0), (PIXELS // 128, 4)),
}


@pytest.mark.parametrize("name", FINE)
def test_odd_images_are_decoded(name):
    for modes in (IMAGE_MODES, MASK_MODES):
        np.testing.assert_array_equal(decode_image(FINE[name], url(name), SIZE, modes), PIXELS)


def packed(bits):
    """INSIDE as a grey PNG of 2 or 4 bits, with all bits set inside."""
    rows = np.unpackbits(np.packbits(np.repeat(INSIDE, bits, axis=1), axis=1), axis=1)
    return png(depth=bits, data=b"".join(b"\0" + np.packbits(row).tobytes() for row in rows))


EDITORS_MASKS = {
    "1 bit.png": encoded(INSIDE),
    "1 bit.tif": encoded(INSIDE, "TIFF"),
    "2 bits.png": packed(2),
    "4 bits.png": packed(4),
    **{f"{mode}.png": encoded(BLACK_WHITE, mode=mode) for mode in ("RGB", "RGBA", "LA", "P")},
    **{f"{mode}.tif": encoded(BLACK_WHITE, "TIFF", mode=mode) for mode in ("RGB", "RGBA", "LA", "P")},
    "a palette of two.png": encoded(ZERO_ONE, palette=[0, 0, 0, 9, 9, 9]),
}


@pytest.mark.parametrize("name", EDITORS_MASKS)
def test_masks_are_read_as_editors_save_them_and_images_stay_strict(name):
    np.testing.assert_array_equal(decode_image(EDITORS_MASKS[name], url(name), SIZE, MASK_MODES) != 0, INSIDE)
    with pytest.raises(DatasetError, match="not 8-bit greyscale"):
        decode_image(EDITORS_MASKS[name], url(name), SIZE, IMAGE_MODES)


def test_files_of_public_reports():
    for name in ("image_odd_profile.png", "image_with_thumbnail.tif"):
        pixels = decode_image((CASES / name).read_bytes(), name, (96, 64), IMAGE_MODES)
        np.testing.assert_array_equal(pixels, TRUTH["image"])
    for name, words in (
        ("image_signed.tif", "signed numbers"),
        ("mask_orientation_3.tif", "orientation tag .3"),
        ("mask_orientation_6_square.tif", "orientation tag .6"),
        ("mask_white_is_zero.tif", "stores white as 0"),
    ):
        with pytest.raises(DatasetError, match=words):
            decode_image((CASES / name).read_bytes(), name, (96, 64), MASK_MODES)


# ---------------------------------------------------------------------------------------------------------------
# Samples


def samples_and_bucket(folder):
    bucket = open_bucket(str(folder), None)
    return pair_images_and_masks(bucket.list(SPLIT), SPLIT, bucket.url, None)[1], bucket


def a_split(folder, number, *masks):
    """Samples of a new bucket in a folder, all with the same image and masks, and the bucket."""
    write_split(folder / SPLIT, number * [PIXELS], number * [np.dstack(masks)])
    return samples_and_bucket(folder)


def test_samples_come_in_order_with_pixels_and_digest(tmp_path):
    samples, bucket = a_split(tmp_path, 30, BLACK_WHITE, PIXELS % 2)
    for sample, decoded in zip(samples, decode_samples(samples, bucket, SIZE, 3), strict=True):
        assert decoded.sample == sample and decoded.problems == decoded.remarks == []
        np.testing.assert_array_equal(decoded.image, PIXELS)
        np.testing.assert_array_equal(decoded.masks, np.dstack([ZERO_ONE, PIXELS % 2]))
        assert (decoded.image.dtype, decoded.masks.dtype) == (np.uint8, np.uint8)
        contents = b"".join((tmp_path / blob.name).read_bytes() for blob in (sample.image, *sample.masks))
        assert decoded.digest == hashlib.blake2b(contents, digest_size=16).digest()


def test_files_that_cannot_be_used_are_named_and_the_others_decoded(tmp_path):
    a_split(tmp_path, 6, BLACK_WHITE)
    image, mask = (tmp_path / SPLIT / f"{folder}/slice_0004.png" for folder in ("images", "masks/class_0"))
    image.write_bytes(PNG[:99])
    mask.write_bytes(encoded(PIXELS[:-1]))
    for number, decoded in enumerate(decode_samples(*samples_and_bucket(tmp_path), SIZE, 20)):
        wrong = [image, mask] if number == 4 else []
        assert [tmp_path / name for name, _ in decoded.problems] == wrong
        assert all(sentence.startswith(str(tmp_path / name)) for name, sentence in decoded.problems)
        assert (decoded.image is None) == (decoded.masks is None) == bool(wrong) and len(decoded.digest) == 16


def test_an_error_of_the_bucket_comes_in_place_of_its_sample(tmp_path):
    samples, bucket = a_split(tmp_path, 9, BLACK_WHITE)
    (tmp_path / samples[7].image.name).unlink()
    decoded = decode_samples(samples, bucket, SIZE, 3)
    assert [next(decoded).sample for _ in range(7)] == samples[:7]
    with pytest.raises(BucketError, match=samples[7].name):
        next(decoded)


def test_fetching_starts_with_the_call_and_only_a_few_are_fetched_and_decoded_ahead(tmp_path, monkeypatch):
    samples, bucket = a_split(tmp_path, 99, BLACK_WHITE)
    monkeypatch.setattr("image_utils.FETCH_AHEAD", 20)
    fetch, read = (mock.Mock(wraps=getattr(bucket, name)) for name in ("fetch", "read"))
    monkeypatch.setattr(bucket, "fetch", fetch)
    monkeypatch.setattr(bucket, "read", read)
    decoded = decode_samples(samples, bucket, SIZE, 5)
    while fetch.call_count < 2 * 20:
        time.sleep(0.01)
    assert not read.called
    for number, _ in enumerate(decoded, start=1):
        fetched = fetch.call_count - read.call_count  # to read a file of a directory, it is fetched too
        assert read.call_count <= 2 * (number + 5) and fetched <= 2 * (number + 5 + 20)


# ---------------------------------------------------------------------------------------------------------------
# Doubtful masks


def remarks(folder, *masks):
    """Those of one sample with these masks, as explain_remarks takes them."""
    write_split(folder / SPLIT, [masks[0]], [np.dstack(masks)])
    (decoded,) = decode_samples(*samples_and_bucket(folder), masks[0].shape[::-1], 1)
    return {kind: (1, name, detail) for kind, name, detail in decoded.remarks}


@pytest.mark.parametrize(
    "mask, words",
    [
        (PIXELS, "have more than two grey values: 1, such as {} with 256 grey values. Every pixel that is not 0"),
        (JPEG, "have more than two grey values: 1, such as {} with 55 grey values"),
        (np.where(INSIDE, np.uint8(200), np.uint8(90)), "no 0: 1, such as {} with 2 grey values (90, 200)"),
        (1 + ZERO_ONE, "no 0: 1, such as {} with 2 grey values (1, 2)"),
        (PIXELS % 4, "look like label maps: 1, such as {} with 4 grey values (0, 1, 2, 3)"),
        (np.where(INSIDE, np.uint8(255), PIXELS % 3), "look like label maps: 1, such as"),
        (np.where(INSIDE, np.uint8(255), PIXELS % 2), "both 1 and 255: 1, such as {} with 3 grey values (0, 1, 255)"),
    ],
)
def test_doubtful_masks_are_a_warning_that_says_what_they_look_like(tmp_path, mask, words):
    (warning,) = explain_remarks(remarks(tmp_path, mask), 1, url)
    assert words.format(url(f"{SPLIT}/masks/class_0/slice_0000.png")) in warning


@pytest.mark.parametrize("mask", [0 * PIXELS, 0 * PIXELS + 1, 0 * PIXELS + 255, PIXELS % 2, BLACK_WHITE])
def test_plain_masks_are_no_warning(tmp_path, mask):
    assert remarks(tmp_path, mask, 0 * PIXELS, PIXELS % 2) == {}


def test_equal_masks_in_all_class_folders_are_an_error_if_they_are_equal_throughout(tmp_path):
    equal = remarks(tmp_path / "equal", PIXELS % 4, PIXELS % 4)
    blank = remarks(tmp_path / "blank", 0 * PIXELS, 0 * PIXELS)
    for found, number in ((equal, 1), (equal | blank, 2)):
        with pytest.raises(DatasetError, match="all class folders hold the same masks, such as gs://bucket/datasets"):
            explain_remarks(found, number, url)
    assert "label maps" in explain_remarks(equal, 2, url)[0]
    assert explain_remarks(blank, 1, url) == []
