"""From the text of a file to documents whose parts know their lines. Pure, but for the variables that are handed in.

Contract: decK's `${{ env "DECK_..." }}` are filled in as decK does, where the variable is set; where it is not, they
stay, without their quotation marks, and are told later. No message quotes anything of the text but names of variables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from kong_metering.commands.check.findings import Finding, Level, Path
from kong_metering.log import printable

_DECK = re.compile(r"""\$\{\{\s*env\s+["'`]([^"'`\s]*)["'`]\s*((?:\|\s*\w+\s*)*)\}\}""")
_LEFT = re.compile(r"\$\{\{\s*env\s+(\S*)\s*(?:\|[^}]*)?\}\}")
# What YAML's own messages quote of the text; a single character is no secret.
_QUOTED = re.compile(r"'[^'<][^']+'")


@dataclass(frozen=True)
class Document:
    """One document of a file: what it says, and its tree with lines (None where it could not be had)."""

    value: Any
    node: yaml.Node | None = None

    def line(self, path: Path) -> int | None:
        """Tell the line of what a path leads to, or of the innermost part of it that there is."""
        node = self.node
        line = node.start_mark.line + 1 if node else None
        for part in path:
            if isinstance(node, yaml.MappingNode):
                found = [(key, value) for key, value in node.value if key.value == part]
                if not found:
                    break
                key, node = found[-1]
                line = key.start_mark.line + 1
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                break
        return line


@dataclass(frozen=True)
class Text:
    """What was read: documents, what is wrong with the text itself, and the variables of decK that it asks for."""

    documents: tuple[Document, ...] = ()
    findings: tuple[Finding, ...] = ()
    deck_variables: frozenset[str] = field(default_factory=frozenset)


def left_unfilled(value: str) -> str | None:
    """Return the name of decK's variable that a value still asks for."""
    match = _LEFT.search(value)
    return match[1] if match else None


def read(text: str, environment: Mapping[str, str]) -> Text:
    """Read a file's text as JSON or YAML."""
    wrong: list[Finding] = []
    variables: set[str] = set()
    filled = _filled(text, environment, wrong, variables)
    stripped = filled.lstrip("\ufeff \t\r\n")
    documents: Sequence[Document] = ()
    try:
        documents = _json(filled, wrong) if stripped[:1] in ("{", "[") else _yaml(filled, wrong)
    except yaml.YAMLError as error:
        wrong.append(_unreadable_yaml(error))
    except json.JSONDecodeError as error:
        wrong.append(_unreadable_json(error))
    except RecursionError:
        wrong.append(Finding(Level.ERROR, "syntax", (), "it is nested too deeply to be read", "is it the right file?"))
    return Text(tuple(documents), tuple(wrong), frozenset(variables))


# --------------------------------------------------------------------------------------------------------------- decK


def _filled(text: str, environment: Mapping[str, str], wrong: list[Finding], variables: set[str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        variables.add(name)
        if not name.startswith("DECK_"):
            line = text.count("\n", 0, match.start()) + 1
            wrong.append(
                Finding(
                    Level.ERROR,
                    "deck-variable-name",
                    (),
                    f"decK fills in only variables whose names begin with DECK_, and {printable(name, 80)} does not",
                    f"call it DECK_{printable(name, 80)}, here and in the environment",
                    line=line,
                )
            )
        elif name in environment:
            return environment[name]
        return "${{ env DECK_" + name.removeprefix("DECK_") + " " + match[2] + "}}"

    return _DECK.sub(value, text)


# --------------------------------------------------------------------------------------------------------- JSON, YAML


def _json(text: str, wrong: list[Finding]) -> list[Document]:
    doubled: list[str] = []

    def members(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            if name in made:
                doubled.append(name)
            made[name] = value
        return made

    try:
        value = json.loads(text.lstrip("\ufeff"), object_pairs_hook=members)
    except json.JSONDecodeError as error:
        try:
            # YAML may begin with a brace or a bracket too.
            return _yaml(text, wrong)
        except yaml.YAMLError:
            raise error from None
    wrong += [_doubled(name, None) for name in doubled]
    try:
        return [Document(value, yaml.compose(text, yaml.SafeLoader))]
    except yaml.YAMLError:
        return [Document(value)]


def _yaml(text: str, wrong: list[Finding]) -> list[Document]:
    documents = []
    loader = _Loader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            value = None if node is None else _constructed(loader, node)
            if value is not None:
                documents.append(Document(value, node))
    finally:
        loader.dispose()
    wrong += [_doubled(name, line) for name, line in loader.doubled]
    return documents


def _constructed(loader: _Loader, node: yaml.Node) -> Any:
    try:
        return loader.construct_document(node)
    except (ValueError, TypeError, LookupError, ArithmeticError):
        # Such as `!!int x`; PyYAML lets through what Python says of it, which quotes the value.
        problem = "a value is not of the type that its tag says"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class _Loader(yaml.SafeLoader):
    """Notes which names stand twice in a mapping, where YAML takes the last one in silence."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.doubled: list[tuple[str, int]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - as in PyYAML
        return super().construct_mapping(node, deep)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    self.doubled.append((key.value, key.start_mark.line + 1))
                seen.add(key.value)
        return node


# Dates stay as they are written: no setting is one.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _doubled(name: str, line: int | None) -> Finding:
    return Finding(
        Level.ERROR,
        "doubled-name",
        (),
        f"{printable(name, 80)} stands twice in one place, and only the last one counts",
        "remove the one that is not meant",
        line=line,
    )


def _unreadable_yaml(error: yaml.YAMLError) -> Finding:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    said = getattr(error, "problem", None) or "it cannot be read"
    why = _QUOTED.sub("'...'", printable(str(said)))
    return Finding(
        Level.ERROR,
        "syntax",
        (),
        f"it is no YAML: {why}" + (f", in column {mark.column + 1}" if mark else ""),
        "look at this line and the one before: indentation is by blanks, and a text with `: `, ` #`, or one of "
        "`{[*&!%@` at its beginning needs quotation marks",
        line=mark.line + 1 if mark else None,
    )


def _unreadable_json(error: json.JSONDecodeError) -> Finding:
    return Finding(
        Level.ERROR,
        "syntax",
        (),
        f"it is no JSON: {printable(error.msg)}, in column {error.colno}",
        "look at this line and the one before: names and texts stand in double quotation marks, a comma between two "
        "members and none behind the last one",
        line=error.lineno,
    )
