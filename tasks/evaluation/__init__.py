"""Worker: lm-eval on one model, offline, in one call for all tasks. Run as `python -m tasks.evaluation DIR [DIR ...]`.

    suite.py      names of tasks -> lm-eval's task objects; every mistake in a task file becomes a `UserError`
    model.py      lm-eval's Hugging Face model, with progress and batches that fit
    results.py    lm-eval's answer -> results.json and samples/<task>.jsonl
    heartbeat.py  a sign of life while nothing can be counted
    __main__.py   one directory after the other; the imports (7 s of 2 cores) are paid once

Statistics over the logged samples (paired bootstrap) read `samples/`; their order is the order of the task's documents.
"""
