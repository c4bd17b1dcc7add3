"""Methods for diffusion transformers, one file each."""
