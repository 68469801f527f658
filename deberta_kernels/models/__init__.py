"""The model side: DeBERTa models of transformers and AdapterHub, patched to run fused attention, and back."""
