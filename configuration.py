"""Reading and checking the command line and the two config.yaml in the bucket."""

import argparse
import difflib
import itertools
import reprlib
import sys

import yaml

from errors import ConfigurationError, UsageError

MAX_BYTES = 2**18  # of a config.yaml
MAX_NODES = 20_000  # values in it, its aliases resolved
MAX_EDGE = 2**14  # pixels
SUBSET_SEED = 1234  # where neither the arguments nor train_config give one


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and keeps the line breaks of description and epilog."""


class ArgumentParser(argparse.ArgumentParser):
    """Raises UsageError where argparse would end the process, and names a mistyped argument before a missing one."""

    def __init__(self, **options):
        self._known = []
        super().__init__(formatter_class=HelpFormatter, **options)

    def add_argument(self, *names, **options):
        self._known += names
        return super().add_argument(*names, **options)

    def error(self, message):
        for name in (word.partition("=")[0] for word in sys.argv[1:]):
            if name.startswith("--") and not any(known.startswith(name) for known in self._known):
                close = difflib.get_close_matches(name, self._known, 1)
                message = f"there is no argument {name}" + "".join(f" (perhaps {known} is meant)" for known in close)
                break
        raise UsageError(f"{message}; see --help")


def number(kind, low, high, above_low=False):
    """Make a `type=` for argparse: a number from `low` to `high`, without `low` itself if `above_low`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above_low and value == low):
            raise argparse.ArgumentTypeError(
                f"must be {'above' if above_low else 'at least'} {low} and at most {high}, not {text}"
            )
        return value

    parse.__name__ = kind.__name__  # argparse shows it: "invalid int value"
    return parse


def folders(depth):
    """Make a `type=` for argparse: a path of `depth` folder names."""

    def parse(text):
        path = text.strip("/")
        if not path or path.count("/") != depth - 1:
            raise argparse.ArgumentTypeError(f"must be {'/'.join(['<name>'] * depth)}, not {text!r}")
        return path

    return parse


def read_config(bucket, name, section):
    """Read one section of a YAML file in the bucket.

    Parameters
    ----------
    bucket : as gcp_utils.open_bucket gives
    name : str
        The file's name in the bucket.
    section : str
        A key at the file's top: dataset_config or train_config.

    Returns
    -------
    dict

    Raises
    ------
    ConfigurationError
        The file is not valid YAML, is far too large for a configuration, or has no such section.
    BucketError
        The file is missing or cannot be read.
    """
    url, blob = bucket.url(name), bucket.stat(name)
    if blob.size > MAX_BYTES:
        raise ConfigurationError(
            f"{url} has {blob.size:,} bytes, too many for a configuration: put the right file there"
        )
    text = bucket.read(blob)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        # Before the values are built: a few nested aliases can stand for any number of values.
        if _count_nodes(node, MAX_NODES) <= 0:
            raise ConfigurationError(
                f"{url} is too large for a configuration, or too deep: use fewer aliases or levels"
            )
        config = loader.construct_document(node) if node else None
    except ConfigurationError:
        raise
    except Exception as error:  # PyYAML's constructors of numbers and dates raise exceptions of many types
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigurationError(f"{url} is not valid YAML, correct it: {reason}") from error
    if not isinstance(config, dict) or not isinstance(config.get(section), dict):
        raise ConfigurationError(f"{url} needs a section {section}: with keys and values below it")
    return config[section]


def _count_nodes(node, budget, depth=20):
    """`budget` minus the number of nodes in a YAML node; 0 or less if they are too many, too deep, or a huge number."""
    if isinstance(node, yaml.CollectionNode) and budget > 0:
        if depth == 0:
            return 0
        for child in itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value:
            budget = _count_nodes(child, budget, depth - 1)
    elif isinstance(node, yaml.ScalarNode) and len(node.value) > 100 and not node.tag.endswith(":str"):
        return 0
    return budget - 1


def target_size(dataset_config, url):
    """The size of every image and mask of a dataset.

    Parameters
    ----------
    dataset_config : dict
    url : str
        Of the file, for the message.

    Returns
    -------
    list
        [width, height] in pixels, each from 1 to MAX_EDGE.

    Raises
    ------
    ConfigurationError
    """
    size = dataset_config.get("target_size")
    if not (
        isinstance(size, list) and len(size) == 2 and all(type(edge) is int and 0 < edge <= MAX_EDGE for edge in size)
    ):
        raise ConfigurationError(
            f"{url} needs target_size: [width, height], 1 to {MAX_EDGE} pixels, not {reprlib.repr(size)}"
        )
    return size


def stacks(dataset_config, split):
    """The names of the stacks in a split; an empty list where dataset_config does not give them."""
    splits = dataset_config.get("dataset_split")
    names = splits.get(split) if isinstance(splits, dict) else None
    return [str(name) for name in names if isinstance(name, str | int)] if isinstance(names, list) else []


def subset_seed(train_config, split, seed):
    """The seed for drawing the subset: `seed`, or if it is None the split's in train_config, or else SUBSET_SEED.

    Parameters
    ----------
    train_config : dict
    split : str
        The name of the split's folder, with validation or test in it.
    seed : int or None
        From the command line.

    Returns
    -------
    int
        0 to 2**32 - 1.

    Raises
    ------
    ConfigurationError
        The seed in train_config is not such an integer.
    """
    for name in ("validation", "test"):
        if seed is None and name in split:
            seed = train_config.get(f"{name}_data_shuffle_seed")
    if seed is None:
        seed = SUBSET_SEED
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ConfigurationError(
            f"the shuffle seed {reprlib.repr(seed)} in the model's config.yaml must be an integer, 0 to 4294967295"
        )
    return seed
