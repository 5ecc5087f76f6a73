"""The documented HTTP service: a front that never imports torch, and the engine in a process of its own."""
