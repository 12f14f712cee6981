"""Checkpoints as bytes: written whole or not at all, checked on the way back, and free of code.

Nothing in here knows what a trainer is. Import the piece that is needed; those marked * need no torch:

    engine         save a payload, now or in the background; with background, pending, report *, spent *
    snapshot       live tensors to one moment; with trust, planned, device_copy, and arena for its memory
    payload        what may be in a payload, and what becomes of the rest; with stand_ins and exact *
    stateful       a dict of live objects as a payload; restoring brings it back
    tensors        which bytes of which storages go into the file
    writing        the file written; with layout, and direct * for whole blocks past the page cache
    container    * the file: torch's zip layout plus a manifest; with plain_summary * and checksum *
    commit       * temp file, fsync, rename, fsync of the directory; with open_files * and reserved *
    load           read it back, every byte checked; with mapped, and single for one tensor
    verify       * every byte against the manifest, without loading; with integrity * and own_file *
    pickling       the pickle in the file, written and read without importing a name
    pickle_scan  * what a pickle may call and how much that may make; opcodes * says it before anything runs
    foreign        files of torch.save and PyTorch Lightning; shape * of what training takes from them
    contents     * what anybody's file holds; inspect * and compare * tell it
    sharded        a directory that many processes write; with directories *, sharded_manifest * and merge
    catalog      * what a directory holds; choice *, newest and ownership * say which is meant, and whose
    migrate        older payloads to today's shape
    retention    * which checkpoints go
"""
