"""
What the events of a measured boot say, and whether their digests cover it.

Sources: TCG PC Client Platform Firmware Profile (PFP) 1.06, section 10; UEFI 2.10, sections 3.1.3
(load options), 5.3 (GPT), 10 (device paths); GRUB and the Linux EFI stub for their own strings.

The data of an event is not what was measured, its digest is. Nothing read here raises: what does
not have the form of its type is shown as bytes, because one odd event must not hide the others.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pyenclave.formats.eventlog import DSTACK_EVENT

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyenclave.formats.eventlog import Event

__all__ = ["Decoded", "bank_hash", "decode", "digest_covers", "hash_candidates"]

Covers = Literal["data", "variable", "text", "differs", "unknown"]

_MAX_TEXT = 512  # characters of one event shown
_MAX_SEARCHED = 8192  # bytes in which text or its end is looked for
_MAX_NODES = 64  # nodes of one device path shown
_MAX_ITEMS = 32  # partitions or tables shown

_GUIDS = {
    "8be4df61-93ca-11d2-aa0d-00e098032b8c": "EFI_GLOBAL_VARIABLE",
    "d719b2cb-3d3a-4596-a3bc-dad00e67656f": "EFI_IMAGE_SECURITY_DATABASE",
    "605dab50-e046-4300-abb6-3dd810dd8b23": "SHIM_LOCK",
    "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f": "SYSTEMD_LOADER",
}
_SEPARATORS = {bytes(4): "end of firmware", b"\xff" * 4: "end of firmware", b"\1\0\0\0": "error"}
# GRUB puts its kind of string before what it hashes.
_PREFIXES = (b"grub_cmd: ", b"kernel_cmdline: ", b"module_cmdline: ", b"grub_kernel_cmdline ")


@dataclass(frozen=True, slots=True)
class Decoded:
    """
    An event for people.

    Attributes:
        text: One line.
        fields: The parts, JSON-ready.
        hashed: Parts of the data that a digest may be of, beside the whole.
        must_match: Whether the profile says that the digest is of the data: if it is not, the
            text does not tell what was measured.
    """

    text: str
    fields: dict[str, Any]
    hashed: tuple[tuple[Covers, bytes], ...] = ()
    must_match: bool = False


class _ShapeError(Exception):
    """The data does not have the form of its type."""


def bank_hash(bank: str, data: bytes) -> bytes | None:
    """Return the digest of *data* in a bank, or None where there is no such function here."""
    try:
        return hashlib.new(bank.replace("sm3_256", "sm3"), data).digest()
    except ValueError:
        return None


def decode(event: Event) -> Decoded:
    """Say what an event is about; never raises."""
    reader = _READERS.get(event.type, _other)
    try:
        return reader(event)
    except (_ShapeError, struct.error, UnicodeDecodeError):
        return Decoded(_shown(event.data), {"data": event.data[:256].hex()})


def hash_candidates(event: Event, decoded: Decoded | None = None) -> list[tuple[Covers, bytes]]:
    """Return the byte strings that an event's digest may be of, with what to call them."""
    found: list[tuple[Covers, bytes]] = [("data", event.data)]
    found += (decoded or decode(event)).hashed
    return found


def digest_covers(event: Event, decoded: Decoded | None = None) -> Covers:
    """
    Tell what of an event's data its digests are of.

    Returns:
        ``data``: all of it; ``variable``: the content of the EFI variable; ``text``: the string
        without its prefix or final NUL; ``differs``: none of these although the profile demands
        it, so the data may say anything; ``unknown``: what the type of event measures is not in
        the log (an image, a table), or the log left the data out.
    """
    decoded = decode(event) if decoded is None else decoded
    known = {bank: digest for bank, digest in event.digests.items() if bank_hash(bank, b"")}
    if event.extends and known:
        for name, candidate in hash_candidates(event, decoded):
            if all(bank_hash(bank, candidate) == digest for bank, digest in known.items()):
                return name
    return "differs" if event.data and event.extends and known and decoded.must_match else "unknown"


