"""The node daemon, the registry client and both commands: policy and network."""

__version__ = "0.1.0"
