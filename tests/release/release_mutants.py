"""
Wrong versions of what judges a release inside, each of which some test must notice.

As a plugin of pytest (``-p release_mutants``) it loads the one that RELEASE_MUTANT names.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pyenclave

_ANSWER = "pyenclave.trusted._release_answer"
_RELEASE = "pyenclave.trusted._release"
_FORMS = "pyenclave.formats.release"
_HOST = "pyenclave.trusted._release_relay"
_RELAY = "pyenclave.calls.services"

# Module, text that occurs in it exactly once, what stands there instead, and who notices.
MUTANTS: dict[str, tuple[str, str, str, str]] = {
    "host": (
        _ANSWER,
        "if not any(_covers(name, expected.host) for name in names):",
        "if False:",
        "other_host or another_host",
    ),
    "wildcard": (
        _ANSWER,
        'return host.partition(".")[2] == name[2:] and "." in name[2:]',
        "return host.endswith(name[1:])",
        "another_host",
    ),
    "dates": (
        _ANSWER,
        "if not one.not_valid_before_utc <= at <= one.not_valid_after_utc:",
        "if False:",
        "dates_are",
    ),
    "at": (_ANSWER, "    at = expected.at\n", "    at = None\n", "dates_are"),
    "chain": (
        _ANSWER,
        "        verifier.verify(leaf, chain[1:])\n",
        "        verifier.store\n",
        "root or leaf or server",
    ),
    "signature": (
        _ANSWER,
        "if not answer.jws.verify(key, allowed=SIGNATURES):",
        "if False:",
        "changed_answer or header",
    ),
    "asked": (
        _ANSWER,
        "same = vault == expected.vault and name == expected.name",
        "same = vault == expected.vault",
        "another_key",
    ),
    "vault": (
        _ANSWER,
        "same = vault == expected.vault and name == expected.name",
        "same = name == expected.name",
        "every_word",
    ),
    "version": (
        _ANSWER,
        "if not same or (expected.version and version != expected.version):",
        "if not same:",
        "another_version",
    ),
    "versions": (
        _ANSWER,
        "if not version or (asked and asked != version):",
        "if not version:",
        "another_key",
    ),
    "unversioned": (
        _ANSWER,
        "if not version or (asked and asked != version):",
        "if asked and asked != version:",
        "another_key",
    ),
    "nonce": (
        _ANSWER,
        "if answer.nonce is not None and answer.nonce != expected.nonce:",
        "if 0:",
        "every_word",
    ),
    "no nonce": (
        _ANSWER,
        "if answer.nonce is None and expected.require_nonce:",
        "if False:",
        "every_word",
    ),
    "enc": (_ANSWER, "if answer.enc != expected.algorithm:", "if False:", "every_word"),
    "disabled": (
        _ANSWER,
        'if answer.attributes.get("enabled") is False:',
        "if False:",
        "every_word",
    ),
    "exp": (
        _ANSWER,
        "if now is not None and ends is not None and ends <= now:",
        "if False:",
        "every_word",
    ),
    "nbf": (_ANSWER, "if now is not None and begins is not None and", "if False and", "every_word"),
    "aes": (_ANSWER, "if len(wrapping) != _WRAPPING_KEY:", "if False:", "oaep"),
    "split": (
        _ANSWER,
        "    split = (transfer.key_size + 7) // 8\n",
        "    split = 384\n",
        "comes_whole",
    ),
    "public half": (_ANSWER, "    if not fits:\n", "    if False:\n", "substituted"),
    "modulus": (_ANSWER, '_same(answer, "n", numbers.n) and ', "", "every_word or substituted"),
    "exponent": (_ANSWER, ' and _same(answer, "e", numbers.e)', "", "every_word"),
    "x": (_ANSWER, '_same(answer, "x", point.x) and ', "", "every_word or elliptic_half"),
    "y": (_ANSWER, ' and _same(answer, "y", point.y)', "", "every_word or elliptic_half"),
    "curve": (_ANSWER, "fits = named and ", "fits = ", "elliptic_half"),
    "oct size": (_ANSWER, "if len(material) not in _OCT_SIZES:", "if False:", "oct_key"),
    "issuer": (
        _RELEASE,
        "if not isinstance(said, str) or said.rstrip",
        "if said and said.rstrip",
        "issuer",
    ),
    "other issuer": (_RELEASE, 'said.rstrip("/") != issuer.rstrip("/"):', "False:", "issuer"),
    "token nonce": (
        _RELEASE,
        'if nonce is not None and claims.get("nonce") != nonce:',
        "if 0:",
        "issuer",
    ),
    "fresh nonce": (_RELEASE, "_LABEL + os.urandom(32)", "_LABEL", "before"),
    "token ends": (
        _RELEASE,
        "        return 0.0  # it is used once\n",
        "        return 9e99\n",
        "without_an_end",
    ),
    "token early": (_RELEASE, "    return ends - _EARLY\n", "    return ends\n", "ends_is_renewed"),
    "renewal": (_RELEASE, "if reused and status in (400, 401, 403):", "if False:", "renewed_once"),
    "status": (
        _RELEASE,
        "        if status != 200:\n            raise refusal(\n",
        "        if 0:\n            raise refusal(\n",
        "refus",
    ),
    "long answer": (
        _HOST,
        "    if len(body) > services.MAX_BODY:\n",
        "    if False:\n",
        "too_long",
    ),
    "retry": (
        _HOST,
        "if found[0] not in _TRANSIENT or attempt == _ATTEMPTS:",
        "if True:",
        "passing",
    ),
    "deadline": (_HOST, "        if left <= 0:\n", "        if False:\n", "counts"),
    "flight": (
        _RELEASE,
        "        with self._flight(asked, terms.deadline):\n",
        "        if True:\n",
        "at_once",
    ),
    "closed": (_RELEASE, "return not key.closed and (", "return (", "closed_or"),
    "expired": (_RELEASE, "key.expires > time.time())", "True)", "closed_or"),
    "close": (_RELEASE, "            kept.key.close()\n", "            pass\n", "wipes"),
    "zero padding": (
        _RELEASE,
        "hashlib.sha256(data).digest() + bytes(32)",
        "hashlib.sha512(data).digest()",
        "digest",
    ),
    "paths": (
        _RELAY,
        "method == allowed and form.fullmatch(path)",
        "form.fullmatch(path)",
        "reaches",
    ),
    "path end": (
        _RELAY,
        "method == allowed and form.fullmatch(path)",
        "method == allowed and form.match(path)",
        "reaches",
    ),
    "api version": (
        _RELAY,
        "return bool(_API_VERSION.fullmatch(api_version)) and any(",
        "return any(",
        "reaches",
    ),
    "https": (_FORMS, 'r"https://(', 'r"https?://(', "not_usable"),
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, module: str, old: str, new: str) -> None:
        self.module, self.old, self.new = module, old, new

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != self.module:
            return None
        return importlib.util.spec_from_loader(name, self)

    def exec_module(self, module: ModuleType) -> None:
        relative = self.module.removeprefix("pyenclave.").replace(".", "/") + ".py"
        path = Path(pyenclave.__file__).parent / relative
        source = path.read_text("utf-8")
        if source.count(self.old) != 1:
            raise AssertionError(f"{relative} has {source.count(self.old)} times {self.old!r}")
        code = compile(source.replace(self.old, self.new), str(path), "exec")
        exec(code, module.__dict__)


def pytest_configure() -> None:
    name = os.environ.get("RELEASE_MUTANT")
    if name:
        sys.meta_path.insert(0, _Finder(*MUTANTS[name][:3]))
