"""Readable models on pyaccel's ops. `pyaccel.models.bert` is the encoder of the BERT family."""
