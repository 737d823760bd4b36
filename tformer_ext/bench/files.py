"""Results as files: CSV with a header about the machine, JSON, and comparison with an older CSV."""

import csv
import datetime
import json
import platform
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import torch

from .. import _C
from ..commands.info import cpu_model
from .job import OURS
from .record import Record


def machine(threads: int) -> dict[str, str]:
    """What a figure cannot be understood without."""
    build = _C.build_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "isa": _C.cpu_isa(),
        "threads": str(threads),
        "tformer_ext": build["version"],
        "commit": str(build["commit"]),
        "compiler": build["compiler"],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_csv(path: Path, about: dict[str, str], records: Iterable[Record]) -> None:
    """Lines "# key: value" about the machine, then one row per record."""
    names = [f.name for f in fields(Record)]
    with path.open("w", newline="", encoding="utf-8") as file:
        for key, value in about.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for record in records:
            writer.writerow({k: _short(v) for k, v in asdict(record).items()})


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def read_csv(path: Path) -> tuple[dict[str, str], list[Record]]:
    """What write_csv wrote. ValueError names what is wrong with the file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    needed = {f.name for f in fields(Record) if f.default is MISSING}
    missing = needed - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"{path}: expected a CSV file of this benchmark, columns are missing: {sorted(missing)}")
    return about, [Record.from_strings(row) for row in reader]


def as_json(about: dict[str, str], records: Iterable[Record], bars: Iterable) -> str:
    return json.dumps(
        {"about": about, "records": [asdict(r) for r in records], "bars": [asdict(b) for b in bars]}, indent=1
    )


def changes(old: Iterable[Record], new: Iterable[Record], by: float = 0.1) -> list[tuple[Record, float]]:
    """(record, time now / time then) of our cases that changed by more than `by`, the slowed ones first."""
    then = {record.key: record for record in old if record.contender == OURS}
    found = []
    for record in new:
        if record.contender == OURS and record.key in then:
            ratio = record.median_us / then[record.key].median_us
            if ratio > 1 + by or ratio < 1 / (1 + by):
                found.append((record, ratio))
    return sorted(found, key=lambda pair: -pair[1])
