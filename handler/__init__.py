"""The RunPod worker: `python -m handler`.

    __main__          the start: the read, the imports, the model, then jobs
    worker            one job in, one answer out; the SDK's loop
    delivery          chunks and progress on their way to RunPod
    jobs, images, openai_routes    the requests: text, pictures, OpenAI's routes
    answers           the answers, made piece by piece
    errors            why a job fails
    alias_follower    swaps the model when the worker's alias is repointed
    termination       ends a worker whose engine hangs
    first_answer      adds the first answer to the record of the start
    health            the check of a container that runs by itself
    privileges        gives up root and the token
    engines/          the engines: transformers, diffusers, vLLM; `ENGINES` is the table

The worker imports `modelstore`; nothing there imports the worker.
"""
