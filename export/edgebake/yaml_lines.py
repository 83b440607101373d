"""YAML with line numbers: a safe subset, built from the parser's events so that nothing hostile is ever constructed.

Scalars follow the YAML 1.2 core schema (``no`` and ``1:30`` are text, ``1e-3`` is a number); keys are always text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import yaml

from edgebake.wording import said, visible

MAX_NODES = 20_000  # counted with aliases expanded: a YAML bomb stops here
MAX_DEPTH = 32

Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]{1,40}")
_BASED = re.compile(r"0x[0-9a-fA-F]{1,32}|0o[0-7]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,10})?")
_SPECIAL: dict[str, Any] = {"": None, "~": None, "true": True, "false": False}
_SPECIAL |= {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}
_SPECIAL |= dict.fromkeys(("null", "Null", "NULL"))
_SPECIAL |= {"True": True, "TRUE": True, "False": False, "FALSE": False}


@dataclass(frozen=True)
class Fault:
    """Something wrong in the text, at a line counted from 1."""

    line: int
    what: str
    fix: str = ""
    key: Path = ()


class YamlError(Exception):
    """The text cannot be read any further; ``fault`` says why."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(fault.what)


@dataclass(frozen=True)
class Document:
    """Plain ``value`` of a text, the line of each key, and faults that did not stop the reading."""

    value: Any
    lines: Mapping[Path, int]
    faults: tuple[Fault, ...]


@dataclass
class _Node:
    line: int
    value: Any = None
    entries: dict[str, tuple[int, _Node]] | None = None
    items: list[_Node] | None = None
    size: int = 1
    depth: int = 1


@dataclass
class _Reader:
    events: Iterator[yaml.Event]
    anchors: dict[str, _Node] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    nodes: int = 0


