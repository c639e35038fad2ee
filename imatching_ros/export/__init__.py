"""What other programs read: COLMAP's database and model."""
