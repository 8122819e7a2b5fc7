#!/usr/bin/env python3
"""Uploading a snapshot over S3: `modelstore seed --to` against boto3's own parallel upload of the same files.

    python scripts/bench_s3.py [--size 1GB] [--runs 5]

Both send the same parts with as many threads to a moto server on this machine, in turn. Expected: within 10 %, the
rest being the MD5 of each part, which boto3 does not send.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from boto3.s3.transfer import TransferConfig

from modelstore import s3
from modelstore.bench import environment, make_checkpoint
from modelstore.settings import parse_size
from modelstore.store import ModelStore
from tests.s3_server import BUCKET, running_s3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="1GB")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    with tempfile.TemporaryDirectory() as folder, running_s3() as server:
        make_checkpoint(Path(folder, "model"), parse_size("--size", options.size), "float16")
        snapshot = ModelStore(Path(folder, "store")).ensure(f"file://{folder}/model")
        url = f"http://127.0.0.1:{server.backend}"
        volume = s3.Volume(s3.parse_target(f"s3://{BUCKET}@EU-RO-1"), endpoint=url)
        client = volume._client
        plain = TransferConfig(s3.PART_BYTES, 8, s3.PART_BYTES)

        def ours() -> None:
            volume.upload(snapshot)

        def boto3s() -> None:
            for file in snapshot.manifest.files:
                client.upload_file(str(snapshot.path / file.path), BUCKET, f"plain/{file.path}", Config=plain)

        took: dict[str, list[float]] = {"boto3": [], "ours": []}
        for _run in range(options.runs):
            for name, upload in (("boto3", boto3s), ("ours", ours)):
                for key in server.listing():
                    client.delete_object(Bucket=BUCKET, Key=key)
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
