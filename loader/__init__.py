"""The node daemon, the registry client and both commands: policy and network."""
