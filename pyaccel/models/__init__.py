"""Readable models on pyaccel's ops: `bert`, the encoder of the BERT family, its `heads`, and `gpt2`."""
