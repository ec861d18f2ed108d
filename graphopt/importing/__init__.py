"""Import: the structure that a state dict has and an exported graph has lost."""

from __future__ import annotations

from graphopt.importing.importer import ImportedModule, ImportReport, import_factors

__all__ = ["ImportReport", "ImportedModule", "import_factors"]
