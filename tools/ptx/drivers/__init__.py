"""What the drivers of both backends share, and what is measured through them."""
