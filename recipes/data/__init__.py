"""Videos to training samples: files, shards and tables of captions, decoded in worker processes; writing clips."""
