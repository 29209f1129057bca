"""NAME.pictures: pictures as files or pixels; each is prepared as its row's task says, and NAME answers.

    picture  BYTES [-1, 1]        the bytes of a file: PNG, JPEG, WebP or BMP
             or UINT8 [-1, H, W, 3]   pixels, red, green and blue, as in the native layout of a Triton repository
    task     BYTES [-1, 1]        a task's name per row; optional when the bundle has one task

Outputs are those of NAME. Preparing takes a processor, so it runs beside the event loop, one request to a thread.
"""

from __future__ import annotations

import asyncio
import io
import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.engine import IMAGES, TASK
from ..merge.errors import UsageError
from . import protocol
from .pictures import read_rows
from .rejections import InvalidRequest
from .tensors import BYTES, numbers, texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from .bundle_models import BundleModel
    from .models import Asked
    from .registry import Registry, Request
    from .tensors import InputTensor, OutputTensor

PICTURES = ".pictures"
"""Behind a bundle's name: the model that reads pictures."""

PICTURE = "picture"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 1 << 26  # of one picture: a file of some bytes may unfold to more than memory holds


def reads_pictures(registry: Registry) -> bool:
    """Whether every task of a bundle reads single pictures."""
    if registry.all_tasks or list(registry.inputs) != [IMAGES]:
        return False
    prepared = [version.task.preprocessing for version in registry.versions.values()]
    return all(p is not None and p.clip is None for p in prepared)


class PictureModel:
    """See the module."""

    def __init__(self, bundle: BundleModel) -> None:
        """Over the model of prepared pictures."""
        self._bundle = bundle
        self.name = bundle.name + PICTURES
        self.versions = bundle.versions

    @property
    def ready(self) -> bool:
        """See `Model.ready`."""
        return self._bundle.ready

    def metadata(self, version: str) -> dict[str, Any]:
        """See `Model.metadata`."""
        told = self._bundle.metadata(version)
        task = [entry for entry in told["inputs"] if entry["name"] == TASK]
        picture = {"name": PICTURE, "datatype": BYTES, "shape": [-1, 1]}
        return {**told, "name": self.name, "inputs": [picture, *task]}

    def config(self, version: str) -> dict[str, Any]:
        """See `Model.config`."""
        told = self._bundle.config(version)
        task = [entry for entry in told["input"] if entry["name"] == TASK]
        picture = {"name": PICTURE, "data_type": "TYPE_STRING", "dims": [1]}
        return {**told, "name": self.name, "input": [picture, *task]}

    def statistics(self) -> list[dict[str, Any]]:
        """See `Model.statistics`: its requests are counted as those of NAME."""
        return []

    async def infer(self, asked: Asked) -> list[OutputTensor]:
        """See `Model.infer`."""
        registry = self._bundle.registry
        protocol.check_outputs(registry, asked.outputs)
        request = await asyncio.to_thread(self._read, asked.inputs)
        answers = await self._bundle.answer(asked, lambda: request)
        return protocol.write_answers(registry, answers, asked.outputs)

    def _read(self, inputs: Sequence[InputTensor]) -> Request:
        given = {tensor.name: tensor for tensor in inputs}
        if PICTURE not in given or len(given) != len(inputs) or not set(given) <= {PICTURE, TASK}:
            raise InvalidRequest(
                "the inputs are not those of pictures",
                wanted=f"{PICTURE}, and {TASK} where there are several tasks",
                found=", ".join(tensor.name for tensor in inputs) or "none",
            )
        registry = self._bundle.registry
        pictures = _pictures(given[PICTURE], registry.max_batch)
        named = protocol.read_names(given[TASK]) if TASK in given else None
        versions = registry.named(named, len(pictures))
        rows = [
            _prepared(picture, row, version.task.preprocessing)
            for row, (picture, version) in enumerate(zip(pictures, versions, strict=True))
        ]
        (name,) = registry.inputs
        return registry.check_versions({name: np.concatenate(rows)}, versions)


def _pictures(tensor: InputTensor, most: int) -> list[bytes | NDArray[np.uint8]]:
    """The pictures of a request: the bytes of each file, or its pixels `[H, W, 3]`."""
    count = tensor.shape[0] if tensor.shape else 0
    if not 1 <= count <= most:
        raise InvalidRequest(
            "the request has too many rows" if count else "the request has no rows",
            where=PICTURE,
            wanted=f"1 to {most} rows",
            found=count,
        )
    if tensor.datatype == BYTES and tensor.shape in ((count,), (count, 1)):
        files = texts(tensor)
        if any(isinstance(file, str) for file in files):
            raise InvalidRequest(
                "a picture came as text", where=PICTURE, do="send it as binary data, not as JSON"
            )
        return [bytes(file) for file in files if not isinstance(file, str)]
    if tensor.datatype == "UINT8" and len(tensor.shape) == 4 and tensor.shape[-1] == 3:
        if math.prod(tensor.shape[1:3]) > MAX_PIXELS or 0 in tensor.shape:
            raise InvalidRequest(
                "a picture has no pixels or too many",
                where=PICTURE,
                wanted=f"1 to {MAX_PIXELS}",
                found=list(tensor.shape),
            )
        return list(numbers(tensor))
    raise InvalidRequest(
        "an input has the wrong datatype or shape",
        where=PICTURE,
        wanted=f"{BYTES} [n, 1], or UINT8 [n, H, W, 3]",
        found=f"{tensor.datatype} {list(tensor.shape)}",
    )


def _prepared(picture: bytes | NDArray[np.uint8], row: int, preprocessing: Any) -> NDArray[Any]:
    """`[1, C, H, W]` as the task wants it."""
    from PIL import Image

    where = f"{PICTURE}, row {row}"
    try:
        if not isinstance(picture, bytes):
            return read_rows(Image.fromarray(picture), preprocessing)
        with warnings.catch_warnings(), Image.open(io.BytesIO(picture), formats=FORMATS) as opened:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            _require_pixels(opened, where)
            return read_rows(opened, preprocessing)
    except InvalidRequest:
        raise
    except (UsageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as cause:
        raise InvalidRequest(
            "a picture cannot be read",
            where=where,
            wanted=f"a file of {', '.join(FORMATS)}",
            found=str(cause).splitlines()[0][:200] if str(cause) else repr(cause),
        ) from cause


def _require_pixels(picture: Image, where: str) -> None:
    if picture.width * picture.height > MAX_PIXELS:
        raise InvalidRequest(
            "a picture has too many pixels",
            where=where,
            wanted=f"at most {MAX_PIXELS}",
            found=f"{picture.width} x {picture.height}",
        )
