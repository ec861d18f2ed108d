"""What the folder of a bundle looks like: nobody takes it for a model, or writes into it.

In it is a file ``current``, with the name of the folder that holds the plan and all else.
"""

from __future__ import annotations

from pathlib import Path

from graphopt.errors import BadInput

CURRENT, PLAN = "current", "plan.json"


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle."""
    return (path / CURRENT).is_file()


def not_one_file(bundle: Path | str) -> BadInput:
    """What to say where a model in one file is asked for and a bundle was given."""
    name = Path(bundle).with_suffix(".onnx").name
    return BadInput(
        "is a bundle, and here one file is asked for",
        where=str(bundle),
        hint=f"graphopt bundle merge {bundle} -o {name}",
    )


def refuse_inside(folder: Path) -> None:
    """Refuse to write into the folder of a bundle.

    Raises:
        BadInput: It is one, or lies in one.
    """
    place = folder.absolute()
    for around in (place, *place.parents):
        # A file may be called `current` anywhere.
        if is_bundle(around) and any(around.glob(f"*/{PLAN}")):
            what = "is a bundle" if around == place else f"is in the bundle {around}"
            hint = f"write beside it, into {around.parent}"
            raise BadInput(f"{what}, which holds nothing of others", where=str(folder), hint=hint)
