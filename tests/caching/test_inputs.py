"""Which argument is a model's input: by name, then by form; never the time or the conditioning."""

import torch

from fewstep.caching.inputs import entry_of, form_of, input_of, time_of

X, TIME = torch.zeros(2, 3, 4), torch.zeros(2)
TEXT = torch.zeros(2, 5, 6)


def test_names_come_first():
    for name in ("hidden_states", "sample", "x", "latents"):
        given = {"timestep": TIME, "other": TEXT, "encoder_hidden_states": TEXT, name: X}
        assert input_of(given) is X
    assert input_of({"hidden_states": X[0], "other": TEXT}) is not TEXT
    assert input_of({"x": None, "latents": X}) is X


def test_form_comes_second():
    ids = torch.zeros(2, 3, 4, dtype=torch.long)
    assert input_of({"t": TIME, "ids": ids, "encoder_hidden_states": TEXT, "noise": X}) is X
    listed = [X, X]
    assert input_of({"t": TIME, "flags": [1, 2], "noise": listed}) is listed
    assert input_of({"timestep": TIME, "one": TIME + 1, "noise": X[0, 0]}).dim() == 1
    assert input_of({"timestep": X, "encoder_hidden_states": TEXT, "name": "a"}) is None


def test_time():
    assert time_of({"x": X, "t": TIME}) is TIME
    assert time_of({"timestep": None, "time": TIME}) is TIME
    assert time_of({"x": X}) is None


def test_lists_are_batches():
    entry = entry_of([X[0], X[1]])
    assert torch.equal(entry, X)
    assert form_of([X[0], X[1]], entry) == ((2, 3, 4), torch.float32, X.device)
    sizes = [X[0], X[0, :2]]
    assert entry_of(sizes) is None
    assert form_of(sizes, None) == ((2, (3, 4), (2, 4)), torch.float32, X.device)
    assert form_of(None, entry_of(None)) == ()
