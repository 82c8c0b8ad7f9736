"""GLM-5's chat format as a template of our own, for checkpoints that this project writes itself.

No text is added around a turn: no newline, no end token. A turn's reasoning is shown after the last user message, and
before it only when `clear_thinking` is given as false; a turn without visible reasoning starts with a bare `</think>`.
Values other than strings are JSON with ", " and ": " and without ASCII escapes.
"""

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content is iterable and content is not mapping -%}
    {%- for part in content -%}
      {%- if part is string -%}{{- part -}}{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}
    {%- endfor -%}
  {%- elif content is not none -%}
    {{- content -}}
  {%- endif -%}
{%- endmacro -%}

{%- macro call(function) -%}
  {{- '<tool_call>' ~ function.name -}}
  {%- for key, value in function.arguments.items() -%}
    {{- '<arg_key>' ~ key ~ '</arg_key><arg_value>' -}}
    {{- value if value is string else value | tojson(ensure_ascii=False) -}}
    {{- '</arg_value>' -}}
  {%- endfor -%}
  {{- '</tool_call>' -}}
{%- endmacro -%}

{%- macro assistant(message, show_reasoning) -%}
  {%- set answer = text(message.content) -%}
  {%- set reasoning = '' -%}
  {%- if message.reasoning_content is string -%}
    {%- set reasoning = message.reasoning_content -%}
  {%- elif '</think>' in answer -%}
    {%- set reasoning = answer.split('</think>')[0].split('<think>')[-1] -%}
    {%- set answer = answer.split('</think>')[-1] -%}
  {%- endif -%}
  {{- '<|assistant|>' -}}
  {%- if reasoning and show_reasoning -%}
    {{- '<think>' ~ reasoning.strip() -}}
  {%- endif -%}
  {{- '</think>' ~ answer.strip() -}}
  {%- for item in message.tool_calls or [] -%}
    {{- call(item.function or item) -}}
  {%- endfor -%}
{%- endmacro -%}

{{- '[gMASK]<sop>' -}}
{%- if tools -%}
  {{- '<|system|>\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' -}}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>\\n' -}}
  {%- for tool in tools -%}
    {{- tool | tojson(ensure_ascii=False) ~ '\\n' -}}
  {%- endfor -%}
  {{- '</tools>\\n\\nFor each function call, output the function name and arguments ' -}}
  {{- 'within the following XML format:\\n' -}}
  {{- '<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>' -}}
  {{- '<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>' -}}
{%- endif -%}

{%- set keep = clear_thinking is defined and not clear_thinking -%}
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}
    {{- '<|system|>' ~ text(message.content) -}}
  {%- elif message.role == 'user' -%}
    {{- '<|user|>' ~ text(message.content) -}}
  {%- elif message.role == 'assistant' -%}
    {{- assistant(message, keep or loop.index0 > last.user) -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|observation|>' if loop.first or loop.previtem.role != 'tool' -}}
    {{- '<tool_response>' ~ text(message.content) ~ '</tool_response>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' ~ ('</think>' if enable_thinking is defined and not enable_thinking else '<think>') -}}
{%- endif -%}
"""
