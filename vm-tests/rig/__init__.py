"""The VM rig: kernels, machines, the host's side of a scenario, the report."""
