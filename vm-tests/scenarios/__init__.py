"""Scenarios: one file each, with the host's part (`host`) and one guest function a boot (`BOOTS`)."""
