"""python launch.py WEIGHTS DATA OUT SECONDS CONFIGS.py WORKERS: workers side by side, then one line a run."""

import glob
import json
import os
import subprocess
import sys
import time
from pathlib import Path


weights, data, out, seconds, configs, workers = sys.argv[1:7]
here, deadline = os.path.dirname(os.path.abspath(__file__)), time.time() + float(seconds)
env = dict(os.environ, OMP_NUM_THREADS="2", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True", PYTHONUNBUFFERED="1")
command = [sys.executable, "-W", "ignore", f"{here}/search.py", weights, data, out, str(deadline), configs]
processes = [subprocess.Popen(command, env=env) for _ in range(int(workers))]
for p in processes:
    try:
        p.wait(max(1, deadline + 25 - time.time()))
    except subprocess.TimeoutExpired:
        p.kill()
for path in sorted(glob.glob(out + "/*.jsonl")):
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    scores = [f"{r['samples'] // 1000}k:{r['score']}" for r in records if "score" in r]
    ups = [(r["up"], r["samples"], r["s"]) for r in records if "up" in r]
    last = records[-1] if records else {}
    print(os.path.basename(path), " ".join(scores[::2][-10:]), ups, {k: v for k, v in last.items() if k != "probe"})
