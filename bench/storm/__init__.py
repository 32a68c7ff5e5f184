"""Kill storms: readers of every kind, a slow registry, and processes of the daemon that are killed all the time."""
