import pytest

from regard import Unsupported
from regard.workbench.budget import Budget


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("8m", "seconds", 480),
        ("90 s", "seconds", 90),
        ("1.5h", "seconds", 5400),
        ("2 hours", "seconds", 7200),
        ("2M tokens", "tokens", 2e6),
        ("500k tokens", "tokens", 5e5),
        ("1_000 tokens", "tokens", 1000),
        ("5e13 flops", "flops", 5e13),
        ("3T FLOPs", "flops", 3e12),
        ("5min", "seconds", 300),
    ],
)
def test_amounts_are_read(text, unit, amount):
    assert Budget.parse(text) == Budget(unit, amount)


@pytest.mark.parametrize(
    "text", ["", "banana", "8", "8 bananas", "-3m", "0m", "0 tokens", "2M m", "nan m", "1e999 h x"]
)
def test_nonsense_is_refused_with_what_is_accepted(text):
    with pytest.raises(Unsupported, match="budget") as caught:
        Budget.parse(text)
    assert caught.value.supported
    assert Budget.parse(caught.value.nearest)


@pytest.mark.parametrize(
    "text", ["90s", "8m", "20m", "3h", "2e+06 tokens", "60k tokens", "123 tokens", "1.5G tokens", "5e13 flops"]
)
def test_what_is_printed_is_read_again(text):
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


@pytest.mark.parametrize("text", ["60k tokens", "123 tokens", "122.88k tokens", "2M tokens", "90s", "8m"])
def test_it_is_printed_as_a_person_writes_it(text):
    assert str(Budget.parse(text)) == text
