"""Lua patterns, for the `match` rules of Kong schemas.

All of Lua 5.1's patterns but position captures: character classes, sets, the quantifiers `* + - ?`, anchors,
captures, back references, `%b` and `%f`.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_ESCAPE = ord("%")
_QUANTIFIERS = b"*+-?"


class PatternError(ValueError):
    """The pattern is malformed; the text is Lua's own message."""


def lua_match(text: str, pattern: str) -> str | None:
    """Return the first part of `text` that `pattern` matches, or None.

    Raises:
        PatternError: the pattern is malformed.

    """
    source, rule = text.encode(), pattern.encode()
    anchored = rule.startswith(b"^")
    starts = range(1) if anchored else range(len(source) + 1)
    for start in starts:
        end = _Matcher(source, rule).match(start, 1 if anchored else 0)
        if end is not None:
            return source[start:end].decode("utf-8", "replace")
    return None


def _class_test(letter: int) -> Callable[[int], bool]:
    chars = _CLASSES.get(chr(letter).lower())
    if chars is None:
        return lambda byte: byte == letter
    if chr(letter).isupper():
        return lambda byte: byte not in chars
    return lambda byte: byte in chars


_CLASSES: dict[str, bytes] = {
    "a": string.ascii_letters.encode(),
    "c": bytes([*range(32), 127]),
    "d": string.digits.encode(),
    "l": string.ascii_lowercase.encode(),
    "p": string.punctuation.encode(),
    "s": b" \t\n\v\f\r",
    "u": string.ascii_uppercase.encode(),
    "w": (string.ascii_letters + string.digits).encode(),
    "x": string.hexdigits.encode(),
    "z": b"\0",
}


@dataclass
class _Matcher:
    text: bytes
    rule: bytes
    captures: list[tuple[int, int | None]] = field(default_factory=list)

    def match(self, at: int, rule_at: int) -> int | None:
        """Return where a match that starts at `at` with the rule from `rule_at` on ends; None when there is none."""
        if rule_at >= len(self.rule):
            return at
        special = self._special(at, rule_at)
        if special is not _NOT_SPECIAL:
            return special
        return self._single(at, rule_at)

    def _special(self, at: int, rule_at: int) -> int | None:
        char = self.rule[rule_at : rule_at + 1]
        if char == b"(":
            return self._open(at, rule_at + 1)
        if char == b")":
            return self._close(at, rule_at + 1)
        if char == b"$" and rule_at + 1 == len(self.rule):
            return at if at == len(self.text) else None
        if char == b"%":
            return self._escaped(at, rule_at + 1)
        return _NOT_SPECIAL

    def _escaped(self, at: int, rule_at: int) -> int | None:
        letter = self.rule[rule_at : rule_at + 1]
        if letter == b"b":
            return self._balanced(at, rule_at + 1)
        if letter == b"f":
            return self._frontier(at, rule_at + 1)
        if letter.isdigit():
            return self._back_reference(at, rule_at + 1, int(letter))
        return _NOT_SPECIAL

    def _open(self, at: int, rule_at: int) -> int | None:
        self.captures.append((at, None))
        end = self.match(at, rule_at)
        if end is None:
            self.captures.pop()
        return end

    def _close(self, at: int, rule_at: int) -> int | None:
        for i in range(len(self.captures) - 1, -1, -1):
            start, end = self.captures[i]
            if end is None:
                self.captures[i] = (start, at)
                found = self.match(at, rule_at)
                if found is None:
                    self.captures[i] = (start, None)
                return found
        raise PatternError("invalid pattern capture")

    def _balanced(self, at: int, rule_at: int) -> int | None:
        pair = self.rule[rule_at : rule_at + 2]
        if len(pair) != len(b"xy"):
            raise PatternError("unbalanced pattern")
        if self.text[at : at + 1] != pair[:1]:
            return None
        depth = 0
        for i in range(at, len(self.text)):
            if self.text[i] == pair[1]:
                depth -= 1
                if not depth:
                    return self.match(i + 1, rule_at + 2)
            elif self.text[i] == pair[0]:
                depth += 1
        return None

    def _frontier(self, at: int, rule_at: int) -> int | None:
        if self.rule[rule_at : rule_at + 1] != b"[":
            raise PatternError("missing '[' after '%f' in pattern")
        test, after = self._item(rule_at)
        before = self.text[at - 1] if at else 0
        here = self.text[at] if at < len(self.text) else 0
        return self.match(at, after) if not test(before) and test(here) else None

    def _back_reference(self, at: int, rule_at: int, number: int) -> int | None:
        if not 0 < number <= len(self.captures) or self.captures[number - 1][1] is None:
            raise PatternError("invalid capture index")
        start, end = self.captures[number - 1]
        found = self.text[start:end]
        return self.match(at + len(found), rule_at) if self.text.startswith(found, at) else None

    def _single(self, at: int, rule_at: int) -> int | None:
        test, after = self._item(rule_at)
        quantifier = self.rule[after : after + 1]
        if not quantifier or quantifier not in _QUANTIFIERS:
            return self.match(at + 1, after) if self._fits(at, test) else None
        if quantifier == b"-":
            return self._lazy(at, after + 1, test)
        least = 1 if quantifier == b"+" else 0
        most = 1 if quantifier == b"?" else len(self.text)
        return self._greedy(at, after + 1, test, (least, most))

    def _greedy(self, at: int, rule_at: int, test: Callable[[int], bool], times: tuple[int, int]) -> int | None:
        least, most = times
        count = 0
        while count < most and self._fits(at + count, test):
            count += 1
        for taken in range(count, least - 1, -1):
            end = self.match(at + taken, rule_at)
            if end is not None:
                return end
        return None

    def _lazy(self, at: int, rule_at: int, test: Callable[[int], bool]) -> int | None:
        while True:
            end = self.match(at, rule_at)
            if end is not None:
                return end
            if not self._fits(at, test):
                return None
            at += 1

    def _fits(self, at: int, test: Callable[[int], bool]) -> bool:
        return at < len(self.text) and test(self.text[at])

    def _item(self, rule_at: int) -> tuple[Callable[[int], bool], int]:
        """Return the test of the single-character item at `rule_at`, and where the rule goes on after it."""
        char = self.rule[rule_at]
        if char == ord("["):
            return self._set(rule_at + 1)
        if char == _ESCAPE:
            if rule_at + 1 >= len(self.rule):
                raise PatternError("malformed pattern (ends with '%')")
            return _class_test(self.rule[rule_at + 1]), rule_at + 2
        if char == ord("."):
            return lambda _: True, rule_at + 1
        return lambda byte: byte == char, rule_at + 1

    def _set(self, at: int) -> tuple[Callable[[int], bool], int]:
        negated = self.rule[at : at + 1] == b"^"
        at += negated
        tests: list[Callable[[int], bool]] = []
        while not tests or self.rule[at : at + 1] != b"]":
            test, at = self._set_member(at)
            tests.append(test)
        return lambda byte: any(test(byte) for test in tests) is not negated, at + 1

    def _set_member(self, at: int) -> tuple[Callable[[int], bool], int]:
        if at >= len(self.rule):
            raise PatternError("malformed pattern (missing ']')")
        low = self.rule[at]
        if low == _ESCAPE and at + 1 < len(self.rule):
            return _class_test(self.rule[at + 1]), at + 2
        high = self.rule[at + 2 : at + 3]
        if self.rule[at + 1 : at + 2] == b"-" and high and high != b"]":
            return lambda byte: low <= byte <= high[0], at + 3
        return lambda byte: byte == low, at + 1


_NOT_SPECIAL = -1  # the rule goes on with a plain item
