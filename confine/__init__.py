"""The kernel interface of confinement: capabilities(7), no_new_privs, landlock(7), seccomp(2). No policy.

Everything here is for good, for the calling thread and whatever it starts afterwards: call it before other threads run.
"""

from confine.process import drop_capabilities, filter_system_calls, restrict_writes

__all__ = ["drop_capabilities", "filter_system_calls", "restrict_writes"]
