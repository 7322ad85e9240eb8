"""Measuring code the way the hardware does."""
