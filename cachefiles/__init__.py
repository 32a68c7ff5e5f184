"""The kernel interface of cachefiles on-demand mode: messages, ioctls, device. No policy."""
