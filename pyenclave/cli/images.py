"""The commands of images: keygen, build, sign, inspect, diff."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from pyenclave._files import read_file
from pyenclave.cli import output

__all__ = ["add_commands"]

_MAX_KEY = 64 << 10  # bytes of a key, a signature or a passphrase

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001


def add_commands(subparsers: Subparsers) -> None:
    """Add the commands of this module."""
    from pyenclave.cli.measure import add_exit_code

    command = subparsers.add_parser("keygen", help="make a signing key (RSA-3072, e = 3)")
    command.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="new file, mode 0600"
    )
    _passphrase(command)
    command.set_defaults(function=_keygen)

    command = subparsers.add_parser("build", help="build an image from a manifest or a script")
    command.add_argument(
        "source",
        nargs="?",
        default="enclave.toml",
        help="enclave.toml, its folder, or one Python file (default: enclave.toml)",
    )
    command.add_argument("-o", "--output", metavar="FILE", help="default: NAME.enclave")
    command.add_argument("--lock", metavar="FILE", help="lock list of the runtime it shall run on")
    command.add_argument("--write-lock", metavar="FILE", help="also write this runtime's lock list")
    command.add_argument(
        "--data-key-file",
        metavar="FILE",
        help="the 32 bytes that encrypt what [encrypted] names; made, of mode 0600, where there is "
        "no such file",
    )
    command.set_defaults(function=_build)

    command = subparsers.add_parser(
        "sign",
        help="sign an image, in one step or in two (HSM)",
        description="One step: --key. Two steps: --digest-out (or --message-out), then --signature "
        "with --public-key. SOURCE_DATE_EPOCH sets the date; it must be the same in both steps.",
    )
    command.add_argument("image")
    command.add_argument("--key", metavar="PEM", help="private key: sign now")
    _passphrase(command)
    command.add_argument("--digest-out", metavar="FILE", help="write the SHA-256 that is signed")
    command.add_argument(
        "--message-out", metavar="FILE", help="write the 256 bytes that are signed"
    )
    command.add_argument("--signature", metavar="FILE", help="384 bytes, RSASSA-PKCS1-v1_5")
    command.add_argument("--public-key", metavar="PEM", help="the signer's, with --signature")
    command.add_argument("-o", "--output", metavar="FILE", help="default: the image itself")
    command.set_defaults(function=_sign)

    command = subparsers.add_parser("inspect", help="explain an image and all that runs inside")
    command.add_argument("image")
    command.add_argument("--modules", action="store_true", help="list every module, not the sums")
    command.set_defaults(function=_inspect)

    command = subparsers.add_parser("diff", help="name what makes two images differ")
    command.add_argument("a")
    command.add_argument("b")
    add_exit_code(command)
    command.set_defaults(function=_diff)


def _passphrase(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--passphrase-file", metavar="FILE", help="its first line protects the private key"
    )


def _read_passphrase(args: argparse.Namespace) -> bytes | None:
    if args.passphrase_file is None:
        return None
    lines = read_file(args.passphrase_file, limit=_MAX_KEY).splitlines()
    if not lines or not lines[0]:
        raise ValueError(f"{args.passphrase_file}: the passphrase is empty")
    return lines[0]


def _date() -> int:
    from pyenclave.image import sign
    from pyenclave.measurement.image import DEFAULT_DATE

    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        return DEFAULT_DATE
    try:
        if not epoch.isdecimal() or len(epoch) > 12:  # the year 9999 has that many digits
            raise ValueError(epoch)
        return sign.bcd_date(int(epoch))
    except ValueError:
        raise ValueError(
            "SOURCE_DATE_EPOCH: expected seconds since 1970, at most to the year 9999, found "
            f"{epoch[:40]!r}"
        ) from None


def _say(args: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    if args.json:
        output.print_json(result)
    else:
        output.say(text)
    return 0


def _keygen(args: argparse.Namespace) -> int:
    import hashlib

    from pyenclave.image import keys

    passphrase = _read_passphrase(args)
    pem = keys.keygen(passphrase)
    modulus = keys.load_private(pem, passphrase).public_key().public_numbers().n
    mrsigner = hashlib.sha256(modulus.to_bytes(keys.KEY_BITS // 8, "little")).hexdigest()
    try:
        keys.write_new(args.output, pem)
    except FileExistsError:
        raise ValueError(
            f"{args.output} is there, and no key is overwritten: name another file"
        ) from None
    result = {"file": args.output, "mrsigner": mrsigner, "encrypted": passphrase is not None}
    return _say(args, result, f"{args.output}: new signing key\nMRSIGNER {mrsigner}")


def _data_key(path: str) -> tuple[bytes, bool]:
    """Return the data key of a file, or a new one for it, and whether it is new."""
    import stat

    from pyenclave.sealed._held import KEY_SIZE, read_key_file

    if not os.path.lexists(path):
        return os.urandom(KEY_SIZE), True
    key = read_key_file(path)
    if os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        output.note(f"others may read the key file {path} (chmod 600)")
    return key, False


def _build(args: argparse.Namespace) -> int:
    from pyenclave.cli._targets import check_target
    from pyenclave.formats.image import Image
    from pyenclave.formats.lock import MAX_LOCK
    from pyenclave.image import build, keys
    from pyenclave.measurement.image import measure_image

    for named in (args.output, args.write_lock):
        if named is not None:
            check_target(named)
    lock = read_file(args.lock, limit=MAX_LOCK) if args.lock else None
    data_key, new = None, False
    if args.data_key_file is not None:
        data_key, new = _data_key(args.data_key_file)
        if new:
            check_target(args.data_key_file)
    data = build.build(args.source, lock=lock, data_key=data_key)
    image = Image.parse(data)
    path = args.output or f"{image.info.name.replace('/', '_')}.enclave"

    def keep() -> None:
        # A build that failed leaves no key, and no image is without the one that opens it.
        if new and data_key is not None:
            keys.write_new(args.data_key_file, data_key)

    build.write_image(path, data, first=keep)
    if args.write_lock:
        build.write_image(args.write_lock, image.lock_bytes)
    mrenclave = measure_image(image).hex()
    result = {
        "file": path,
        "name": image.info.name,
        "mrenclave": mrenclave,
        "sha256": image.sha256.hex(),
        "size": len(data),
        "functions": [function["name"] for function in image.info.functions],
        "lock_digest": image.lock_digest.hex(),
    }
    functions = ", ".join(function["name"] for function in image.info.functions)
    text = f"{path}: {len(data)} bytes, unsigned\nMRENCLAVE {mrenclave}\nfunctions {functions}"
    if image.info.encrypted is not None:
        result["encrypted"] = list(image.info.encrypted.files)
        text += f"\nencrypted {', '.join(image.info.encrypted.files)}"
    return _say(args, result, text)


def _sign(args: argparse.Namespace) -> int:
    from pyenclave.formats.image import MAX_IMAGE
    from pyenclave.image import build, sign

    first = args.digest_out is not None or args.message_out is not None
    if (args.key is not None) + first + (args.signature is not None) != 1:
        raise ValueError(
            "give one of --key, --digest-out (or --message-out), --signature with --public-key"
        )
    if (args.signature is None) != (args.public_key is None):
        raise ValueError("--signature and --public-key belong together")
    data, date = read_file(args.image, limit=MAX_IMAGE), _date()
    if first:
        digest = sign.signing_digest(data, date=date)
        if args.digest_out is not None:
            build.write_image(args.digest_out, digest)
        if args.message_out is not None:
            build.write_image(args.message_out, sign.signing_message(data, date=date))
        written = args.digest_out or args.message_out
        return _say(args, {"digest": digest.hex(), "file": written}, f"digest {digest.hex()}")
    if args.key is not None:
        key = read_file(args.key, limit=_MAX_KEY)
        signed = sign.sign(data, key, passphrase=_read_passphrase(args), date=date)
    else:
        signed = sign.attach_signature(
            data,
            read_file(args.public_key, limit=_MAX_KEY),
            read_file(args.signature, limit=_MAX_KEY),
            date=date,
        )
    return _signed(args, signed)


def _signed(args: argparse.Namespace, signed: bytes) -> int:
    from pyenclave.formats.image import Image
    from pyenclave.image import build
    from pyenclave.measurement.image import verify_image

    image = Image.parse(signed)
    identity = verify_image(image)
    path = args.output or args.image
    build.write_image(path, signed)
    result = {
        "file": path,
        "mrenclave": identity.mrenclave.hex(),
        "mrsigner": identity.mrsigner.hex(),
        "product_id": identity.product_id,
        "security_version": identity.security_version,
        "debug_allowed": identity.debug_allowed,
    }
    return _say(
        args,
        result,
        f"{path}: signed\nMRENCLAVE {result['mrenclave']}\nMRSIGNER  {result['mrsigner']}",
    )


def _inspect(args: argparse.Namespace) -> int:
    from pyenclave.formats.image import MAX_IMAGE, Image
    from pyenclave.image.inspect import describe

    found = describe(Image.parse(read_file(args.image, limit=MAX_IMAGE)))
    if args.json:
        output.print_json(found)
        return 0
    signer = found["mrsigner"] or found["signature"]
    output.say(
        f"{found['name']}: product {found['product_id']}, version {found['security_version']}"
    )
    output.say(f"MRENCLAVE {found['mrenclave']}")
    output.say(f"MRSIGNER  {signer}")
    output.say(f"options   {', '.join(f'{k}={v}' for k, v in found['options'].items())}")
    output.say(f"functions {', '.join(f['name'] for f in found['functions'])}")
    for ocall in found["ocalls"]:
        allowed = f", which may call {', '.join(ocall['allow'])}" if ocall["allow"] else ""
        output.say(f"ocall     {ocall['name']}{allowed}")
    output.say("\npages")
    for row in found["pages"]:
        line = f"  {row['offset']:#010x}  {row['pages']:6} pages  {row['flags']}  {row['what']}"
        output.say(line)
    output.say("\nfiles")
    for row in found["files"]:
        hidden = "  (encrypted)" if row.get("encrypted") else ""
        output.say(f"  {row['sha256'][:16]}…  {row['size']:10}  {row['name']}{hidden}")
    _say_base(found, every=args.modules)
    return 0


def _say_base(found: dict[str, Any], *, every: bool) -> None:
    base = found["trusted_base"]
    output.say(f"\ntrusted base: {base['files']} files, {base['bytes']} bytes, all locked by hash")
    output.say(f"  lock {found['lock']['digest']}\n  {found['lock']['python']}")
    if hidden := [row["name"] for row in base.get("encrypted", ())]:
        output.say(f"  encrypted code, which only its owner can read: {', '.join(hidden)}")
    if every:
        for kind in ("bootstrap", "libraries", "modules", "data"):
            output.say(f"\n{kind}")
            for row in base[kind]:
                name = row.get("name", "")
                output.say(f"  {row['sha256'][:16]}…  {row['size']:10}  {name:40} {row['path']}")
        return
    groups: dict[str, list[int]] = {}
    for kind in ("bootstrap", "libraries", "modules", "data"):
        for row in base[kind]:
            own = "standard library" if row["path"].startswith("stdlib:") else row.get("name", "")
            name = kind if kind != "modules" else own.split(".")[0]
            total = groups.setdefault(name, [0, 0])
            total[0] += 1
            total[1] += row["size"]
    for name, (files, size) in sorted(groups.items(), key=lambda item: -item[1][1]):
        output.say(f"  {files:6} files  {size:12} bytes  {name}")
    output.say("  (--modules lists each)")


def _diff(args: argparse.Namespace) -> int:
    from pyenclave.formats.image import MAX_IMAGE, Image
    from pyenclave.image.diff import diff
    from pyenclave.measurement.image import measure_image

    a, b = (Image.parse(read_file(path, limit=MAX_IMAGE)) for path in (args.a, args.b))
    rows = diff(a, b)
    same = measure_image(a) == measure_image(b)
    result = {
        "same": not rows,
        "same_measurement": same,
        "mrenclave": [measure_image(a).hex(), measure_image(b).hex()],
        "differences": rows,
    }
    if args.json:
        output.print_json(result)
    else:
        output.say("same measurement" if same else "different measurements")
        for row in rows:
            output.say(f"  {row['what']} {row['name']}: {_short(row['a'])} → {_short(row['b'])}")
    return 1 if args.exit_code and not same else 0


def _short(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 72 or not sys.stdout.isatty() else text[:71] + "…"
