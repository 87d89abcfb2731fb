"""Reading, checking and writing weight files: ``.pth``, ``.pt`` and ``.safetensors``, from a path or a URL.

Everything is verified before anything is copied into a model or moved to its final name, so a bad file changes nothing.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

import torch
from torch import Tensor, nn

_HOST = "https://download.pytorch.org/models/"

# The files torchvision publishes: builder -> name in its enum -> file. The hex digits begin the sha256 of the file.
PUBLISHED: dict[str, dict[str, str]] = {
    "vgg11": {"IMAGENET1K_V1": "vgg11-8a719046.pth"},
    "vgg11_bn": {"IMAGENET1K_V1": "vgg11_bn-6002323d.pth"},
    "vgg13": {"IMAGENET1K_V1": "vgg13-19584684.pth"},
    "vgg13_bn": {"IMAGENET1K_V1": "vgg13_bn-abd245e5.pth"},
    "vgg16": {
        "IMAGENET1K_V1": "vgg16-397923af.pth",
        # From SSD: the classifier holds NaN, only `features` is meant to be used.
        "IMAGENET1K_FEATURES": "vgg16_features-amdegroot-88682ab5.pth",
    },
    "vgg16_bn": {"IMAGENET1K_V1": "vgg16_bn-6c64b313.pth"},
    "vgg19": {"IMAGENET1K_V1": "vgg19-dcbb9e9d.pth"},
    "vgg19_bn": {"IMAGENET1K_V1": "vgg19_bn-c79401a0.pth"},
}

SUFFIXES = (".pth", ".pt", ".safetensors")

# torch.hub's convention: name-<first hex digits of the sha256>.suffix
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")


class WeightsError(RuntimeError):
    """A weight file that is missing, damaged or does not fit; says which file, what it holds and what was expected."""


@dataclass(frozen=True)
class Source:
    """Where weights come from: a path or URL, and the number of classes if it is known beforehand."""

    location: str
    num_classes: int | None = None


def find_weights(arch: str, weights: Any) -> Source:
    """What the ``weights=`` of a builder means.

    Args:
        arch: name of the builder, such as ``"vgg16_bn"``.
        weights: ``"DEFAULT"``, ``"IMAGENET1K_V1"`` or ``"VGG16_BN_Weights.IMAGENET1K_V1"``, a member of torchvision's
            enum (anything with ``.url`` and ``.meta``), a path or a URL.

    Raises:
        TypeError: an enum member of another builder, or an object of another kind.
        ValueError: a name that is neither known, nor a file, nor a URL.

    Example:
        >>> find_weights("vgg16", "DEFAULT").location
        'https://download.pytorch.org/models/vgg16-397923af.pth'
    """
    enum = f"{arch.upper()}_Weights"
    if hasattr(weights, "url") and hasattr(weights, "meta"):
        # Torchvision names its enums after the builders; another object with these attributes is taken at its word.
        kind = type(weights).__name__
        if re.fullmatch(r"VGG\d+(_BN)?_Weights", kind) and kind != enum:
            raise TypeError(f"{arch} takes the weights of {enum}, got {weights!s}")
        categories = weights.meta.get("categories")
        return Source(str(weights.url), len(categories) if categories else None)
    if isinstance(weights, os.PathLike):
        return Source(os.fspath(weights))
    if not isinstance(weights, str):
        raise TypeError(f"{arch}: weights must be a name, a path, a URL or an enum member, got {weights!r}")
    files = PUBLISHED[arch]
    name = weights.removeprefix(enum + ".")
    name = "IMAGENET1K_V1" if name == "DEFAULT" else name
    if name in files:
        return Source(_HOST + files[name], 1000 if name == "IMAGENET1K_V1" else None)
    if _is_url(weights) or weights.lower().endswith(SUFFIXES):
        return Source(weights)
    known = ", ".join(["DEFAULT", *files])
    raise ValueError(
        f"{arch}: unknown weights {weights!r}: give one of {known} (with or without '{enum}.'), the path of a "
        f"{', '.join(SUFFIXES)} file, or a URL of one"
    )


def load_weights(model: nn.Module, source: str | os.PathLike[str], *, progress: bool = True) -> None:
    """Copy the weights of a file into a model, completely or not at all.

    Args:
        model: any module; its parameters and buffers keep their dtype and device.
        source: path or URL, see :func:`read_weights`.
        progress: show a progress bar while downloading.

    Raises:
        WeightsError: the file is missing, damaged, or has other keys or shapes than the model, which is then unchanged.

    Example:
        >>> import tempfile; path = tempfile.mkdtemp() + "/linear.safetensors"
        >>> save_weights(nn.Linear(2, 3), path); load_weights(nn.Linear(2, 3), path)
    """
    state = read_weights(source, progress=progress)
    model.load_state_dict(fitted_state(model, state, str(source)))


def read_weights(source: str | os.PathLike[str], *, progress: bool = True) -> dict[str, Tensor]:
    """The tensors of a weight file, by name, on the CPU.

    ``.pth`` and ``.pt`` are read with ``weights_only=True``: no code from the file runs. A URL is downloaded once, to
    ``torch.hub``'s cache under torchvision's file names. Its sha256 is checked at every use if the name carries it
    (``name-0123abcd.pth``) or the URL ends with ``#sha256=<hex digits>``; a cached file that fails is fetched again.

    Args:
        source: path, or URL (http, https, file), of a ``.pth``, ``.pt`` or ``.safetensors`` file.
        progress: show a progress bar while downloading.

    Raises:
        WeightsError: the file cannot be had, is damaged, has the wrong hash, or holds something else than tensors.

    Example:
        >>> import tempfile; path = tempfile.mkdtemp() + "/w.pth"
        >>> save_weights({"w": torch.ones(2)}, path); read_weights(path)
        {'w': tensor([1., 1.])}
    """
    text = os.fspath(source)
    if not _is_url(text):
        path = Path(text).expanduser()
        published = {file for files in PUBLISHED.values() for file in files.values()}
        # Only torchvision's own names are taken for hashes here: a file of the user may end in -20240131.pth.
        expected = _hash_in_name(path.name) if path.name in published else None
        return _read_checked(path, expected)
    url, _, expected = text.partition("#sha256=")
    parts = urlparse(url)
    name = unquote(os.path.basename(parts.path))
    _format(name, text)
    expected = expected.lower() or _hash_in_name(name) or ""
    if parts.scheme == "file":
        return _read_checked(Path(url2pathname(parts.path)), expected)
    if parts.scheme not in ("http", "https"):
        raise WeightsError(f"{text}: cannot download from {parts.scheme}://, only from http, https and file")
    return _download(url, name, expected, progress)


def save_weights(model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a model's state_dict, or a mapping of tensors, to a file that is either complete or not there.

    Args:
        model: a module or its state_dict.
        path: ends in ``.pth``, ``.pt`` or ``.safetensors``, which chooses the format.
        force: replace an existing file.

    Raises:
        WeightsError: the file exists and ``force`` is False, another suffix, or the file cannot be written.

    Example:
        >>> import tempfile; path = tempfile.mkdtemp() + "/linear.pth"
        >>> save_weights(nn.Linear(2, 3), path); save_weights(nn.Linear(2, 3), path, force=True)
    """
    target = Path(path).expanduser()
    suffix = _format(target.name, str(target))
    refuse_overwrite(target, force)
    state = _plain_state(model.state_dict() if isinstance(model, nn.Module) else model)
    try:
        with _complete_or_absent(target) as temporary:
            if suffix == ".safetensors":
                from safetensors.torch import save_file

                save_file(state, temporary, metadata={"format": "pt"})
            else:
                torch.save(state, temporary)
    except Exception as error:  # OSError, RuntimeError from torch.save, SafetensorError, which is neither
        raise WeightsError(f"{target}: cannot be written: {error}") from error


