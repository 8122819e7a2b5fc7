"""Pictures in an S3 bucket instead of in the answer, by the SDK's own upload.

Its variables are RunPod's: BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY.
"""

from __future__ import annotations

import asyncio
import base64
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from handler.errors import Code, JobError
from handler.images import Images, Step


async def with_addresses(pieces: AsyncIterator[Step | Images], job_id: str) -> AsyncIterator[Step | Images]:
    """The pieces of an answer, the pictures uploaded and with their addresses. Raises JobError if that fails."""
    async with aclosing(pieces) as source:  # type: ignore[type-var]
        async for piece in source:
            if isinstance(piece, Images):
                piece = await asyncio.to_thread(_uploaded, piece, job_id)
            yield piece


def _uploaded(images: Images, job_id: str) -> Images:
    from runpod.serverless.utils.rp_upload import get_boto_client, upload_image

    try:
        client, _config = get_boto_client()
        if client is None:  # else the SDK writes into a folder of the container, and answers with its name
            raise ValueError("BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY are not both set")
        with tempfile.TemporaryDirectory(prefix="modelstore-picture-") as folder:
            urls = []
            for number, picture in enumerate(images.images):
                path = Path(folder) / f"{number}.{images.image_format}"
                path.write_bytes(base64.b64decode(picture))
                urls.append(str(upload_image(job_id, str(path))))
    except Exception as error:  # botocore's and boto3's have no common class
        raise JobError(Code.INTERNAL_ERROR, f"the bucket took no picture: {type(error).__name__}: {error}") from error
    return replace(images, urls=tuple(urls))
