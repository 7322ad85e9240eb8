"""The rows of `pyenclave bench`."""
