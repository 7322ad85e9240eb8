"""The wire between processes: typed frames, rings in shared memory, control channels."""
