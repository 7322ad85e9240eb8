"""Sealed data: blobs that live on beyond a launch."""
