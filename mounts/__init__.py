"""The kernel interface of mounting: mount(2), fsopen(2), fsconfig(2), fsmount(2), umount2(2). No policy."""
