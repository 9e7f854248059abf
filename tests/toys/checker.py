"""The runtime type checker that the tests put under every function of av_lens: an int is a float, as PEP 484 says.

jaxtyping binds a call's arguments anew each time, to compare shapes across them: in a search over a small model that
is three fifths of all the time. In the rooms that a search calls most, `checked` asks it only of functions whose
annotations name an array; the others there have beartype alone, which checks the same types.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec

import jaxtyping
from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
shaped = jaxtyping.jaxtyped
OFTEN = ("av_lens.isolation.", "av_lens.results.", "av_lens.interventions.", "av_lens.core.", "av_lens.spans")


def names_an_array(function: Callable[..., Any]) -> bool:
    """Whether an annotation is or names a jaxtyping type or its alias (or a ParamSpec: beartype refuses it in text)."""
    said = " ".join(str(one) for one in function.__annotations__.values())
    named = [function.__globals__.get(name) for name in re.findall(r"\w+", said)]
    return "jaxtyping." in said or any(isinstance(one, ParamSpec) or "jaxtyping" in repr(one) for one in named)


def checked(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """Stand in for `jaxtyping.jaxtyped` in what its import hook writes."""

    def decorate(what: Any) -> Any:
        if inspect.isfunction(what) and what.__module__.startswith(OFTEN) and not names_an_array(what):
            return typechecker(what)
        return shaped(typechecker=typechecker)(what)

    return decorate
