"""Checkpoints as bytes: written whole or not at all, checked on the way back, and free of code.

Nothing in here knows what a trainer is. Import the piece that is needed:

    engine     save a payload, durably
    load       read it back, every byte checked
    catalog    what a directory holds (without torch)
    payload    what may be in a payload, and what becomes of the rest
    exact      the exact types that come back, and the allowlist for a user's own
    container  the file: torch's zip layout plus a manifest
    commit     temp file, fsync, rename, fsync of the directory
"""
