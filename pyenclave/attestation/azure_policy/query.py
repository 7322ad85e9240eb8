"""
JMESPath within a budget.

A result may hold one object many times: ``[@,@]|[@,@]|…`` doubles at each step and costs nothing
until somebody writes it out. So the size of each intermediate result is counted as if it were
written, each shared object measured once, and what is too large is refused before anything walks
it.
"""

from __future__ import annotations

import json
from typing import Any, Final

from pyenclave.attestation.azure_policy.budget import MAX_CHARACTERS, Budget
from pyenclave.errors import AttestationError

__all__ = ["MAX_QUERY", "search"]

MAX_QUERY: Final = 4096  # characters of a query; it is parsed by recursive descent
_NUMBER: Final = 32  # characters that a number, a boolean or null counts for
_MAX_NESTED: Final = 256


class _Sizes:
    """Sizes of values as JSON text, about; those of lists and objects are kept by identity."""

    def __init__(self) -> None:
        # The value is kept too: an identity is only its own as long as it lives.
        self._known: dict[int, tuple[int, object]] = {}

    def of(self, value: object, depth: int = 0) -> int:
        """Return the size of *value*; AttestationError if it is too large or too deep."""
        if isinstance(value, str):
            return len(value) + 2
        if not isinstance(value, list | dict):
            # JMESPath's own literals and to_number make integers of thousands of digits.
            return _NUMBER + (value.bit_length() // 3 if isinstance(value, int) else 0)
        known = self._known.get(id(value))
        if known is not None:
            return known[0]
        if depth > _MAX_NESTED:
            raise AttestationError("JmesPath: the result is nested too deeply")
        size = 2
        if isinstance(value, dict):
            for name, item in value.items():
                size += len(name) + 4 + self.of(item, depth + 1)
        else:
            for item in value:
                size += 1 + self.of(item, depth + 1)
        if size > MAX_CHARACTERS * _NUMBER:
            raise _too_large()
        self._known[id(value)] = size, value
        return size


def _too_large() -> AttestationError:
    return AttestationError(
        "JmesPath: the result is too large", expected=f"at most {MAX_CHARACTERS} characters"
    )


def search(path: str, document: object, budget: Budget) -> str:
    """
    Return what *path* finds in *document*, as JSON.

    Args:
        path: A JMESPath expression.
        document: Parsed JSON.
        budget: Of the evaluation.

    Raises:
        AttestationError: A wrong expression, too much of anything, or jmespath is not installed.

    """
    try:
        from jmespath import (  # an extra (pyenclave[azure]): only such policies need it
            exceptions,
            functions,
            parser,
            visitor,
        )
    except ImportError:
        raise AttestationError(
            "JmesPath: the package jmespath is not installed",
            advice="pip install 'pyenclave[azure]'",
        ) from None
    sizes = _Sizes()

    class Functions(functions.Functions):  # type: ignore[misc]
        """JMESPath's own, and the one that Azure's samples use beside them."""

        @functions.signature(*[{"types": ["string", "null"]}] * 2)  # type: ignore[untyped-decorator]
        def _func_equals_ignore_case(self, left: str | None, right: str | None) -> bool:
            if left is None or right is None:
                return left is right
            return left.casefold() == right.casefold()

        def call_function(self, function_name: str, resolved_args: list[Any]) -> Any:
            budget.work(sum(sizes.of(item) for item in resolved_args))
            if function_name == "join" and len(resolved_args) == 2:
                glue, items = resolved_args
                if isinstance(glue, str) and isinstance(items, list):
                    budget.work(len(glue) * len(items))
            return super().call_function(function_name, resolved_args)

    class Interpreter(visitor.TreeInterpreter):  # type: ignore[misc]
        """Counts each step and what it gives."""

        def visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
            budget.step()
            result = super().visit(node, *args, **kwargs)
            budget.work(sizes.of(result))
            return result

    # A large document is looked at once in any case; then each step passes on a part of it.
    interpreter = Interpreter(visitor.Options(custom_functions=Functions()))
    try:
        found = interpreter.visit(parser.Parser().parse(path).parsed, document)
        size = sizes.of(found)
        if size > MAX_CHARACTERS * _NUMBER:
            raise _too_large()
        budget.work(size)
        return json.dumps(found, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except exceptions.JMESPathError as error:
        found_text = str(error).split("\n")[0][:200]
        raise AttestationError(
            "JmesPath: the query cannot be evaluated", found=found_text
        ) from None
    except (ArithmeticError, TypeError, ValueError) as error:  # infinities, numbers beyond JSON
        raise AttestationError(
            "JmesPath: the query cannot be evaluated", found=str(error)[:200]
        ) from None
    except RecursionError:
        raise AttestationError("JmesPath: the query is nested too deeply") from None
