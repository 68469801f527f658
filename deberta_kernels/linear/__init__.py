"""Linear layers and dropout, computed in faster ways where a module is plain; nothing here knows DeBERTa."""
