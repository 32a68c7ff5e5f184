"""The kernel interface of fanotify pre-content events: groups, marks, events, answers. No policy."""
