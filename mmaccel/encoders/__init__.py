"""Methods that work in or right behind a vision or audio encoder, one file each."""