# ---- text and small parts ---------------------------------------------------------------------


def _shown(data: bytes) -> str:
    if not data:
        return "(no data)"
    text = _text(data)
    if text is not None:
        return text
    return data.hex() if len(data) <= 32 else f"{data[:32].hex()}… ({len(data)} bytes)"


def _text(data: bytes) -> str | None:
    """Return ASCII or UTF-16 text, a final NUL aside; None if it is neither."""
    if len(data) > _MAX_SEARCHED:
        return None
    plain = data[:-1] if data.endswith(b"\0") else data
    if plain and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in plain):
        return _cut(plain.decode("ascii").rstrip("\r\n"))
    if len(data) >= 4 and not any(data[1::2]):
        wide = data[::2].rstrip(b"\0")
        if wide and all(32 <= byte < 127 for byte in wide):
            return _cut(wide.decode("ascii"))
    return None


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}… ({len(text)} characters)"


def _utf16(data: bytes) -> str:
    return _cut(data.decode("utf-16-le").rstrip("\0"))


def _guid(data: bytes) -> str:
    text = str(uuid.UUID(bytes_le=data))
    return _GUIDS.get(text, text)


def _take(data: bytes, at: int, size: int) -> bytes:
    if size > len(data) - at:
        raise _ShapeError
    return data[at : at + size]


def _strip(data: bytes) -> tuple[tuple[Covers, bytes], ...]:
    """Return the text of *data* as boot loaders hash it: without NUL, without its prefix."""
    plain = data.rstrip(b"\0")
    found: list[tuple[Covers, bytes]] = [("text", plain)]
    for prefix in _PREFIXES:
        if plain.startswith(prefix):
            found += [("text", plain[len(prefix) :]), ("text", plain[len(prefix) :] + b"\0")]
    return tuple(found)


# ---- one reader a type ------------------------------------------------------------------------


def _other(event: Event) -> Decoded:
    if event.type == DSTACK_EVENT:  # its payload is hashed with the event's type and name
        head = event.type.to_bytes(4, "little") + b":" + event.label.encode() + b":"
        fields = {"name": event.label, "data": event.data[:256].hex()}
        text = f"{event.label}: {_shown(event.data)}"
        return Decoded(text, fields, (("data", head + event.data),), True)
    text = f"{event.label}: {_shown(event.data)}" if event.label else _shown(event.data)
    named: dict[str, Any] = {"name": event.label} if event.label else {}
    return Decoded(text, named | {"data": event.data[:256].hex()}, _strip(event.data))


def _no_action(event: Event) -> Decoded:
    name, _, rest = event.data[:16].partition(b"\0")
    if not name or not name.isascii():
        return _other(event)
    title = name.decode("ascii")
    if title == "StartupLocality" and len(event.data) == 17:
        return Decoded(
            f"{title} {event.data[16]}", {"signature": title, "locality": event.data[16]}
        )
    return Decoded(title if not rest.strip(b"\0") else _shown(event.data), {"signature": title})


def _separator(event: Event) -> Decoded:
    meaning = _SEPARATORS.get(event.data)
    text = f"{event.data.hex()} ({meaning})" if meaning else _shown(event.data)
    return Decoded(text, {"value": event.data[:256].hex()}, must_match=True)


def _string(event: Event) -> Decoded:
    return Decoded(_shown(event.data), {"text": _shown(event.data)}, _strip(event.data), True)


def _version(event: Event) -> Decoded:
    text = _guid(event.data) if len(event.data) == 16 else _shown(event.data)
    return Decoded(text, {"version": text}, _strip(event.data), True)


