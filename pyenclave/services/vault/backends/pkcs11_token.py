"""One session with a PKCS #11 token: keys are made, wrapped, opened and released in there."""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from pyenclave._files import open_file
from pyenclave.errors import ConfigurationError, ServiceError
from pyenclave.formats import jose, jwa, vault_keys
from pyenclave.formats.key_context import KeyContext
from pyenclave.services.vault.backends.base import KeyMaterial, KeySpec
from pyenclave.services.vault.backends.rules import check_released

__all__ = ["LABEL", "MAC_SIZE", "Token", "TokenPlace", "cannot"]

_MAGIC: Final = b"PYEHSMK\x01"
LABEL: Final = "pyenclave-vault"
_ID: Final = 8
MAC_SIZE: Final = 32
_MAX_WRAPPED: Final = 16 << 10
_MAX_PIN: Final = 256
_OPENED: Final = 64  # unwrapped keys that are kept as objects of the session
_RELEASE_BITS: Final = {
    "CKM_RSA_AES_KEY_WRAP": "1",
    "RSA_AES_KEY_WRAP_256": "256",
    "RSA_AES_KEY_WRAP_384": "384",
}


def _extra() -> None:
    try:
        import pkcs11  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "the pkcs11 backend needs python-pkcs11", advice='pip install "pyenclave[hsm]"'
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPlace:
    """
    Where a token is.

    Attributes:
        module: Path of the PKCS #11 library.
        token: Label of the token.
        pin_file: File with the user's PIN, readable by its owner alone.
        label: Label of the two keys that stay in the token.
    """

    module: str
    token: str
    pin_file: str
    label: str = LABEL

    def check(self) -> None:
        """
        Look for what a start later would miss, too.

        Raises:
            ConfigurationError: No python-pkcs11, no such library, or no PIN.

        """
        _extra()
        try:
            library = ctypes.CDLL(self.module)
        except OSError as error:
            raise ConfigurationError(
                "pkcs11: module-path is no library", found=str(error)[:200]
            ) from None
        if not hasattr(library, "C_GetFunctionList"):
            raise ConfigurationError(f"pkcs11: {self.module} is no PKCS #11 module")
        self.pin()

    def pin(self) -> str:
        """
        Read the PIN.

        Raises:
            ConfigurationError: The file is open to others, or holds none.

        """
        try:
            with open(open_file(self.pin_file), "rb") as file:
                status = os.fstat(file.fileno())
                data = file.read(_MAX_PIN + 1)
        except OSError as error:
            raise ConfigurationError(f"PIN file {self.pin_file}: {error.strerror}") from None
        if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid not in (0, os.geteuid()):
            raise ConfigurationError(
                f"PIN file {self.pin_file} is open to others",
                expected="mode 0600, of this user",
                found=f"mode {stat.S_IMODE(status.st_mode):o}",
            )
        text = data.decode("utf-8", "replace").removesuffix("\n")
        if not 0 < len(data) <= _MAX_PIN or not text.isprintable():
            raise ConfigurationError(f"PIN file {self.pin_file} holds no PIN")
        return text


@dataclass(slots=True)
class _Kek:
    """The two keys that stay in the token."""

    id: bytes
    wrap: Any
    mac: Any


