"""One engine a file, run by the Python of that engine's environment, which has nothing of ours installed."""
