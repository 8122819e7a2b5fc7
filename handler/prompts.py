"""What a text request asks to continue: a text, tokens, or a conversation as OpenAI takes it. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from handler.errors import invalid, shown
from handler.fields import TEMPLATE_FIELDS
from handler.values import flag, objects, token_ids

MAX_MESSAGES = 4096
MAX_TOOLS = 256
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = ("url", "image_url", "audio_url", "video_url", "data", "file_data")  # of other parts: their contents
# Variables of a template that have fields of their own, or are not a job's to set.
_NOT_VARIABLES = frozenset(
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversations", "documents"),
        *("messages", "return_assistant_tokens_mask", "tools", "tokenize"),
    )
)


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """How a conversation becomes a text: see transformers' `apply_chat_template`."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()
    documents: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The text or the tokens to continue, or a conversation for the chat template."""

    text: str | None = None
    tokens: tuple[int, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    template: TemplateOptions = TemplateOptions()

    @property
    def begins_message(self) -> bool:
        """Whether the answer is a message of its own."""
        return bool(self.messages) and not self.template.continue_final_message

    @property
    def beginning(self) -> str:
        """The text that an answer with `echo` begins with; empty if the tokens say it. In a conversation it is the
        message that is continued."""
        if self.text is not None:
            return self.text
        is_continued = self.template.continue_final_message and self.messages
        return text_of_content(self.messages[-1]["content"]) if is_continued else ""


def parse_prompts(value: object, name: str, *, characters: int, at_most: int) -> tuple[tuple[Prompt, ...], bool]:
    """The prompts of a field, and whether they came as a list: a text, token ids, or a list of either. `characters`:
    the longest. Raises JobError."""
    if isinstance(value, list) and not (name == "prompt" and value and type(value[0]) is int):
        if not 1 <= len(value) <= at_most:
            raise invalid(f"{name} must be a list of 1 to {at_most} strings, not {len(value)}")
        return tuple(_prompt(each, f"{name}[{index}]", characters) for index, each in enumerate(value)), True
    if name == "prompts":
        raise invalid(f"{name} must be a list of 1 to {at_most} strings, not {shown(value)}")
    return (_prompt(value, name, characters),), False


def _prompt(value: object, name: str, characters: int) -> Prompt:
    if isinstance(value, list):
        if not value:
            raise invalid(f"{name} must not be empty")
        return Prompt(tokens=token_ids(value, name, at_most=characters))
    if not isinstance(value, str):
        raise invalid(f"{name} must be a string, not {shown(value)}")
    if not value:
        raise invalid(f"{name} must not be empty")
    if len(value) > characters:
        raise invalid(f"{name} must have at most {characters} characters, not {len(value)}")
    return Prompt(value)


def parse_messages(value: object, characters: int) -> tuple[Mapping[str, Any], ...]:
    """A conversation. `characters`: the most, together. Raises JobError.

    A content may be empty, null beside a call of a tool, or a list of text parts. It is a string or a list of parts in
    the messages that are returned, too: the template says which of them it gets. A message's other fields, such as
    `name` or `tool_call_id`, are the template's.
    """
    messages = _checked_messages(value)
    _check_characters(messages, characters)
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def text_of_content(content: str | Sequence[Mapping[str, str]]) -> str:
    """The content of a message as a text: parts are joined by line breaks."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def parts_of_content(content: str | Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    """The content of a message as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def unparsed_messages(value: object, characters: int) -> tuple[Mapping[str, Any], ...]:
    """A conversation as it came, for a server that reads it; checked for the size of its texts alone: pictures and
    sounds in it are not counted. Raises JobError."""
    messages = _checked_messages(value)
    _check_characters(messages, characters + media_characters(list(messages)))
    return messages


def media_characters(value: Any) -> int:
    """The characters of the pictures and sounds in a conversation: `data:` addresses or base64, in their own parts."""
    total, pending = 0, [(value, False)]
    while pending:
        item, in_media = pending.pop()
        if isinstance(item, list):
            pending += ((each, in_media) for each in item)
        elif isinstance(item, dict):
            kind = item.get("type")
            in_media = in_media or (isinstance(kind, str) and kind not in _TEXT_PARTS)
            for name, each in item.items():
                if in_media and name in _MEDIA and isinstance(each, str):
                    total += len(each)
                else:
                    pending.append((each, in_media))
    return total


