"""The platform process: launch control, identity, keys, reports, quotes, counters."""
