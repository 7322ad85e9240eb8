"""Release of keys: who proved what, and the wrapped key for it."""
