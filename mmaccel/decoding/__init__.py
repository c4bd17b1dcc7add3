"""Methods that guess tokens and verify them, one file each."""
