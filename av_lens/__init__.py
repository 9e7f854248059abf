"""av_lens: TransformerLens for audio-visual language models."""
