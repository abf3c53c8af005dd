"""Chat templates that call tools, shortened from the models' own where that changes nothing about calls."""

QWEN = """{%- if tools %}{{- "<|im_start|>system\\nFor each call, return a json object within <tool_call></tool_call> tags:\\n" }}
{%- for tool in tools %}{{- tool | tojson ~ "\\n" }}{%- endfor %}{{- "<|im_end|>\\n" }}{%- endif %}
{%- for message in messages %}
{{- "<|im_start|>" ~ ("user" if message.role == "tool" else message.role) ~ "\\n" ~ message.content }}
{%- for tool_call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' ~ tool_call.function.name ~ '", "arguments": ' }}
{{- (tool_call.function.arguments | tojson) ~ '}\\n</tool_call>' }}
{%- endfor %}{{- "<|im_end|>\\n" }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}"""

QWEN_CODER = """{%- if tools %}{{- "<|im_start|>system\\n<tools>" }}
{%- for tool in tools %}{{- "\\n<function>\\n<name>" ~ tool.function.name ~ "</name>\\n</function>" }}{%- endfor %}
{{- "\\n</tools>\\nReply ONLY as <tool_call>\\n<function=example>\\n<parameter=first>\\nvalue\\n</parameter>\\n" }}
{{- "</function>\\n</tool_call><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
{{- "<|im_start|>" ~ message.role ~ "\\n" ~ message.content }}
{%- for tool_call in message.tool_calls or [] %}{{- "\\n<tool_call>\\n<function=" ~ tool_call.function.name ~ ">\\n" }}
{%- for name, value in tool_call.function.arguments | items %}
{{- "<parameter=" ~ name ~ ">\\n" ~ (value if value is string else value | tojson) ~ "\\n</parameter>\\n" }}
{%- endfor %}{{- "</function>\\n</tool_call>" }}{%- endfor %}{{- "<|im_end|>\\n" }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}"""

MIXTRAL = """{%- for message in messages %}
{%- if message.role == "user" %}
{%- if tools and loop.last %}{{- "[AVAILABLE_TOOLS] " ~ tools | tojson ~ "[/AVAILABLE_TOOLS]" }}{%- endif %}
{{- "[INST] " ~ message.content ~ "[/INST]" }}
{%- elif message.tool_calls %}{{- "[TOOL_CALLS] [" }}
{%- for tool_call in message.tool_calls %}{{- (tool_call.function | tojson)[:-1] }}
{%- if tool_call.id | length != 9 %}{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}
{{- ', "id": "' ~ tool_call.id ~ '"}' ~ (", " if not loop.last else "]</s>") }}
{%- endfor %}
{%- elif message.role == "tool" %}{{- '[TOOL_RESULTS] {"content": ' ~ message.content ~ ', "call_id": "' ~ message.tool_call_id }}
{{- '"}[/TOOL_RESULTS]' }}
{%- else %}{{- " " ~ message.content ~ "</s>" }}{%- endif %}{%- endfor %}"""

LLAMA = """{%- if tools %}{{- "Given the following functions, please respond with a JSON for a function call.\\n\\n" }}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. Do not use variables.\\n\\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) ~ "\\n\\n" }}{%- endfor %}{%- endif %}
{%- for message in messages %}
{{- "<|start_header_id|>" ~ ("ipython" if message.role == "tool" else message.role) ~ "<|end_header_id|>\\n\\n" }}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception("This model only supports single tool-calls at once!") }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ "}" }}
{%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}"""

OLMOE = """{%- for message in messages %}{{- "<|" ~ message.role ~ "|>\\n" ~ message.content ~ "\\n" }}{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>\\n" }}{%- endif %}"""

FORMS = {"qwen": QWEN, "qwen-coder": QWEN_CODER, "mixtral": MIXTRAL, "llama": LLAMA}
