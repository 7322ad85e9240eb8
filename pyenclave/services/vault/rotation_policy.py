"""
Rotation policies: when a key gets a new version by itself, and how long versions live.

Wire: Azure Key Vault, KeyRotationPolicy (7.3 and later), with the limits that its documentation
names: expiry of at least 28 days, rotation at least 7 days after creation and before expiry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from pyenclave.services.vault.durations import Duration
from pyenclave.services.vault.fields import Fields, bad_parameter

__all__ = ["RotationPolicy", "Trigger"]

_MIN_EXPIRY: Final = 28  # days
_MIN_ROTATION: Final = 7  # days
_DEFAULT_NOTICE: Final = "P30D"
_ACTIONS: Final = {"rotate": "Rotate", "notify": "Notify"}


@dataclass(frozen=True, slots=True)
class Trigger:
    """So long after the version's creation, or before its end."""

    side: Literal["timeAfterCreate", "timeBeforeExpiry"]
    duration: Duration

    def moment(self, created: int, expires: int | None) -> int | None:
        """Return the Unix time at which it strikes, None if never."""
        if self.side == "timeAfterCreate":
            return self.duration.after(created)
        return None if expires is None else self.duration.before(expires)


@dataclass(frozen=True, slots=True)
class RotationPolicy:
    """
    A key's rotation policy.

    Attributes:
        rotate: When a new version is made, or None.
        notify: When the owner is told, or None.
        expiry: How long a new version lives, or None for ever.
    """

    rotate: Trigger | None = None
    notify: Trigger | None = None
    expiry: Duration | None = None

    @classmethod
    def default(cls) -> Self:
        """Return the policy of a key that was given none: a notice 30 days before its end."""
        return cls(notify=Trigger("timeBeforeExpiry", Duration.parse(_DEFAULT_NOTICE)))

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Self:
        """
        Read the body of ``PUT /keys/{name}/rotationpolicy``.

        Raises:
            ServiceError: 400.

        """
        fields = Fields(body)
        attributes = fields.table("attributes")
        expiry = None if attributes is None else _duration(attributes, "expiryTime")
        if expiry is not None and not expiry.at_least(_MIN_EXPIRY):
            raise bad_parameter(f"Property expiryTime is less than {_MIN_EXPIRY} days.")
        found: dict[str, Trigger] = {}
        for value in fields.array("lifetimeActions", longest=2) or ():
            action, trigger = _action(Fields.of(value, "lifetimeActions."))
            if action in found:
                raise bad_parameter(f"There is more than one lifetime action {action}.")
            found[action] = trigger
        rotate, notify = found.get("Rotate"), found.get("Notify")
        if notify is not None and notify.side != "timeBeforeExpiry":
            raise bad_parameter("Action Notify takes timeBeforeExpiry.")
        if rotate is not None:
            _check_rotation(rotate, expiry)
        return cls(rotate=rotate, notify=notify, expiry=expiry)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls.read(json.loads(text))

    def to_json(self) -> str:
        """Return the policy as it is kept."""
        return json.dumps(self.shown())

    def shown(self) -> dict[str, Any]:
        """Return the policy as it is on the wire, without its id and times."""
        actions = [
            {
                "trigger": {trigger.side: trigger.duration.text},
                "action": {"type": name},
            }
            for name, trigger in (("Rotate", self.rotate), ("Notify", self.notify))
            if trigger is not None
        ]
        attributes = {} if self.expiry is None else {"expiryTime": self.expiry.text}
        return {"lifetimeActions": actions, "attributes": attributes}

    def expires(self, created: int) -> int | None:
        """Return when a version made at *created* ends, None if never."""
        return None if self.expiry is None else self.expiry.after(created)


def _duration(fields: Fields, name: str) -> Duration | None:
    text = fields.text(name, longest=64, shortest=1)
    if text is None:
        return None
    try:
        return Duration.parse(text)
    except ValueError as error:
        raise fields.error(name, f"{error}: another value") from None


def _action(fields: Fields) -> tuple[str, Trigger]:
    action = fields.table("action")
    kind = None if action is None else action.text("type", longest=16)
    name = _ACTIONS.get((kind or "").lower())
    if name is None:
        raise fields.error("action.type", "Rotate or Notify")
    trigger = fields.table("trigger")
    if trigger is None:
        raise bad_parameter("Property lifetimeActions.trigger is missing.")
    after = _duration(trigger, "timeAfterCreate")
    before = _duration(trigger, "timeBeforeExpiry")
    if after is not None and before is None:
        return name, Trigger("timeAfterCreate", after)
    if before is not None and after is None:
        return name, Trigger("timeBeforeExpiry", before)
    raise bad_parameter("A trigger takes either timeAfterCreate or timeBeforeExpiry.")


def _check_rotation(rotate: Trigger, expiry: Duration | None) -> None:
    if not rotate.duration.at_least(_MIN_ROTATION):
        raise bad_parameter(f"Rotation takes place at least {_MIN_ROTATION} days after or before.")
    if expiry is None:
        if rotate.side == "timeBeforeExpiry":
            raise bad_parameter("Rotation before expiry needs expiryTime.")
    elif not expiry.longer_than(rotate.duration):
        raise bad_parameter("Rotation would take place outside of the life of a version.")
