"""The other engines that run these models on a CPU, and ours, in turns on the same token ids."""
