"""Batch jobs: OpenAI batch lines in, a run directory out.

`requests` reads the lines, `outputs` keeps what is finished, `report` says what the run did, and
`run` puts them together.
"""

from executor.job.run import JobOptions, JobProgress, run_job

__all__ = ["JobOptions", "JobProgress", "run_job"]
