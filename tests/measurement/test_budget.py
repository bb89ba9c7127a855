import pytest

from regard import Unsupported
from regard.measurement.budget import Budget

READ = {
    "8m": ("seconds", 480),
    "90 s": ("seconds", 90),
    "1.5h": ("seconds", 5400),
    "2 hours": ("seconds", 7200),
    "5min": ("seconds", 300),
    "2M tokens": ("tokens", 2e6),
    "1.5G tokens": ("tokens", 1.5e9),
    "500k tokens": ("tokens", 5e5),
    "1_000 tokens": ("tokens", 1000),
    "2e+06 tokens": ("tokens", 2e6),
    "5e13 flops": ("flops", 5e13),
    "3T FLOPs": ("flops", 3e12),
}


@pytest.mark.parametrize("text", READ)
def test_amounts_are_read_and_what_is_printed_is_read_again(text):
    assert Budget.parse(text) == Budget.parse(str(Budget.parse(text))) == Budget(*READ[text])


@pytest.mark.parametrize("text", ["60k tokens", "123 tokens", "122.88k tokens", "2M tokens", "90s", "8m"])
def test_it_is_printed_as_a_person_writes_it(text):
    assert str(Budget.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "banana", "8", "8 bananas", "-3m", "0m", "0 tokens", "2M m", "nan m", "1e999 h x", "1e400 steps"]
)
def test_nonsense_is_refused_with_what_is_accepted(text):
    with pytest.raises(Unsupported, match="budget") as caught:
        Budget.parse(text)
    assert caught.value.supported
    assert Budget.parse(caught.value.nearest)
