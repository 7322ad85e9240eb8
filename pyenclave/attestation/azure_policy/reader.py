"""
Reading Azure Attestation policies.

Grammar: the project's notes on Azure Attestation, 8.3 (Azure's "claim rule grammar", "policy
version 1.2", "claim rule functions"). Only the grammar is accepted: the ``=`` in place of ``==``
and the misspelt functions of some published samples are refused with their line and column. What
can be refused while reading is refused then, so that a policy that was accepted cannot fail later
for a reason that lies in its text.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Final, Literal, NoReturn, cast

from pyenclave.attestation.azure_policy.claims import MAX_INTEGER
from pyenclave.attestation.azure_policy.syntax import (
    FUNCTIONS,
    PROPERTIES,
    Action,
    Call,
    ClaimArguments,
    ClaimReference,
    Comparison,
    Condition,
    Expression,
    Literal_,
    Policy,
    Property,
    PropertyCondition,
    PropertyReference,
    Rule,
    Verb,
)
from pyenclave.errors import AttestationError

__all__ = ["MAX_DEPTH", "MAX_RULES", "MAX_SIZE", "policy_hash", "read_policy"]

MAX_SIZE: Final = 1 << 20  # characters of text
MAX_RULES: Final = 1024
MAX_DEPTH: Final = 16  # nested function calls
_MAX_CONDITIONS: Final = 64  # of a rule, and comparisons of a condition
_VERSIONS: Final = ((1, 0), (1, 1), (1, 2))

_TOKEN: Final = re.compile(
    r"""
    (?P<space>[ \t\r\n]+|//[^\n]*)
  | (?P<string>"(?:[^"\\\x00-\x1f]|\\["\\])*")
  | (?P<version>[0-9]+\.[0-9]+)
  | (?P<integer>-?[0-9]+)
  | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
  | (?P<sign>=>|==|!=|<=|>=|&&|[<>=!\[\](){},;:.])
    """,
    re.VERBOSE,
)
Section = Literal["configurationrules", "authorizationrules", "issuancerules"]
_VERBS: Final = {
    "configurationrules": ("issueproperty",),
    "authorizationrules": ("permit", "deny", "add"),
    "issuancerules": ("add", "issue", "issueproperty"),
}
_COMPARISONS: Final = ("==", "!=", "<", "<=", ">", ">=")
_ORDER: Final = ("<", "<=", ">", ">=")


def policy_hash(text: str) -> str:
    """Return ``x-ms-policy-hash``: BASE64URL(SHA256(UTF8(BASE64URL(UTF8(text)))))."""
    inner = base64.urlsafe_b64encode(text.encode()).rstrip(b"=")
    return base64.urlsafe_b64encode(hashlib.sha256(inner).digest()).rstrip(b"=").decode()


def read_policy(text: str) -> Policy:
    """
    Read a policy.

    Args:
        text: The policy, at most 1 MiB.

    Raises:
        AttestationError: Not the grammar; line, column, what was expected and what was found.

    """
    if not isinstance(text, str):
        raise TypeError(f"text is str, not {type(text).__name__}")
    if len(text) > MAX_SIZE:
        raise AttestationError(
            "attestation policy: too long", expected=f"at most {MAX_SIZE}", found=len(text)
        )
    return _Reader(text).policy()


class _Token:
    """A piece of the text."""

    __slots__ = ("kind", "offset", "text")

    def __init__(self, kind: str, text: str, offset: int) -> None:
        self.kind = kind
        self.text = text
        self.offset = offset


class _Reader:
    """A reader by recursive descent; only function calls nest, and they are counted."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split()
        self._position = 0
        self._version = (1, 0)
        self._rules = 0
        self._bound: set[str] = set()

    # ---- pieces ------------------------------------------------------------------------------

    def _split(self) -> list[_Token]:
        tokens = []
        offset = 0
        while offset < len(self._text):
            match = _TOKEN.match(self._text, offset)
            if match is None:
                self._fail("a piece of the language", self._text[offset : offset + 20], offset)
            if match.lastgroup != "space":
                tokens.append(_Token(cast("str", match.lastgroup), match[0], offset))
            offset = match.end()
        tokens.append(_Token("end", "the end of the text", len(self._text)))
        return tokens

    def _line(self, offset: int) -> tuple[int, int]:
        before = self._text[:offset]
        return before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1

    def _fail(self, expected: str, found: str | None = None, offset: int | None = None) -> NoReturn:
        if offset is None:
            token = self._tokens[self._position]
            offset, found = token.offset, token.text if found is None else found
        line, column = self._line(offset)
        raise AttestationError(
            f"attestation policy: line {line}, column {column}",
            expected=expected,
            found=(found or "")[:80],
        )

    def _peek(self, *texts: str) -> bool:
        token = self._tokens[self._position]
        return token.kind in ("sign", "name") and token.text in texts

    def _next(self) -> _Token:
        token = self._tokens[self._position]
        if token.kind != "end":
            self._position += 1
        return token

    def _take(self, text: str, advice: str | None = None) -> None:
        if not self._peek(text):
            self._fail(advice or text)
        self._position += 1

    def _skip(self, text: str) -> bool:
        if self._peek(text):
            self._position += 1
            return True
        return False

    def _name(self, expected: str, *known: str) -> str:
        token = self._tokens[self._position]
        if token.kind != "name" or (known and token.text not in known):
            self._fail(expected)
        return self._next().text

    # ---- policy and rules --------------------------------------------------------------------

    def policy(self) -> Policy:
        """Read everything."""
        self._take("version")
        self._take("=")
        token = self._tokens[self._position]
        if token.kind != "version":
            self._fail("a version such as 1.0")
        major, minor = (int(part[:4]) for part in token.text.split("."))
        if (major, minor) not in _VERSIONS or token.text != f"{major}.{minor}":
            self._fail("version 1.0, 1.1 or 1.2")
        self._position += 1
        self._version = (major, minor)
        self._take(";")
        configuration: tuple[Rule, ...] = ()
        if self._peek("configurationrules"):
            if self._version < (1, 1):
                self._fail("authorizationrules (configurationrules need version 1.1)")
            configuration = self._section("configurationrules")
        authorization = self._section("authorizationrules")
        issuance = self._section("issuancerules")
        if self._tokens[self._position].kind != "end":
            self._fail("the end of the text")
        return Policy(self._version, configuration, authorization, issuance, self._text)

    def _section(self, section: Section) -> tuple[Rule, ...]:
        self._take(section)
        self._take("{")
        rules = []
        while not self._peek("}"):
            rules.append(self._rule(section))
        self._take("}")
        self._take(";")
        return tuple(rules)

    def _rule(self, section: Section) -> Rule:
        self._rules += 1
        if self._rules > MAX_RULES:
            self._fail(f"at most {MAX_RULES} rules")
        self._bound = set()
        line, column = self._line(self._tokens[self._position].offset)
        conditions = []
        if not self._peek("=>"):
            conditions.append(self._condition())
            while self._skip("&&"):
                if len(conditions) >= _MAX_CONDITIONS:
                    self._fail(f"at most {_MAX_CONDITIONS} conditions")
                conditions.append(self._condition())
        self._take("=>", "&& or =>")
        action = self._action(section)
        self._take(";")
        return Rule(tuple(conditions), action, line, column)

    def _condition(self) -> Condition:
        negated = False
        if self._peek("!"):
            if self._version < (1, 2):
                self._fail("a condition without ! (that needs version 1.2)")
            negated = self._skip("!")
        identifier = None
        if self._tokens[self._position].kind == "name":
            identifier = self._next().text
            if identifier in self._bound:
                self._position -= 1
                self._fail("an identifier that the rule has not used yet")
            self._take(":")
        self._take("[", "a condition in [ ]")
        properties = [self._property_condition()]
        while self._skip(","):
            if len(properties) >= _MAX_CONDITIONS:
                self._fail(f"at most {_MAX_CONDITIONS} comparisons")
            properties.append(self._property_condition())
        self._take("]", ", or ]")
        # What a negated condition finds is nothing, so nothing can refer to it.
        if identifier is not None and not negated:
            self._bound.add(identifier)
        return Condition(tuple(properties), identifier, negated)

    def _property_condition(self) -> PropertyCondition:
        name = self._name("type, value, valueType or issuer", *PROPERTIES)
        if not self._peek(*_COMPARISONS):
            self._fail("== or another comparison (a single = compares nothing)")
        comparison = self._next().text
        if comparison in _ORDER and name != "value":
            self._position -= 1
            self._fail(f"== or != ({name} is a string)")
        expression = self._expression(1)
        value = expression.value if isinstance(expression, Literal_) else None
        if comparison in _ORDER and value is not None and type(value) is not int:
            self._fail(f"an integer after {comparison}")
        if name != "value" and value is not None and not isinstance(value, str):
            self._fail(f"a string to compare {name} with")
        return PropertyCondition(cast("Property", name), cast("Comparison", comparison), expression)

    # ---- expressions and actions -------------------------------------------------------------

    def _expression(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            self._fail(f"calls nested at most {MAX_DEPTH} deep")
        token = self._next()
        if token.kind == "string":
            text = token.text[1:-1]
            return Literal_(text.replace("\\\\", "\0").replace('\\"', '"').replace("\0", "\\"))
        if token.kind == "integer":
            digits = token.text.lstrip("-")
            number = int(token.text) if len(digits) <= 19 else MAX_INTEGER + 1
            if not -MAX_INTEGER - 1 <= number <= MAX_INTEGER:
                self._position -= 1
                self._fail("an integer of 64 bits")
            return Literal_(number)
        if token.kind == "name":
            if token.text in ("true", "false"):
                return Literal_(token.text == "true")
            if self._peek("("):
                return self._call(token, depth)
            if self._peek("."):
                self._position += 1
                name = self._name("type, value, valueType or issuer", *PROPERTIES)
                if token.text not in self._bound:
                    self._fail("an identifier of an earlier condition", token.text, token.offset)
                return PropertyReference(token.text, cast("Property", name))
        self._position -= token.kind != "end"
        return self._fail("a string, an integer, true, false, identifier.property or a function")

    def _call(self, token: _Token, depth: int) -> Call:
        if self._version < (1, 2):
            self._fail("no function (functions need version 1.2)", token.text, token.offset)
        if token.text not in FUNCTIONS:
            self._fail("one of " + ", ".join(FUNCTIONS), token.text, token.offset)
        self._take("(")
        arguments: list[Expression] = []
        if not self._peek(")"):
            arguments.append(self._expression(depth + 1))
            while self._skip(","):
                if len(arguments) >= FUNCTIONS[token.text]:
                    break
                arguments.append(self._expression(depth + 1))
        if len(arguments) != FUNCTIONS[token.text] or not self._peek(")"):
            wanted = FUNCTIONS[token.text]
            self._fail(f"{wanted} argument{'s' * (wanted > 1)}", token.text, token.offset)
        self._take(")")
        return Call(token.text, tuple(arguments))

    def _action(self, section: Section) -> Action:
        allowed = _VERBS[section]
        verb = cast("Verb", self._name(f"one of {', '.join(allowed)} (in {section})", *allowed))
        self._take("(")
        if verb in ("permit", "deny"):
            self._take(")")
            return Action(verb)
        argument = self._claim_arguments()
        self._take(")", ", or )")
        return Action(verb, argument)

    def _claim_arguments(self) -> ClaimReference | ClaimArguments:
        if self._skip("claim"):
            self._take("=")
            token = self._tokens[self._position]
            name = self._name("an identifier")
            if name not in self._bound:
                self._fail("an identifier of an earlier condition", name, token.offset)
            return ClaimReference(name)
        given: dict[str, Expression] = {}
        while True:
            name = self._name("type, value or valueType", "type", "value", "valueType")
            if name in given:
                self._position -= 1
                self._fail(f"{name} once")
            self._take("=")
            given[name] = self._expression(1)
            if not self._skip(","):
                break
        if "type" not in given or "value" not in given:
            self._fail("type and value")
        for name in ("type", "valueType"):
            literal = given.get(name)
            if isinstance(literal, Literal_) and (
                not isinstance(literal.value, str) or not literal.value
            ):
                self._fail(f"a string as {name}")
        return ClaimArguments(given["type"], given["value"], given.get("valueType"))
