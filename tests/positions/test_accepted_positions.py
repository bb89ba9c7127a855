"""Which mechanism takes which position scheme: what a card accepts works, what it does not is refused with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import ACTS_LIKE, TURNED_BEFORE, Context, Kind, Pattern, Unsupported
from regard.create import create_layer
from regard.positions import SCHEMES, list_positions

ATTENTION = list_mechanisms(kind=Kind.ATTENTION)
INSIDE = [name for name in list_positions() if SCHEMES[name].rotate is not None or SCHEMES[name].bias is not None]
ACCEPTED = [
    (name, scheme) for name in ATTENTION for scheme in INSIDE if scheme in get_mechanism(name).accepts_positions
]
REFUSED = [(name, s) for name in ATTENTION for s in list_positions() if s not in get_mechanism(name).accepts_positions]


def layer(name: str, scheme: str, pattern: Pattern) -> nn.Module:
    made = create_layer(name, 16, 2, pattern=pattern, positions=scheme).double().eval()
    with torch.no_grad():
        for parameter in made.positions.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


def sample_roles(name: str, x: Tensor, pattern: Pattern) -> Tensor | None:
    card, count = get_mechanism(name), x.shape[1]
    if card.sample_context is None:
        return None
    rng = torch.Generator().manual_seed(0)
    return card.sample_context(rng, batch=len(x), n=count, m=count, pattern=pattern).get("roles")


@pytest.mark.parametrize(("name", "scheme"), ACCEPTED)
def test_an_accepted_scheme_changes_the_output_and_decodes(name, scheme):
    card = get_mechanism(name)
    selves = [p for p in (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF) if p in card.patterns]
    if not selves:
        pytest.skip("no self pattern")
    module, x = layer(name, scheme, selves[0]), torch.randn(2, 12, 16, dtype=torch.float64)
    roles = sample_roles(name, x, selves[0])
    whole = module(x, context=Context(roles=roles)).output
    used, module.positions = module.positions, SCHEMES["none"]()
    assert (module(x, context=Context(roles=roles)).output - whole).abs().max() > 1e-6
    module.positions = used
    if selves[0] is not Pattern.CAUSAL_SELF or card.state is None:
        return
    state, outputs = None, []
    for part in torch.arange(12).split([5, 1, 1, 1, 4]):
        now = Context(roles=None if roles is None else roles[:, part], want=frozenset({"state"}))
        result = module(x[:, part], context=now, state=state)
        outputs.append(result.output)
        state = result.state
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "scheme"), REFUSED)
def test_a_scheme_that_is_not_accepted_is_refused_with_the_reason(name, scheme):
    with pytest.raises(
        Unsupported, match=rf"^not supported: {scheme} positions with {name} \(.+\); supported: none"
    ) as refusal:
        create_layer(name, 16, 2, pattern=get_mechanism(name).patterns[0], positions=scheme)
    assert refusal.value.nearest == "none"


@pytest.mark.parametrize("name", ATTENTION)
def test_schemes_that_act_at_the_same_place_are_accepted_alike(name):
    card = get_mechanism(name)
    accepted = set(card.accepts_positions)
    for place in ("rotate", "bias"):
        alike = {s for s in INSIDE if getattr(SCHEMES[s], place) is not None and s not in TURNED_BEFORE}
        if place == "bias" and accepted & alike:
            assert "bias" in card.honours
        assert accepted >= alike or not accepted & alike


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("scheme", TURNED_BEFORE)
def test_what_turns_queries_and_keys_before_the_call_is_not_accepted_where_they_are_rotated_again(name, scheme):
    card = get_mechanism(name)
    fits = set(ACTS_LIKE[scheme]) <= set(card.accepts_positions)
    assert (scheme in card.accepts_positions) == (fits and "rotate" not in card.honours)
