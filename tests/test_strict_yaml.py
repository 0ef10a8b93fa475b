"""YAML: what a scalar means, what is refused, and that what PyYAML writes comes back."""

import pytest
import yaml

from latent_egc.strict_yaml import parse_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"),  # octal in YAML 1.1
        ("1:30", "1:30"),  # base 60
        ("0b11", "0b11"),
        ("2024-01-01", "2024-01-01"),
        ("0", 0),
        ("-3", -3),
        ("1_000", 1000),
        ("0x1F", 31),
        ("1.5e-3", 0.0015),
        ("yes", True),
        ("~", None),
        ("", None),
        ("x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}", {"x": {"a": 1, "b": 2}, "y": {"a": 3, "b": 2}}),
    ],
)
def test_a_scalar_means_what_it_looks_like(text, value):
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: 1, b: 2, a: 1}", "duplicate key 'a'"),
        ("x: {a: 1, 'a': 2}", "duplicate key 'a'"),
        (BOMB, "with its aliases written out the document has more than 20000 values"),
        ("&a [*a]", "with its aliases written out the document contains itself"),
        ("&a {b: *a}", "with its aliases written out the document contains itself"),
        ("[" * 3000, "nested too deeply"),
        ("9" * 5000, "digits"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: [", "flow"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


@pytest.mark.parametrize(
    "value", ["010", "08", "1:30", "1e-4", "2024-01-01", "yes", "0b1", ".5", "1_0", "=", "<<", "~"]
)
def test_strings_that_pyyaml_writes_come_back(value):
    assert parse_yaml(yaml.safe_dump({"key": value})) == {"key": value}
