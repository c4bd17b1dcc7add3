"""Machinery that no user sees: patching with exact undo, the state of a call, pruned caches, attention probes."""
