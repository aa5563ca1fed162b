"""Files at addresses such as s3://bucket/corpus, of any file system that fsspec knows.

A key whose value is a path also accepts an address. It then stands for a path in a local copy, which the component that
reads it fetches first, so that everything else reads local files.

address.py          addresses and the paths of their local copies; lists, reads, writes and removes files at an address
local_copy.py       `fetch`: brings the local copy of a file, directory or pattern up to date; `fetch_file` for one file

Checkpoints are written to local disks and uploaded: components/checkpoint/remote.py and uploader.py.
"""
