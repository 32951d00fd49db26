"""Images and masks: names, pairing, decoding, and one error that names all files that cannot be used."""

import io
import os
import resource
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from fake_gcs import listing_stub
from helpers import ROOT, SPLIT, arguments, assert_one_error_line, run_tool
from hostile import attempt, error_line, memory, mutate, mutations, sealed_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import terminal
from blobs import Blob
from errors import BucketError, DatasetError
from gcp_utils import open_bucket
from image_utils import (
    Problems,
    Sample,
    check_sizes_in_bytes,
    decode_image,
    draw_subset,
    is_leftover,
    pair_images_and_masks,
    start_decoding,
)


@pytest.fixture(autouse=True)
def sealed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with sealed_folder(tmp_path):
        yield


# ---------------------------------------------------------------------------------------------------------------
# Names

REFUSED_NAMES = {
    "climbing out": f"{SPLIT}/images/../../../../etc/passwd.png",
    "climbing out at the end": f"{SPLIT}/images/..",
    "an empty part": f"{SPLIT}/images//etc/passwd.png",
    "a dot part": f"{SPLIT}/images/./x.png",
    "an escape sequence": f"{SPLIT}/images/\x1b]0;owned\x07\x1b[2J.png",
    "a C1 escape": f"{SPLIT}/images/\x9b2J.png",
    "a newline": f"{SPLIT}/images/x.png\nerror: all is well.png",
    "a carriage return": f"{SPLIT}/images/x\rerror: all is well.png",
    "a null byte": f"{SPLIT}/images/x.png\0.png",
    "a delete character": f"{SPLIT}/images/\x7f\x7f\x7f.png",
    "text, not an image": f"{SPLIT}/images/x.png.exe",
    "no ending": f"{SPLIT}/images/png",
    "an ending with a space": f"{SPLIT}/images/x.png ",
    "a right-to-left override": f"{SPLIT}/images/\u202egnp.x",
    "a full-width dot": f"{SPLIT}/images/x\uff0epng",
    "a mask without a class": f"{SPLIT}/masks/x.png",
    "a mask too deep": f"{SPLIT}/masks/class_0/class_1/x.png",
    "a very long name": f"{SPLIT}/images/{'x' * 900}.png",
    "a name that is a format string": f"{SPLIT}/images/{{0.__class__}}%s%n.png",
    "another case": f"{SPLIT}/images/A.png",
    "another Unicode form": f"{SPLIT}/images/a\u0301.png",
}


def pair(names, monkeypatch, tmp_path):
    with listing_stub(names) as (url, _):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        bucket = open_bucket("gs://bucket", tmp_path / "tmp/objects")
        return pair_images_and_masks(bucket.list(SPLIT), SPLIT, bucket.url, tmp_path / "tmp/problems.txt")


@pytest.mark.parametrize("what", REFUSED_NAMES)
def test_a_hostile_name_is_one_clean_error_line(what, monkeypatch, tmp_path, capsys):
    name = REFUSED_NAMES[what]
    names = [f"{SPLIT}/images/a.png", f"{SPLIT}/masks/class_0/a.png", name]
    # The last part of the name, with escapes for what would steer a terminal.
    shown = name.rpartition("/")[2].split("\n")[0].encode("unicode_escape").decode() if name.isascii() else ""
    error_line(lambda: pair(names, monkeypatch, tmp_path), capsys, "gs://bucket", shown)


ODD_BUT_FINE = [
    "A.png",
    "a.PNG",
    "\u0430.png",  # Cyrillic
    "a\u0301.png",
    "\u00e1.png",
    "a..png",
    "$(touch owned).png",
    "`touch owned`.png",
    "; touch owned;.png",
    "%2e%2e%2fx.png",
    "x\\..\\x.png",
    "C:\\x.png",
    "-rf.png",
    "$\\frac{.png",
    "x" * 240 + ".png",
]


def test_odd_names_are_accepted_and_not_confused(monkeypatch, tmp_path):
    names = [f"{SPLIT}/{part}/{name}" for part in ("images", "masks/class_0") for name in ["a.png", *ODD_BUT_FINE]]
    _, samples = pair(names, monkeypatch, tmp_path)
    assert [sample.name for sample in samples] == sorted(["a.png", *ODD_BUT_FINE])


def test_too_many_classes_are_refused(monkeypatch, tmp_path, capsys):
    names = [f"{SPLIT}/images/a.png", *(f"{SPLIT}/masks/{number}/a.png" for number in range(101))]
    error_line(lambda: pair(names, monkeypatch, tmp_path), capsys, "101 folders", "at most 100 classes")


@pytest.mark.parametrize("name", [b"\xff.png", b"a\nb.png", b"\x1b[2J.png", b"\xed\xa0\x80.png"])
def test_hostile_names_in_a_directory(name, tmp_path, capsys):
    folder = tmp_path / "bucket" / SPLIT / "images"
    folder.mkdir(parents=True)
    Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(b"x")
    bucket = open_bucket("bucket", tmp_path / "tmp/objects")
    error_line(lambda: bucket.list(SPLIT), capsys, repr(os.fsdecode(name))[1:-1])


