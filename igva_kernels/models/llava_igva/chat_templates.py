"""The prompts of LLaVA as chat templates; the content of a message is a string with ``<image>`` or a list of parts."""

_CONTENT = (
    "{%- macro said(message) -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{ '<image>\n' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_TEMPLATES = {
    # Only what lies between "generation" and "endgeneration" is supervised. It starts with the first letter of the
    # answer, because not every tokenizer has a token for the space before it.
    "plain": (
        _CONTENT + "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '<image>' * said(m).count('<image>') }}"
        "{% else %}{% generation %}{{ said(m) | trim }}\n{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "vicuna_v1": (
        _CONTENT + "{{ bos_token }}" + _VICUNA + "{% for m in messages %}"
        "{% if m['role'] == 'user' %} USER: {{ said(m) }} ASSISTANT:"
        "{% else %} {% generation %}{{ said(m) | trim }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
}
"""LLaVA's ``--version``: "plain" for stage 1 (image, caption), "vicuna_v1" for stage 2 and for LLaVA-1.5."""
