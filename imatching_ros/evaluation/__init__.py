"""Matching accuracy, accuracy of poses, trajectory error, and the report that shows them."""
