"""Model files: read lazily and checked, written atomically and deterministically."""

from __future__ import annotations

from graphopt.files.load import load_model
from graphopt.files.save import StagedSave, save_model, stage_model

__all__ = ["StagedSave", "load_model", "save_model", "stage_model"]
