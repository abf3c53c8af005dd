"""Stream an answer from the built-in model inside a small budget:  python examples/stream.py "Once upon a time" """

import sys

import d2moe

prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
with d2moe.load(memory="128MB", expert_memory="4MB", bits=4) as model:
    for piece in model.stream(prompt, max_tokens=60, seed=1):
        print(piece.text, end="", flush=True)
    print()