def test_a_link_to_a_file_outside_leaks_nothing(tmp_path, capsys):
    folder = tmp_path / "bucket" / SPLIT / "images"
    folder.mkdir(parents=True)
    (folder / "a.png").symlink_to("/etc/passwd")
    bucket = open_bucket("bucket", tmp_path / "tmp/objects")
    (blob,) = bucket.list(SPLIT)
    line = error_line(lambda: decode_image(bucket.read(blob), bucket.url(blob.name), (9, 9), ("L",)), capsys, "a.png")
    assert "root" not in line


def blobs_of(names, size=5):
    return [Blob(f"{SPLIT}/{name}", size, "1") for name in names]


def paired(names, path="tmp/problems.txt"):
    return pair_images_and_masks(blobs_of(names), SPLIT, lambda name: f"gs://bucket/{name}", path)


LEFT_BEHIND = [
    *(
        "Thumbs.db",
        "thumbs.DB",
        "ehthumbs.db",
        "desktop.ini",
        "Desktop.ini",
        "Icon\r",
        ".DS_Store",
        "._a.png",
        ".a.png",
    ),
    *("@eaDir/a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "__MACOSX/._a.png", "#recycle/a.png", "@Recycle/a.png"),
    *("a_$folder$", ".ipynb_checkpoints/a-checkpoint.png", "$RECYCLE.BIN/a.png", "a.png:Zone.Identifier", "_SUCCESS"),
]


@pytest.mark.parametrize("folder", ["", "images/", "masks/", "masks/class_0/"])
def test_what_desktops_and_nas_boxes_leave_behind_is_skipped(folder):
    """Also in places where it would be a class or an image."""
    class_folders, samples = paired(["images/a.png", "masks/class_0/a.png", *(folder + name for name in LEFT_BEHIND)])
    assert class_folders == ["class_0"] and [sample.name for sample in samples] == ["a.png"]


@pytest.mark.parametrize(
    "name", ["images/..", "images/./a.png", "..", "Icon", "images/folder$", "desktop.ini.png", "a@eaDir"]
)
def test_similar_names_are_not_skipped(name):
    assert not is_leftover(name)


COMPOSED, DECOMPOSED = "sch\u00e4dling.png", "scha\u0308dling.png"


@pytest.mark.parametrize("image, mask", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_that_differ_only_in_unicode_form_are_paired(image, mask):
    _, (sample,) = paired([f"images/{image}", f"masks/class_0/{mask}"])
    assert (sample.name, sample.image.name) == (image, f"{SPLIT}/images/{image}")
    assert [blob.name for blob in sample.masks] == [f"{SPLIT}/masks/class_0/{mask}"]
    with pytest.raises(DatasetError, match="has no partner"):  # one mask does not serve two images
        paired([f"images/{image}", f"images/{mask}", f"masks/class_0/{mask}"])
    with pytest.raises(DatasetError, match="has no partner"):  # nor does one in a third form
        paired(["images/\u00c5.png", "images/\u212b.png", "masks/class_0/A\u030a.png"])


def test_all_wrong_names_are_counted_and_ten_are_named(tmp_path):
    fine = [f"{folder}/{number:02}.png" for folder in ("images", "masks/a", "masks/b") for number in range(20)]
    names = [name for name in fine if name not in ("images/03.png", "masks/a/04.png")]
    names += [
        "images/x.jpg",
        "masks/c/notes.txt",
        "masks/04.png",
        *(f"masks/b/{number}.png" for number in range(20, 30)),
    ]
    path = tmp_path / "tmp/problems.txt"
    with pytest.raises(DatasetError) as caught:
        paired(names, path)
    assert "16 files" in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    lines = path.read_text().splitlines()
    assert len(lines) == 16  # image 03 is missing twice
    named = [line.split()[0].removeprefix("gs://bucket/") for line in lines]
    assert [name in str(caught.value) for name in named] == 10 * [True] + 6 * [False]
    wrong = {"images/x.jpg", "masks/c/notes.txt", "masks/04.png", "masks/a/03.png", "masks/b/03.png", "images/04.png"}
    assert set(named) == {f"{SPLIT}/{name}" for name in wrong} | {f"{SPLIT}/masks/b/{n}.png" for n in range(20, 30)}


def test_a_single_problem_is_the_whole_message(tmp_path):
    with pytest.raises(DatasetError) as caught:
        paired(["images/a.png", "images/b.png", "masks/a/a.png"], tmp_path / "tmp/problems.txt")
    assert str(caught.value) == (
        f"gs://bucket/{SPLIT}/images/b.png has no partner: add gs://bucket/{SPLIT}/masks/a/b.png or remove it"
    )
    assert not (tmp_path / "tmp").exists()


@pytest.mark.parametrize("path", ["bucket/problems.txt", "tmp/problems.txt"])
def test_without_room_for_the_list_the_error_still_names_ten(path, tmp_path):
    (tmp_path / "bucket").write_text("")
    problems = Problems(tmp_path / path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        for number in range(5000):
            problems.add(f"{number}.png", f"{number}.png is empty")
        error = str(problems.error())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "5,000 files" in error and all(f"{number}.png" in error for number in range(10))
    assert "problems.txt, cannot be written" in error
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "bucket"]


def test_a_list_of_problems_is_there_when_it_is_whole(tmp_path):
    """Another process may write the same list, and end at any moment."""
    finished, unfinished = (Problems(tmp_path / "tmp/problems.txt") for _ in range(2))
    for number in range(3):
        for problems in (unfinished, finished):
            problems.add(f"{number}.png", f"{number}.png is empty")
    assert not (tmp_path / "tmp/problems.txt").exists()
    finished.error()
    unfinished.add("4.png", "4.png is empty")
    assert (tmp_path / "tmp/problems.txt").read_text().splitlines() == [f"{number}.png is empty" for number in range(3)]


def test_all_files_of_impossible_size_are_named_before_anything_is_fetched(tmp_path):
    samples = [
        Sample(f"{n}", *blobs_of([f"images/{n}.png"], n), tuple(blobs_of([f"masks/a/{n}.png"]))) for n in range(3)
    ]
    samples.append(Sample("big", *blobs_of(["images/big.png"], 2**40), tuple(blobs_of(["masks/a/big.png"], 0))))
    with pytest.raises(DatasetError) as caught:
        check_sizes_in_bytes(samples, lambda name: name, SIZE, tmp_path / "tmp/problems.txt")
    assert "3 files" in str(caught.value)
    assert [line.split()[0] for line in (tmp_path / "tmp/problems.txt").read_text().splitlines()] == [
        f"{SPLIT}/images/0.png", f"{SPLIT}/images/big.png", f"{SPLIT}/masks/a/big.png"
    ]  # fmt: skip
    check_sizes_in_bytes(samples[1:3], lambda name: name, SIZE, tmp_path / "tmp/problems.txt")


@pytest.mark.parametrize("factor", [1e-300, 1e-9, 0.01, 0.3])
def test_a_factor_that_leaves_no_image_means_one_image(factor):
    assert len(draw_subset(["a", "b", "c"], factor, 1)) == 1


# ---------------------------------------------------------------------------------------------------------------
# Images

WIDTH, HEIGHT = SIZE = (48, 32)
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), np.uint8)


