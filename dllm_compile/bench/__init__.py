"""The commands that measure and show."""
