"""Mistakes in our own flags, and a model's folder that isn't there: told within seconds, before vLLM is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from server.config_file import as_words, read_config, split_config
from server.decode_settings import add_decode_flags, pass_selectors
from server.errors import Exit, StartError
from server.platforms import Platform
from server.prefill_settings import add_prefill_flags, pass_patterns
from server.settings import add_flags, default_policy, pass_weights

# What our flags are looked at beside. Where it is worse than that, the real start says so.
_BEST = {"block_size": None, "tensor_parallel_size": 1, "additional_config": None}


def check_early(argv: Sequence[str], command: str = "serve") -> None:
    """Look at what can be seen without vLLM; what passes may still be refused.

    Raises:
        StartError: a mistake.
        SystemExit: a value of the wrong type, by argparse.
    """
    if any(word in ("-h", "--help") or word.startswith("--help=") for word in argv):
        return
    argv = split_config(argv)
    content = read_config(argv)
    own = argparse.ArgumentParser(
        prog=f"longreach {command}", usage=f"longreach {command} [MODEL] [flags]", add_help=False, allow_abbrev=False
    )
    for add in (add_flags, add_decode_flags, add_prefill_flags):
        add(own)
    args, _ = own.parse_known_args([_dashes(word) for word in [*as_words(content), *argv]])
    vars(args).update(_BEST)
    platform = Platform("cpu", None)
    default = default_policy(args, platform)
    pass_weights(args)
    pass_selectors(args, platform, default)
    pass_patterns(args, platform)
    if argv and not argv[0].startswith("-"):
        check_folder(argv[0])


def _dashes(word: str) -> str:
    """A flag as it is registered: vLLM's parser takes underscores too."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def check_folder(model: str) -> None:
    """Whether a model that looks like a folder is one with a model in it.

    Raises:
        StartError: it isn't there, or holds none.
    """
    folder = Path(model).expanduser()
    if model.startswith(("/", "./", "../", "~")) and not folder.exists():
        raise StartError(f"{model} doesn't exist: name a folder with a model, or a repository (OWNER/NAME)", Exit.MODEL)
    if folder.is_dir() and not any((folder / name).exists() for name in ("config.json", "params.json")):
        raise StartError(f"{model} holds no model: there is no config.json in it", Exit.MODEL)
