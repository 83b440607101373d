"""Device profiles: data about real hardware, read from ``edgebake_targets/devices.yaml`` when first asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from edgebake import yaml_lines
from edgebake.errors import Problem, RecipeError
from edgebake.wording import did_you_mean, nearest, said

FILE = "devices.yaml"
VENDORS = ("apple", "google", "mediatek", "qualcomm", "samsung")
PLATFORMS = ("android", "ios", "macos")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
OS = re.compile(r"(Android|iOS|iPadOS|macOS)[1-9][0-9]?")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing to know of a device: what it means, its type, and the vendor whose chips alone have it."""

    help: str
    kind: type
    vendor: str = ""


FACTS: Mapping[str, Fact] = {
    "npu": Fact(help="name and generation of the NPU", kind=str),
    "ram_gib": Fact(help="the most memory that a device with this chip has", kind=float),
    "bandwidth_gb_s": Fact(help="peak memory bandwidth, 10^9 bytes a second", kind=float),
    "os_floor": Fact(help="the system that the first devices with this chip came with", kind=str),
    "soc_model": Fact(help="QNN's number of the chip", kind=int, vendor="qualcomm"),
    "htp_arch": Fact(help="version of the Hexagon tensor processor", kind=int, vendor="qualcomm"),
    "vtcm_mib": Fact(help="the tensor processor's own fast memory", kind=int, vendor="qualcomm"),
    "htp_fp16": Fact(help="whether QNN compiles float16 for the chip", kind=bool, vendor="qualcomm"),
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """A chip and the devices around it.

    ``facts`` by the names in FACTS, in their order; ``sources`` says where each comes from, ``unknown`` why a fact of
    FACTS is not among them: each of FACTS that the vendor's chips have stands in one of the two.
    """

    name: str
    title: str
    vendor: str
    platform: str
    facts: Mapping[str, Any]
    sources: Mapping[str, str]
    unknown: Mapping[str, str]

    @property
    def row(self) -> dict[str, Any]:
        """All that lowering may look at: what the device is, not who says so."""
        return {
            "name": self.name,
            "title": self.title,
            "vendor": self.vendor,
            "platform": self.platform,
            **self.facts,
        }


def names() -> tuple[str, ...]:
    """All device names, as in the file."""
    return tuple(_devices())


def find(name: str) -> Device:
    """The device ``name``; RecipeError with the nearest name when there is none. A title finds its name, too."""
    known = _devices()
    if name not in known:
        raise RecipeError(f"there is no device {said(name)}", fix=_nearest(name, known))
    return known[name]


def row(name: str | None) -> Mapping[str, Any] | None:
    """:attr:`Device.row` of ``name``; None for no device."""
    return None if name is None else find(name).row


def _nearest(name: str, known: Mapping[str, Device]) -> str:
    titles = {re.sub(r"[ _]+", "-", device.title.lower()): device.name for device in known.values()}
    meant = nearest(re.sub(r"[ _]+", "-", name.strip()), titles)
    if meant is None or nearest(name, known) is not None:
        return did_you_mean(name, known)
    found = known[titles[meant]]
    return f"did you mean {found.name!r} ({found.title})? all: edgebake devices"


@lru_cache
def _devices() -> Mapping[str, Device]:
    return read((files("edgebake_targets") / FILE).read_text("utf-8"))


def read(text: str) -> dict[str, Device]:
    """The devices of ``text``; RecipeError with every problem at ``file:line:key``."""
    try:
        document = yaml_lines.parse(text)
    except yaml_lines.YamlError as error:
        fault = error.fault
        raise RecipeError(fault.what, where=f"{FILE}:{fault.line}", fix=fault.fix) from None
    problems = [Problem(what=f.what, where=f"{FILE}:{f.line}", fix=f.fix) for f in document.faults]
    problems += _problems(document)
    if problems:
        raise RecipeError(problems)
    documents, rows = document.value["documents"], document.value["devices"]
    return {name: _device(name, row, documents) for name, row in rows.items()}


def _device(name: str, row: Mapping[str, Any], documents: Mapping[str, str]) -> Device:
    found = {key: row[key] for key in FACTS if key in row}
    return Device(
        name=name,
        title=row["title"],
        vendor=row["vendor"],
        platform=row["platform"],
        facts={key: float(v) if FACTS[key].kind is float else v for key, v in found.items()},
        sources={key: _cited(row["sources"][key], documents) for key in found},
        unknown=dict(row.get("unknown", {})),
    )


def _cited(source: str, documents: Mapping[str, str]) -> str:
    """``document: detail`` with the document written out; other texts as they are."""
    document, _, detail = source.partition(":")
    if document not in documents:
        return source
    return documents[document] + (f": {detail.strip()}" if detail else "")


# --- what can be wrong with the file --------------------------------------------------------------------------------

_TOP = ("documents", "devices")
_ROW = ("title", "vendor", "platform", *FACTS, "sources", "unknown")


@dataclass(frozen=True)
class _Place:
    """A key of the file, for problems that say where they are."""

    lines: Mapping[yaml_lines.Path, int]
    key: yaml_lines.Path = ()

    def __truediv__(self, key: str) -> _Place:
        return _Place(self.lines, (*self.key, key))

    def problem(self, what: str, fix: str) -> Problem:
        known = next(self.key[:n] for n in range(len(self.key), -1, -1) if self.key[:n] in self.lines)
        path = ".".join(map(str, self.key))
        return Problem(what=what, where=f"{FILE}:{self.lines[known]}:{path}", fix=fix)


def _problems(document: yaml_lines.Document) -> Iterator[Problem]:
    top = _Place(document.lines)
    value = document.value
    if not isinstance(value, dict) or set(value) != set(_TOP) or not all(isinstance(v, dict) for v in value.values()):
        yield top.problem("must be a mapping of documents and devices", "documents: {...} and devices: {...}")
        return
    yield from _wrong_texts(value["documents"], top / "documents")
    for name, row in value["devices"].items():
        place = top / "devices" / name
        if not NAME.fullmatch(name):
            yield place.problem(f"{said(name)} cannot name a device", "lower-case letters, digits and - only")
        if isinstance(row, dict):
            yield from _wrong_row(row, place)
        else:
            yield place.problem(f"must be a mapping, not {said(row)}", f"keys: {', '.join(_ROW)}")


def _wrong_row(row: Mapping[str, Any], place: _Place) -> Iterator[Problem]:
    for key in row.keys() - set(_ROW):
        yield (place / key).problem(f"a device has no {said(key)}", did_you_mean(key, _ROW))
    yield from _wrong_words(row, place)
    sources, unknown = row.get("sources", {}), row.get("unknown", {})
    for key, texts in (("sources", sources), ("unknown", unknown)):
        if not isinstance(texts, dict):
            yield (place / key).problem(f"must be a mapping, not {said(texts)}", "fact: text")
            return
        yield from _wrong_texts(texts, place / key)
    given = [key for key in FACTS if key in row]
    for key in given:
        yield from _wrong_fact(row, key, place / key)
    for key in sorted(set(given) ^ set(sources)):
        what = f"{key} has no source" if key in row else f"there is a source for {said(key)}, and no such fact"
        yield (place / "sources").problem(what, f"sources: {{{key}: a document, or a document's name and where in it}}")
    expected = {key for key, fact in FACTS.items() if fact.vendor in ("", row.get("vendor"))}
    for key in sorted(expected - set(given) - set(unknown)):
        yield place.problem(f"neither {key} nor why it is unknown", f"{key}: a value, or unknown: {{{key}: why}}")
    for key in sorted(set(unknown) - (expected - set(given))):
        yield (place / "unknown" / key).problem(f"{said(key)} is no fact that is left out", "take it out of unknown")


def _wrong_words(row: Mapping[str, Any], place: _Place) -> Iterator[Problem]:
    if not isinstance(row.get("title"), str) or not row["title"].strip():
        yield (place / "title").problem("must be the name that people know", "title: Snapdragon 8 Gen 3")
    for key, choices in (("vendor", VENDORS), ("platform", PLATFORMS)):
        if row.get(key) not in choices:
            what = f"must be one of {', '.join(choices)}, not {said(row.get(key))}"
            yield (place / key).problem(what, f"{key}: {choices[0]}")


def _wrong_fact(row: Mapping[str, Any], key: str, place: _Place) -> Iterator[Problem]:
    value, fact = row[key], FACTS[key]
    if fact.vendor not in ("", row.get("vendor")):
        yield place.problem(f"only chips of {fact.vendor} have {key}", "take it out")
    elif fact.kind is bool:
        if type(value) is not bool:
            yield place.problem(f"{key} must be true or false, not {said(value)}", fact.help)
    elif fact.kind is str:
        pattern = OS if key == "os_floor" else NAME
        if not isinstance(value, str) or not pattern.fullmatch(value):
            example = "Android14, iOS17 or macOS15" if key == "os_floor" else "hexagon-v75"
            yield place.problem(f"{key} must be written like {example}, not {said(value)}", fact.help)
    elif type(value) not in (int, fact.kind) or not 0 < value < 10_000:
        kind = "a whole number" if fact.kind is int else "a number"
        yield place.problem(f"{key} must be {kind} above 0, not {said(value)}", fact.help)


def _wrong_texts(texts: Mapping[str, Any], place: _Place) -> Iterator[Problem]:
    for key, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            yield (place / key).problem(f"must be text, not {said(text)}", "name the document, or give the reason")
