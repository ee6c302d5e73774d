"""The commands ``temporal-layers sample ...``: clips from the command line, one module a command."""
