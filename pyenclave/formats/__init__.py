"""Bytes and dataclasses: every layout that is read or written, without I/O."""
