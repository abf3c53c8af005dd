"""The same prompt at every width of the same file:  python examples/widths.py"""

import d2moe

with d2moe.load() as model:
    for bits in (2, 3, 4, 8):
        before = model.engine.counters.snapshot()
        answer = model.generate("Lily went to the park and", max_tokens=24, temperature=0, bits=bits)
        used = model.engine.counters - before
        print(f"{bits} bits, {used.read_bytes / 1e6:4.1f} MB read: {answer.text.strip()!r}")
