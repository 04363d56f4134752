"""Chat templates are code of others: whatever they compute, they end soon and in little room."""

import tracemalloc
from contextlib import contextmanager

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from executor.errors import CheckpointError, JobError
from executor.guard import told_as
from executor.job import template_sandbox
from executor.job.chat import ChatTemplate
from executor.job.template_sandbox import LimitedEnvironment

GROWING = "{{% set ns = namespace(x='aaaa') %}}{{% for i in range(60) %}}{}{{% endfor %}}"
ENDLESS = {
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a power that decides": "{% if 2 ** 99999 > 1 %}x{% endif %}",
    "a product": GROWING.format("{% set ns.y = 99999999999999999999 * (ns.y or 99) ** 64 %}"),
    "a repeated text": "{{ 'x' * 10 ** 9 }}",
    "a repeated list": "{{ [1] * 10 ** 9 }}",
    "a filter that pads": "{{ 'x' | center(10 ** 9) }}",
    "a method that pads": "{{ 'x'.ljust(1000000000) }}",
    "a format": "{{ '%1000000000d' | format(1) }}",
    "a format method": "{{ '{:1000000000}'.format(1) }}",
    "an operator that formats": "{{ '%1000000000d' % 1 }}",
    "batches": "{{ '' | batch(10 ** 9, 'x') | list }}",
    "a range": "{{ range(10 ** 9) | list }}",
    "a text joined to itself": GROWING.format("{% set ns.x = ns.x ~ ns.x %}"),
    "a text added to itself": GROWING.format("{% set ns.x = ns.x + ns.x %}"),
    "a block of itself": GROWING.format("{% set t %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = t %}"),
    "a list of itself": GROWING.format("{% set ns.x = [ns.x, ns.x] | join %}"),
    "a join method": GROWING.format("{% set ns.x = ns.x.join([ns.x, ns.x]) %}"),
    "a replacement": GROWING.format("{% set ns.x = ns.x.replace('a', ns.x) %}"),
    "much text in a loop": "{% for i in range(99999) %}" + "y" * 99999 + "{% endfor %}",
}
# What takes no room goes on until its time is over.
LASTING = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a text": "{% set t = 'x' * 9999 %}{% for a in t %}{% for b in t %}{% endfor %}{% endfor %}",
    "recursion in two": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop with continue": "{% for i in range(10 ** 5) %}{% for j in range(10 ** 5) %}"
    "{% continue %}{% endfor %}{% endfor %}",
}


@contextmanager
def refused_in_little_room(error, match=None):
    tracemalloc.start()
    try:
        with pytest.raises(error, match=match):
            yield
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_would_not_end_is_refused_in_little_room(source, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 1.0)
    with refused_in_little_room(SecurityError):
        LimitedEnvironment().from_string(source).render()


SHARES = st.lists(
    st.sampled_from(
        [
            "{{ m.role + ': ' + m['content'] | trim }}",
            "{{ loop.index0 % 2 }}",
            "{{ 7 // 2 * 1.5 }}",
            "{% if loop.first %}a{% else %}{{ m.content.split(' ')[-1] }}{% endif %}",
            "text 123456",
            "{{ '%s of %03d' % (m.role, 7) }}",
            "{{ m.content.replace('1234567', 'x') ~ none }}",
            "{{ '{:>5}'.format(m.role) }}",
            "{{ [m.role, 'x'] | join(', ') }}",
            "{{ m | tojson }}",
            "{% set x %}{{ m.role }}{% endset %}{{ x | upper | center(20) }}",
            "{{ 2 ** 10 - 1 }}",
            "{% for c in m.content %}{{ c | e }}{% endfor %}",
            "{{ m.content | replace('é', 'e') }}",
            "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(m.role) }}",
            "{{ range(3) | list }}",
            "{{ m.content | indent(4) | wordwrap(5) }}",
            "{{ -loop.index }}",
            "{{ undefined ~ 1 }}",
        ]
    ),
    max_size=6,
)


