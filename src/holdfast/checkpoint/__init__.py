"""Checkpoints as bytes: written whole or not at all, checked on the way back, and free of code.

Nothing in here knows what a trainer is. Import the piece that is needed; those marked * need no torch:

    engine         save a payload, durably
    load           read it back, every byte checked
    catalog      * what a directory holds
    payload        what may be in a payload, and what becomes of the rest
    stand_ins      the nearest plain value of every type
    exact        * the exact types that come back, and the allowlist for a user's own
    tensors        which bytes of which storages go into the file
    pickling       the pickle in the file: written, scanned, read without importing a name
    container    * the file: torch's zip layout plus a manifest
    integrity    * every byte against the manifest
    checksum     * CRC-32
    commit       * temp file, fsync, rename, fsync of the directory
    foreign        files of torch.save and PyTorch Lightning, with foreign_types for what they hold
    migrate        older payloads to today's shape
    retention    * which checkpoints go
"""
