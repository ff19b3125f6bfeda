"""The stem of CRATE: patches of an image to tokens."""