def _variable(event: Event) -> Decoded:
    """UEFI_VARIABLE_DATA (PFP 1.06, 10.2.6)."""
    data = event.data
    guid, name_len, size = struct.unpack_from("<16sQQ", data)
    if not name_len <= 1024 or len(data) != 32 + 2 * name_len + size:
        raise _ShapeError
    name = _utf16(_take(data, 32, 2 * name_len))
    content = data[32 + 2 * name_len :]
    vendor = _guid(guid)
    fields: dict[str, Any] = {"variable": name, "guid": vendor, "size": size}
    shown = _variable_text(name, content, fields)
    return Decoded(
        f"{name} ({vendor}) = {shown}", fields, (("variable", content),), must_match=True
    )


def _variable_text(name: str, content: bytes, fields: dict[str, Any]) -> str:
    if len(content) == 1 and name in ("SecureBoot", "AuditMode", "DeployedMode", "SetupMode"):
        fields["value"] = content[0]
        return "on" if content[0] else "off"
    if name == "BootOrder" and len(content) % 2 == 0 and len(content) <= 128:
        order = [f"Boot{number:04X}" for (number,) in struct.iter_unpack("<H", content)]
        fields["value"] = order
        return ", ".join(order)
    if len(name) == 8 and name.startswith("Boot") and len(content) > 6:
        return _load_option(content, fields)
    if len(content) <= 64:
        fields["value"] = content.hex()
    return _shown(content) if len(content) <= 256 else f"{len(content)} bytes"


def _load_option(content: bytes, fields: dict[str, Any]) -> str:
    """EFI_LOAD_OPTION (UEFI 2.10, 3.1.3): attributes, path size, title, path."""
    path_size = int.from_bytes(content[4:6], "little")
    end = 6
    while content[end : end + 2] not in (b"\0\0", b""):
        end += 2
        if end > _MAX_SEARCHED:
            raise _ShapeError
    fields["title"] = _utf16(content[6:end])
    fields["path"] = _device_path(_take(content, end + 2, path_size))
    return f"{fields['title']!r} {fields['path']}"


def _image(event: Event) -> Decoded:
    """UEFI_IMAGE_LOAD_EVENT (PFP 1.06, 10.2.3). The digest is the image's Authenticode hash."""
    address, size, _, path_size = struct.unpack_from("<QQQQ", event.data)
    path = _device_path(_take(event.data, 32, path_size))
    fields = {"address": address, "size": size, "path": path}
    return Decoded(f"{path or '(no path)'}, {size} bytes", fields)


def _gpt(event: Event) -> Decoded:
    """UEFI_GPT_DATA (PFP 1.06, 10.2.5)."""
    if event.data[:8] != b"EFI PART":
        raise _ShapeError
    disk = _guid(_take(event.data, 56, 16))
    entry_size = int.from_bytes(event.data[84:88], "little")
    count = int.from_bytes(_take(event.data, 92, 8), "little")
    if entry_size < 128 or count > (len(event.data) - 100) // entry_size:
        raise _ShapeError
    names = []
    for number in range(min(count, _MAX_ITEMS)):
        entry = event.data[100 + number * entry_size :][:entry_size]
        # A name that is no UTF-16 is the disk's affair.
        names.append(entry[56:128].decode("utf-16-le", "replace").partition("\0")[0])
    fields = {"disk": disk, "partitions": names}
    listed = ", ".join(name or "unnamed" for name in names)
    return Decoded(f"disk {disk}: {count} partitions: {_cut(listed)}", fields, (), True)


def _blob(event: Event) -> Decoded:
    if len(event.data) != 16:
        return _other(event)
    base, size = struct.unpack("<QQ", event.data)
    fields = {"address": base, "size": size}
    return Decoded(f"{size} bytes at {base:#x}", fields)


def _described(event: Event) -> tuple[str, bytes]:
    size = _take(event.data, 0, 1)[0]
    name = _take(event.data, 1, size).rstrip(b"\0")
    return name.decode("ascii"), event.data[1 + size :]


def _blob2(event: Event) -> Decoded:
    name, rest = _described(event)
    if len(rest) != 16:
        raise _ShapeError
    base, size = struct.unpack("<QQ", rest)
    fields = {"description": name, "address": base, "size": size}
    return Decoded(f"{name}: {size} bytes at {base:#x}", fields)


