"""Chat templates in the manner of well-known families, written for these tests."""

from __future__ import annotations

CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' ~ (tool | tojson) }}
    {%- endfor %}
    {{- '</tools>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '\\n{"name": "%s", "arguments": %s}' % (call.function.name, call.function.arguments | tojson) }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>' }}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}\
{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}\
{% endfor %}"""

LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now('%Y') %}
    {%- else %}
        {%- set date_string = '26 Jul 2024' %}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(count=0, system='') %}
{%- for message in messages if message.role == 'system' %}
    {%- set ns.system = ns.system ~ message['content'] | trim %}
{%- endfor %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today: ' + date_string + '\\n' }}
{{- ns.system }}
{{- '<|eot_id|>' }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message.content is mapping or message.content is iterable and message.content is not string %}
        {%- set content = message.content | map(attribute='text') | join('|') %}
    {%- else %}
        {%- set content = message.content %}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + content | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '<!-- ' ~ ns.count ~ ' -->' }}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'assistant') %}
        {% set role = 'model' %}
    {% else %}
        {% set role = message['role'] %}
    {% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}
"""

MACROS = """\
{%- macro part(message, depth=0) -%}
    {%- if message.content is string -%}
        {{ message.content.split('</think>')[-1].lstrip('\\n').replace('<b>', '*') }}
    {%- else -%}
        {%- for item in message.content -%}{{ '[{}:{}]'.format(loop.index, item.text) }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set seen = [] -%}
{%- set rules = {'user': 'U', 'assistant': 'A', 'system': 'S', 'tool': 'T'} -%}
{%- for message in messages recursive -%}
    {%- set shown -%}{{ part(message) }}{%- endset -%}
    {{ rules.get(message.role, '?') ~ ': ' ~ shown }}
    {%- if message.role == 'assistant' -%}
        {% generation %}{{ message.reasoning_content or '' }}{{ eos_token }}{% endgeneration %}
    {%- endif -%}
    {{ '\\n' if not loop.last else ('=' * 8) }}
    {%- if loop.index > 40 -%}{% break %}{%- endif -%}
{%- endfor -%}
{%- for key, value in rules | dictsort -%}{{ key }}={{ value }}{{ ',' if not loop.last }}{%- endfor -%}
{{- messages | selectattr('role', 'equalto', 'user') | list | length -}}
{{- dict(a=1, b=[1, 2.5, none, true]) | tojson -}}
{{- cls_token is defined -}}
"""

FAMILIES = {
    "chatml": CHATML,
    "llama-2": LLAMA_2,
    "llama-3": LLAMA_3,
    "gemma": GEMMA,
    "macros": MACROS,
}
