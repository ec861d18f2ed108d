"""What was measured of a plugin on GPUs: the file beside its kernels, and what follows from it for one place."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from graphopt.errors import BadInput

NEAR = 2.0
"""A place is judged by measurements whose sizes are within this factor of its own."""

Positive = Annotated[float, Field(gt=0)]


class Interval(BaseModel):
    """A time in microseconds: the median, and the ends of its 95 % interval."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: Positive
    median: Positive
    high: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Interval:
        if not self.low <= self.median <= self.high:
            raise ValueError("low ≤ median ≤ high does not hold")
        return self


class Measurement(BaseModel):
    """One shape, timed on one GPU against what TensorRT does without the plugin.

    Attributes:
        gpu: As the driver names it.
        date: Of the measurement.
        library: What ran the other way, with its version.
        variant: Of the op; for PivotLinear the form.
        dtype: Of the weights.
        rows: Of x.
        sizes: The other sizes that decide, by name; for PivotLinear inputs, outputs and rank.
        tactic: The fastest kernel.
        plugin: Its time.
        other: The time of the other way.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpu: str
    date: datetime.date
    library: str
    variant: str
    dtype: str
    rows: Annotated[int, Field(gt=0)]
    sizes: dict[str, Annotated[int, Field(gt=0)]]
    tactic: Annotated[int, Field(gt=0)]
    plugin: Interval
    other: Interval

    @property
    def faster(self) -> bool:
        """Whether the plugin is: the intervals lie apart."""
        return self.plugin.high < self.other.low


class Measurements(BaseModel):
    """What the file holds.

    Attributes:
        format: Of the file.
        note: For whoever opens it.
        measurements: None where the plugin has not been measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    note: str = ""
    measurements: tuple[Measurement, ...] = ()

    def why_not(
        self, *, gpu: str | None, variant: str, dtype: str, rows: tuple[int, int] | None, sizes: Mapping[str, int]
    ) -> str | None:
        """Why a place is not given to the plugin; None where the measurements say that it is faster there.

        It is where measurements on this GPU, of this variant and dtype and of sizes within a factor of `NEAR`, reach
        from the fewest rows to the most, and all of them in that range found it faster.

        Args:
            gpu: As the driver names it; None where there is none here.
            variant: Of the op.
            dtype: Of the weights.
            rows: The fewest and the most that the engine is built for; None where that is not known.
            sizes: As in `Measurement`.
        """
        if not self.measurements:
            return "the plugin has not been measured on any GPU"
        if gpu is None:
            return "there is no GPU here whose measurements would count"
        if rows is None:
            return "how many rows x has is not known"
        same = [m for m in self.measurements if m.gpu == gpu]
        if not same:
            return f"the plugin has not been measured on {gpu}"
        near = [m for m in same if (m.variant, m.dtype) == (variant, dtype) and _near(m.sizes, sizes)]
        below = [m.rows for m in near if m.rows <= rows[0]]
        above = [m.rows for m in near if m.rows >= rows[1]]
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        span = str(rows[0]) if rows[0] == rows[1] else f"{rows[0]} to {rows[1]}"
        if not below or not above:
            return f"{variant} form, {dtype}, {told} at {span} rows has not been measured on {gpu}"
        slower = [m for m in near if max(below) <= m.rows <= min(above) and not m.faster]
        if slower:
            first = slower[0]
            return f"at {first.rows} rows it takes {first.plugin.median:g} µs, the products {first.other.median:g} µs"
        return None


def _near(measured: Mapping[str, int], sizes: Mapping[str, int]) -> bool:
    return measured.keys() == sizes.keys() and all(
        measured[name] <= NEAR * size and size <= NEAR * measured[name] for name, size in sizes.items()
    )


def load_measurements(path: Path) -> Measurements:
    """Read a file of measurements.

    Raises:
        BadInput: It cannot be read, or says what it must not.
    """
    try:
        return Measurements.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot be read: {error}", where=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BadInput(f"{place or 'the file'}: {first['msg']}", where=str(path)) from error
