#!/usr/bin/env python3
"""Uploading a snapshot over S3: `modelstore seed --to` against boto3's own parallel upload of the same files.

    python scripts/bench/s3.py [--size 1GB] [--runs 5]

Both send the same parts with as many threads to a moto server on this machine, in turn; over TLS, as RunPod's endpoints
are reached. There boto3 signs the SHA-256 of each part and ours sends its MD5 instead; without TLS, ours would pay for
both. Expected: within 10 %.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from boto3.s3.transfer import TransferConfig
from werkzeug.serving import make_ssl_devcert

from modelstore.bench.checkpoints import make_checkpoint
from modelstore.bench.race import environment
from modelstore.fill.bucket import parse_target
from modelstore.fill.upload import PART_BYTES, RemoteVolume
from modelstore.settings import parse_size
from modelstore.store import ModelStore
from tests.support.s3_server import BUCKET, create_volume, moto


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="1GB")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        certificate, key = make_ssl_devcert(f"{folder}/tls", host="localhost")
        os.environ["AWS_CA_BUNDLE"] = certificate
        port = stack.enter_context(moto("-c", certificate, "-k", key))
        make_checkpoint(Path(folder, "model"), parse_size("--size", options.size), "float16")
        snapshot = ModelStore(Path(folder, "store")).ensure(f"file://{folder}/model")
        volume = RemoteVolume(parse_target(f"s3://{BUCKET}@EU-RO-1"), endpoint=f"https://localhost:{port}")
        client = volume.bucket.client
        create_volume(client)
        plain = TransferConfig(PART_BYTES, 8, PART_BYTES)

        def ours() -> None:
            volume.upload(snapshot)

        def boto3s() -> None:
            for file in snapshot.manifest.files:
                client.upload_file(str(snapshot.path / file.path), BUCKET, f"plain/{file.path}", Config=plain)

        took: dict[str, list[float]] = {"boto3": [], "ours": []}
        for _run in range(options.runs):
            for name, upload in (("boto3", boto3s), ("ours", ours)):
                for there in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
                    client.delete_object(Bucket=BUCKET, Key=there["Key"])
                began = time.perf_counter()
                upload()
                took[name].append(time.perf_counter() - began)
        print(environment(Path(folder)))
        print(f"{snapshot.size_bytes / 1e9:.2f} GB, {options.runs} runs in turn, median (least to most)")
        for name, seconds in took.items():
            print(f"{name:6} {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
        ratios = [ours_s / boto_s for ours_s, boto_s in zip(took["ours"], took["boto3"], strict=True)]
        print(f"ours / boto3, pair by pair: {statistics.median(ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
