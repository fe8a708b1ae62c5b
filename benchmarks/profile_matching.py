"""Print the time of a step of trajectory matching and the share of the convolutions in it, in percent.

python -m benchmarks.profile_matching
"""

from __future__ import annotations

import argparse
import sys

from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import allocator, status
from benchmarks.jobs import CPU, Scale, fast, matching_engine


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    allocator(engine=True)
    step = matching_engine(10, Scale(compute=fast(CPU)), CPU)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    convolutions = sum(event.self_cpu_time_total for event in events if "convolution" in event.key.split("::")[-1])
    print(f"{total / 1e6:.2f} s; convolutions {100 * convolutions / total:.0f} %")


if __name__ == "__main__":
    sys.exit(status("profile-matching", main))
