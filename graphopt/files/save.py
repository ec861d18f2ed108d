"""Save a model: streamed, deterministic, and all or nothing.

Weights stay where the input had them: inside the ``.onnx``, or in one data file beside it, named by the hash of its
content (``model.<hash>.data``). A save is prepared in a hidden folder beside the target and takes effect when the
``.onnx`` is renamed; killed at any moment it leaves the old model or the new one, and what it had not finished (the
hidden folder; between the two renames of a commit also the new data file) is removed by the next save to the same
target. Large files are not flushed to disk: that is about killed processes and full disks, not about power cuts.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import TracebackType

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.files.folder import (
    as_one_line,
    check_target,
    data_stem,
    locked,
    make_staging,
    mentions,
)
from graphopt.files.placement import Slot, embeds, goes_outside, tensor_slots
from graphopt.files.writing import saved_form, serialise, write_data, write_file

_DATA = r"\.[0-9a-f]{32}\.data"


class StagedSave:
    """A model written completely but not yet in place. Made by `stage_model`.

    Use it as a context manager: leaving the block without `commit` discards the save.

    Attributes:
        staged_path: The new ``.onnx``, loadable, in a hidden folder beside the target. `commit` moves it away, so a
            model loaded from here must not be used after that.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._folder = target.parent
        self._lock: int | None
        self._staging, self._lock = make_staging(target)
        self._data: Path | None = None
        self._moved: list[tuple[Slot, ir.TensorProtocol]] = []
        self.staged_path = self._staging / target.name

    def __enter__(self) -> StagedSave:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def commit(self) -> Path:
        """Put the model in place, atomically, and remove what earlier saves to this target left.

        Tensors of the saved model that lie in a file that this removes are replaced by the same tensors in the new
        file, so the model stays usable after it was saved over its own source. (Tensors that only some other model
        object holds are not found.)

        Returns:
            The target.

        Raises:
            GraphoptError: The target cannot be replaced; it is as it was.
        """
        if self._lock is None:
            raise GraphoptError("this save was committed or discarded already", where=str(self._target))
        with as_one_line(self._target), locked(self._folder):
            if self._data is not None:
                self._data.replace(self._folder / self._data.name)
            self.staged_path.replace(self._target)
            stale = self._stale_data()
            self._repoint(stale)
            for file in stale:
                file.unlink(missing_ok=True)
        self.discard()
        return self._target

    def discard(self) -> None:
        """Remove everything staged; after `commit` there is nothing left to remove."""
        if self._lock is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def write(self, model: ir.Model) -> None:
        """Write ``model`` into the hidden folder; it is the same model afterwards. Called once, by `stage_model`."""
        if embeds(model):
            write_file(self.staged_path, serialise(model, self._target), self._target)
            return
        slots = list(tensor_slots(model))
        outside = [slot for slot in slots if goes_outside(slot)]
        written = write_data(self._staging, outside, self._target) if outside else None
        replaced: list[Slot] = []
        try:
            for slot in slots:
                new = saved_form(slot, written, self._staging)
                if new is None:
                    continue
                slot.put(new)
                replaced.append(slot)
                if isinstance(slot.tensor, ir.ExternalTensor):
                    final = saved_form(slot, written, self._folder)
                    assert final is not None
                    self._moved.append((slot, final))
            content = serialise(model, self._target)
        finally:
            for slot in replaced:
                slot.put(slot.tensor)
        if written is not None:
            self._data = written.file
        write_file(self.staged_path, content, self._target)

    def _stale_data(self) -> list[Path]:
        """Data files of earlier saves to this target that no model in the folder refers to."""
        pattern = re.compile(re.escape(data_stem(self._target)) + _DATA)
        current = None if self._data is None else self._data.name
        with os.scandir(self._folder) as entries:
            names = sorted(e.name for e in entries if pattern.fullmatch(e.name) and e.name != current)
        if not names:
            return []
        # A copy of the old model under another name needs the old data.
        others = [file for file in self._folder.glob("*.onnx") if file.name != self._target.name]
        return [self._folder / name for name in names if not any(mentions(file, name) for file in others)]

    def _repoint(self, stale: list[Path]) -> None:
        gone = {os.path.realpath(file) for file in stale}
        if not gone:
            return
        for slot, new in self._moved:
            old = slot.tensor
            if slot.get() is old and isinstance(old, ir.ExternalTensor) and os.path.realpath(old.path) in gone:
                slot.put(new)


def stage_model(model: ir.Model, path: str | Path) -> StagedSave:
    """Write a model beside its target without replacing the target.

    Weights are evaluated (`ir.LazyTensor`) and written one at a time. The same model gives the same bytes.

    Args:
        model: The model; unchanged afterwards.
        path: The target, which may be the file that ``model`` was loaded from.

    Returns:
        The staged save: check ``staged_path``, then ``commit()`` or ``discard()``.

    Raises:
        BadInput: The target cannot be written to at all: no such folder, a folder itself, no permission.
        GraphoptError: Writing failed (disk full, ...), or the model does not fit the format. Nothing is left behind.
    """
    target = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would write through a link, not replace it
    check_target(target)
    with as_one_line(target):
        staged = StagedSave(target)
        try:
            staged.write(model)
        except BaseException:
            staged.discard()
            raise
    return staged


def save_model(model: ir.Model, path: str | Path) -> Path:
    """Save a model, atomically. See `stage_model`, `StagedSave.commit`. Returns the absolute path written."""
    with stage_model(model, path) as staged:
        return staged.commit()
