"""The hub's cache on disk: blobs by their content's hash, snapshots by commit, branches as files."""

import hashlib


def commit(root, name, folder):
    """Put a model's folder into a cache as the newest commit of its main branch; the snapshot's folder."""
    home = root / f"models--{name.replace('/', '--')}"
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    number = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
    snapshot = home / "snapshots" / number
    for part in (home / "blobs", home / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        blob = home / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / file).unlink(missing_ok=True)
        (snapshot / file).symlink_to(blob)
    (home / "refs" / "main").write_text(number)
    return snapshot