def _checked_messages(value: object) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise invalid(f"messages must be a list with at least one message, not {shown(value)}")
    check_message_count(value)
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise invalid(f"messages[{index}] must be an object, not {shown(message)}")
    return tuple(value)


def _check_characters(messages: Sequence[Mapping[str, Any]], characters: int) -> None:
    if (size := _characters(list(messages))) > characters:
        raise invalid(f"messages must have at most {characters} characters together, not {size}")


def check_message_count(messages: list[Any]) -> None:
    """Raise JobError if a conversation has more messages than a template is given."""
    if len(messages) > MAX_MESSAGES:
        raise invalid(f"messages must be at most {MAX_MESSAGES} messages, not {len(messages)}")


def parse_template_options(data: Mapping[str, Any]) -> TemplateOptions:
    """The fields that say how a conversation becomes a text. Raises JobError."""
    is_continued = flag(data, "continue_final_message")
    opens = flag(data, "add_generation_prompt", default=not is_continued)
    if is_continued and opens:
        raise invalid("continue_final_message goes on with the last message: leave add_generation_prompt out")
    variables = {} if data.get("chat_template_kwargs") is None else data["chat_template_kwargs"]
    if not isinstance(variables, dict):
        raise invalid(f"chat_template_kwargs must be an object, not {shown(variables)}")
    for name in variables:
        if name in _NOT_VARIABLES or not name.isidentifier():
            raise invalid(f"chat_template_kwargs must name variables of a template, and {shown(name)} is none")
    if (effort := data.get("reasoning_effort")) is not None:
        if not isinstance(effort, str):
            raise invalid(f"reasoning_effort must be a string, not {shown(effort)}")
        variables = {"reasoning_effort": effort} | variables
    tools = objects(data, "tools", at_most=MAX_TOOLS)
    return TemplateOptions(
        add_generation_prompt=opens,
        continue_final_message=is_continued,
        tools=tools if _may_call(data.get("tool_choice"), tools) else (),
        documents=objects(data, "documents", at_most=MAX_TOOLS),
        variables=variables,
    )


def check_no_template_options(data: Mapping[str, Any]) -> None:
    """Raise JobError if a request without a conversation says something of one."""
    for name in TEMPLATE_FIELDS:
        value = data.get(name)
        if value is not None and not any(value == plain and type(value) is type(plain) for plain in _PLAIN[name]):
            raise invalid(f"{name} says something of a conversation: send messages instead of a prompt")


# The values that say nothing
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "reasoning_effort": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "documents": ([],),
}


def _may_call(choice: object, tools: tuple[Mapping[str, Any], ...]) -> bool:
    """Whether the model shall know of the tools."""
    if choice in ("none", None):
        return choice is None
    if not tools:
        raise invalid("tool_choice needs tools beside it")
    if choice != "auto":
        raise invalid(
            f"tool_choice={shown(choice)} is not served by the text engine; ENGINE=vllm serves it: send auto or none"
        )
    return True


def _message(message: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise invalid(f"{place}.role must be a string that is not empty, not {shown(role)}")
    if content is None and (role == "assistant" or message.get("tool_calls")):
        content = ""  # a call of a tool, or an answer without a text
    if isinstance(content, list):
        texts = [_part(part, f"{place}.content[{number}]") for number, part in enumerate(content)]
        content = [{"type": "text", "text": text} for text in texts]
    elif not isinstance(content, str):
        raise invalid(f"{place}.content must be a string or a list of text parts, not {shown(content)}")
    others = {name: value for name, value in message.items() if value is not None}
    if "tool_calls" in others:
        calls = objects(others, "tool_calls", at_most=MAX_TOOLS)
        others["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return others | {"role": role, "content": content}


def _part(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, dict) else part
    raise invalid(f"{place} is {shown(kind)}: the text engine serves parts of type text; ENGINE=vllm serves others")


def _with_parsed_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call whose arguments are an object, as templates take them, and not OpenAI's text of one."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _characters(value: object) -> int:
    """The characters of all texts in a message."""
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 0
