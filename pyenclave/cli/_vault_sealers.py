"""What ``pyenclave encrypt`` and ``decrypt`` do with a key: of a vault, or from a file."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

from pyenclave._files import read_file
from pyenclave._locks import Lock
from pyenclave.cli import _headers, _place, _sealers
from pyenclave.cli._tree import Tree
from pyenclave.errors import ArgumentError, EvidenceFormatError, RemoteServiceError, UnsealError
from pyenclave.formats import jsonstrict, wrapped
from pyenclave.sealed import envelope
from pyenclave.sealed.envelope import Together, Wrapping, WrappingKey, key_name
from pyenclave.sealed.envelope_keys import PrivateKey, PublicKey, VaultWrappingKey, public_of

__all__ = ["Rewrapper", "VaultSealer", "check_encrypted", "opened_key"]

_MAX_KEY_FILE: Final = 64 << 10


# ---- which key -----------------------------------------------------------------------------------


def _full_kid(kid: str | None) -> str:
    """Return an identifier that names a version: files say which one opens them."""
    from pyenclave.vault_client import split_key_url

    if kid is None or not split_key_url(kid)[2]:
        raise ValueError(
            "--key needs the version too, https://VAULT/keys/NAME/VERSION: a key from a file does "
            "not say it"
        )
    return kid


def _public(path: str, kid: str | None) -> PublicKey:
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = read_file(path, limit=_MAX_KEY_FILE)
    if data.lstrip().startswith(b"-----BEGIN"):
        try:
            public = load_pem_public_key(data)
        except ValueError as error:
            raise ArgumentError(f"{path} holds no public key", found=str(error)[:200]) from None
        if not isinstance(public, rsa.RSAPublicKey):
            raise ArgumentError(f"{path}: only RSA keys encrypt with their public half")
        return PublicKey(_full_kid(kid), public)
    try:
        members = jsonstrict.object_of(data, path)
        inner = members.get("key")  # what a vault answers has the key inside
        members = inner if isinstance(inner, dict) else members
        own = members.get("kid")
        public = public_of(members)
    except EvidenceFormatError as error:
        raise ArgumentError(f"{path} holds no key: {error}") from None
    if not isinstance(own, str):
        return PublicKey(_full_kid(kid), public)
    full = _full_kid(own)
    wanted = key_name(kid) if kid is not None else ""
    if wanted and key_name(full) != wanted and key_name(full).partition("/")[0] != wanted:
        raise ArgumentError(f"{path} is another key", expected=str(kid), found=own)
    return PublicKey(full, public)


def _private(path: str, kid: str | None) -> PrivateKey:
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(read_file(path, limit=_MAX_KEY_FILE), password=None)
    except (ValueError, TypeError):  # TypeError: it has a password
        raise ArgumentError(f"{path} holds no private key in PEM without a password") from None
    if not isinstance(private, rsa.RSAPrivateKey):
        raise ArgumentError(f"{path}: only RSA keys unwrap here")
    return PrivateKey(_full_kid(kid), private)


def _credential(args: argparse.Namespace) -> tuple[Any, bool]:
    """Return what gives tokens, and whether the vault may ask for those of its domain only."""
    from pyenclave.vault_client import StaticToken, TokenFile

    if args.token_file is not None and args.token_env is not None:
        raise ValueError("--token-file and --token-env: one of them")
    # A token that somebody chose for this very vault is sent to it, whatever it asks for.
    if args.token_file is not None:
        return TokenFile(args.token_file), False
    if args.token_env is not None:
        token = os.environ.get(args.token_env)
        if not token:
            raise ValueError(f"--token-env: there is no variable {args.token_env}")
        return StaticToken(token), False
    try:
        from azure.identity import DefaultAzureCredential
    except ModuleNotFoundError:
        raise ValueError(
            "the vault wants a token: give --token-file, or install azure-identity and log in"
        ) from None
    return DefaultAzureCredential(), True


@contextlib.contextmanager
def opened_key(args: argparse.Namespace) -> Iterator[Any]:
    """
    Give the key that the arguments name.

    Raises:
        ValueError: They contradict each other, or name none.
        ArgumentError: A file holds no such key.

    """
    from pyenclave.vault_client import VaultClient, split_key_url

    files = [name for name in ("public_key", "private_key") if getattr(args, name, None)]
    if len(files) > 1:
        raise ValueError("--public-key and --private-key: one of them")
    if files and (args.ca or args.token_file or args.token_env):
        raise ValueError("with a key from a file no vault is asked: no --ca, no token")
    if getattr(args, "public_key", None):
        yield _public(args.public_key, args.key)
        return
    if args.key is None:
        raise ValueError("--key https://VAULT/keys/NAME is missing")
    vault, name, version = split_key_url(args.key)
    if args.private_key:
        yield _private(args.private_key, args.key)
        return
    credential, verify = _credential(args)
    with VaultClient(vault, credential, ca=args.ca, verify_challenge_resource=verify) as client:
        yield VaultWrappingKey(
            client, name, version, algorithm=getattr(args, "algorithm", "A256KW")
        )


# ---- files ---------------------------------------------------------------------------------------


def check_encrypted(fd: int) -> None:
    """
    Refuse what no key of a vault opens.

    Raises:
        UnsealError: It was sealed in another way, or is no sealed file.

    """
    form = _sealers.form_of(fd)
    if form != "encrypted":
        raise UnsealError(
            "the file is not encrypted to a key of a vault",
            expected="what pyenclave encrypt makes",
            found={"": "no sealed file"}.get(form, _headers.FORMS.get(form, form)),
            advice="Open it with pyenclave unseal." if form else None,
        )


class VaultSealer(_sealers.KeySealer):
    """
    Seals under one data key a run, which the given key wraps.

    Args:
        key: Wraps, unwraps, or both.
        name: What the files are bound to.

    """

    form = "encrypted"

    def __init__(self, key: Any, name: bytes) -> None:
        self._opens = key
        self._makes: Together | None = None
        self._name = name
        self._blind = not hasattr(key, "unwrap") and not hasattr(key, "for_kid")
        self.jobs = 2 * (os.cpu_count() or 1)

    def prepare(self) -> Wrapping:
        """Make and wrap the data key, so that what the key refuses is known before any work."""
        self._makes = Together(self._opens)
        made = self._makes.fresh()[1]
        self._blind |= not getattr(self._opens, "may_unwrap", True)
        return made

    def _given(self) -> Any:
        return self._opens

    def _making(self) -> Any:
        return self._makes or self._opens

    def _refuse(self, source: int) -> UnsealError:
        try:
            check_encrypted(source)
        except UnsealError as error:
            return error
        return UnsealError("the file's envelope is damaged")

    def recognised(
        self, there: int, source: int, tick: Callable[[int], None]
    ) -> tuple[bytes | None, bool]:
        """Compare what is there; by its looks, if this key's holder may not open it."""
        if not self._blind:
            try:
                take = _sealers.from_descriptor(source, tick)
                return _place.compare(self, there, take), False
            except RemoteServiceError as error:
                if error.status not in (401, 403):
                    raise
                self._blind = True  # who may encrypt need not be one who may decrypt
                os.lseek(source, 0, os.SEEK_SET)
        found = self._looks_done(there, source)
        if found is not None:
            tick(os.fstat(source).st_size)
        return found, found is not None

    def _looks_done(self, there: int, source: int) -> bytes | None:
        """Return the id of a whole file of this key, of this size, made after the last change."""
        try:
            found = wrapped.newest(os.pread(there, wrapped.HEAD_SIZE, 0)).key_envelope
            header = _headers.file_header(there, wrapped.HEAD_SIZE)
        except UnsealError:
            return None
        own = self.prepare() if self._makes is None else self._makes.fresh()[1]
        before, after = os.fstat(source), os.fstat(there)
        same = (
            key_name(found.kid) == key_name(own.kid)
            and header.file_id == found.file_id
            and header.size == before.st_size
            # The time of change is the kernel's: no copy that keeps times passes for an old file.
            and max(before.st_mtime_ns, before.st_ctime_ns) < after.st_mtime_ns
        )
        return header.file_id if same else None


