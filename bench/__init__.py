"""Measurements side by side with other programs, and the demo. Nothing here is part of the distribution."""
