"""The command ``holdfast``: parse, call, print.

    show       text for a terminal or a pipe: escaped, aligned, cut where a terminal is narrow
    ls         what checkpoints a directory holds
    inspect    what a file holds
    verify     every byte of files and directories
    diff       what is different between two files
    merge      a sharded checkpoint as one file
    main       arguments, errors and exit codes

None of it imports torch, unless numbers of tensors have to be compared, or shards merged.
"""

from holdfast.cli.main import main as main
