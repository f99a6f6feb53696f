"""Arguments of registered ops, from the fields of types."""

import inspect

import pytest

from fastgt import contract
from fastgt.contract import Dropout, HeadMask, Logit, Switches
from fastgt.ops import attention_launch
from fastgt.signature import Signature

SIGNATURES = {"forward": attention_launch.FORWARD, "backward": attention_launch.BACKWARD}


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_a_call_leaves_out_has_its_default(name):
    signature = SIGNATURES[name]
    required = signature.schema.split("=")[0].count(",")
    full = signature.split((*range(required),))
    assert [x for value in full for x in value][:required] == list(range(required))
    flat = tuple(x for value in full for x in value)
    assert len(flat) == signature.size
    for given in range(required, signature.size + 1):
        assert signature.split(flat[:given]) == full


def test_defaults_are_those_of_the_fields():
    signature = Signature(Logit, HeadMask, Dropout, Switches)
    for given in ((0.5, -5.0, 5.0, 0.0), (0.5, -5.0, 5.0, 0.0, None)):
        values = signature.split(given)
        assert values == [Logit(*given[:4]), HeadMask(), Dropout(), Switches()]
        assert [type(x) for x in values] == [Logit, HeadMask, Dropout, Switches]


def test_a_default_before_an_argument_without_one_is_none():
    """A schema takes defaults at its end only."""
    assert Signature(HeadMask, Logit).schema.startswith("Tensor? rows, Tensor? cols, float scale")


def test_two_fields_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"fields must have different names, got .*'rows'"):
        Signature(HeadMask, HeadMask)


def test_every_type_of_the_contract_says_what_it_is():
    types = [x for x in vars(contract).values() if inspect.isclass(x) and hasattr(x, "_fields")]
    assert len(types) > 30
    for kind in types:
        assert not kind.__doc__.startswith(f"{kind.__name__}("), kind