def encoded(pixels=PIXELS, kind="PNG", mode=None, **options):
    file, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width=WIDTH, height=HEIGHT, depth=8, colour=0, interlace=0, data=None, before=b""):
    raw = b"".join(b"\0" + row.tobytes() for row in PIXELS) if data is None else data
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    chunks = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def text_chunk(size):
    return chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(size)))


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :]


def several_pages(kind="TIFF", pages=((PIXELS, 0), (255 - PIXELS, 0))):
    """Each page with its NewSubfileType."""
    file = io.BytesIO()
    first, *others = [Image.fromarray(pixels) for pixels, _ in pages]
    for image, (_, flag) in zip(others, pages[1:], strict=True):
        image.encoderinfo = {"tiffinfo": {254: flag}}
    first.save(file, kind, save_all=True, append_images=others, tiffinfo={254: pages[0][1]})
    return file.getvalue()


def tiff(tags, data=b""):
    """A little-endian TIFF with one page; tags are (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


BASE_TAGS = {256: (4, 1, WIDTH), 257: (4, 1, HEIGHT), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}


def odd_tiff(tags, data=bytes(4096)):
    return tiff([(tag, *value) for tag, value in (BASE_TAGS | tags).items()], data)


SMALL = np.ascontiguousarray(PIXELS[::8, ::8])
PNG, TIFF = encoded(), encoded(kind="TIFF")
MIDDLE = len(PNG) // 2
BOMB = np.zeros((8192, 8192), np.uint8)
HOSTILE_IMAGES = {
    "a PNG bomb": ("x.png", lambda: encoded(BOMB)),
    "a TIFF bomb": ("x.tif", lambda: encoded(BOMB, "TIFF", compression="tiff_adobe_deflate")),
    "a PNG that claims 2^31 pixels a side": ("x.png", lambda: png(2**31 - 1, 2**31 - 1)),
    "a TIFF that claims 2^31 pixels a side": (
        "x.tif", lambda: odd_tiff({256: (4, 1, 2**31 - 1), 257: (4, 1, 2**31 - 1)})
    ),
    "a PNG of no width": ("x.png", lambda: png(0, HEIGHT)),
    "a PNG of no height": ("x.png", lambda: png(WIDTH, 0)),
    "a TIFF of no size": ("x.tif", lambda: odd_tiff({256: (4, 1, 0), 257: (4, 1, 0)})),
    "too few pixels": ("x.png", lambda: png(data=b"\0" * 99)),
    "a bad zlib stream": ("x.png", lambda: PNG.replace(zlib.compress(b"")[:2], b"\xff\xff", 1)[:-40]),
    "a flipped bit in the pixels": ("x.png", lambda: flipped(PNG, MIDDLE)),
    "a flipped bit in the header": ("x.png", lambda: flipped(PNG, 18)),
    "a flipped bit in the last checksum": ("x.png", lambda: flipped(PNG, len(PNG) - 14)),
    "no IEND": ("x.png", lambda: PNG[:-12]),
    "no pixels": ("x.png", lambda: PNG[:33] + PNG[-12:]),
    "nothing but the signature": ("x.png", lambda: PNG[:8]),
    "one byte": ("x.png", lambda: b"\x89"),
    "a chunk longer than the file": ("x.png", lambda: PNG[:33] + b"\x7f\xff\xff\xffIDAT" + PNG[41:]),
    "a TIFF by content": ("x.png", lambda: TIFF),
    "a PNG by content": ("x.tiff", lambda: PNG),
    "a JPEG by content": ("x.png", lambda: encoded(kind="JPEG")),
    "a GIF by content": ("x.tif", lambda: encoded(kind="GIF")),
    "an EPS by content": ("x.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 32\n(owned) (w) file\n"),
    "an SVG by content": ("x.png", lambda: b"<svg><script>owned</script></svg>"),
    "16 bits": ("x.png", lambda: encoded(PIXELS.astype(np.uint16) * 256)),
    "16 bits in a TIFF": ("x.tif", lambda: encoded(PIXELS.astype(np.uint16) * 256, "TIFF")),
    "float": ("x.tif", lambda: encoded(PIXELS.astype(np.float32), "TIFF")),
    "32-bit integers": ("x.tif", lambda: encoded(PIXELS.astype(np.int32), "TIFF")),
    "colour": ("x.png", lambda: encoded(mode="RGB")),
    "a palette": ("x.png", lambda: encoded(mode="P")),
    "alpha": ("x.png", lambda: encoded(mode="LA")),
    "CMYK": ("x.tif", lambda: encoded(kind="TIFF", mode="CMYK")),
    "one bit": ("x.png", lambda: encoded(mode="1")),
    "an animation": ("x.png", lambda: several_pages("PNG")),
    "two pages": ("x.tif", several_pages),
    "another size": ("x.png", lambda: encoded(PIXELS[:-1])),
    "another size in a TIFF": ("x.tif", lambda: encoded(PIXELS[:-1], "TIFF")),
    "a TIFF without strips": ("x.tif", lambda: odd_tiff({})),
    "strips beyond the file": ("x.tif", lambda: odd_tiff({273: (4, 1, 2**31), 278: (4, 1, HEIGHT), 279: (4, 1, 1536)})),
    "2^30 strips": ("x.tif", lambda: odd_tiff({273: (4, 2**30, 8), 278: (4, 1, 1), 279: (4, 2**30, 8)})),
    "tiles of 2^30 pixels": (
        "x.tif",
        lambda: odd_tiff({259: (3, 1, 8), 322: (4, 1, 2**15), 323: (4, 1, 2**15), 324: (4, 1, 200), 325: (4, 1, 99)}),
    ),
    "tiles of no size": (
        "x.tif", lambda: odd_tiff({322: (4, 1, 0), 323: (4, 1, 0), 324: (4, 1, 200), 325: (4, 1, 99)})
    ),
    "an unknown compression": (
        "x.tif", lambda: odd_tiff({259: (3, 1, 4711), 273: (4, 1, 200), 278: (4, 1, HEIGHT), 279: (4, 1, 1536)})
    ),
    "JPEG in a TIFF, and no JPEG": (
        "x.tif", lambda: odd_tiff({259: (3, 1, 7), 273: (4, 1, 200), 278: (4, 1, HEIGHT), 279: (4, 1, 1536)})
    ),
    "2^16 samples a pixel": ("x.tif", lambda: odd_tiff({277: (3, 1, 65535), 273: (4, 1, 200), 279: (4, 1, 1536)})),
    "a directory that is its own next": ("x.tif", lambda: TIFF[:4] + struct.pack("<I", 4) + TIFF[8:]),
    "a directory beyond the file": ("x.tif", lambda: TIFF[:4] + struct.pack("<I", 2**32 - 1) + TIFF[8:]),
    "tags of a wrong type": ("x.tif", lambda: odd_tiff({256: (2, 4, 0x41414141), 257: (12, 1, 8)})),
    **{
        f"a PNG cut after {percent} %": ("x.png", lambda percent=percent: PNG[: len(PNG) * percent // 100])
        for percent in (1, 10, 50, 90, 99)
    },
    **{
        f"a TIFF cut after {percent} %": ("x.tif", lambda percent=percent: TIFF[: len(TIFF) * percent // 100])
        for percent in (1, 10, 50, 90)
    },
    **{
        f"a {name} TIFF cut in the middle": (
            "x.tif", lambda name=name: (data := encoded(kind="TIFF", compression=name))[: len(data) // 2]
        )
        for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits")
    },
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_IMAGES)
def test_hostile_images(what, capfd, recwarn):
    name, make = HOSTILE_IMAGES[what]
    data = make()
    Path("/proc/self/clear_refs").write_text("5")  # the memory for making the file does not count
    before = memory("VmRSS")
    with pytest.raises(DatasetError) as caught:
        decode_image(data, f"gs://bucket/{name}", SIZE, modes=("L",))
    assert memory("VmHWM") - before < 100
    Path("/proc/self/clear_refs").write_text("5")
    noise = capfd.readouterr()
    assert noise == ("", "") or "JPEG" in what  # libtiff's JPEG decoder cannot be silenced
    terminal.fail(caught.value)
    line = capfd.readouterr().err
    assert line.startswith(f"error: gs://bucket/{name} ") and line[:-1].isprintable() and len(line) < 600
    assert "BytesIO" not in line


def plain(tags, pixels=PIXELS):
    """An uncompressed TIFF with these tags."""
    rows = {273: (4, 1, 8 + 2 + 12 * 20 + 4), 278: (4, 1, HEIGHT), 279: (4, 1, pixels.nbytes)}
    data = odd_tiff(rows | tags, b"")
    return data.ljust(8 + 2 + 12 * 20 + 4, b"\0") + pixels.tobytes()


REFUSED_WITH_A_REASON = {  # Pillow would silently rotate, invert, scale, drop or misread something
    **{
        f"orientation {number}": ("x.tif", lambda n=number: encoded(kind="TIFF", tiffinfo={274: n}), f"tag ({number})")
        for number in (0, *range(2, 10))
    },
    "orientation in XMP": (
        "x.tif", lambda: encoded(kind="TIFF", tiffinfo={700: b'<x tiff:Orientation="3"/>'}), "orientation tag (3)"
    ),
    "orientation in the Exif of a PNG": ("x.png", lambda: encoded(exif=orientation(6)), "orientation tag (6)"),
    "white is zero": ("x.tif", lambda: encoded(kind="TIFF", tiffinfo={262: 0}), "Invert LUT"),
    "white is zero in one bit": ("x.tif", lambda: encoded(kind="TIFF", mode="1", tiffinfo={262: 0}), "uint8, not bool"),
    "nothing about white": ("x.tif", lambda: plain({262: (3, 0, 0)}), "photometric interpretation"),
    "signed": ("x.tif", lambda: plain({339: (3, 1, 2)}), "signed"),
    "float": ("x.tif", lambda: plain({339: (3, 1, 3), 258: (3, 1, 32)}, PIXELS.astype("f4")), "floating-point"),
    "double": ("x.tif", lambda: plain({339: (3, 1, 3), 258: (3, 1, 64)}, PIXELS.astype("f8")), "floating-point"),
    "complex": ("x.tif", lambda: plain({339: (3, 1, 6), 258: (3, 1, 64)}, PIXELS.astype("c8")), "sample format 6"),
    "16 bits": ("x.tif", lambda: plain({258: (3, 1, 16)}, PIXELS.astype("u2")), "16-bit"),
    "16 bits in a PNG": ("x.png", lambda: encoded(PIXELS.astype(np.uint16)), "16-bit"),
    "4 bits": ("x.tif", lambda: plain({258: (3, 1, 4)}), "4-bit"),
    "4 bits in a PNG": ("x.png", lambda: png(depth=4, data=bytes(25 * HEIGHT)), "4-bit"),
    "reversed bits": ("x.tif", lambda: encoded(kind="TIFF", tiffinfo={266: 2}), "fill order"),
    "a second channel": ("x.tif", lambda: plain({277: (3, 1, 2), 338: (3, 1, 0)}, np.repeat(PIXELS, 2)), "channels"),
    "a palette": ("x.tif", lambda: encoded(kind="TIFF", mode="P"), "palette"),
    "a palette in a PNG": ("x.png", lambda: encoded(mode="P"), "palette"),
    "transparency": ("x.png", lambda: encoded(mode="LA"), "transparency"),
    "colour": ("x.tif", lambda: encoded(kind="TIFF", mode="RGB"), "colour"),
    "two pages": ("x.tif", several_pages, "2 pages"),
    "a stack of ImageJ in one page": (
        "x.tif", lambda: encoded(kind="TIFF", tiffinfo={270: "ImageJ=1.53t\nimages=7\nslices=7\n"}), "7 pages or slices"
    ),
    "a stack of tifffile in one page": (
        "x.tif", lambda: encoded(kind="TIFF", tiffinfo={270: '{"shape": [5, 32, 48], "truncated": true}'}), "several"
    ),
    "a volume": ("x.tif", lambda: plain({32997: (4, 1, 9)}), "9 pages or slices"),
    "a strip for each slice": ("x.tif", lambda: two_strips(), "more strips"),
    "a thousand thumbnails": ("x.tif", lambda: several_pages(pages=[(PIXELS, 0), *99 * [(SMALL, 1)]]), "pages"),
    "an animation": ("x.png", lambda: several_pages("PNG"), "animation"),
    "JPEG 2000 in a TIFF": ("x.tif", lambda: plain({259: (3, 1, 33003)}), "33003"),
    "the PNG of iPhones": ("x.png", lambda: PNG[:8] + chunk(b"CgBI", b"0000") + PNG[8:], "CgBI"),
    "a pointer of Git LFS": ("x.png", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "a big-endian BigTIFF": ("x.tif", lambda: b"MM\0+\0\x08\0\0" + bytes(99), "BigTIFF"),
}  # fmt: skip


def two_strips():
    """Two strips, each as large as the image: Pillow reads the second one, other programs the first."""
    file = plain({273: (4, 2, 254 + PIXELS.nbytes), 279: (4, 2, 254 + PIXELS.nbytes)})
    return file + struct.pack("<II", 254, 254)


@pytest.mark.parametrize("what", REFUSED_WITH_A_REASON)
def test_what_pillow_would_reinterpret_is_refused_with_a_reason(what):
    name, make, words = REFUSED_WITH_A_REASON[what]
    for modes in (("L",), ("L", "1")):
        with pytest.raises(DatasetError) as caught:
            decode_image(make(), f"gs://bucket/{name}", SIZE, modes)
        assert words in str(caught.value) and "cannot be decoded" not in str(caught.value)


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "group4"})])
def test_masks_of_one_bit_are_read(kind, options):
    data = encoded(PIXELS > 99, kind, **options)
    np.testing.assert_array_equal(decode_image(data, f"x.{kind[:4].lower()}", SIZE, ("L", "1")) != 0, PIXELS > 99)
    with pytest.raises(DatasetError, match="1-bit"):
        decode_image(data, f"x.{kind.lower()}", SIZE, ("L",))


def test_the_libraries_print_nothing(tmp_path):
    """In a process, because pytest captures warnings."""
    (tmp_path / "bucket").mkdir()
    for number, data in enumerate((TIFF[:100], TIFF[: len(TIFF) // 2], odd_tiff({256: (2, 4, 0x41414141)}), PNG[:99])):
        (tmp_path / f"bucket/{number}.tif").write_bytes(data)
    code = """
