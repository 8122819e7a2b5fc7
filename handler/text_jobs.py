"""A text job for an engine that has no routes of its own: its request, and the form of its answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

from handler import openai_routes
from handler.answers import Answer, TextAnswer, TextDelta, whole
from handler.jobs import JobContext, TextRequest, parse_text

Generate = Callable[[TextRequest], AsyncIterator[TextDelta]]


def text_answer(generate: Generate, data: Mapping[str, Any], job: JobContext) -> Answer:
    """The answer to a job, whose pieces `generate` makes. Raises JobError."""
    if not openai_routes.is_request(data):
        request = parse_text(data, job.limits)
        return generate(replace(request, model=job.model_of(data))), TextAnswer(request)
    requested, content = openai_routes.route_and_body(data)
    route = openai_routes.parse_route(requested, openai_routes.TEXT_ROUTES)
    if route == "models":
        openai_routes.check_no_body(content)
        return whole(openai_routes.models(job.models, created=job.created))
    body = openai_routes.checked_body(content)
    request = openai_routes.parse_body(route, body, job.limits)
    answer = openai_routes.OpenAIAnswer(route, request, body, job_id=job.id, created=job.created)
    return generate(replace(request, model=job.model_of(body))), answer
