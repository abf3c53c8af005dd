"""Peak memory of a conversion beside that of a small one, in a process of its own."""

MEASURE = """
import sys
from d2moe.convert.pipeline import convert

def peak_mb():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024

convert(sys.argv[1], sys.argv[2])
before = peak_mb()
convert(sys.argv[3], sys.argv[4])
print(before, peak_mb())
"""
