from grace.nested import flatten


def test_flatten_names_every_leaf():
    nested = {"a": {"b": [1, {"c": None}]}, "d": {}}
    assert dict(flatten(nested)) == {"a.b": [1, {"c": None}], "d": {}}
    assert dict(flatten(nested, lists=True)) == {"a.b[0]": 1, "a.b[1].c": None, "d": {}}
