"""Planes: the ways in which the kernel asks, and canaries that find out which of them works here, in which form."""