def _tables(event: Event, name: str = "", data: bytes | None = None) -> Decoded:
    data = event.data if data is None else data
    count = int.from_bytes(_take(data, 0, 8), "little")
    if len(data) != 8 + 24 * count:
        raise _ShapeError
    guids = [_guid(data[8 + 24 * i : 24 + 24 * i]) for i in range(min(count, _MAX_ITEMS))]
    fields = {"description": name, "tables": guids}
    return Decoded(f"{name}: {', '.join(guids)}" if name else ", ".join(guids), fields)


def _tables2(event: Event) -> Decoded:
    name, rest = _described(event)
    return _tables(event, name, rest)


def _tag(event: Event) -> Decoded:
    """TCG_PCClientTaggedEvent: the Linux EFI stub's, and Windows'."""
    number, size = struct.unpack_from("<II", event.data)
    content = event.data[8:]
    if size != len(content):
        raise _ShapeError
    fields = {"tag": f"{number:#010x}", "data": content[:256].hex()}
    return Decoded(f"{number:#010x}: {_shown(content)}", fields, (("text", content),))


# ---- device paths -----------------------------------------------------------------------------


def _device_path(data: bytes) -> str:
    """Write a device path as text (UEFI 2.10, 10.6), as far as its nodes are known."""
    parts: list[str] = []
    at = 0
    while at < len(data):
        if len(parts) >= _MAX_NODES:
            parts.append("…")
            break
        kind, sub, size = struct.unpack_from("<BBH", data, at)
        if size < 4 or size > len(data) - at:
            raise _ShapeError
        if kind == 0x7F:
            break
        parts.append(_node(kind, sub, data[at + 4 : at + size]))
        at += size
    return _cut("/".join(parts))


def _node(kind: int, sub: int, body: bytes) -> str:
    match kind, sub, len(body):
        case 1, 1, 2:
            return f"Pci({body[1]:#x},{body[0]:#x})"
        case 2, 1, 8:
            hid, uid = struct.unpack("<II", body)
            return f"PciRoot({uid:#x})" if hid == 0x0A0341D0 else f"Acpi({hid:#010x},{uid:#x})"
        case 3, 2, 4:
            return "Scsi({:#x},{:#x})".format(*struct.unpack("<HH", body))
        case 3, 18, 6:
            return "Sata({:#x},{:#x},{:#x})".format(*struct.unpack("<HHH", body))
        case 3, 23, 12:
            return f"NVMe({int.from_bytes(body[:4], 'little'):#x})"
        case 4, 1, 38:
            number = int.from_bytes(body[:4], "little")
            guid = uuid.UUID(bytes_le=body[20:36]) if body[37] == 2 else body[20:24].hex()
            return f"HD({number},{guid})"
        case 4, 4, _:
            return _utf16(body)
        case 4, 6, 16:
            return f"FvFile({_guid(body)})"
        case 4, 7, 16:
            return f"Fv({_guid(body)})"
        case 4, 8, 20:
            return "Offset({:#x},{:#x})".format(*struct.unpack("<QQ", body[4:]))
    return f"Path({kind},{sub},{body[:32].hex()}{'…' if len(body) > 32 else ''})"


_READERS: dict[int, Callable[[Event], Decoded]] = {
    0x00000003: _no_action,
    0x00000004: _separator,
    0x00000005: _string,
    0x00000006: _tag,
    0x00000008: _version,
    0x80000001: _variable,
    0x80000002: _variable,
    0x80000003: _image,
    0x80000004: _image,
    0x80000005: _image,
    0x80000006: _gpt,
    0x80000007: _string,
    0x80000008: _blob,
    0x80000009: _tables,
    0x8000000A: _blob2,
    0x8000000B: _tables2,
    0x8000000C: _variable,
    0x8000000D: _gpt,
    0x800000E0: _variable,
}
