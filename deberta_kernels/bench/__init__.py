"""The user's own model on the user's own texts, stock and patched: what `deberta-kernels bench --model` runs."""