class Token:
    """One session; every method runs in the session's own thread."""

    def __init__(self, place: TokenPlace) -> None:
        _extra()
        import pkcs11
        from pkcs11 import constants

        self.p: Any = pkcs11
        self._omit = constants.DEFAULT
        try:
            library = pkcs11.lib(place.module)
            token = library.get_token(token_label=place.token)
            try:
                self.session: Any = token.open(user_pin=place.pin(), rw=True)
            except pkcs11.exceptions.UserAlreadyLoggedIn:  # by the other session
                self.session = token.open(rw=True)
        except (pkcs11.exceptions.PKCS11Error, RuntimeError, OSError) as error:
            raise ConfigurationError(
                f"token {place.token!r:.60} cannot be used", found=type(error).__name__
            ) from None
        self.mechanisms = set(token.slot.get_mechanisms())
        self._place = place
        self._keks = self._load()
        self._opened: OrderedDict[bytes, Any] = OrderedDict()

    def close(self) -> None:
        """Close the session; its objects are gone with it."""
        with contextlib.suppress(self.p.exceptions.PKCS11Error):
            self.session.close()

    # ---- the keys that stay ------------------------------------------------------------------

    def _load(self) -> dict[bytes, _Kek]:
        attribute, kinds = self.p.Attribute, self.p.KeyType
        found: dict[bytes, dict[str, Any]] = {}
        query = {
            attribute.CLASS: self.p.ObjectClass.SECRET_KEY,
            attribute.LABEL: self._place.label,
            attribute.TOKEN: True,
        }
        for key in self.session.get_objects(query):
            name = {kinds.AES: "wrap", kinds.GENERIC_SECRET: "mac"}.get(key[attribute.KEY_TYPE])
            if name is None or key[attribute.EXTRACTABLE] or not key[attribute.SENSITIVE]:
                raise ConfigurationError(
                    f"token: a key {self._place.label!r:.60} is not ours, or can be extracted"
                )
            found.setdefault(bytes(key[attribute.ID]), {})[name] = key
        # The newest first: a newer pair has a smaller id. Of two processes that start at once each
        # may make a pair: both are good, and both take the smaller one.
        return {
            name: _Kek(name, pair["wrap"], pair["mac"])
            for name, pair in sorted(found.items())
            if len(pair) == 2
        }

    def _make(self, name: bytes = b"") -> dict[bytes, _Kek]:
        p, name = self.p, name or os.urandom(_ID)
        stay = {p.Attribute.SENSITIVE: True, p.Attribute.EXTRACTABLE: False}
        common: dict[str, Any] = {"id": name, "label": self._place.label, "store": True}
        flags = p.MechanismFlag
        self.session.generate_key(
            p.KeyType.AES, 256, template=stay, capabilities=flags.WRAP | flags.UNWRAP, **common
        )
        self.session.generate_key(
            p.KeyType.GENERIC_SECRET,
            256,
            template=stay,
            capabilities=flags.SIGN | flags.VERIFY,
            mechanism=p.Mechanism.GENERIC_SECRET_KEY_GEN,
            **common,
        )
        return self._load()

    def _newest(self) -> _Kek:
        """Return the pair that wraps; the first key that is wrapped makes it."""
        if not self._keks:
            self._keks = self._load() or self._make()
        return next(iter(self._keks.values()))

    def keks(self) -> tuple[bytes, ...]:
        """Look for the pairs again, and return their ids; the last one wraps."""
        self._keks = self._load()
        return tuple(reversed(self._keks))

    def rotate(self) -> bytes:
        """Make another pair, which wraps from now on; return its id."""
        self._keks = self._load()
        if not self._keks:
            return self._newest().id
        newest = int.from_bytes(next(iter(self._keks)), "big")
        step = 1 + int.from_bytes(os.urandom(_ID), "big") % max(1, newest >> 8)
        if newest < step:
            raise ServiceError(
                "the token's label has no room for another pair of keys",
                status=409,
                error_code="Conflict",
            )
        name = (newest - step).to_bytes(_ID, "big")
        self._keks = self._make(name)
        return name

    def destroy(self, ids: Collection[bytes]) -> None:
        """Destroy pairs, also what is left of half of one; the newest stays in any case."""
        self._keks = self._load()
        newest = next(iter(self._keks), b"")
        attribute = self.p.Attribute
        for name in ids:
            query = {attribute.LABEL: self._place.label, attribute.ID: name, attribute.TOKEN: True}
            for key in list(self.session.get_objects(query)) if name != newest else ():
                key.destroy()
        self._keks = self._load()

    # ---- wrapped keys ------------------------------------------------------------------------

    def tag(self, kek: _Kek, head: bytes, context: bytes) -> bytes:
        """Return what authenticates a wrapped key's head together with its context."""
        data = struct.pack("<II", len(head), len(context)) + head + context
        return bytes(kek.mac.sign(data, mechanism=self.p.Mechanism.SHA256_HMAC))

    def seal(self, key: Any, public: Mapping[str, str], context: bytes) -> bytes:
        """Wrap *key*, an object of the session."""
        kek = self._newest()
        body = kek.wrap.wrap_key(key, mechanism=self.p.Mechanism.AES_KEY_WRAP_PAD)
        return self._sealed(kek, public, bytes(body), context)

    def _sealed(self, kek: _Kek, public: Mapping[str, str], body: bytes, context: bytes) -> bytes:
        shown = msgspec.json.encode(dict(public))
        head = _MAGIC + kek.id + struct.pack("<H", len(shown)) + shown + body
        return head + self.tag(kek, head, context)

    def rewrap(self, wrapped: bytes, context: bytes) -> bytes | None:
        """
        Wrap a key with the newest pair, in the token; None if it is already.

        Raises:
            ServiceError: 400 NotSupported: the token does not do that inside, by its name.

        """
        kek, public, body = self.check(wrapped, context)
        newest = self._newest()
        if kek.id == newest.id:
            return None
        kty = KeyContext.from_bytes(context).kty
        kind = kty.removesuffix("-HSM")
        with self._moving(kty):
            key = self._unwrap(kek, body, kind)
            try:
                moved = bytes(
                    newest.wrap.wrap_key(key, mechanism=self.p.Mechanism.AES_KEY_WRAP_PAD)
                )
            finally:
                key.destroy()
            # What the token cannot open again must not take the place of what it can.
            self._unwrap(newest, moved, kind).destroy()
        return self._sealed(newest, public, moved, context)

    @contextlib.contextmanager
    def _moving(self, kty: str) -> Iterator[None]:
        e = self.p.exceptions
        try:
            yield
        except (
            *(e.MechanismInvalid, e.MechanismParamInvalid, e.ArgumentsBad, e.FunctionNotSupported),
            *(e.KeyUnextractable, e.KeyNotWrappable, e.KeyTypeInconsistent, e.KeySizeRange),
            *(e.TemplateInconsistent, e.AttributeValueInvalid, e.WrappedKeyInvalid),
        ) as error:
            why = f"it does not wrap them again inside ({type(error).__name__})"
            raise cannot(f"AES_KEY_WRAP_PAD of {kty} keys", why) from error

    def check(self, wrapped: bytes, context: bytes) -> tuple[_Kek, dict[str, str], bytes]:
        """Return which key wrapped it, the public half and the wrapped key; authentic."""
        refused = ServiceError(
            "the key's private half does not belong to its record",
            status=500,
            error_code="InternalError",
        )
        start = len(_MAGIC) + _ID + 2
        short = not start + MAC_SIZE < len(wrapped) <= _MAX_WRAPPED
        if short or not wrapped.startswith(_MAGIC):
            raise refused
        name = wrapped[len(_MAGIC) : len(_MAGIC) + _ID]
        if name not in self._keks:
            self._keks = self._load()
        kek = self._keks.get(name)
        head, tag = wrapped[:-MAC_SIZE], wrapped[-MAC_SIZE:]
        if kek is None or not hmac.compare_digest(self.tag(kek, head, context), tag):
            raise refused
        (size,) = struct.unpack_from("<H", wrapped, start - 2)
        public: dict[str, str] = msgspec.json.decode(head[start : start + size])
        return kek, public, head[start + size :]

    def open(self, wrapped: bytes, context: bytes) -> Any:
        """Return the key as an object of the session; lately used ones are kept."""
        kek, _, body = self.check(wrapped, context)
        if key := self._opened.get(wrapped):
            self._opened.move_to_end(wrapped)
            return key
        key = self._unwrap(kek, body, KeyContext.from_bytes(context).kty.removesuffix("-HSM"))
        self._opened[wrapped] = key
        while len(self._opened) > _OPENED:
            self._opened.popitem(last=False)[1].destroy()
        return key

    def _unwrap(self, kek: _Kek, body: bytes, kind: str) -> Any:
        p = self.p
        a, flags = p.Attribute, p.MechanismFlag
        template = {a.SENSITIVE: True, a.EXTRACTABLE: True}
        uses = flags.SIGN | flags.DECRYPT
        if kind == "oct":
            uses = flags.ENCRYPT | flags.DECRYPT | flags.WRAP | flags.UNWRAP
        else:  # attributes that private keys do not have
            template |= dict.fromkeys((a.ENCRYPT, a.VERIFY, a.WRAP), self._omit)
            if kind == "EC":
                uses = flags.SIGN
        types = {"RSA": p.KeyType.RSA, "EC": p.KeyType.EC, "oct": p.KeyType.AES}
        classes = p.ObjectClass
        return kek.wrap.unwrap_key(
            classes.SECRET_KEY if kind == "oct" else classes.PRIVATE_KEY,
            types[kind],
            body,
            store=False,
            mechanism=p.Mechanism.AES_KEY_WRAP_PAD,
            capabilities=uses,
            template=template,
        )

    # ---- making and taking keys --------------------------------------------------------------

    def generate(self, spec: KeySpec, context: bytes) -> KeyMaterial:
        """Make a key in the token."""
        kind = _kind(spec.kty, context)
        size, crv = vault_keys.check_spec(kind, spec.size or 0, spec.crv or "")
        p = self.p
        stay = {p.Attribute.SENSITIVE: True, p.Attribute.EXTRACTABLE: True}
        if kind == "oct":
            key = self.session.generate_key(p.KeyType.AES, size, store=False, template=stay)
            return self._material(key, {}, context, size=size)
        if kind == "RSA":
            shown, key = self.session.generate_keypair(
                p.KeyType.RSA, size, store=False, private_template=stay
            )
            public = {
                "n": jose.b64url_encode(bytes(shown[p.Attribute.MODULUS])),
                "e": jose.b64url_encode(bytes(shown[p.Attribute.PUBLIC_EXPONENT])),
            }
        else:
            curve = jwa.CURVES[crv]
            domain = self.session.create_domain_parameters(
                p.KeyType.EC, {p.Attribute.EC_PARAMS: _oid(curve.name)}, local=True
            )
            shown, key = domain.generate_keypair(store=False, private_template=stay)
            public = _point(crv, bytes(shown[p.Attribute.EC_POINT]))
        shown.destroy()
        return self._material(key, public, context)

    def _material(
        self, key: Any, public: dict[str, str], context: bytes, *, size: int = 0
    ) -> KeyMaterial:
        # Not every token tells the size of a key that was unwrapped.
        noted = public or {"size": str(size)}
        try:
            return KeyMaterial(public=public, wrapped=self.seal(key, noted, context))
        finally:
            key.destroy()

    def take(self, jwk: Mapping[str, Any], context: bytes) -> KeyMaterial:
        """Put somebody's key into the token, and wrap it there."""
        kind = _kind(str(jwk.get("kty", "")), context)
        p = self.p
        a = p.Attribute
        given = vault_keys.from_jwk(jwk, kind)
        template: dict[Any, Any] = {a.TOKEN: False, a.SENSITIVE: True, a.EXTRACTABLE: True}
        if isinstance(given, bytes):
            template |= {
                a.CLASS: p.ObjectClass.SECRET_KEY,
                a.KEY_TYPE: p.KeyType.AES,
                a.VALUE: given,
            }
        elif kind == "RSA":
            template |= _rsa_template(p, given)
        else:
            template |= _ec_template(p, given)
        size = len(given) * 8 if isinstance(given, bytes) else 0
        key = self.session.create_object(template)
        return self._material(key, vault_keys.public_of(given), context, size=size)

    # ---- release -----------------------------------------------------------------------------

    def oaep(self, bits: str, what: str) -> tuple[Any, Any, None]:
        """Return the parameters of OAEP, if the token has the mechanism at all."""
        p = self.p
        if p.Mechanism.RSA_PKCS_OAEP not in self.mechanisms:
            raise cannot(what, "it has no RSA-OAEP")
        digests = {"1": "SHA_1", "256": "SHA256", "384": "SHA384"}
        generators = {"1": "SHA1", "256": "SHA256", "384": "SHA384"}
        return getattr(p.Mechanism, digests[bits]), getattr(p.MGF, generators[bits]), None

    @contextlib.contextmanager
    def by_name(self, what: str, why: str) -> Iterator[None]:
        """Refuse what the token does not do by its name."""
        e = self.p.exceptions
        try:
            yield
        except (e.MechanismInvalid, e.MechanismParamInvalid, e.ArgumentsBad) as error:
            raise cannot(what, why) from error

    def release(
        self, wrapped: bytes, context: bytes, modulus: bytes, exponent: int, enc: str
    ) -> bytes:
        """Wrap in the token: nothing of the key is outside in the clear at any moment."""
        check_released(KeyContext.from_bytes(context))
        if enc not in _RELEASE_BITS:
            raise jwa.AlgorithmError(f"no such key wrap: {enc!r:.40}")
        jwa.check_transfer(modulus, exponent)
        p = self.p
        a, bits = p.Attribute, _RELEASE_BITS[enc]
        param = self.oaep(bits, enc)
        target = self.open(wrapped, context)
        public = self.session.create_object(
            {
                a.CLASS: p.ObjectClass.PUBLIC_KEY,
                a.KEY_TYPE: p.KeyType.RSA,
                a.TOKEN: False,
                a.WRAP: True,
                a.MODULUS: modulus,
                a.PUBLIC_EXPONENT: exponent.to_bytes((exponent.bit_length() + 7) // 8, "big"),
            }
        )
        once = self.session.generate_key(
            p.KeyType.AES,
            256,
            store=False,
            capabilities=p.MechanismFlag.WRAP,
            template={a.SENSITIVE: True, a.EXTRACTABLE: True},
        )
        try:
            with self.by_name(enc, f"it has no RSA-OAEP with {_digest_name(bits)}"):
                head = public.wrap_key(
                    once, mechanism=p.Mechanism.RSA_PKCS_OAEP, mechanism_param=param
                )
            with self.by_name(enc, "it has no AES key wrap with padding"):
                tail = once.wrap_key(target, mechanism=p.Mechanism.AES_KEY_WRAP_PAD)
        finally:
            once.destroy()
            public.destroy()
        return bytes(head) + bytes(tail)


def _digest_name(bits: str) -> str:
    return f"SHA-{bits}"


def cannot(what: str, why: str) -> ServiceError:
    """Return the refusal of what the token does not do."""
    return ServiceError(f"the token cannot do {what}: {why}", status=400, error_code="NotSupported")


def _kind(kty: str, context: bytes) -> str:
    bound = KeyContext.from_bytes(context).kty.removesuffix("-HSM")
    if kty.removesuffix("-HSM") != bound:
        raise jwa.AlgorithmError("the key's kind is not that of its record")
    return bound


def _oid(curve: str) -> bytes:
    from pkcs11.util.ec import encode_named_curve_parameters

    return bytes(encode_named_curve_parameters(curve))


def _point(crv: str, octets: bytes) -> dict[str, str]:
    size = (jwa.CURVES[crv].key_size + 7) // 8
    # An OCTET STRING around the point, in DER; its length has one or two bytes.
    point = octets[-(2 * size + 1) :]
    if len(point) != 2 * size + 1 or point[0] != 4:
        raise ServiceError("the token's point", status=500, error_code="InternalError")
    return {
        "crv": crv,
        "x": jose.b64url_encode(point[1 : 1 + size]),
        "y": jose.b64url_encode(point[1 + size :]),
    }


def _bytes(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def _rsa_template(p: Any, key: Any) -> dict[Any, Any]:
    a, numbers = p.Attribute, key.private_numbers()
    public = numbers.public_numbers
    return {
        a.CLASS: p.ObjectClass.PRIVATE_KEY,
        a.KEY_TYPE: p.KeyType.RSA,
        a.MODULUS: _bytes(public.n),
        a.PUBLIC_EXPONENT: _bytes(public.e),
        a.PRIVATE_EXPONENT: _bytes(numbers.d),
        a.PRIME_1: _bytes(numbers.p),
        a.PRIME_2: _bytes(numbers.q),
        a.EXPONENT_1: _bytes(numbers.dmp1),
        a.EXPONENT_2: _bytes(numbers.dmq1),
        a.COEFFICIENT: _bytes(numbers.iqmp),
    }


def _ec_template(p: Any, key: Any) -> dict[Any, Any]:
    a = p.Attribute
    size = (key.curve.key_size + 7) // 8
    return {
        a.CLASS: p.ObjectClass.PRIVATE_KEY,
        a.KEY_TYPE: p.KeyType.EC,
        a.EC_PARAMS: _oid(key.curve.name),
        a.VALUE: key.private_numbers().private_value.to_bytes(size, "big"),
    }
