"""A job on several GPUs: rank 0 does all that one process does, and has the others run every batch with it."""
