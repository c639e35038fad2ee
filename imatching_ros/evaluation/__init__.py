"""Matching accuracy, relative-pose accuracy, trajectory error, and the report that shows them."""
