"""Every model of a served bundle by name, and tasks that come and go as models do."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

from ..merge.errors import UsageError
from .bundle_models import BundleModel, TaskModel
from .picture_model import PictureModel, reads_pictures
from .rejections import InvalidRequest, UnknownModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .models import Model
    from .tasks.commands import TaskCommands

FILE = "file:"  # of the parameters of a load: files by their place in the model's folder


class BundleRepository:
    """All of a bundle's models. Loading and unloading a task's model adds and removes the task."""

    def __init__(self, models: Sequence[BundleModel], commands: TaskCommands) -> None:
        """Of NAME first.

        Args:
            models: NAME, and NAME.all where there is such an engine.
            commands: What changes the tasks of NAME.
        """
        self._bundle = models[0]
        self._commands = commands
        self._own: dict[str, Model] = {model.name: model for model in (*models, commands)}
        if reads_pictures(self._bundle.registry):
            pictures = PictureModel(self._bundle)
            self._own[pictures.name] = pictures

    def find(self, name: str) -> Model | None:
        """See `Repository.find`."""
        if name in self._own:
            return self._own[name]
        version = self._bundle.registry.versions.get(name)
        return None if version is None else TaskModel(self._bundle, version)

    def models(self) -> Iterable[Model]:
        """See `Repository.models`."""
        yield from self._own.values()
        for name, version in self._bundle.registry.versions.items():
            if name not in self._own:
                yield TaskModel(self._bundle, version)

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Add the task whose packed file comes with the parameters, or a new version of it.

        A model that is there and comes without a file is left as it is.

        Raises:
            UtuneError: See `TaskCommands`; or the parameters are none of a task.
        """
        files = {key: value for key, value in parameters.items() if key.startswith(FILE)}
        if not files:
            if self.find(name) is None:
                raise UnknownModel(
                    "there is no such model to load",
                    found=name,
                    do="send the packed task in a parameter `file:1/NAME.task`, base64",
                )
            return
        if len(files) != 1 or name in self._own:
            raise InvalidRequest(
                "a load takes one packed task", where=name, found=", ".join(sorted(files))
            )
        (content,) = files.values()
        update = name in self._bundle.registry.versions
        await self._commands.add(_packed(content), update=update, name=name)

    async def unload(self, name: str) -> None:
        """Remove a task.

        Raises:
            UtuneError: There is no such task, or it is the last.
        """
        if name in self._own:
            raise UsageError(
                "this model is the server's own and stays", where=name, do="stop the server"
            )
        if self.find(name) is None:
            raise UnknownModel("there is no such model to unload", found=name)
        await self._commands.remove(name)


def _packed(content: Any) -> bytes:
    """The bytes of a file that came as a parameter: base64 in JSON, as they are in protobuf."""
    if isinstance(content, bytes):
        return content
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, TypeError, ValueError) as cause:
        raise InvalidRequest("the packed task is not base64", found=str(cause)) from cause