def parse(text: str) -> Document:
    """Read one document; YamlError at the first fault that makes the rest unreadable."""
    _refuse_strange_characters(text)
    fast = getattr(yaml, "CSafeLoader", None)  # libyaml, where PyYAML was built with it
    if fast is not None:
        try:
            return _read(text, fast)
        except (YamlError, yaml.YAMLError):  # told in PyYAML's words: they name the line where a bracket was opened
            pass
    try:
        return _read(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise YamlError(_syntax_fault(error, text)) from None
    except yaml.YAMLError as error:
        raise YamlError(Fault(1, f"not readable as YAML: {error}")) from None


def _read(text: str, loader: Any) -> Document:
    reader = _Reader(yaml.parse(text, Loader=loader))
    node = _document(reader)
    lines: dict[Path, int] = {(): node.line}
    _gather_lines(node, (), lines)
    return Document(_plain(node), lines, tuple(reader.faults))


def _refuse_strange_characters(text: str) -> None:
    strange = {character for character in set(text) if character < " " or "\x7e" < character < "\xa0"} - set("\t\n\r")
    if strange:
        first = min(strange, key=text.index)
        line = text.count("\n", 0, text.index(first)) + 1
        raise YamlError(Fault(line, f"holds the control character {first!r}", "save the recipe as plain UTF-8 text"))


def _document(reader: _Reader) -> _Node:
    node: _Node | None = None
    for event in reader.events:
        if isinstance(event, yaml.DocumentStartEvent):
            if node is not None:
                _stop(event, "holds a second document ('---')", "keep one recipe per file")
            node = _node(reader, next(reader.events), 1, ())
    return node if node is not None else _Node(line=1)


def _node(reader: _Reader, event: yaml.Event, depth: int, key: Path) -> _Node:
    if depth > MAX_DEPTH:
        _stop(event, f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(event, yaml.AliasEvent):
        return _alias(reader, event, depth)
    _count(reader, event, 1)
    tag = getattr(event, "tag", None)
    if tag not in (None, "!"):
        _stop(event, f"tags such as {said(tag)} are not allowed", "write plain values; quote what must stay text")
    if isinstance(event, yaml.ScalarEvent):
        node = _Node(_line(event), _scalar(event))
    elif isinstance(event, yaml.MappingStartEvent):
        node = _mapping(reader, event, depth, key)
    else:
        node = _sequence(reader, event, depth, key)
    if anchor := cast(yaml.NodeEvent, event).anchor:
        reader.anchors[anchor] = node
    return node


def _alias(reader: _Reader, event: yaml.AliasEvent, depth: int) -> _Node:
    name = str(event.anchor)
    node = reader.anchors.get(name)
    if node is None:
        _stop(event, f"alias {said('*' + name)} stands before its anchor, or inside what it names")
    _count(reader, event, node.size)
    if depth + node.depth - 1 > MAX_DEPTH:
        _stop(event, f"is nested deeper than {MAX_DEPTH} levels")
    return node


def _mapping(reader: _Reader, start: yaml.Event, depth: int, key: Path) -> _Node:
    entries: dict[str, tuple[int, _Node]] = {}
    node = _Node(_line(start), entries=entries)
    while not isinstance(event := next(reader.events), yaml.MappingEndEvent):
        name, line = _key(event), _line(event)
        value = _node(reader, next(reader.events), depth + 1, (*key, name))
        if name in entries:
            first = entries[name][0]
            fault = Fault(line, f"{said(name)} stands twice (first in line {first})", "keep one", (*key, name))
            reader.faults.append(fault)
        entries[name] = (line, value)
        node.size += value.size
        node.depth = max(node.depth, value.depth + 1)
    return node


def _sequence(reader: _Reader, start: yaml.Event, depth: int, key: Path) -> _Node:
    items: list[_Node] = []
    node = _Node(_line(start), items=items)
    while not isinstance(event := next(reader.events), yaml.SequenceEndEvent):
        item = _node(reader, event, depth + 1, (*key, len(items)))
        items.append(item)
        node.size += item.size
        node.depth = max(node.depth, item.depth + 1)
    return node


def _key(event: yaml.Event) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        _stop(event, "a key must be one word or text, not a list, mapping or alias")
    if event.value == "<<" and not event.style:
        _stop(event, "merge keys ('<<') are not supported", "write the keys out, or use extends:")
    return str(_text(event))


def _scalar(event: yaml.ScalarEvent) -> Any:
    if event.style or event.tag == "!":
        return _text(event)
    text = event.value
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if len(text) < 400 and _FLOAT.fullmatch(text):
        return float(text)
    return _text(event)


def _text(event: yaml.ScalarEvent) -> str:
    for character in event.value:
        if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t\u200d":
            _stop(event, f"holds the invisible character {character!r}", "remove it")
    return str(event.value)


def _count(reader: _Reader, event: yaml.Event, nodes: int) -> None:
    reader.nodes += nodes
    if reader.nodes > MAX_NODES:
        _stop(event, f"holds more than {MAX_NODES} values (aliases counted as often as they are used)")


def _gather_lines(node: _Node, path: Path, lines: dict[Path, int]) -> None:
    for name, (line, value) in (node.entries or {}).items():
        lines[(*path, name)] = line
        _gather_lines(value, (*path, name), lines)
    for index, item in enumerate(node.items or ()):
        lines[(*path, index)] = item.line
        _gather_lines(item, (*path, index), lines)


def _plain(node: _Node) -> Any:
    if node.entries is not None:
        return {name: _plain(value) for name, (_, value) in node.entries.items()}
    if node.items is not None:
        return [_plain(item) for item in node.items]
    return node.value


def _syntax_fault(error: yaml.MarkedYAMLError, text: str) -> Fault:
    problem = error.problem or "not readable"
    at_end = "end of stream" in problem or "stream end" in problem
    mark = error.context_mark if at_end and error.context_mark else error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    written = next(iter(text.splitlines()[line - 1 : line]), "")
    if "'\\t'" in problem or written.lstrip(" ").startswith("\t"):
        return Fault(line, "holds a tab where YAML wants spaces", "indent with spaces")
    words = visible(problem + (f" {error.context}" if error.context else ""))[:200]
    return Fault(line, f"not readable as YAML: {words}", "check indentation, brackets, quotes and colons")


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _stop(event: yaml.Event, what: str, fix: str = "") -> NoReturn:
    raise YamlError(Fault(_line(event), what, fix))
