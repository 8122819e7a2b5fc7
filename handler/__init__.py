"""The RunPod worker: `python -m handler`.

    __main__          the start: the read, the imports, the model, then jobs
    engine_start      which engine it is, its imports beside the read, and its model
    worker            one job in, one answer out; the SDK's loop
    delivery          chunks and progress on their way to RunPod
    sdk               the SDK's import without its pause
    http_server, http_requests, http_protocol, listening    the same worker over HTTP, its requests, limits and ports
    fields            every field of a request, and what becomes of it
    jobs, prompts, sampling, values                         a text request and its parts
    images, embeddings, openai_routes, openai_images        other requests, and their answers
    text_jobs         a text job for an engine without routes of its own
    answers           the answers, made piece by piece
    bucket            pictures uploaded instead of sent
    redaction         texts without paths of the volume
    errors            why a job fails
    alias_follower    swaps the model when the worker's alias is repointed
    warm_up, compilation    a small job, and torch.compile, before the first one
    readahead         the files of a start, asked for ahead of the imports
    termination, start_failure    the end of a worker whose engine hangs, or whose start fails
    worker_metrics    its counts, for Prometheus
    first_answer      adds the first answer to the record of the start
    health            the check of a container that runs by itself
    privileges        gives up root and the token
    engines/          the engines: transformers, diffusers, vLLM; `ENGINES` is the table

The worker imports `modelstore`; nothing there imports the worker.
"""