def refuse_overwrite(target: Path, force: bool) -> None:
    """Raise WeightsError if ``target`` exists and ``force`` is False."""
    if target.exists() and not force:
        raise WeightsError(f"{target} exists: give another name, or force=True (--force) to replace it")


def fitted_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """``state`` if ``load_state_dict(strict=True)`` would take all of it, with ``where`` named in the error if not.

    Raises:
        WeightsError: missing or unexpected keys, other shapes, integers for floats, or a model without storage.
    """
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    if any(value.is_meta for value in own.values()):
        raise WeightsError(
            f"{where}: the model is on the meta device and has no storage: call model.to_empty(device=…)"
        )
    return check_state(own, state, where)


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """:func:`fitted_state` for the tensors ``own`` of a model, which may be on the meta device."""
    # Files older than PyTorch 0.4.1, torchvision's among them, lack this counter; PyTorch itself lets that pass.
    counters = {key: own[key] for key in own if key.endswith(".num_batches_tracked") and key not in state}
    found = list(state)
    state = {**state, **counters}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes, kinds = [], []
    for key in [key for key in own if key in state]:
        theirs, ours = state[key], own[key]
        if theirs.shape != ours.shape:
            shapes.append(f"{key}: {tuple(theirs.shape)} in the file, {tuple(ours.shape)} in the model")
        elif theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex():
            kinds.append(f"{key}: {theirs.dtype} in the file, {ours.dtype} in the model")
    problems = [
        f"{len(items)} {what}: {'; '.join(items[:4])}{'; …' if len(items) > 4 else ''}"
        for what, items in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of another dtype", kinds),
        )
        if items
    ]
    if problems:
        hint = _hint(found, unexpected, shapes)
        raise WeightsError(f"{where} does not fit the model, which is unchanged: {', '.join(problems)}{hint}")
    return dict(state)


