"""Scripts for one NVIDIA GPU; each prints JSON lines, one claim a script."""
