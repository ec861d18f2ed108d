"""How far a build is, from what the library reports."""

from __future__ import annotations

import json

from graphopt.engines.phases import Phases


def told(phases: Phases, **said: object) -> tuple[str, float]:
    phases.read(json.dumps(said))
    return phases.now, phases.fraction


def test_phases_inside_each_other() -> None:
    phases = Phases()
    assert (phases.now, phases.fraction) == ("", 0.0)
    assert told(phases, start="whole", within="", steps=4) == ("whole", 0.0)
    assert told(phases, step=0, of="whole") == ("whole", 0.25)
    assert told(phases, start="part", within="whole", steps=2) == ("part", 0.25)
    assert told(phases, step=0, of="part") == ("part", 0.375)
    assert told(phases, finish="part") == ("whole", 0.375)
    assert told(phases, step=3, of="whole") == ("whole", 1.0)
    assert told(phases, finish="whole") == ("", 1.0)


def test_it_never_goes_back() -> None:
    phases = Phases()
    told(phases, start="a", within="", steps=2)
    told(phases, step=0, of="a")
    told(phases, finish="a")
    assert told(phases, start="b", within="", steps=1) == ("b", 0.5)


def test_what_makes_no_sense_is_passed_over() -> None:
    phases = Phases()
    phases.read('{"start": "cut off')
    assert told(phases, step=3, of="unknown") == ("", 0.0)
    assert told(phases, finish="unknown") == ("", 0.0)
    assert told(phases, start="none", within="", steps=0) == ("none", 0.0)
    assert told(phases, step=9, of="none") == ("none", 1.0)
