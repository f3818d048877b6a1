"""The `import_path` of serve configurations that were deployed before 0.2: use `catid2_ray.on_ray.serve.app:build`."""

from catid2_ray.on_ray.serve.app import AppSettings, RetrieverReplica, build

__all__ = ["AppSettings", "RetrieverReplica", "build"]
