"""Methods that work on the language model's prefill, attention or cache, one file each."""