class _Memo:
    """Wraps a data key that several files share once."""

    def __init__(self, key: WrappingKey) -> None:
        self._key = key
        self._made: dict[bytes, Wrapping] = {}
        self._lock = Lock()

    def wrap(self, data_key: bytes) -> Wrapping:
        """Wrap, or return what was made before."""
        mark = hashlib.sha256(data_key).digest()
        with self._lock:
            if mark not in self._made:
                self._made[mark] = self._key.wrap(data_key)
            return self._made[mark]


class Rewrapper:
    """
    From one key, or version of it, to another: only the envelope is written.

    Args:
        old: Unwraps.
        new: Wraps.

    """

    def __init__(self, old: Any, new: WrappingKey) -> None:
        self._old = old
        self._new = _Memo(new)
        self._kid = new.wrap(bytes(envelope.DATA_KEY_SIZE)).kid  # asks, before anything is done
        self.jobs = 2 * (os.cpu_count() or 1)

    def file(self, tree: Tree, path: str, tick: Callable[[int], None], *, listing: bool) -> bool:
        """Wrap a file's key anew; False if that was done before."""
        from pyenclave.cli.resealing import replace_envelope

        fd = tree.open(path)
        try:
            check_encrypted(fd)
            tick(os.fstat(fd).st_size)
            head = os.pread(fd, wrapped.HEAD_SIZE, 0)
            if key_name(wrapped.newest(head).key_envelope.kid) == key_name(self._kid):
                return False
            old, new = envelope.rewrap(head, self._old, self._new)
            parent, _, name = path.rpartition("/")
            with tree.folder(parent) as folder:
                replace_envelope(fd, folder, name, old, new)
        finally:
            os.close(fd)
        return True
