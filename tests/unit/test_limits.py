"""What others wrote is ended when it takes too long, in whichever thread it runs."""

import threading

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from grace.errors import GraceError
from grace.limits import within

ENDLESS = "".join(f"{{% for {x} in range(90000) %}}" for x in "abc") + 3 * "{% endfor %}"


def render(seconds):
    with within(seconds, "the template takes too long"):
        return render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=ENDLESS)


def test_a_template_without_end_is_one_sentence():
    with pytest.raises(GraceError, match=r"^the template takes too long$"):
        render(0.2)


def test_in_another_thread_too():
    said = []

    def run():
        try:
            render(0.2)
        except GraceError as error:
            said.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert said == ["the template takes too long"]


def test_what_is_quick_passes_and_other_errors_stay():
    with within(60, "never"):
        assert sum(range(10)) == 45
    with pytest.raises(KeyError), within(60, "never"):
        raise KeyError
