"""Batch jobs: OpenAI batch lines in, a run directory out.

`requests` reads the lines, `survey` looks at all of them first, `outputs` keeps what is finished
and `writer` writes it as it comes, `identity` says whether a run may go on in a directory, `report`
what it did, `progress` how far it is, `options` what it is told, and `run` puts them together.
"""

from executor.job.options import JobOptions
from executor.job.progress import JobProgress
from executor.job.run import run_job

__all__ = ["JobOptions", "JobProgress", "run_job"]
