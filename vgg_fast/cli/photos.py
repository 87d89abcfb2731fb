"""Photographs for the demo, as the networks trained on ImageNet want them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# Photographs that lie in the packages themselves; their other pictures are downloaded when first asked for.
_SHIPPED = (
    ("skimage", "data", ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
)
_SHORT_SIDE, _CROP = 256, 224
_MOST_ELONGATED = 50  # the longer side would be 12800 pixels
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect


class PhotoError(Exception):
    """An image that cannot be had; the message names the file and the reason."""


def shipped(sources: Sequence[tuple[str, str, Sequence[str]]] = _SHIPPED) -> list[Path]:
    """Photographs of the first installed package that ships some.

    Args:
        sources: (package, folder in it, file names).

    Raises:
        PhotoError: none is installed.
    """
    for package, folder, names in sources:
        spec = importlib.util.find_spec(package)  # found without importing it
        if spec is None or spec.origin is None:
            continue
        paths = [path for name in names if (path := Path(spec.origin).parent / folder / name).is_file()]
        if paths:
            return paths
    raise PhotoError(
        "no photographs to show: name image files (vgg-fast demo cat.jpg dog.png), or pip install scikit-image, "
        "which ships some"
    )


def read(path: Path) -> Tensor:
    """One image as ``[3, 224, 224]`` fp32: short side to 256, centre, ImageNet's normalisation, as torchvision does.

    Raises:
        PhotoError: no such file, not an image, damaged, or far too elongated.
    """
    # Not at the top: Pillow is not needed by the other commands.
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise PhotoError(f"{path}: {'is a folder, not an image' if path.is_dir() else 'no such file'}")
    try:
        with Image.open(path) as file:
            width, height = file.size
            if max(file.size) > _MOST_ELONGATED * min(file.size):
                raise PhotoError(f"{path}: {width}x{height} is longer than {_MOST_ELONGATED} times its width")
            image = file.convert("RGB")
    except UnidentifiedImageError:
        raise PhotoError(f"{path}: not an image that Pillow can read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow's decoders raise
        raise PhotoError(f"{path}: cannot be read: {error}") from None
    # torchvision cuts the longer side down to a whole number, and rounds the corner of the crop.
    short = min(width, height)
    width, height = (int(_SHORT_SIDE * side / short) for side in (width, height))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - _CROP) / 2), round((height - _CROP) / 2)
    image = image.crop((left, top, left + _CROP, top + _CROP))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(_CROP, _CROP, 3)
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return (pixels.permute(2, 0, 1) / 255 - mean) / std


def read_all(paths: Sequence[Path]) -> Tensor:
    """``[N, 3, 224, 224]`` of several files."""
    return torch.stack([read(path) for path in paths])