import pathlib, sys, image_utils
for path in sorted(pathlib.Path("bucket").iterdir()):
    try:
        image_utils.decode_image(path.read_bytes(), path.name, (48, 32), ("L",))
    except image_utils.DatasetError:
        print("refused")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (process.stdout, process.stderr) == ("refused\n" * 4, "")


def interlaced():
    """A PNG in seven passes (Adam7), which Pillow cannot write."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = (row for y, x, dy, dx in passes for row in PIXELS[y::dy, x::dx])
    return png(interlace=1, data=b"".join(b"\0" + row.tobytes() for row in rows))


def big_endian():
    tags = BASE_TAGS | {273: (4, 1, 200), 278: (4, 1, HEIGHT), 279: (4, 1, PIXELS.nbytes)}
    entries = b"".join(
        struct.pack(">HHI", tag, kind, count) + struct.pack(">I" if kind == 4 else ">Hxx", value)
        for tag, (kind, count, value) in sorted(tags.items())
    )
    return (b"MM\0*" + struct.pack(">IH", 8, len(tags)) + entries + bytes(4)).ljust(200, b"\0") + PIXELS.tobytes()


def orientation(number):
    exif = Image.Exif()
    exif[274] = number
    return exif


FINE_IMAGES = {
    "made by hand": ("x.png", png),
    "interlaced": ("x.png", interlaced),
    "in capitals": ("x.PNG", lambda: PNG),
    "a profile with an unknown compression": ("x.png", lambda: png(before=chunk(b"iCCP", b"x\0\x07" + PNG))),
    "a colour profile of 500 MB": (
        "x.png",
        lambda: png(before=chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(500_000_000), 1))),
    ),
    "a text chunk of 50 MB": ("x.png", lambda: png(before=text_chunk(50_000_000))),
    "500 text chunks of 1 MB": ("x.png", lambda: png(before=text_chunk(1_000_000) * 500)),
    "gamma": ("x.png", lambda: png(before=chunk(b"gAMA", struct.pack(">I", 45455)))),
    "metadata cut short": (
        "x.png",
        lambda: png(before=b"".join(chunk(k, b"") for k in (b"gAMA", b"pHYs", b"tRNS", b"iTXt"))),
    ),
    "a comment with a wrong checksum": ("x.png", lambda: png(before=chunk(b"tEXt", b"a\0b")[:-1] + b"!")),
    "a grey value that is transparent": ("x.png", lambda: encoded(transparency=9)),
    "upright": ("x.png", lambda: encoded(exif=orientation(1))),
    "Exif that is damaged": ("x.png", lambda: png(before=chunk(b"eXIf", b"MM" + bytes(range(200, 240))))),
    "a suggested palette": ("x.png", lambda: png(before=chunk(b"PLTE", b"rgb"))),
    "an upright TIFF": ("x.tif", lambda: encoded(kind="TIFF", tiffinfo={274: 1})),
    "a TIFF with a profile": ("x.tif", lambda: encoded(kind="TIFF", icc_profile=b"no profile", dpi=(300, 300))),
    "a TIFF of ImageJ": ("x.tif", lambda: encoded(kind="TIFF", tiffinfo={270: "ImageJ=1.53t\nimages=1\nmin=9.0\n"})),
    "a big-endian TIFF": ("x.tif", big_endian),
    "thumbnails after the image": ("x.tif", lambda: several_pages(pages=[(PIXELS, 0), (SMALL, 1), (SMALL, 1)])),
    "a transparency mask after the image": ("x.tif", lambda: several_pages(pages=[(PIXELS, 0), (PIXELS // 128, 4)])),
    "thumbnails before the image": ("x.tif", lambda: several_pages(pages=[(SMALL, 1), (SMALL, 1), (PIXELS, 0)])),
    "zstd": ("x.tif", lambda: encoded(kind="TIFF", compression="zstd")),
    "a predictor": ("x.tif", lambda: encoded(kind="TIFF", compression="tiff_lzw", tiffinfo={317: 2})),
    "a comment": ("x.png", lambda: encoded(pnginfo=comment())),
    "bytes after the end": ("x.png", lambda: PNG + b"<?php owned ?>"),
    "TIFF": ("x.tiff", lambda: TIFF),
    "BigTIFF": ("x.tif", lambda: encoded(kind="TIFF", big_tiff=True)),
    "LZW": ("x.tif", lambda: encoded(kind="TIFF", compression="tiff_lzw")),
    "deflate": ("x.tif", lambda: encoded(kind="TIFF", compression="tiff_adobe_deflate")),
    "packbits": ("x.tif", lambda: encoded(kind="TIFF", compression="packbits")),
    "in tiles": ("x.tif", lambda: encoded(kind="TIFF", tiffinfo={322: 16, 323: 16})),
}


def comment():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "\x1b[2J" * 100, zip=True)
    return info


@pytest.mark.parametrize("what", FINE_IMAGES)
def test_odd_images_are_decoded(what):
    name, make = FINE_IMAGES[what]
    data = make()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    np.testing.assert_array_equal(decode_image(data, f"gs://bucket/{name}", SIZE, modes=("L",)), PIXELS)
    assert memory("VmHWM") - before < 50


# ---------------------------------------------------------------------------------------------------------------
# A split as a whole


class FilesInMemory:
    """As much of a bucket as start_decoding needs; a file that is an exception cannot be fetched."""

    threads = 4

    def __init__(self, files):
        self.files, self.fetched = files, []

    def url(self, name):
        return f"gs://bucket/{name}"

    def is_here(self, blob):
        return False

    def fetch(self, blob):
        self.fetched.append(blob.name)
        if isinstance(self.files[blob.name], Exception):
            raise self.files[blob.name]

    def read(self, blob):
        return self.files[blob.name]


MASK = encoded((PIXELS > 99) * np.uint8(255))


def a_split(number, **changed):
    """Samples and their bucket. Files are image_3.png and mask_3.png; `changed` has the bytes of those that differ."""
    samples = [
        Sample(f"{n:04}.png", Blob(f"image_{n}.png", 9, "1"), (Blob(f"mask_{n}.png", 9, "1"),)) for n in range(number)
    ]
    files = {f"{kind}_{n}.png": data for n in range(number) for kind, data in (("image", PNG), ("mask", MASK))}
    return samples, FilesInMemory(files | {f"{name}.png": data for name, data in changed.items()})


def decode_all(samples, bucket, path, lookahead=3):
    """The names of the samples that were given, the warnings, and the error at the end."""
    names, warnings = [], []
    try:
        for name, image, masks in start_decoding(samples, bucket, SIZE, lookahead, path, warnings.append):
            np.testing.assert_array_equal(image, PIXELS)
            assert (masks.shape, masks.dtype, masks.max()) == ((HEIGHT, WIDTH, 1), np.uint8, 1)
            names.append(name)
    except (BucketError, DatasetError) as error:
        return names, warnings, error
    return names, warnings, None


def test_a_split_without_faults(tmp_path):
    samples, bucket = a_split(700)
    assert decode_all(samples, bucket, tmp_path / "p.txt") == ([sample.name for sample in samples], [], None)
    assert not (tmp_path / "p.txt").exists()


def test_after_a_damaged_file_the_rest_is_checked_and_one_error_names_all(tmp_path):
    wrong = {"image_4": PNG[:99], "mask_4": encoded(PIXELS[:-1]), "mask_5": b""} | {
        f"image_{n}": encoded(mode="RGB") for n in range(600, 620)
    }
    samples, bucket = a_split(700, **wrong)
    names, warnings, error = decode_all(samples, bucket, tmp_path / "tmp/p.txt")
    assert names == [sample.name for sample in samples[:4]]  # no sample after it
    assert len(bucket.fetched) == 1400
    lines = (tmp_path / "tmp/p.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [f"gs://bucket/{name}.png" for name in wrong]
    assert "23 files" in str(error) and lines[0] in str(error) and "tmp/p.txt" in str(error)
    assert [f"{name}.png" in str(error) for name in wrong] == 10 * [True] + 13 * [False]
    (warning,) = warnings  # before the rest is checked, which may take long
    assert lines[0] in warning


@pytest.mark.parametrize("where", [0, 5, 9])
def test_a_single_damaged_file_is_the_whole_message(where, tmp_path):
    names, warnings, error = decode_all(*a_split(10, **{f"mask_{where}": PNG[:99]}), tmp_path / "p.txt", lookahead=10)
    assert len(names) == where and warnings == []
    assert str(error) == f"gs://bucket/mask_{where}.png cannot be decoded as PNG (it is cut off): save it again"
    assert not (tmp_path / "p.txt").exists()


def test_an_error_of_the_bucket_ends_the_run_and_still_names_the_damaged_files(tmp_path):
    gone = BucketError("gs://bucket/image_7.png: changed")
    names, _, error = decode_all(*a_split(10, image_7=gone), tmp_path / "p.txt")
    assert len(names) == 7 and error is gone
    names, _, error = decode_all(*a_split(10, image_7=gone, image_2=PNG[:50]), tmp_path / "p.txt")
    assert len(names) == 2 and isinstance(error, DatasetError)
    assert "image_2.png" in str(error) and "image_7.png: changed" in str(error)


def test_no_more_than_the_lookahead_is_decoded_ahead(monkeypatch, tmp_path):
    """Before a damaged file and after it."""
    waiting, most, lock = 0, 0, threading.Lock()

    class Counting(FilesInMemory):
        def read(self, blob):
            nonlocal waiting, most
            with lock:
                waiting += blob.name.startswith("image")
                most = max(most, waiting)
            return super().read(blob)

    samples, bucket = a_split(200, image_100=b"")
    for _ in start_decoding(samples[:100], Counting(bucket.files), SIZE, 5, tmp_path / "p.txt", print):
        with lock:
            waiting -= 1
    assert most <= 6


SOFT = {
    "JPEG": encoded((PIXELS > 99) * np.uint8(255), "TIFF", compression="jpeg"),
    "edges from resizing": encoded(PIXELS),
    "1 and 255": encoded(np.where(PIXELS > 99, np.uint8(255), np.uint8(1))),
    "three values": encoded(PIXELS % 3),
}


@pytest.mark.parametrize("what", SOFT)
def test_masks_with_more_than_two_grey_values_are_a_warning(what, tmp_path):
    samples, bucket = a_split(10)
    ending = "tif" if what == "JPEG" else "png"
    for number in (3, 4, 8):
        mask = Blob(f"soft_{number}.{ending}", 9, "1")
        samples[number] = samples[number]._replace(masks=(mask,))
        bucket.files[mask.name] = SOFT[what]
    names, (warning,), error = decode_all(samples, bucket, tmp_path / "p.txt")
    assert len(names) == 10 and error is None
    values = len(np.unique(np.append(Image.open(io.BytesIO(SOFT[what])), 0)))
    assert f"3, such as gs://bucket/soft_3.{ending} with {values}" in " ".join(warning.split())


@pytest.mark.parametrize("mask", [0 * PIXELS, 0 * PIXELS + 1, 0 * PIXELS + 255, PIXELS % 2, PIXELS > 99])
def test_masks_of_two_grey_values_are_no_warning(mask, tmp_path):
    samples, bucket = a_split(1, mask_0=encoded(mask))
    ((_, _, decoded),) = start_decoding(samples, bucket, SIZE, 1, tmp_path / "p.txt", pytest.fail)
    np.testing.assert_array_equal(decoded[..., 0], mask != 0)


def test_a_run_names_all_that_is_wrong_and_one_after_repair_works(tiny_bucket, tmp_path):
    """First the names, then the content of the files, and a warning about soft masks at the end."""
    masks = tiny_bucket / SPLIT / "masks/class_0"
    fine = {path: path.read_bytes() for path in sorted(masks.iterdir())}
    damaged = list(fine)[3:6]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-20])
    (masks / "Thumbs.db").write_bytes(b"x")
    for path in list(fine)[:2]:
        path.unlink()
    listed = tmp_path / "tmp/problems_dataset-tiny_validation.txt"
    process = run_tool(*arguments("bucket", batch_size=4), cwd=tmp_path)
    assert_one_error_line(
        process, 3, "2 files", "slice_0000.png", "slice_0001.png", "tmp/problems_dataset-tiny_validation"
    )
    assert len(listed.read_text().splitlines()) == 2
    for path in list(fine)[:2]:
        path.write_bytes(fine[path])
    process = run_tool(*arguments("bucket", batch_size=4), cwd=tmp_path)
    assert_one_error_line(process, 3, "3 files", *(path.name for path in damaged), str(listed.relative_to(tmp_path)))
    assert [line.split()[0] for line in listed.read_text().splitlines()] == [
        path.relative_to(tmp_path).as_posix() for path in damaged
    ]
    for path in damaged:
        path.write_bytes(fine[path])
    Image.fromarray(np.arange(64 * 96, dtype=np.uint8).reshape(64, 96)).save(damaged[0])
    process = run_tool(*arguments("bucket", batch_size=4), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    (line,) = (line for line in process.stderr.splitlines() if "grey values" in line)
    assert line.startswith("warning: ") and damaged[0].name in line and "with 256" in line


# ---------------------------------------------------------------------------------------------------------------
# Fuzzing

fuzzed = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes the filter of image_utils
@fuzzed
@given(st.sampled_from(sorted(what for what in FINE_IMAGES if "MB" not in what)), mutations)
def test_fuzz_images(what, steps):
    name, make = FINE_IMAGES[what]
    data = mutate(make(), steps)
    pixels = attempt(lambda: decode_image(data, f"gs://bucket/{name}", SIZE, modes=("L",)))
    if pixels is not None:
        assert (pixels.shape, pixels.dtype) == ((HEIGHT, WIDTH), np.uint8)
        if name.lower().endswith("png") and steps[0][1] != "insert":  # a PNG carries checksums
            np.testing.assert_array_equal(pixels, PIXELS)


parts = st.sampled_from(["images", "masks", "class_0", "class_1", "a.png", "b.tif", ".x", "c", "", "\x1b", "a.PNG"])
paths = st.lists(parts | st.text(max_size=6), min_size=1, max_size=4).map("/".join)


@fuzzed
@given(st.lists(paths, max_size=12, unique=True))
def test_fuzz_listings(names):
    found = attempt(lambda: paired(names))
    if found:
        class_folders, samples = found
        for sample in samples:
            assert sample.image.name == f"{SPLIT}/images/{sample.name}"
            expected = [f"{SPLIT}/masks/{folder}/{sample.name}" for folder in class_folders]
            assert [mask.name for mask in sample.masks] == expected
