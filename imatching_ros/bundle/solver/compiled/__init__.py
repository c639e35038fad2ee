"""What system.py and adjust.py say in torch, compiled for the CPU; minimise.py is the way in."""
