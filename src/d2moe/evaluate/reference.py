"""The same perplexity from transformers in float32 on the checkpoint that was converted.

The only file outside of conversion and tests that needs torch and transformers, which it imports when called.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from d2moe.errors import CheckpointError, D2MoeError, RequestError
from d2moe.evaluate.perplexity import CONTEXT, Perplexity, count_scored, negative_log_likelihood, result, windows
from d2moe.runtime.request import Progress
from d2moe.runtime.tokenizer import Tokenizer


def reference_perplexity(
    src: str | Path,
    tokens: Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    context: int = CONTEXT,
    stride: int | None = None,
    max_tokens: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `tokens` by the Hugging Face checkpoint in `src`, windows as in `perplexity`; all of it in memory.

    D2MoeError if torch or transformers is not installed, CheckpointError if transformers cannot load `src`.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise D2MoeError(
            f"--reference needs {error.name}, which is not installed; run: pip install 'd2moe[torch]'"
        ) from None
    stride = context if stride is None else stride
    if len(tokens) < 2:
        raise RequestError(f"the text has {len(tokens)} tokens, perplexity needs at least 2")
    if not (Path(src) / "config.json").is_file():
        raise CheckpointError(
            f"{src} has no config.json; --reference wants the folder of the Hugging Face checkpoint that was converted"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        # Local files only: measuring must not depend on a network, nor run code that came with the checkpoint.
        model = transformers.AutoModelForCausalLM.from_pretrained(str(src), dtype=torch.float32, local_files_only=True)
    except Exception as error:  # transformers raises nearly anything
        raise CheckpointError(
            f"{src}: transformers cannot load this checkpoint: {' '.join(str(error).split())}"
        ) from None
    model.eval()
    vocab = int(model.config.vocab_size)
    bad = next((t for t in tokens if not 0 <= t < vocab), None)
    if bad is not None:
        raise RequestError(
            f"the text holds token {bad}, {src} has a vocabulary of {vocab}; is it the checkpoint of this model?"
        )
    total = count_scored(len(tokens), max_tokens)
    tokens = list(tokens[: total + 1])
    begun = time.perf_counter()
    nll, done = 0.0, 0
    with torch.inference_mode():
        for window in windows(len(tokens), context, stride, max_tokens):
            inputs = torch.tensor([tokens[window.start : window.end]])
            rows = model(inputs, use_cache=False).logits[0, window.first - 1 - window.start :]
            nll += negative_log_likelihood(rows.float().numpy(), tokens[window.first : window.end + 1])
            done += window.end + 1 - window.first
            if progress is not None:
                progress(done, total)
    return result(
        nll, tokens, tokenizer, bits=None, context=context, stride=stride, seconds=time.perf_counter() - begun
    )
