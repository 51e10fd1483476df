"""Refuses models that an older pyaccel accelerated and pickled: their pickles name this module."""

raise ImportError(
    "this model was accelerated and pickled by an older version of pyaccel: load it with that version, call "
    "pyaccel.restore(model), and save it again, with model.save_pretrained(...) or pickle"
)
