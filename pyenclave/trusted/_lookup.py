"""
Looking at functions and classes without evaluating their annotations.

From Python 3.14 on annotations are evaluated when somebody asks (PEP 649). Where only names and
defaults are wanted nobody does: what is annotated may be defined further down, or nowhere.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["annotated_names", "signature_of"]

if sys.version_info >= (3, 14):
    from annotationlib import Format

    def signature_of(function: Callable[..., Any]) -> inspect.Signature:
        return inspect.signature(function, annotation_format=Format.STRING)

    def annotated_names(cls: type) -> Iterable[str]:
        return inspect.get_annotations(cls, format=Format.STRING)

else:

    def signature_of(function: Callable[..., Any]) -> inspect.Signature:
        """Return the signature of *function*; its annotations may be text."""
        return inspect.signature(function)

    def annotated_names(cls: type) -> Iterable[str]:
        """Return the names that *cls* itself annotates, in order."""
        return inspect.get_annotations(cls)
