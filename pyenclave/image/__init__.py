"""Enclave images: manifest, lock list, build, signature."""