def _hint(keys: list[str], unexpected: list[str], shapes: list[str]) -> str:
    for prefix in ("module.", "_orig_mod."):
        if unexpected and all(key.startswith(prefix) for key in unexpected):
            return f" (every key begins with {prefix!r}: save model.{prefix.rstrip('.')}.state_dict() instead)"
    if len(shapes) in (1, 2) and not unexpected:
        return " (if only the last layer differs, build the model with the file's number of classes)"
    return "" if keys else " (the file is empty)"


def _is_url(text: str) -> bool:
    # A one-letter scheme is a Windows drive.
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|file:", text))


def _hash_in_name(name: str) -> str | None:
    found = _HASH_IN_NAME.search(name)
    return found.group(1) if found else None


def _format(name: str, where: str) -> str:
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise WeightsError(
            f"{where}: a weight file ends in {', '.join(SUFFIXES)}, not {suffix or 'nothing'!r} "
            "(for Keras files: vgg-fast convert)"
        )
    return suffix


def _read_checked(path: Path, expected: str | None) -> dict[str, Tensor]:
    suffix = _format(path.name, str(path))
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    _check_hash(path, expected)
    return _parse(path, suffix, str(path))


def _check_hash(path: Path, expected: str | None) -> None:
    if not expected:
        return
    found = _sha256(path)
    if not found.startswith(expected):
        raise WeightsError(
            f"{path} ({path.stat().st_size} bytes): wrong or truncated file: its sha256 is {found}, "
            f"expected {expected}…"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from error
    return digest.hexdigest()


def _parse(path: Path, suffix: str, where: str) -> dict[str, Tensor]:
    try:
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            # Memory-mapping halves the peak; only the zip format of torch >= 1.6 can be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # parsers of damaged files raise anything from KeyError to UnpicklingError
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise WeightsError(
            f"{where}: not a readable {suffix} file, damaged or truncated ({path.stat().st_size} bytes), or it holds "
            f"more than tensors (save model.state_dict(), not the model): {reason}"
        ) from error
    if not isinstance(state, Mapping):
        raise WeightsError(
            f"{where}: expected a state_dict (a mapping of names to tensors), found {type(state).__name__}"
        )
    others = [str(key) for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if others:
        raise WeightsError(
            f"{where}: expected a state_dict, found a checkpoint with other entries ({', '.join(others[:6])}): save "
            "the state_dict inside it to a file of its own"
        )
    return dict(state)


def _download(url: str, name: str, expected: str, progress: bool) -> dict[str, Tensor]:
    suffix = _format(name, url)
    if not expected or _hash_in_name(name) != expected:
        # The name does not identify the content: two servers may both have a model.pth.
        name = f"{Path(name).stem}.{hashlib.sha256(f'{url} {expected}'.encode()).hexdigest()[:16]}{suffix}"
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    if target.is_file():
        try:
            return _read_checked(target, expected)
        except WeightsError as error:
            warnings.warn(f"{error}; downloading it again from {url}", stacklevel=4)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _complete_or_absent(target) as temporary:
            torch.hub.download_url_to_file(url, str(temporary), expected or None, progress=progress)
            # A connection that breaks off is no error to torch.hub; without a hash only the parser can tell.
            _parse(temporary, suffix, url)
    except WeightsError:
        raise
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise WeightsError(f"{url}: download failed, nothing was kept: {error}") from error
    return _parse(target, suffix, str(target))


@contextmanager
def _complete_or_absent(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that takes its name if the block ends well and vanishes if not."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory (safetensors) and are no views of larger ones (torch.save)."""
    plain, seen = {}, set()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"cannot save {key!r}: expected a tensor, found {type(value).__name__}")
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
            storage = tensor.untyped_storage()
        seen.add(storage.data_ptr())
        plain[key] = tensor
    return plain
