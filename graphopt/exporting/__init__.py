"""torch module → ONNX, compared with the module before anything is written."""

from graphopt.exporting.compare import CaseComparison, OutputComparison
from graphopt.exporting.pipeline import AxisReport, ExportResult, export

__all__ = ["AxisReport", "CaseComparison", "ExportResult", "OutputComparison", "export"]
