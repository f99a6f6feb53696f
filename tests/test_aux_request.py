"""What ``return_aux`` of an operator may be, and what every operator says of anything else."""

import pytest
import torch

from fastgt import AuxRequest
from fastgt.ops.aux_request import check_request


def test_a_request_asks_for_what_it_names_and_none_for_nothing():
    request = AuxRequest(lse=True)
    assert check_request("op", request, "lse", "weights") == request
    assert check_request("op", None, "lse", "weights") == AuxRequest()
    assert check_request("op", AuxRequest(), "lse") == AuxRequest()


@pytest.mark.parametrize("wrong", [True, False, "lse", (True, False, False), torch.ones(())])
def test_what_is_no_request_is_refused_with_one_that_is(wrong):
    said = rf"return_aux must be an AuxRequest, got {type(wrong).__name__}: pass AuxRequest\(lse=T"
    with pytest.raises(TypeError, match=said):
        check_request("op", wrong, "lse", "weights")


def test_a_result_that_an_operator_lacks_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^return_aux: op has no weights; it has edge_scores$"):
        check_request("op", AuxRequest(weights=True, edge_scores=True), "edge_scores")
    with pytest.raises(ValueError, match=r"^return_aux: op has no edge_scores; it has lse, weigh"):
        check_request("op", AuxRequest(lse=True, edge_scores=True), "lse", "weights")


@pytest.mark.parametrize("wrong", ["yes", 1, None])
@pytest.mark.parametrize("name", AuxRequest._fields)
def test_a_field_that_is_no_bool_is_refused_by_name(name, wrong):
    said = f"^return_aux: {name} must be a bool, got {type(wrong).__name__}$"
    with pytest.raises(TypeError, match=said):
        check_request("op", AuxRequest(**{name: wrong}), *AuxRequest._fields)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_request_is_checked_while_a_call_is_traced():
    @torch.compile(fullgraph=True, backend="eager")
    def f(x, request):
        asked = check_request("op", request, "lse")
        return x + 1 if asked.lse else x

    x = torch.zeros(2)
    assert f(x, None).tolist() == [0, 0]
    assert f(x, AuxRequest(lse=True)).tolist() == [1, 1]
    assert f(x, AuxRequest()).tolist() == [0, 0]
