"""Values that stand for attributes of objects for a while."""

import pytest

from fewstep.caching._pipelines import standing_in


class Model:
    def forward(self):
        return 1


def test_objects_are_as_they_were():
    plain, own = Model(), Model()
    own.forward = None  # an attribute of its own, whatever it is
    stands = [(plain, "forward", lambda: 2), (plain, "forward", lambda: 3), (own, "forward", 4)]
    with standing_in(stands):
        assert (plain.forward(), own.forward) == (3, 4)
    assert plain.forward() == 1
    assert vars(plain) == {}
    assert vars(own) == {"forward": None}


def test_also_where_one_of_them_can_not_be_made():
    model = Model()

    def stands():
        yield model, "forward", lambda: 2
        assert model.forward() == 2
        raise KeyError("no second one")

    with pytest.raises(KeyError), standing_in(stands()):
        pytest.fail("nothing runs with half of them")
    assert vars(model) == {}
