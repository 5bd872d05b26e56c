"""One policy a file, one paper, one class."""
