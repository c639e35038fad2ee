"""Recordings, read from bags or rendered with exact ground truth."""
