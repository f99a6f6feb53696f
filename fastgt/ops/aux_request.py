"""What a call asks for beside its output, checked by name."""

from __future__ import annotations

from fastgt.contract import AuxRequest

_NOTHING = AuxRequest()


def check_request(op: str, return_aux: AuxRequest | None, *allowed: str) -> AuxRequest:
    """``return_aux``, or one that asks for nothing where it is None.

    Args:
        op: The operator's public name.
        return_aux: As the operator takes it.
        allowed: The fields of :class:`fastgt.AuxRequest` that the operator has, at least one.
    """
    if return_aux is None:
        return _NOTHING
    if not isinstance(return_aux, AuxRequest):
        raise TypeError(
            f"return_aux must be an AuxRequest, got {type(return_aux).__name__}: pass "
            f"AuxRequest({allowed[0]}=True)"
        )
    for name, asked in zip(AuxRequest._fields, return_aux, strict=True):
        if not isinstance(asked, bool):
            raise TypeError(f"return_aux: {name} must be a bool, got {type(asked).__name__}")
        if asked and name not in allowed:
            raise ValueError(f"return_aux: {op} has no {name}; it has {', '.join(allowed)}")
    return return_aux
