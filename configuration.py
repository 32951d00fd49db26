"""What the command line and the two config.yaml in the bucket say, checked."""

import argparse
import itertools
import reprlib

import yaml

from errors import ConfigurationError, UsageError

MAX_BYTES = 2**18
MAX_NODES = 20_000
MAX_EDGE = 2**14  # pixels
SUBSET_SEED = 1234  # where neither the arguments nor train_config name one


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Both."""


class ArgumentParser(argparse.ArgumentParser):
    """Shows the defaults, keeps the lines of its texts, and raises UsageError."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, **options)

    def error(self, message):
        raise UsageError(f"{message}; see --help")


def number(kind, low, high, above_low=False):
    """A `type=` for argparse: a number from `low` (or above it) to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above_low and value == low):
            raise argparse.ArgumentTypeError(
                f"must be {'above' if above_low else 'at least'} {low} and at most {high}, not {text}"
            )
        return value

    parse.__name__ = kind.__name__
    return parse


def folders(depth):
    """A `type=` for argparse: the names of `depth` folders, one in the other."""

    def parse(text):
        path = text.strip("/")
        if not path or path.count("/") != depth - 1:
            raise argparse.ArgumentTypeError(f"must be {'/'.join(['<name>'] * depth)}, not {text!r}")
        return path

    return parse


def read_config(bucket, name, section):
    """The dictionary `section` of a YAML file in the bucket.

    Raises
    ------
    ConfigurationError
        The file is no YAML, is far too large for a configuration, or has no such section.
    BucketError
    """
    url, blob = bucket.url(name), bucket.stat(name)
    if blob.size > MAX_BYTES:
        raise ConfigurationError(f"{url} has {blob.size:,} bytes: that is no configuration")
    text = bucket.read(blob)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        # Before any value is made of it: a few aliases, merged or nested, can stand for any number of values.
        if _count_nodes(node, MAX_NODES) <= 0:
            raise ConfigurationError(f"{url} is larger than any configuration once its aliases are resolved")
        config = loader.construct_document(node) if node else None
    except ConfigurationError:
        raise
    except Exception as error:  # the constructors of numbers and dates raise whatever they meet
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigurationError(f"{url} is not valid YAML: {reason}") from error
    if not isinstance(config, dict) or not isinstance(config.get(section), dict):
        raise ConfigurationError(f"{url} needs a section {section}: with keys and values below it")
    return config[section]


def _count_nodes(node, budget, depth=20):
    """What is left of `budget` after one for every YAML node below; at most 0 if too deep, or for a huge number."""
    if isinstance(node, yaml.CollectionNode) and budget > 0:
        if depth == 0:
            return 0
        for child in itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value:
            budget = _count_nodes(child, budget, depth - 1)
    elif isinstance(node, yaml.ScalarNode) and len(node.value) > 100 and not node.tag.endswith(":str"):
        return 0
    return budget - 1


def target_size(dataset_config, url):
    """[width, height] in pixels that every image and mask of the dataset has; `url` is for the message."""
    size = dataset_config.get("target_size")
    if not (
        isinstance(size, list) and len(size) == 2 and all(type(edge) is int and 0 < edge <= MAX_EDGE for edge in size)
    ):
        raise ConfigurationError(
            f"{url} needs target_size: [width, height], 1 to {MAX_EDGE} pixels, not {reprlib.repr(size)}"
        )
    return size


def stacks(dataset_config, split):
    """Names of the stacks that the split was made of; an empty list where the configuration does not say."""
    splits = dataset_config.get("dataset_split")
    names = splits.get(split) if isinstance(splits, dict) else None
    return [str(name) for name in names if isinstance(name, str | int)] if isinstance(names, list) else []


def subset_seed(train_config, split, seed):
    """The seed that draws the subset: `seed` if given, else the one of train_config for the split, else a fixed one."""
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
