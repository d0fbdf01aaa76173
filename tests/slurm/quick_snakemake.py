"""Snakemake that looks after its cluster's jobs every second.

Its Slurm plugin waits 10 s longer after every look that finds nothing ended, up to 3 minutes: right on a shared
cluster, most of the time of a test. No option says otherwise.
"""

import asyncio

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor


async def _one_second(self: RemoteExecutor) -> None:
    await asyncio.sleep(1)


RemoteExecutor.sleep = _one_second
main()
