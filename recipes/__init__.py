"""The Video LDM put together: data, training stages, sampling, metrics and the command line."""
