"""Every race by its name on the command line. A new one is a function that returns its sides, and a line here."""

from __future__ import annotations

from jambascope.studies.bench.kernel_races import EXPERT_RACE, SCAN, SCAN_BACKWARD
from jambascope.studies.bench.memory_races import LOAD, LONG
from jambascope.studies.bench.model_races import CACHE, GENERATE, HOOKS, PREFILL, TRAIN
from jambascope.studies.bench.race import Race
from jambascope.studies.bench.sweep_races import SWEEP

RACES: dict[str, Race] = {
    race.name: race
    for race in (SCAN, SCAN_BACKWARD, EXPERT_RACE, PREFILL, CACHE, GENERATE, TRAIN, LOAD, HOOKS, SWEEP, LONG)
}