@given(SHARES)
def test_what_templates_do_comes_out_as_from_jinjas_own_sandbox(shares):
    source = "{% for m in messages %}" + "\n".join(shares) + "{% endfor %}"
    messages = [{"role": "user", "content": "ab é 1234567 %*"}, {"role": "tool", "content": ""}]
    texts = [
        environment(trim_blocks=True, lstrip_blocks=True).from_string(source).render(messages=messages)
        for environment in (LimitedEnvironment, ImmutableSandboxedEnvironment)
    ]
    assert texts[0] == texts[1]


def test_each_render_has_an_account_of_its_own():
    environment = LimitedEnvironment()
    template = environment.from_string("{{ 'x' * 9000000 }}")
    for _ in range(4):
        environment.begin()
        assert len(template.render()) == 9_000_000


def rendered(folder):
    template = ChatTemplate.of_checkpoint(folder)
    assert template is not None
    return template.render([{"role": "user", "content": "x"}])


GROWING_TAGS = {
    "an indent": "{{ messages | tojson(indent=10 ** 6) }}",
    "an indent of texts": "{{ messages | tojson(indent='x' * 10 ** 6) }}",
    "separators": "{{ messages | tojson(separators=(',' * 10 ** 6, ':')) }}",
    "generations": "{% for i in range(10 ** 5) %}{% generation %}" + "y" * 9999 + "{% endgeneration %}{% endfor %}",
}


REFUSED = {name: (source, 0.1) for name, source in LASTING.items()}
REFUSED |= {name: (source, 1.0) for name, source in GROWING_TAGS.items()}  # for their size, not for their time


@pytest.mark.parametrize(("source", "seconds"), REFUSED.values(), ids=REFUSED)
def test_a_template_of_a_folder_that_would_not_end_is_refused(tmp_path, source, seconds, monkeypatch):
    """Also what chat templates have beside jinja's own."""
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", seconds)
    (tmp_path / "chat_template.jinja").write_text(source)
    with refused_in_little_room(JobError, "must suit the model's chat template"):
        rendered(tmp_path)


BROKEN = {
    "nested for": "{% for a in b %}" * 30 + "{% endfor %}" * 30,  # SyntaxError
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",  # RecursionError
    "digits": "{{ " + "9" * 5000 + " }}",  # ValueError
    "no end": "{% if x %}",
}


@pytest.mark.parametrize("source", BROKEN.values(), ids=BROKEN)
def test_whatever_jinja_raises_for_a_template_names_its_file(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja.* must be a jinja template"):
        rendered(tmp_path)


@pytest.mark.parametrize("source", ["{{ 1 + 'a' }}", "{{ 9 ** 9 ** 9 ** 9 }}", "{{ messages() }}"])
def test_whatever_a_template_raises_is_told_of_the_messages(tmp_path, source):
    (tmp_path / "chat_template.jinja").write_text(source)
    template = ChatTemplate.of_checkpoint(tmp_path)
    assert template is not None
    with pytest.raises(JobError, match="must suit the model's chat template"):
        template.render([{"role": "user", "content": "x"}])


class Panic(BaseException):
    """As a library written in Rust raises it."""


@pytest.mark.parametrize("error", [Panic("boom\n\x1b[0m"), OverflowError(), jinja2.TemplateError()])
def test_what_a_library_raises_is_told_as_a_users_mistake(error):
    with (
        pytest.raises(JobError, match=r"x is <.+>: must be another; do it") as caught,
        told_as(JobError, "x", "must be another", "do it"),
    ):
        raise error
    assert str(caught.value).isprintable()
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), MemoryError(), JobError("a", 1, "b", "c")])
def test_ctrl_c_and_our_own_errors_pass(error):
    with pytest.raises(type(error)) as caught, told_as(CheckpointError, "x", "y", "z"):
        raise error
    assert caught.value is error
