"""Worker: lm-eval on one model, offline, in one call for all tasks. Run as `python -m tasks.evaluation DIR [DIR ...]`.

    __main__.py   one directory after the other; the imports (7 s of 2 cores) are paid once
    run.py        one evaluation from its order to its counts
    environment.py  offline, unless a task of lm-eval itself is asked for
    suite.py      names of tasks -> lm-eval's task objects; every mistake in a task file becomes a `UserError`
    model.py      lm-eval's Hugging Face model, with progress and batches that fit
    results.py    lm-eval's answer -> results.json and samples/<task>.jsonl
    heartbeat.py  a sign of life while nothing can be counted

Statistics over the logged samples (paired bootstrap) read `samples/`; their order is the order of the task's documents.
"""
