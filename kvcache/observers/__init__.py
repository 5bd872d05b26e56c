"""Evidence that is gathered while a prompt's chunks pass. One observer a file."""
